//! Texts of pretraining: forms, documents, validation, and what is refused.

use ringtune::batch::MicroBatch;
use ringtune::data::mix::WeightUnit;
use ringtune::data::pretrain::{self, PretrainDataSpec};
use ringtune::data::progress::Progress;

use crate::loader::{check_batch, setup};

#[test]
fn pretraining_predicts_every_token_once() {
    let s = setup();
    let text = (0..40)
        .map(|i| format!("Paragraph {i} of the text.\nIt has two lines.\n\n{}", if i % 10 == 9 { "\n\n" } else { "" }))
        .collect::<String>();
    let spec = PretrainDataSpec {
        paths: vec![
            s.write("a.txt", &text),
            s.write("b.jsonl", "{\"text\": \"One document.\"}\n\n{\"text\": \"Another.\", \"x\": 1}\n"),
        ],
        val_paths: Vec::new(),
        weights: None,
        weight_unit: WeightUnit::Samples,
        epoch_samples: None,
        val_fraction: 0.0,
        max_seq_len: 32,
        packing: true,
        seed: 1,
        columns: Default::default(),
        raw_width: None,
        cache_dir: s.dir.path().join("cache"),
    };
    let prepare = |spec: &PretrainDataSpec| {
        let mut log = Vec::new();
        pretrain::tokenise(spec, &s.tokenizer, Progress::Hide, &mut |m| log.push(m)).map(|d| (d, log))
    };
    let (data, _) = prepare(&spec).unwrap();
    assert_eq!(data.sets.iter().map(|s| s.counts.rows).collect::<Vec<_>>(), [4, 2]);
    let plan = data.train.plan(0);
    let mut batch = MicroBatch::default();
    (0..plan.n_rows()).for_each(|row| data.train.append_row(&plan, row, &mut batch));
    check_batch(&batch);
    let expected: usize =
        data.train.sets().iter().map(|s| (0..s.tokens.n_docs()).map(|d| s.tokens.doc_len(d) - 1).sum::<usize>()).sum();
    assert_eq!(batch.n_valid, expected);
    assert_eq!(batch.targets.iter().filter(|&&t| t == 3).count(), 6);
    let (_, log) = prepare(&spec).unwrap();
    assert_eq!(log.iter().filter(|l| l.starts_with("reusing ")).count(), 2);
    let (data, _) = prepare(&PretrainDataSpec { val_fraction: 0.2, ..spec.clone() }).unwrap();
    assert!(!data.val[0].pieces.is_empty());
    let with_val = PretrainDataSpec { val_paths: vec![s.write("v.txt", "held out text")], ..spec.clone() };
    assert_eq!(prepare(&with_val).unwrap().0.val.len(), 1);
    let check = |name: &str, bytes: &[u8], expected: &str| {
        let path = s.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let e = prepare(&PretrainDataSpec { paths: vec![path], ..spec.clone() }).unwrap_err().to_string();
        assert!(e.contains(name) && e.contains(expected), "{e}");
    };
    check("c.txt", b"", "empty");
    check("c.txt", b" \n\n", "white space");
    check("c.txt", b"a\n\xff", "c.txt:2: invalid UTF-8");
    check("c.jsonl", b"{\"text\": 1}", "c.jsonl:1: field \"text\" is not a string");
    check("c.jsonl", b"{\"text\": \"a\"}\n{\"content\": \"a\"}", "c.jsonl:2: field \"text\" is missing");
    check("c.jsonl", b"{\"text\": \"a\"}\n{", "c.jsonl:2: invalid JSON");
    check("c.bin", &[1, 2, 3], "whole number");
    let marked = s.write("marked.txt", "\u{feff}one\n\u{feff}two\n");
    let (data, _) = prepare(&PretrainDataSpec { paths: vec![marked], ..spec.clone() }).unwrap();
    let plain = s.write("plain.txt", "one\ntwo\n");
    let (same, _) = prepare(&PretrainDataSpec { paths: vec![plain], ..spec.clone() }).unwrap();
    assert_eq!(data.train.fingerprint(), same.train.fingerprint());
    check("c.txt", b"\xff\xfea\0", "UTF-16");
    let form = |name: &str, bytes: &[u8]| {
        let path = s.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let (data, _) = prepare(&PretrainDataSpec { paths: vec![path], ..spec.clone() }).unwrap();
        (data.sets[0].form.clone(), data.sets[0].counts.rows)
    };
    assert_eq!(form("d.json", b"[{\"text\": \"a\"},\n {\"text\": \"b\"}]"), ("rows of text".into(), 2));
    assert_eq!(form("d.jsonl", "{\"text\": \"a\"}\n\u{feff}{\"text\": \"b\"}".as_bytes()).1, 2);
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut gz, b"{\"text\": \"a\"}\n").unwrap();
    assert_eq!(form("d.jsonl.gz", &gz.finish().unwrap()), ("rows of text, gzip".into(), 1));
    check("c.tok", b"not tokens", "truncated");
}
