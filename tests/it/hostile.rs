//! Hostile input to every parser: the seeds of `fuzz/` and thousands of seeded mutations of them. Each has to end in time, with
//! a value or an error, and without asking for memory that the input does not hold.
//!
//! A parser runs in a process of its own, this program again with `HOSTILE_PARSER` set, so that an abort, a loop or a huge
//! mapping is seen for what it is. The input that was running is in a file, which a failure names.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ringtune::rng::Stream;

use crate::parsers;

/// Mutations of each parser, unless `HOSTILE_ROUNDS` asks for more: then they are other ones.
const ROUNDS: u64 = 2500;
/// A mutation is at most this long.
const LONGEST: usize = 1 << 16;
/// One input may take this much of the processors: on a busy machine wall time says nothing.
const INPUT_LIMIT: Duration = Duration::from_secs(5);
/// A parser may take this long for all of them.
const PARSER_LIMIT: Duration = Duration::from_secs(150);
/// Address space that a parser may take beyond what the process has at its start: 64 KiB of input justify no more.
const MEMORY_LIMIT_KB: u64 = 400 << 10;

fn rounds() -> u64 {
    std::env::var("HOSTILE_ROUNDS").map_or(ROUNDS, |n| n.parse().unwrap())
}

/// A number of the process from `/proc/self/status`, in KiB.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap();
    line.trim_matches([':', '\t', ' ']).trim_end_matches(" kB").parse().unwrap()
}

/// Processor time of this process and its threads so far.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap();
    // Behind the name, which may hold blanks: user and system time are the 12th and 13th field, in hundredths of a second.
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks = |i: usize| fields[i].parse::<u64>().unwrap();
    Duration::from_millis(10 * (ticks(11) + ticks(12)))
}

/// Random numbers in the order they are asked for.
struct Dice {
    stream: Stream,
    at: u64,
}

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.at += 1;
        (self.stream.u64_at(self.at) % n.max(1) as u64) as usize
    }
}

/// One mutation of `seed`; some are made of several.
fn mutate(seed: &[u8], other: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..1 + dice.below(3) {
        let at = dice.below(bytes.len() + 1);
        match dice.below(12) {
            0 if at < bytes.len() => bytes[at] ^= 1 << dice.below(8),
            1 if at < bytes.len() => bytes[at] = dice.below(256) as u8,
            2 => bytes.truncate(at),
            // Length fields of four and eight bytes, where they are likely to stand and anywhere.
            3 | 4 => {
                let extremes = [
                    0,
                    1,
                    u64::MAX,
                    i64::MAX as u64,
                    1 << 31,
                    1 << 32,
                    1 << 40,
                    u64::from(u32::MAX),
                    bytes.len() as u64 + 1,
                ];
                let value = extremes[dice.below(extremes.len())];
                let at = if dice.below(2) == 0 { at / 8 * 8 } else { at };
                let width = if dice.below(2) == 0 { 4 } else { 8 };
                if let Some(field) = bytes.get_mut(at..at + width) {
                    field.copy_from_slice(&value.to_le_bytes()[..width]);
                }
            }
            // A number in text.
            5 => {
                if let Some(start) = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit()) {
                    let end = (start..bytes.len()).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(bytes.len());
                    let numbers = [
                        "18446744073709551615",
                        "-1",
                        "1e308",
                        "4294967296",
                        "999999999999999999999",
                        "0",
                        "2.5",
                        "67108863",
                    ];
                    let number = numbers[dice.below(numbers.len())];
                    bytes.splice(start..end, number.bytes());
                }
            }
            6 => {
                let deep = ["[", "{\"a\":", "{\"replies\":[", "((", "{% if a %}", "\u{fffd}\\ud800"];
                let open = deep[dice.below(deep.len())].repeat(1 + dice.below(6000));
                bytes.splice(at..at, open.bytes());
            }
            7 => {
                let end = (at + dice.below(64)).min(bytes.len());
                let part = bytes[at..end].to_vec().repeat(1 + dice.below(200));
                bytes.splice(at..at, part);
            }
            8 => {
                let end = (at + dice.below(64)).min(bytes.len());
                bytes.drain(at..end);
            }
            9 => {
                let from = dice.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend(&other[from..]);
            }
            10 => {
                let words: [&[u8]; 8] = [b"null", b"\"\"", b"{}", b"[]", b"\0", b"\xff\xfe", b"\\u0000", b"true"];
                bytes.splice(at..at, words[dice.below(words.len())].iter().copied());
            }
            _ => {
                let end = (at + dice.below(16)).min(bytes.len());
                for b in &mut bytes[at..end] {
                    *b = dice.below(256) as u8;
                }
            }
        }
        bytes.truncate(LONGEST);
    }
    bytes
}

