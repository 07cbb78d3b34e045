//! From files to steps: caching, counts, order, ranks, the exact cursor, and what a micro-batch holds.

use std::path::PathBuf;
use std::sync::Arc;

use ringtune::batch::MicroBatch;
use ringtune::data::encode::Overflow;
use ringtune::data::jsonl::{BadRows, RowOptions};
use ringtune::data::loader::{EvalPlan, Loader, StepShape, steps_until};
use ringtune::data::mix::WeightUnit;
use ringtune::data::progress::Progress;
use ringtune::data::rows;
use ringtune::data::sft::{self, RowSpec, SftData, SftDataSpec};
use ringtune::data::template::{Template, TemplateOptions};
use ringtune::data::tokenizer::{SpecialIds, Tokenizer};
use ringtune::data::train_set::{Cursor, TrainSet};

pub struct Setup {
    pub dir: tempfile::TempDir,
    pub tokenizer: Tokenizer,
    template: Template,
}

pub fn setup() -> Setup {
    let mut tokenizer = Tokenizer::open("tests/data/tokenizer/spm4k.model".as_ref(), SpecialIds::default()).unwrap();
    tokenizer.add_chatml();
    let template = Template::load("chatml", TemplateOptions::default()).unwrap();
    Setup { dir: tempfile::tempdir().unwrap(), tokenizer, template }
}

impl Setup {
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    /// `n` rows of different lengths.
    fn rows(&self, name: &str, n: usize) -> PathBuf {
        let rows = (0..n).map(|i| {
            format!("{{\"prompt\": \"{name} question {i}\", \"response\": \"{}\"}}\n", "word ".repeat(1 + i * 7 % 13))
        });
        self.write(name, &rows.collect::<String>())
    }

    fn spec(&self, paths: &[PathBuf]) -> SftDataSpec {
        SftDataSpec {
            paths: paths.to_vec(),
            val_paths: Vec::new(),
            weights: None,
            weight_unit: WeightUnit::Samples,
            epoch_samples: None,
            val_fraction: 0.1,
            packing: true,
            seed: 5,
            row: RowSpec {
                max_seq_len: 64,
                overflow: Overflow::Truncate,
                rows: RowOptions::default(),
                skip_log: Some(self.dir.path().join("skipped.log")),
                cache_dir: self.dir.path().join("cache"),
            },
        }
    }

    fn prepare(&self, spec: &SftDataSpec) -> (ringtune::error::Result<SftData>, Vec<String>) {
        let mut log = Vec::new();
        let data = sft::tokenise(spec, &self.tokenizer, &self.template, Progress::Hide, &mut |m| log.push(m));
        (data, log)
    }

    fn data(&self, spec: &SftDataSpec) -> SftData {
        self.prepare(spec).0.unwrap()
    }
}

fn steps(
    train: &Arc<TrainSet>,
    cursor: Cursor,
    shape: StepShape,
    rank: usize,
    n: usize,
) -> Vec<ringtune::data::loader::Step> {
    let mut loader = Loader::start(train.clone(), cursor, shape, rank).unwrap();
    (0..n).map(|_| loader.next_step().unwrap()).collect()
}

#[test]
fn token_files_are_reused_and_rebuilt_when_damaged() {
    let s = setup();
    let spec = s.spec(&[s.rows("a.jsonl", 40)]);
    let (first, log) = s.prepare(&spec);
    assert!(log.iter().any(|l| l.starts_with("wrote ")), "{log:?}");
    let (second, log) = s.prepare(&spec);
    assert!(log.iter().any(|l| l.starts_with("reusing ")), "{log:?}");
    assert_eq!(first.unwrap().train.fingerprint(), second.unwrap().train.fingerprint());
    let file = std::fs::read_dir(s.dir.path().join("cache")).unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let (third, log) = s.prepare(&spec);
    assert!(third.is_ok() && log.iter().any(|l| l.contains("truncated") && l.contains("making it again")), "{log:?}");
    assert_eq!(std::fs::read(&file).unwrap(), bytes);
    // Other data, other settings or another template are other files.
    s.rows("a.jsonl", 41);
    s.data(&spec);
    s.data(&SftDataSpec { row: RowSpec { max_seq_len: 32, ..spec.row.clone() }, ..spec.clone() });
    assert_eq!(std::fs::read_dir(s.dir.path().join("cache")).unwrap().count(), 3);
}

