//! `ringtune generate`: recorded tokens, every way to give prompts, streaming, stops, conversations, and what sampling draws.

use std::fs;

use ringtune::generate::Sampling;
use serde_json::Value;

use crate::program::Workplace;
use crate::tuned::{fails, ok, tuned, untuned};

const BASE: &str = "ringtune generate --model-path base --tokenizer-path spm.model";

/// The objects that a command with `--json` prints.
fn objects(w: &Workplace, line: &str) -> Vec<Value> {
    let outcome = ok(w.shell(line));
    outcome.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn texts(objects: &[Value]) -> Vec<&str> {
    objects.iter().map(|o| o["text"].as_str().unwrap()).collect()
}

#[test]
fn greedy_tokens_are_the_recorded_ones() {
    let golden: Value =
        serde_json::from_slice(&fs::read("tests/data/golden/tiny-llama-tied/golden.json").unwrap()).unwrap();
    let tokenizer =
        ringtune::data::tokenizer::Tokenizer::open("tests/data/tokenizer/spm4k.model".as_ref(), Default::default())
            .unwrap();
    let w = untuned();
    let mut ran = 0;
    for case in golden["generation"]["cases"].as_array().unwrap() {
        let ids = |key: &str| -> Vec<u32> {
            case[key].as_array().into_iter().flatten().map(|v| v.as_u64().unwrap() as u32).collect()
        };
        // The prompt as text: what its ids spell, where that gives the ids back.
        let text = tokenizer.decode_raw(&ids("prompt_ids")[1..]).unwrap();
        assert_eq!(tokenizer.encode(&text).unwrap(), ids("prompt_ids")[1..], "{text}");
        w.write("prompt.txt", &text);
        let stops: Vec<String> = ids("stop_ids").iter().map(u32::to_string).collect();
        let stop = match stops.is_empty() {
            true => String::new(),
            false => format!("--stop-ids {}", stops.join(",")),
        };
        let n = ids("new_ids").len();
        let line = format!("{BASE} --raw --greedy --json --prompt-file prompt.txt --max-new-tokens {n} {stop}");
        let found = objects(&w, &line);
        assert!(!w.shell(&line).stderr.contains("not trained with"), "raw text needs no ChatML token");
        assert_eq!(found[0]["ids"], case["new_ids"], "{text}");
        assert_eq!(found[0]["prompt_tokens"], ids("prompt_ids").len());
        let reason = if stops.is_empty() { "length" } else { "stop_token" };
        assert_eq!(found[0]["finish_reason"], reason);
        ran += 1;
    }
    assert!(ran >= 5, "{ran} cases");
}

#[test]
fn prompts_come_from_words_a_file_or_standard_input() {
    let w = untuned();
    w.write("one.txt", "What is the\n");
    w.write("many.txt", "\u{feff}What is the\r\n\nWho are\n");
    let tail = "--prompt-template instruct --greedy --max-new-tokens 5 --json";
    let words = objects(&w, &format!("{BASE} {tail} 'What is the' 'Who are'"));
    assert_eq!(words.len(), 2);
    assert_ne!(words[0]["text"], words[1]["text"]);
    let first = vec![words[0].clone()];
    assert_eq!(objects(&w, &format!("{BASE} {tail} --prompt-file one.txt")), first);
    assert_eq!(objects(&w, &format!("{BASE} {tail} < one.txt")), first);
    assert_eq!(objects(&w, &format!("{BASE} {tail} --prompt_file many.txt --batch")), words);
    assert_eq!(objects(&w, &format!("{BASE} {tail} --batch < many.txt")), words);
    // Lines are one prompt without --batch, line ends and all.
    let one = objects(&w, &format!("{BASE} {tail} < many.txt"));
    assert_eq!((one.len(), one[0]["prompt"].as_str()), (1, Some("What is the\r\n\nWho are")));
    // A system turn changes the prompt; text without --json shows the same answers.
    let system = objects(&w, &format!("{BASE} {tail} --system 'Be brief.' 'What is the'"));
    assert_ne!(system[0]["prompt_tokens"], words[0]["prompt_tokens"]);
    let shown =
        ok(w.shell(&format!("{BASE} --prompt-template instruct --greedy --max-new-tokens 5 'What is the' 'Who are'")));
    let [a, b] = texts(&words)[..] else { panic!() };
    assert_eq!(shown.stdout, format!("prompt: What is the\n{a}\n\nprompt: Who are\n{b}\n"));
}

#[test]
fn a_batch_answers_as_one_by_one_and_a_stream_as_the_whole() {
    let w = tuned(&[]);
    let lines: Vec<String> = fs::read_to_string(w.path("rows.jsonl"))
        .unwrap()
        .lines()
        .take(6)
        .map(|l| serde_json::from_str::<Value>(l).unwrap()["prompt"].as_str().unwrap().to_string())
        .collect();
    w.write("prompts.txt", lines.join("\n"));
    let run = |words: &str| {
        objects(
            &w,
            &format!("ringtune generate --model-path out --batch --json --max-new-tokens 24 {words} < prompts.txt"),
        )
    };
    let greedy = run("--greedy");
    assert_eq!(greedy.len(), 6);
    assert_eq!(run("--greedy --batch-size 1"), greedy);
    assert_eq!(run("--greedy --batch-size 4 --threads 1"), greedy);
    let sampled = run("--temperature 1.3 --top-p 1 --seed 3");
    assert_eq!(run("--temperature 1.3 --top-p 1 --seed 3 --batch-size 1"), sampled);
    assert_ne!(texts(&run("--temperature 1.3 --top-p 1 --seed 4")), texts(&sampled));
    assert_ne!(texts(&sampled), texts(&greedy));
    for (line, object) in lines.iter().zip(&greedy) {
        w.write("prompt.txt", line);
        let one = ok(w.shell("ringtune generate --model-path out --greedy --max-new-tokens 24 < prompt.txt"));
        assert_eq!(one.stdout, format!("{}\n", object["text"].as_str().unwrap()));
    }
    // bf16 runs too; -0 temperature is greedy.
    assert_eq!(run("--mixed_precision bf16 --temperature 0").len(), 6);
    assert_eq!(texts(&run("--temperature 0")), texts(&greedy));
}

#[test]
fn answers_end_at_stop_texts_and_tokens() {
    let w = untuned();
    let run = |words: &str| {
        let found = objects(&w, &format!("{BASE} --raw --greedy --json --max-new-tokens 24 {words} 'What is the'"));
        (
            found[0]["text"].as_str().unwrap().to_string(),
            found[0]["finish_reason"].as_str().unwrap().to_string(),
            found[0]["ids"].as_array().unwrap().len(),
        )
    };
    let (whole, reason, n) = run("");
    assert_eq!((reason.as_str(), n), ("length", 24));
    // The answer of the recorded case: "oid here" and then "over" many times.
    let at = whole.find("overover").unwrap();
    assert_eq!(run("--stop overover"), (whole[..at].to_string(), "stop_text".into(), 4));
    assert_eq!(run("--stop nothing --stop ' he'").0, whole[..whole.find(" he").unwrap()]);
    assert_eq!(run("--stop nothing"), (whole.clone(), "length".into(), 24));
    assert_eq!(run("--stop-ids 3437"), (whole[..at].to_string(), "stop_token".into(), 3));
    assert_eq!(run("--stop_ids 9,1548").2, 2);
    // The name of a control token is that token, not text.
    assert_eq!(run("--stop '</s>'"), (whole, "length".into(), 24));
}

#[test]
fn log_probabilities_are_those_of_the_tokens_chosen() {
    let w = untuned();
    let found = objects(&w, &format!("{BASE} --raw --greedy --json --logprobs 3 --max-new-tokens 5 'What is the'"));
    let places = found[0]["logprobs"].as_array().unwrap();
    assert_eq!(places.len(), 5);
    for (place, id) in places.iter().zip(found[0]["ids"].as_array().unwrap()) {
        assert_eq!(place.as_array().unwrap().len(), 3);
        assert_eq!(&place[0][0], id, "the likeliest token was taken");
        let p = |i: usize| place[i][1].as_f64().unwrap();
        assert!(p(0) < 0.0 && p(0) >= p(1) && p(1) >= p(2), "{place}");
    }
    assert_eq!(
        w.shell(&format!("{BASE} --raw --logprobs 3 a")).code,
        Some(2),
        "without --json there is nowhere to print them"
    );
}

#[test]
fn a_conversation_remembers_until_reset() {
    let w = tuned(&[]);
    let chat = |turns: &str| {
        w.write("turns.txt", turns);
        ok(w.shell("ringtune generate --model-path out --chat --greedy --max-new-tokens 8 < turns.txt"))
    };
    let first = chat("What is AI?\n");
    let both = chat("What is AI?\nAre you sure?\n/reset\nWhat is AI?\n\n/what\n/exit\nWhat is AI?\n");
    let answers: Vec<&str> = both.stdout.lines().collect();
    assert_eq!(answers.len(), 3, "{}", both.stdout);
    assert_eq!(first.stdout, format!("{}\n", answers[0]));
    assert_eq!(answers[2], answers[0], "/reset forgets");
    assert!(both.stderr.contains("/what: unknown") && both.stderr.contains("forgotten"), "{}", both.stderr);
    // The second answer has the first turn as its context: alone it is another.
    let alone = chat("Are you sure?\n");
    assert_ne!(alone.stdout, format!("{}\n", answers[1]));
    // A conversation that fills the model's positions is said, and goes on anew.
    let long = "word ".repeat(600);
    let full = chat(&format!("{long}\nWhat is AI?\n"));
    assert!(full.stderr.contains("512 positions") && full.stderr.contains("/reset"), "{}", full.stderr);
    assert_eq!(full.stdout, first.stdout);
}

/// Turns with what was said before kept answer as from nothing, token for token, and compute the new tokens alone.
#[test]
fn a_kept_conversation_answers_as_one_from_nothing() {
    use ringtune::generate::{Conversation, GenerateOptions, generate};
    use ringtune::hf::TensorSource;
    use ringtune::model::Model;
    use ringtune::tensor::DType;
    use std::ops::ControlFlow::Continue;
    // Grouped heads, a window, biases, norms on heads: what stands between keys and their use.
    for name in ["tiny-llama-tied", "mistral-window", "qwen2-untied", "qwen3-tied"] {
        let files = ringtune::hf::safetensors::ModelFiles::open(format!("tests/data/model/{name}").as_ref()).unwrap();
        let dev = ringtune::cpu::Cpu::new(Some(1)).unwrap();
        let params = ringtune::hf::device::load_params(&dev, &files, DType::F32).unwrap();
        let model = Model::fixed(files.config().clone(), params, None, DType::F32);
        let vocab = model.config.vocab_size as u32;
        let options =
            GenerateOptions { max_new_tokens: 9, stop_ids: Vec::new(), batch: 1, sampling: Sampling::default() };
        let fresh =
            |prompt: &[u32]| generate(&dev, &model, &[prompt.to_vec()], &options, |_, _, _| Continue(())).unwrap();
        let mut kept = Conversation::default();
        let mut said: Vec<u32> = Vec::new();
        let mut computed = 0;
        for turn in 0..5u32 {
            let new: Vec<u32> = (0..7 + turn).map(|i| (turn * 131 + i * 37 + 5) % vocab).collect();
            said.extend(&new);
            let answer = kept.answer(&dev, &model, &said, &options, |_| Continue(())).unwrap();
            assert_eq!(answer, fresh(&said)[0], "{name}, turn {turn}");
            // The last token of an answer was chosen and never computed.
            computed += new.len() + usize::from(turn > 0);
            assert_eq!(kept.computed(), computed, "{name}, turn {turn}");
            said.extend(&answer.tokens);
        }
        // A turn that differs in its middle keeps what comes before; the same again computes its last token alone.
        let before = kept.computed();
        said[20] = (said[20] + 1) % vocab;
        assert_eq!(kept.answer(&dev, &model, &said, &options, |_| Continue(())).unwrap(), fresh(&said)[0], "{name}");
        assert_eq!(kept.computed() - before, said.len() - 20, "{name}");
        let before = kept.computed();
        assert_eq!(kept.answer(&dev, &model, &said, &options, |_| Continue(())).unwrap(), fresh(&said)[0], "{name}");
        assert_eq!(kept.computed() - before, 1, "{name}");
    }
}

/// A model that ends its answer at once is said to have done so.
#[test]
fn an_empty_answer_is_said() {
    let w = untuned();
    let stop: Vec<String> = (0..4098).map(|id| id.to_string()).collect();
    w.write("run.sh", format!("exec {BASE} --greedy --stop-ids {} \"$@\"", stop.join(",")));
    let one = ok(w.shell("sh run.sh Hello"));
    assert!(one.stderr.contains("(the model ended its answer at once"), "{}", one.stderr);
    let chat = ok(w.shell("echo Hello | sh run.sh --chat"));
    assert!(chat.stderr.contains("(the model ended its answer at once"), "{}", chat.stderr);
    assert_eq!(chat.stdout, "\n");
}

/// The distribution that one filter leaves, worked out token by token from its definition.
fn expected(s: Sampling, logits: &[f32], seen: &[u32]) -> Vec<f64> {
    let n = logits.len();
    let scaled: Vec<f64> = (0..n)
        .map(|i| {
            let l = f64::from(logits[i]);
            let penalised = match seen.contains(&(i as u32)) {
                true if l > 0.0 => l / s.repetition_penalty,
                true => l * s.repetition_penalty,
                false => l,
            };
            penalised / s.temperature
        })
        .collect();
    let softmax = |keep: &dyn Fn(usize) -> bool| -> Vec<f64> {
        let weight = |i: usize| if keep(i) { scaled[i].exp() } else { 0.0 };
        let sum: f64 = (0..n).map(weight).sum();
        (0..n).map(|i| weight(i) / sum).collect()
    };
    let p = softmax(&|_| true);
    // No two logits are equal, so "before" is a strict order.
    let before = |i: usize| (0..n).filter(|&j| scaled[j] > scaled[i]).collect::<Vec<_>>();
    let top = p.iter().fold(0.0f64, |a, &b| a.max(b));
    softmax(&|i| {
        let ahead = before(i);
        let mass: f64 = ahead.iter().map(|&j| p[j]).sum();
        (s.top_k == 0 || ahead.len() < s.top_k) && (s.top_p >= 1.0 || mass < s.top_p) && p[i] >= s.min_p * top
    })
}

#[test]
fn sampling_draws_from_the_distribution_that_each_filter_leaves() {
    let logits = [1.5f32, -0.5, 2.25, 0.75, -2.0, 1.0, 0.125, -1.0];
    let seen = [2u32, 4, 2];
    let plain = Sampling { temperature: 1.0, seed: 11, ..Default::default() };
    let cases = [
        ("plain", plain),
        ("temperature", Sampling { temperature: 0.6, ..plain }),
        ("temperature", Sampling { temperature: 2.0, ..plain }),
        ("top_k", Sampling { top_k: 3, ..plain }),
        ("top_p", Sampling { top_p: 0.8, ..plain }),
        ("min_p", Sampling { min_p: 0.25, ..plain }),
        ("repetition_penalty", Sampling { repetition_penalty: 1.8, ..plain }),
    ];
    const DRAWS: u64 = 40_000;
    for (name, s) in cases {
        let mut hits = [0u64; 8];
        for sequence in 0..DRAWS {
            hits[s.choose(&logits, &seen, sequence).unwrap() as usize] += 1;
        }
        for (token, p) in expected(s, &logits, &seen).into_iter().enumerate() {
            let found = hits[token] as f64 / DRAWS as f64;
            // Five standard deviations of a count; a token that is filtered out is never drawn.
            let allowed = 5.0 * (p * (1.0 - p) / DRAWS as f64).sqrt();
            assert!((found - p).abs() <= allowed, "{name} {s:?}: token {token}: {found} of draws, expected {p}");
        }
    }
}

#[test]
fn mistakes_are_named() {
    let w = untuned();
    let run = |words: &str| w.shell(&format!("{BASE} --prompt-template instruct {words}"));
    fails(&run("''"), 2, &["prompt 1: expected text"]);
    fails(&run("< /dev/null"), 1, &["standard input: expected a prompt, found nothing"]);
    fails(&run("--prompt-file nowhere.txt"), 1, &["nowhere.txt"]);
    w.write("blank.txt", "\n \n");
    fails(&run("--batch --prompt-file blank.txt"), 1, &["blank.txt: expected a prompt, found nothing"]);
    w.write("latin.txt", b"caf\xe9");
    fails(&run("--prompt-file latin.txt"), 1, &["latin.txt: expected UTF-8 text", "offset 3"]);
    fails(&run("--batch a"), 2, &["--batch", "leave it out"]);
    fails(&run("--stop '' a"), 2, &["--stop: expected text"]);
    fails(&run("--stop-ids 4096 a"), 2, &["--stop-ids: 4096 is no token", "4096"]);
    fails(&run("--temperature -1 a"), 2, &["temperature: expected 0 or more, found -1"]);
    fails(&run("--top-p 0 a"), 2, &["top_p"]);
    fails(&run("--min-p 1.5 a"), 2, &["min_p"]);
    fails(&run("--repetition-penalty 0 a"), 2, &["repetition_penalty"]);
    fails(&run("--max-new-tokens 600 a"), 1, &["--max-new-tokens 600", "512 positions"]);
    w.write("long.txt", "word ".repeat(800));
    fails(&run("--prompt-file long.txt"), 1, &["fills the model's 512 positions"]);
    fails(&w.shell("ringtune generate --model-path nowhere a"), 1, &["nowhere: expected a model folder"]);
    fails(&w.shell("ringtune generate --model-path base a"), 1, &["no tokenizer in base", "--tokenizer-path"]);
    for words in
        ["--greedy --top-k 5 a", "--raw a", "--raw --system b a", "--chat a", "--chat --json", "--prompt-file x a"]
    {
        assert_eq!(run(words).code, Some(2), "{words}");
    }
    fails(&w.shell(&format!("{BASE} --raw --chat")), 2, &["--raw: a conversation needs a template"]);
    // A reader that has gone ends the program quietly.
    let piped = w.shell(&format!("{BASE} --raw --greedy --max-new-tokens 100 'What is the' | head -c 1"));
    assert!(!piped.stderr.contains("panicked"), "{}", piped.stderr);
    // Weights with a NaN.
    let mut bytes = fs::read(w.path("base/model.safetensors")).unwrap();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(w.path("base/model.safetensors"), bytes).unwrap();
    fails(&run("a"), 1, &["NaN"]);
}