/// The work of the other process: every input through one parser.
fn run_parser(name: &str, current: &Path) {
    let parser = parsers::by_name(name);
    let seeds = (parser.seeds)();
    let mut dice = Dice {
        stream: Stream::new(&[0x686f_7374, u64::from_le_bytes(*b"hostile!"), name.len() as u64, rounds()]),
        at: 0,
    };
    // A panic is caught to say with which input; its own message stays.
    let run = |bytes: &[u8], what: &str| {
        std::fs::write(current, bytes).unwrap();
        let start = processor_time();
        let survived = catch_unwind(AssertUnwindSafe(|| (parser.run)(bytes))).is_ok();
        let (took, peak) = (processor_time() - start, status("VmPeak"));
        assert!(survived, "{name}: {what} made it panic");
        assert!(took < INPUT_LIMIT, "{name}: {what} took {took:?}");
        peak
    };
    // Threads and libraries are there after the seeds.
    let base = seeds.iter().map(|seed| run(seed, "a seed")).max().unwrap();
    run(b"", "nothing");
    for round in 0..rounds() {
        let seed = &seeds[dice.below(seeds.len())];
        let other = &seeds[dice.below(seeds.len())];
        let input = mutate(seed, other, &mut dice);
        let peak = run(&input, &format!("mutation {round}"));
        assert!(peak < base + MEMORY_LIMIT_KB, "{name}: mutation {round} took {} MiB", (peak - base) >> 10);
    }
    println!("{name}: {} inputs", seeds.len() as u64 + 1 + rounds());
}

/// Starts this program again for one parser and waits for it.
fn survives(name: &str) {
    if let Some(current) = std::env::var_os("HOSTILE_PARSER") {
        return run_parser(name, Path::new(&current));
    }
    let dir = tempfile::tempdir().unwrap();
    let current = dir.path().join("input");
    let log = std::fs::File::create(dir.path().join("log")).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("hostile::{name}"), "--nocapture", "--test-threads=1"])
        .env("HOSTILE_PARSER", &current)
        // More arenas would each reserve 64 MiB of address space.
        .env("MALLOC_ARENA_MAX", "2")
        .env("RAYON_NUM_THREADS", "2")
        .stdout(Stdio::from(log.try_clone().unwrap()))
        .stderr(Stdio::from(log))
        .spawn()
        .unwrap();
    let limit = PARSER_LIMIT * (rounds() / ROUNDS).max(1) as u32;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if start.elapsed() > limit {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = std::fs::read_to_string(dir.path().join("log")).unwrap();
    let done = text.contains(&format!("{name}: ")) && text.contains(" inputs");
    if status.is_some_and(|s| s.success()) && done {
        return;
    }
    let kept = std::env::temp_dir().join(format!("ringtune-hostile-{name}"));
    let _ = std::fs::copy(&current, &kept);
    let how = status.map_or(format!("did not end within {limit:?}"), |s| s.to_string());
    let tail: Vec<&str> = text.lines().rev().take(30).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    panic!("{name}: {how}; the input is {}\n{}", kept.display(), tail.join("\n"));
}

macro_rules! parsers {
    ($($name:ident)*) => {
        $(#[test] fn $name() { survives(stringify!($name)); })*

        #[test]
        fn every_parser_has_a_test_and_a_fuzz_target() {
            let tested = [$(stringify!($name)),*];
            for parser in parsers::ALL {
                assert!(tested.contains(&parser.name), "{} is not tested", parser.name);
                let target = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz/fuzz_targets/{}.rs", parser.name));
                let text = std::fs::read_to_string(&target).unwrap_or_default();
                assert!(text.contains(&format!("run(\"{}\"", parser.name)), "{}", target.display());
            }
            assert_eq!(tested.len(), parsers::ALL.len());
        }
    };
}

parsers! {
    jsonl_rows token_file raw_tokens safetensors shard_index config_json adapter_config sentencepiece tokenizer_json_input tokenizer_config added_tokens manifest
    trainer_state settings_file jinja dolly oasst alpaca tables encoded_rows pretrain_text pretrain_jsonl conversations
    metrics run_record hub_listing hub_card
}