#[test]
fn a_token_file_is_a_data_set_for_the_same_tokenizer_template_and_length() {
    let s = setup();
    let spec = s.spec(&[s.rows("a.jsonl", 40)]);
    let from_rows = s.data(&spec);
    let file = std::fs::read_dir(s.dir.path().join("cache")).unwrap().next().unwrap().unwrap().path();
    let packed = SftDataSpec { paths: vec![file], ..spec };
    assert_eq!(s.data(&packed).train.fingerprint(), from_rows.train.fingerprint());
    let e = s
        .prepare(&SftDataSpec { row: RowSpec { max_seq_len: 8, ..packed.row.clone() }, ..packed.clone() })
        .0
        .unwrap_err();
    assert!(e.to_string().contains("expected at most 8"), "{e}");
    let other = Template::load("plain", TemplateOptions::default()).unwrap();
    let e = sft::tokenise(&packed, &s.tokenizer, &other, Progress::Hide, &mut |_| ()).unwrap_err().to_string();
    assert!(e.contains("another template") && e.contains("plain") && e.contains("chatml"), "{e}");
    let t = Tokenizer::open("tests/data/tokenizer/spm4k_chatml.model".as_ref(), SpecialIds::default()).unwrap();
    let e = sft::tokenise(&packed, &t, &s.template, Progress::Hide, &mut |_| ()).unwrap_err().to_string();
    assert!(e.contains("another tokenizer"), "{e}");
}

#[test]
fn rows_are_dropped_and_cut_by_reason_and_counted() {
    let s = setup();
    let long = "many words here ".repeat(40);
    let text = format!(
        "{{\"prompt\": \"a\", \"response\": \"b\"}}\n{{\"prompt\": \"{long}\", \"response\": \"b\"}}\n{{\"prompt\": \"c\", \"response\": \"{long}\"}}\n\
         {{\"messages\": [{{\"role\": \"user\", \"content\": \"d\"}}]}}\nbroken\n\
         {{\"messages\": [{{\"role\": \"user\", \"content\": \"d\"}}, {{\"role\": \"assistant\", \"content\": \"e\", \"train\": false}}]}}\n"
    );
    let path = s.write("a.jsonl", &text);
    let mut spec = s.spec(&[path]);
    spec.val_fraction = 0.0;
    let e = s.prepare(&spec).0.unwrap_err().to_string();
    assert!(e.contains("a.jsonl:5: invalid JSON"), "{e}");
    spec.row.rows.bad_rows = BadRows::Skip;
    // The second time the counts come from the cached file.
    for _ in 0..2 {
        let (data, log) = s.prepare(&spec);
        let c = data.unwrap().sets[0].counts.clone();
        assert_eq!(
            (c.rows, c.kept, c.truncated, c.response_cut, c.unsupervised, c.bad, c.too_long),
            (5, 2, 1, 1, 2, 1, 0)
        );
        assert!(
            log.iter()
                .any(|l| l.contains("1 dropped: the response would be cut away") && l.contains("1 bad and skipped")),
            "{log:?}"
        );
        let skipped = std::fs::read_to_string(s.dir.path().join("skipped.log")).unwrap();
        assert!(skipped.contains("a.jsonl:5: invalid JSON") && skipped.lines().count() == 1, "{skipped}");
        std::fs::remove_file(s.dir.path().join("skipped.log")).unwrap();
    }
    spec.row.overflow = Overflow::Drop;
    let c = s.data(&spec).sets[0].counts.clone();
    assert_eq!((c.kept, c.truncated, c.too_long), (1, 0, 2));
    // A conversation that the template refuses is a bad row.
    let odd = s.write(
        "odd.jsonl",
        "{\"prompt\": \"a\", \"response\": \"b\"}\n{\"messages\": [{\"role\": \"assistant\", \"content\": \"x\"}]}\n",
    );
    let llama2 = Template::load("llama2", TemplateOptions::default()).unwrap();
    let spec = s.spec(&[odd]);
    let e = sft::tokenise(&spec, &s.tokenizer, &llama2, Progress::Hide, &mut |_| ()).unwrap_err().to_string();
    assert!(e.contains("odd.jsonl:2: template llama2: ") && e.contains("found assistant"), "{e}");
}

#[test]
fn no_usable_row_is_an_error_that_says_why() {
    let s = setup();
    let path = s.write("a.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"d\"}]}\n");
    let e = s.prepare(&s.spec(&[path])).0.unwrap_err().to_string();
    assert!(e.contains("no usable training row") && e.contains("1 dropped: nothing supervised"), "{e}");
    let mut skip = s.spec(&[s.write("bad.jsonl", "{\"promt\": \"a\"}\n{}\n")]);
    skip.row.rows.bad_rows = BadRows::Skip;
    let e = s.prepare(&skip).0.unwrap_err().to_string();
    assert!(e.contains("2 bad and skipped; the first of them, line 1: field \"prompt\" is missing"), "{e}");
    assert_eq!(s.prepare(&s.spec(&[])).0.unwrap_err().exit_code(), 2);
    let nobyte = Tokenizer::open("tests/data/tokenizer/spm600_nobyte.model".as_ref(), SpecialIds::default()).unwrap();
    let spec = s.spec(&[s.rows("b.jsonl", 5)]);
    let e = sft::tokenise(&spec, &nobyte, &s.template, Progress::Hide, &mut |_| ()).unwrap_err().to_string();
    assert!(e.contains("newlines cannot be encoded"), "{e}");
}

/// The same bytes are the same data, whatever their name, their folder and the cache; other tokens are not.
#[test]
fn the_fingerprint_is_of_the_tokens_not_of_paths() {
    let s = setup();
    let path = s.rows("a.jsonl", 30);
    let elsewhere = s.dir.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let copy = elsewhere.join("b.jsonl");
    std::fs::copy(&path, &copy).unwrap();
    let first = s.data(&s.spec(std::slice::from_ref(&path))).train.fingerprint();
    let mut other = s.spec(&[copy]);
    other.row.cache_dir = elsewhere.join("cache");
    assert_eq!(s.data(&other).train.fingerprint(), first);
    let dotted = s.dir.path().join("./a.jsonl");
    std::fs::remove_dir_all(s.dir.path().join("cache")).unwrap();
    assert_eq!(s.data(&s.spec(&[dotted])).train.fingerprint(), first);
    std::fs::write(&path, std::fs::read_to_string(&path).unwrap().replacen("question 7", "question 8", 1)).unwrap();
    assert_ne!(s.data(&s.spec(&[path])).train.fingerprint(), first);
}

#[test]
fn rows_are_held_out_by_everything_before_their_last_answer() {
    let s = setup();
    let conversations: String = (0..60)
        .map(|i| {
            format!(
                "{{\"messages\": [{{\"role\": \"user\", \"content\": \"Hi\"}}, {{\"role\": \"assistant\", \"content\": \"Hello\"}}, \
                 {{\"role\": \"user\", \"content\": \"q{}\"}}, {{\"role\": \"assistant\", \"content\": \"a{i}\"}}]}}\n",
                i / 2
            )
        })
        .collect();
    let documents: String = (0..60)
        .map(|i| format!("{{\"system\": \"d{i}\", \"prompt\": \"Sum up\", \"response\": \"s{i}\"}}\n"))
        .collect();
    let answers: String =
        (0..60).map(|i| format!("{{\"messages\": [{{\"role\": \"assistant\", \"content\": \"a{i}\"}}]}}\n")).collect();
    for (name, text) in [("chat.jsonl", conversations), ("docs.jsonl", documents), ("answers.jsonl", answers)] {
        let data = s.data(&s.spec(&[s.write(name, &text)]));
        assert_eq!((data.sets[0].n_val, data.sets[0].none_held_out.clone()), (6, None), "{name}");
        if name == "chat.jsonl" {
            // Two rows with one question stay together.
            let questions = |set: &ringtune::data::train_set::PieceSet| -> Vec<u32> {
                (0..set.pieces.len()).map(|p| (set.line(p) - 1) / 2).collect()
            };
            let (train, val) = (questions(&data.train.sets()[0]), questions(&data.val[0]));
            assert!(val.iter().all(|q| !train.contains(q)), "{val:?}");
        }
    }
    let same = "{\"prompt\": \"p\", \"response\": \"r\"}\n".repeat(20);
    let (data, log) = s.prepare(&s.spec(&[s.write("same.jsonl", &same)]));
    assert_eq!(data.unwrap().sets[0].n_val, 0);
    assert!(log.iter().any(|l| l.contains("no row is held out: all 20 rows have one context")), "{log:?}");
}

/// The documents of all ranks' micro-batches in the global order of a step's rows.
fn trained(all: &[Vec<ringtune::data::loader::Step>]) -> Vec<(Cursor, Vec<u32>)> {
    (0..all[0].len())
        .map(|i| {
            let mut samples: Vec<u32> =
                all.iter().flat_map(|s| s[i].micro_batches.iter().flat_map(|b| b.samples.clone())).collect();
            samples.sort_unstable();
            (all[0][i].cursor, samples)
        })
        .collect()
}

#[test]
fn the_same_rows_make_a_step_whatever_the_ranks_and_accumulation() {
    let s = setup();
    let data = s.data(&s.spec(&[s.rows("a.jsonl", 150), s.rows("b.jsonl", 60)]));
    let shapes = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)];
    let all: Vec<_> = shapes
        .iter()
        .map(|&(micro_batch, grad_accum, world_size)| {
            let shape = StepShape { micro_batch, grad_accum, world_size };
            let ranks: Vec<_> = (0..world_size).map(|r| steps(&data.train, Cursor::default(), shape, r, 12)).collect();
            assert!(ranks.iter().flatten().all(|s| s.micro_batches.len() == grad_accum));
            trained(&ranks)
        })
        .collect();
    assert!(all.iter().all(|t| *t == all[0]));
    // Micro-batch k of a step goes to rank k mod w.
    let plan = data.train.plan(0);
    let shape = StepShape { micro_batch: 1, grad_accum: 2, world_size: 3 };
    for rank in 0..3 {
        let step = &steps(&data.train, Cursor::default(), shape, rank, 2)[1];
        assert_eq!(step.micro_batches[0].samples, plan.row(6 + rank));
        assert_eq!(step.micro_batches[1].samples, plan.row(9 + rank));
    }
}

/// What a micro-batch holds, and so the dropout key that names it, does not depend on who trains it; nor where a run resumes.
#[test]
fn the_same_rows_make_a_micro_batch_whatever_the_ranks() {
    let s = setup();
    let data = s.data(&s.spec(&[s.rows("a.jsonl", 150)]));
    let through =
        steps(&data.train, Cursor::default(), StepShape { micro_batch: 2, grad_accum: 1, world_size: 1 }, 0, 3);
    for cursor in [Cursor::default(), through[2].cursor] {
        let numbered = |grad_accum, world_size| -> Vec<Vec<MicroBatch>> {
            let shape = StepShape { micro_batch: 2, grad_accum, world_size };
            let ranks: Vec<_> = (0..world_size).map(|r| steps(&data.train, cursor, shape, r, 40)).collect();
            assert!(ranks[0].iter().any(|s| s.epoch_end), "the test covers an epoch's tail");
            let of = |i: usize, k: usize| ranks[k % world_size][i].micro_batches[k / world_size].clone();
            (0..40).map(|i| (0..6).map(|k| of(i, k)).collect()).collect()
        };
        let one = numbered(6, 1);
        assert!(one.iter().flatten().any(|b| b.tokens.is_empty()), "some micro-batch is empty");
        assert!(numbered(3, 2) == one && numbered(2, 3) == one && numbered(1, 6) == one);
    }
}

#[test]
fn an_epoch_trains_each_row_once_and_its_tail_is_filled_with_nothing() {
    let s = setup();
    for packing in [true, false] {
        let data = s.data(&SftDataSpec { packing, ..s.spec(&[s.rows("a.jsonl", 101)]) });
        let n_rows = data.train.plan(0).n_rows() as u64;
        assert!(packing || n_rows == data.train.sets()[0].pieces.len() as u64);
        let shape = StepShape { micro_batch: 2, grad_accum: 3, world_size: 2 };
        let n = steps_until(&data.train, Cursor::default(), 1.0, shape);
        assert_eq!(n, n_rows.div_ceil(12));
        let ranks: Vec<_> = (0..2).map(|r| steps(&data.train, Cursor::default(), shape, r, n as usize)).collect();
        let mut samples: Vec<u32> =
            ranks.iter().flatten().flat_map(|s| s.micro_batches.iter().flat_map(|b| b.samples.clone())).collect();
        samples.sort_unstable();
        assert_eq!(samples, (0..data.train.sets()[0].pieces.len() as u32).collect::<Vec<_>>());
        for steps in &ranks {
            assert!(steps[..n as usize - 1].iter().all(|s| !s.epoch_end));
            let last = steps.last().unwrap();
            assert!(last.epoch_end && last.cursor == Cursor { epoch: 1, rows: 0 } && last.epoch_fraction == 1.0);
        }
        assert!(n_rows.is_multiple_of(12) || ranks[1].last().unwrap().micro_batches.last().unwrap().samples.len() < 2);
    }
}

#[test]
fn the_cursor_resumes_exactly_and_at_another_world_size() {
    let s = setup();
    let data = s.data(&s.spec(&[s.rows("a.jsonl", 75)]));
    let shape = StepShape { micro_batch: 2, grad_accum: 1, world_size: 1 };
    let through = steps(&data.train, Cursor::default(), shape, 0, 40);
    assert!(through.last().unwrap().cursor.epoch >= 2, "the test covers epoch borders");
    for at in [1, 7, 20, 33] {
        assert_eq!(steps(&data.train, through[at - 1].cursor, shape, 0, 40 - at), through[at..]);
    }
    let halves = StepShape { micro_batch: 1, grad_accum: 1, world_size: 2 };
    let ranks: Vec<_> = (0..2).map(|r| steps(&data.train, through[6].cursor, halves, r, 33)).collect();
    assert_eq!(trained(&ranks), trained(&[through[7..].to_vec()]));
    let e = Loader::start(data.train.clone(), Cursor { epoch: 0, rows: 10_000 }, shape, 0).unwrap_err().to_string();
    assert!(e.contains("cursor at row 10000 of epoch 0, expected one below"), "{e}");
}

pub fn check_batch(batch: &MicroBatch) {
    let n = batch.tokens.len();
    assert!(batch.targets.len() == n && batch.doc_start.len() == n);
    for t in 0..n {
        let start = batch.doc_start[t];
        assert!(start as usize <= t && (start as usize == t || batch.doc_start[t - 1] == start));
        if batch.targets[t] != -100 {
            assert!(batch.doc_start[t + 1] == start && batch.tokens[t + 1] == batch.targets[t]);
        }
    }
    assert_eq!(batch.targets.iter().filter(|&&t| t != -100).count(), batch.n_valid);
}

#[test]
fn micro_batches_agree_with_packed_rows() {
    let s = setup();
    let data = s.data(&s.spec(&[s.rows("a.jsonl", 80)]));
    let plan = data.train.plan(3);
    assert_ne!(plan, data.train.plan(2));
    assert_eq!(plan, data.train.plan(3));
    for row in 0..plan.n_rows() {
        let mut batch = MicroBatch::default();
        data.train.append_row(&plan, row, &mut batch);
        check_batch(&batch);
        let packed = data.train.packed_row(&plan, row, 0);
        assert_eq!(packed.input_ids.len(), 64);
        for (t, &token) in batch.tokens.iter().enumerate() {
            assert_eq!(token as u32, packed.input_ids[t]);
            assert_eq!(packed.position_ids[t], t as u32 - batch.doc_start[t] as u32);
            let label = packed.labels.get(t + 1).copied().unwrap_or(-100);
            assert_eq!(batch.targets[t], label, "the target of a place is the label of the next");
        }
        assert!(packed.labels[batch.tokens.len()..].iter().all(|&l| l == -100));
        assert_eq!(packed.cu_seqlens.len(), plan.row(row).len() + 1 + usize::from(batch.tokens.len() < 64));
    }
    let rows = rows::epoch_rows(&data.train, &plan, &RowOptions::default()).unwrap();
    assert_eq!(rows.len(), plan.samples().len());
    assert!(rows.iter().all(|r| r.text.as_ref().unwrap().prompt().starts_with("a.jsonl question") && r.source.ends_with("a.jsonl")));
    assert_eq!(data.train.sample_name(plan.samples()[0]), format!("{}:{}", rows[0].source, rows[0].line));
}

#[test]
fn evaluation_sees_every_held_out_row_once_on_any_number_of_ranks() {
    let s = setup();
    let data = s.data(&s.spec(&[s.rows("a.jsonl", 200)]));
    let set = &data.val[0];
    assert_eq!(set.pieces.len(), 20);
    for packing in [true, false] {
        let plan = EvalPlan::new(set, 64, packing, None, 1);
        for world_size in [1, 3] {
            let mut samples = Vec::new();
            for rank in 0..world_size {
                for (_, batch) in plan.micro_batches(set, 2, rank, world_size) {
                    check_batch(&batch);
                    assert!(batch.tokens.len() <= 128 && !batch.tokens.is_empty());
                    samples.extend(batch.samples);
                }
            }
            samples.sort_unstable();
            assert_eq!(samples, (0..20).collect::<Vec<_>>());
        }
    }
    let plan = EvalPlan::new(set, 64, false, Some(5), 1);
    assert_eq!(plan.n_rows(), 5);
    let rows = rows::piece_rows(set, &[0, 3], &RowOptions::default()).unwrap();
    assert!(rows.len() == 2 && rows[0].prompt().starts_with("a.jsonl question"));
    let whole = sft::load_sets(
        &[s.dir.path().join("a.jsonl")],
        &s.spec(&[]).row,
        &s.tokenizer,
        &s.template,
        Progress::Hide,
        &mut |_| (),
    )
    .unwrap();
    assert_eq!(whole[0].pieces.len(), 200);
}

/// Rows of about a hundred tokens, tokenised and packed at a rate that makes 50,000 a matter of seconds (3.6 s on 2 cores).
#[test]
fn thousands_of_rows_a_second_are_tokenised_and_packed() {
    let s = setup();
    let words = ["loss", "gradient", "a", "the", "token", "of", "learning", "is", "model", "step"];
    let rows = (0..10_000u64).map(|i| {
        let text: String =
            (0..70).map(|k| format!("{} ", words[(ringtune::rng::mix(&[i, k]) % 10) as usize])).collect();
        format!("{{\"prompt\": \"Question {i}?\", \"response\": \"{text}\"}}\n")
    });
    let mut spec = s.spec(&[s.write("big.jsonl", &rows.collect::<String>())]);
    spec.row.max_seq_len = 1024;
    let start = std::time::Instant::now();
    let data = s.data(&spec);
    let plan = data.train.plan(0);
    let seconds = start.elapsed().as_secs_f64();
    let tokens: u64 = data.train.sets()[0].size().tokens;
    assert!(tokens > 9000 * 90 && plan.n_rows() > 800);
    println!("10,000 rows, {tokens} training tokens: {seconds:.2} s");
    assert!(seconds < 40.0, "{seconds} s");
    let start = std::time::Instant::now();
    s.data(&spec);
    println!("reused: {:.2} s", start.elapsed().as_secs_f64());
}
