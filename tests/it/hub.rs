//! Models and data by their names on the hub: the whole program against a hub on this machine.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::hub_server::{Access, COMMIT, Fault, HubServer, Tags, etag};
use crate::program::{Outcome, Workplace, code_blocks, first_rows, repository};
use crate::ringrun_program::ringrun;
use crate::tuned::{fails, json, ok};

const MODEL: &str = "tests/data/model/tiny-llama-tied";
const TINY: &str = "models/org/tiny";

fn bytes(path: &str) -> Vec<u8> {
    fs::read(repository().join(path)).unwrap()
}

/// `org/tiny`, and `org/rows` with a split for training and one for validation.
fn hub() -> HubServer {
    let server = HubServer::start();
    server.put(
        TINY,
        &[
            ("config.json", bytes(&format!("{MODEL}/config.json"))),
            ("generation_config.json", bytes(&format!("{MODEL}/generation_config.json"))),
            ("model.safetensors", bytes(&format!("{MODEL}/model.safetensors"))),
            ("tokenizer.model", bytes("tests/data/tokenizer/spm4k.model")),
            ("pytorch_model.bin", b"pickled".to_vec()),
            ("README.md", b"# Tiny\n".to_vec()),
        ],
    );
    server.put(
        "datasets/org/rows",
        &[
            ("train.jsonl", first_rows("data/demo/chat.jsonl", 24).into_bytes()),
            ("validation.jsonl", first_rows("data/demo/define.jsonl", 9).into_bytes()),
            ("README.md", b"---\nlicense: mit\n---\n".to_vec()),
        ],
    );
    server
}

/// Runs `ringtune` with words, online.
fn online(w: &Workplace, server: &HubServer, words: &str) -> Outcome {
    w.shell(&format!("HF_HUB_OFFLINE=0 HF_ENDPOINT={} ringtune {words}", server.endpoint()))
}

/// A line for the shell that trains two steps.
fn sft(out: &str) -> String {
    format!(
        "sft --model-path org/tiny --dataset-paths hf:org/rows --val-paths hf:org/rows:validation --output-dir {out} --max-steps 2 \
         --max-seq-len 96 --prompt-template plain --lora-r 2 --per-device-train-batch-size 1 --gradient-accumulation-steps 1 \
         --no-tensorboard --device cpu"
    )
}

fn snapshot(w: &Workplace, repo: &str) -> PathBuf {
    w.path(&format!("hf/hub/{repo}/snapshots/{COMMIT}"))
}

fn blob(w: &Workplace, name: &str) -> PathBuf {
    let file = if name == "tokenizer.model" {
        bytes("tests/data/tokenizer/spm4k.model")
    } else {
        bytes(&format!("{MODEL}/{name}"))
    };
    w.path(&format!("hf/hub/models--org--tiny/blobs/{}", etag(name, &file)))
}

#[test]
fn names_train_and_what_is_in_the_cache_needs_no_hub() {
    let (w, server) = (Workplace::new(), hub());
    let first = ok(online(&w, &server, &sft("out")));
    assert!(first.stderr.contains("org/tiny: fetching 4 files"), "{}", first.stderr);
    assert_eq!(json(&w, "out/adapter_config.json")["base_model_name_or_path"], "org/tiny");
    assert_eq!(json(&w, "out/adapter_config.json")["revision"], serde_json::Value::Null);
    // The layout that Python reads.
    let tiny = w.path("hf/hub/models--org--tiny");
    assert_eq!(fs::read_to_string(tiny.join("refs/main")).unwrap(), COMMIT);
    for name in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.model"] {
        let target = fs::read_link(snapshot(&w, "models--org--tiny").join(name)).unwrap();
        assert_eq!(target, Path::new("../../blobs").join(blob(&w, name).file_name().unwrap()), "{name}");
    }
    assert!(!snapshot(&w, "models--org--tiny").join("pytorch_model.bin").exists(), "more was fetched than is needed");
    assert!(fs::read(blob(&w, "model.safetensors")).unwrap() == bytes(&format!("{MODEL}/model.safetensors")));
    let asked = server.seen();
    assert!(asked.iter().any(|r| r.starts_with("get /api/models/org/tiny/revision/main?blobs=true ")), "{asked:?}");
    assert!(asked.iter().any(|r| r.starts_with(&format!("get /datasets/org/rows/resolve/{COMMIT}/validation.jsonl "))));

    // With the hub: asked once what main is, for nothing else.
    ok(online(&w, &server, "eval --model-path out --dataset-paths hf:org/rows:validation --device cpu"));
    let again = server.seen();
    assert!(again.iter().all(|r| r.starts_with("get /api/")) && again.len() == 2, "{again:?}");
    assert_eq!(server.stored().len(), 2, "weights and tokenizer came once");
    // A commit is asked for never.
    let pinned = ok(online(&w, &server, &format!("download org/tiny@{COMMIT}")));
    assert_eq!(pinned.stdout.trim(), snapshot(&w, "models--org--tiny").display().to_string());
    assert_eq!(server.seen(), Vec::<String>::new());

    // Without it: the cache, said in one line.
    let endpoint = server.endpoint();
    drop(server);
    let gone = ok(w.shell(&format!("HF_HUB_OFFLINE=0 HF_ENDPOINT={endpoint} ringtune {}", sft("again"))));
    assert!(
        gone.stderr.contains("cannot be reached") && gone.stderr.contains("org/tiny is taken from the cache"),
        "{}",
        gone.stderr
    );
    let offline = ok(w.shell(&format!("ringtune {}", sft("offline"))));
    assert!(!offline.stderr.contains("cannot be reached"), "{}", offline.stderr);
    let weights = |dir: &str| fs::read(w.path(&format!("{dir}/adapter_model.safetensors"))).unwrap();
    assert!(weights("out") == weights("again") && weights("out") == weights("offline"));
    // Commands that read an adapter find its base by the name.
    ok(w.run(&["merge", "--model-path", "out", "--output-dir", "merged", "--device", "cpu"]));
    ok(w.run(&["generate", "--model-path", "out", "--device", "cpu", "--max-new-tokens", "2", "hello"]));
    ok(w.run(&["inspect", "file", "org/tiny"]));
    ok(w.run(&["plan", "--model-path", "org/tiny", "--gpu", "h100"]));
    let words =
        ["check", "--model-path", "org/tiny", "--dataset-paths", "hf:org/rows", "--output-dir", "x", "--device", "cpu"];
    let check = w.run(&words);
    assert!(
        [Some(0), Some(1)].contains(&check.code) && check.stdout.contains("rows"),
        "{}{}",
        check.stdout,
        check.stderr
    );
    // A folder of the cache is its snapshot.
    let folder = ok(w.run(&["inspect", "file", "hf/hub/models--org--tiny"]));
    assert!(folder.stderr.contains("a folder of the hub's cache"), "{}", folder.stderr);
    // What is not in the cache is not had without the hub.
    fails(
        &w.run(&["download", "org/other"]),
        1,
        &[
            "org/other: this model is not in the cache",
            "HF_HUB_OFFLINE is set",
            "`ringtune download org/other`",
            "`hf download org/other`",
            "--model-path",
        ],
    );
    fails(
        &w.run(&["download", "hf:org/other@v1"]),
        1,
        &["`ringtune download hf:org/other@v1`", "--repo-type dataset --revision v1"],
    );
    fs::remove_file(blob(&w, "model.safetensors")).unwrap();
    fails(&w.run(&["download", "org/tiny"]), 1, &["org/tiny: model.safetensors is not in the cache"]);
}

#[test]
fn what_came_is_kept_and_what_is_wrong_is_not() {
    let (w, server) = (Workplace::new(), hub());
    let whole = bytes(&format!("{MODEL}/model.safetensors"));
    let (target, part) = (blob(&w, "model.safetensors"), {
        let mut name = blob(&w, "model.safetensors").into_os_string();
        name.push(".incomplete");
        PathBuf::from(name)
    });
    let again = |front: Option<&[u8]>| {
        let _ = fs::remove_file(&target);
        if let Some(front) = front {
            fs::create_dir_all(part.parent().unwrap()).unwrap();
            fs::write(&part, front).unwrap();
        }
        let outcome = online(&w, &server, "download org/tiny");
        let stored: Vec<String> = server.stored().into_iter().filter(|r| r.contains("model.safetensors")).collect();
        (outcome, stored)
    };
    // Another process was interrupted.
    let (outcome, stored) = again(Some(&whole[..whole.len() / 2]));
    ok(outcome);
    assert!(fs::read(&target).unwrap() == whole && !part.exists());
    assert!(stored.len() == 1 && stored[0].contains(&format!("range: bytes={}-", whole.len() / 2)), "{stored:?}");
    // The whole was there but for its name.
    let (outcome, stored) = again(Some(&whole));
    ok(outcome);
    assert_eq!(stored, Vec::<String>::new());
    // A beginning of something else: found by the checksum, thrown away.
    let (outcome, stored) = again(Some(&[7; 1000]));
    assert!(ok(outcome).stderr.contains("checksum mismatch"));
    assert!(fs::read(&target).unwrap() == whole && stored.len() == 2, "{stored:?}");
    // The connection breaks twice, the storage is busy, bytes are wrong.
    server.fault([Fault::Cut(5000), Fault::Cut(3000), Fault::Status(503), Fault::Wrong]);
    server.busy(2);
    let (outcome, stored) = again(None);
    ok(outcome);
    assert!(fs::read(&target).unwrap() == whole);
    assert!(stored[1].contains("range: bytes=5000-") && stored[2].contains("range: bytes=8000-"), "{stored:?}");
    assert!(stored.len() == 5 && !stored[4].contains("range:"), "{stored:?}");
}

#[test]
fn a_signal_leaves_what_the_next_run_goes_on_from() {
    let (w, server) = (Workplace::new(), hub());
    server.fault([Fault::Stall(4000)]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_ringtune"))
        .args(["download", "org/tiny"])
        .envs([
            ("HF_HOME", w.path("hf").to_str().unwrap()),
            ("HF_ENDPOINT", &server.endpoint()),
            ("NO_PROXY", "127.0.0.1"),
        ])
        .env_remove("HF_HUB_OFFLINE")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let blobs = w.path("hf/hub/models--org--tiny/blobs");
    let partial = || {
        fs::read_dir(&blobs).into_iter().flatten().flatten().any(|e| {
            e.file_name().to_string_lossy().ends_with(".incomplete") && e.metadata().is_ok_and(|m| m.len() == 4000)
        })
    };
    let start = Instant::now();
    while !partial() {
        assert!(start.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none(), "nothing came");
        std::thread::sleep(Duration::from_millis(20));
    }
    // SAFETY: a signal to a child that this test started and has not waited for.
    unsafe { libc::kill(child.id() as i32, libc::SIGINT) };
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGINT));
    assert!(partial(), "what came is gone");
    server.stored();
    ok(online(&w, &server, "download org/tiny"));
    assert!(server.stored().iter().any(|r| r.contains("range: bytes=4000-")));
    assert!(fs::read(blob(&w, "model.safetensors")).unwrap() == bytes(&format!("{MODEL}/model.safetensors")));
}

#[test]
fn the_token_goes_to_the_hub_alone_and_is_never_shown() {
    let (w, server) = (Workplace::new(), hub());
    server.close(TINY, Access::Gated);
    let url = format!("{}/org/tiny", server.endpoint());
    let refused = online(&w, &server, "download org/tiny");
    fails(
        &refused,
        1,
        &["org/tiny: ", "gated (401, GatedRepo): accept the licence at", &url, "HF_TOKEN", "hf auth login"],
    );
    w.write("hf/token", "hf_other\n");
    let refused = online(&w, &server, "download org/tiny");
    fails(&refused, 1, &["gated (403, GatedRepo): the account of the token that was sent has no access", &url]);
    assert!(!refused.stderr.contains("hf_other"), "{}", refused.stderr);
    server.seen();
    let line = format!("HF_TOKEN=good HF_HUB_OFFLINE=0 HF_ENDPOINT={} ringtune download org/tiny", server.endpoint());
    let had = ok(w.shell(&line));
    assert!(!had.stderr.contains("good") && !had.stdout.contains("good"));
    assert!(server.seen().iter().all(|r| r.contains("authorization: bearer good")));
    let stored = server.stored();
    assert!(!stored.is_empty() && stored.iter().all(|r| !r.contains("authorization")), "{stored:?}");
    // Who had access once needs no token for what is here.
    fs::remove_file(w.path("hf/token")).unwrap();
    ok(online(&w, &server, "download org/tiny"));
}

#[test]
fn refusals_say_what_to_do() {
    let (w, server) = (Workplace::new(), hub());
    let says = |words: &str, code, parts: &[&str]| fails(&online(&w, &server, words), code, parts);
    says("download org/none", 1, &["org/none: no such model", "RepoNotFound", "no token was sent", "hf:org/name"]);
    says("download hf:org/none", 1, &["org/none: no such data set"]);
    says("download org/tiny@v9", 1, &["org/tiny@v9: no revision \"v9\"", "expected a branch, a tag or a commit"]);
    says("download org/tiny/x", 2, &["expected org/name[@revision] of a model"]);
    says("download hf:org/rows:nope", 2, &["no split \"nope\"; found train, validation"]);
    says("download org/tiny --include '*.gguf'", 2, &["--include fits no file; found README.md"]);
    server.put("models/org/pickled", &[("config.json", b"{}".to_vec()), ("pytorch_model.bin", b"x".to_vec())]);
    says("download org/pickled", 1, &["pickled weights are not read", "refs/pr/N"]);
    server.put(
        "models/org/lost",
        &[
            ("config.json", b"{}".to_vec()),
            ("model.safetensors.index.json", br#"{"weight_map": {"a": "gone.safetensors"}}"#.to_vec()),
        ],
    );
    says("download org/lost", 1, &["names gone.safetensors, which is not in it"]);
    says(
        "sft --model-path org/none --dataset-paths hf:org/rows --output-dir x",
        1,
        &["org/none: no folder of this name here, and on the hub: ", "no such model"],
    );
    says(
        "sft --model-path org/tiny --dataset-paths org/rows --output-dir x",
        2,
        &["org/rows: no such file or folder; a data set of the hub is written hf:org/rows"],
    );
    // What lies here is never the hub's.
    w.write("org/here.txt", "");
    server.seen();
    says("generate --model-path org/tiny hello", 1, &["org/tiny: expected a model folder, found nothing"]);
    assert_eq!(server.seen(), Vec::<String>::new());
    ok(online(&w, &server, "download hf:org/rows org/tiny --include '*.md'"));
    server.huge();
    server.put("models/org/big", &[("config.json", b"{}".to_vec()), ("model.safetensors", b"x".to_vec())]);
    says("download org/big", 1, &["are to be fetched, and", "free some space", "HF_HOME"]);
}

#[test]
fn processes_at_once_fetch_once() {
    let (w, server) = (Workplace::new(), hub());
    let one = format!("HF_HUB_OFFLINE=0 HF_ENDPOINT={} ringtune download org/tiny hf:org/rows", server.endpoint());
    let outcome =
        ok(w.shell(&format!("({one}) & a=$!; ({one}) & b=$!; ({one}) & c=$!; wait $a && wait $b && wait $c")));
    assert_eq!(outcome.stdout.lines().count(), 6, "{}", outcome.stdout);
    let stored = server.stored();
    assert_eq!(stored.iter().filter(|r| r.contains("model.safetensors")).count(), 1, "{stored:?}");
    assert!(fs::read(blob(&w, "model.safetensors")).unwrap() == bytes(&format!("{MODEL}/model.safetensors")));
    let left = fs::read_dir(w.path("hf/hub/models--org--tiny/blobs")).unwrap().flatten();
    assert!(left.into_iter().all(|e| !e.file_name().to_string_lossy().contains("incomplete")));
}

#[test]
fn mirrors_that_list_names_alone_are_asked_for_each_file() {
    let (w, server) = (Workplace::new(), hub());
    server.names_only();
    ok(online(&w, &server, "download org/tiny"));
    assert!(server.seen().iter().any(|r| r.starts_with("head ")));
    assert!(fs::read(blob(&w, "model.safetensors")).unwrap() == bytes(&format!("{MODEL}/model.safetensors")));
    assert!(fs::read(blob(&w, "config.json")).unwrap() == bytes(&format!("{MODEL}/config.json")));
    ok(w.run(&["download", "org/tiny"]));
}

/// Files that are not large are held to git's hash: of the list, or of the tag that they come with.
#[test]
fn a_small_file_is_verified_too() {
    let (server, whole) = (hub(), bytes(&format!("{MODEL}/config.json")));
    let fetched = |tags: Tags, names_only: bool, faults: &[Fault]| {
        let w = Workplace::new();
        server.tags(tags);
        if names_only {
            server.names_only();
        }
        server.fault_small(faults.iter().cloned());
        let outcome = ok(online(&w, &server, "download org/tiny --include config.json"));
        let link = snapshot(&w, "models--org--tiny").join("config.json");
        assert!(fs::read(&link).unwrap() == whole, "{tags:?} {faults:?}: other bytes");
        // The next run takes it from the cache.
        server.seen();
        ok(online(&w, &server, "download org/tiny --include config.json"));
        assert!(server.seen().iter().all(|r| r.starts_with("get /api/models/")), "{tags:?} {faults:?}: asked again");
        let blob = fs::read_link(&link).unwrap().file_name().unwrap().to_string_lossy().into_owned();
        (outcome.stderr, blob)
    };
    let hash = etag("config.json", &whole);
    for (tags, names_only) in
        [(Tags::Strong, false), (Tags::None, false), (Tags::Odd, false), (Tags::Strong, true), (Tags::Weak, true)]
    {
        let (said, blob) = fetched(tags, names_only, &[Fault::Wrong]);
        assert!(said.contains("checksum mismatch: expected git's hash"), "{tags:?}: {said}");
        assert_eq!(blob, hash, "{tags:?}");
    }
    let (said, _) = fetched(Tags::Weak, true, &[Fault::Short(whole.len() - 1), Fault::Cut(7)]);
    assert!(said.contains("the server offers") && said.contains("the connection"), "{said}");
    // Without a tag that says anything the size alone is known.
    for tags in [Tags::None, Tags::Odd] {
        let (said, blob) = fetched(tags, true, &[Fault::Short(3)]);
        assert!(said.contains("the server offers") && blob.starts_with("untagged-"), "{tags:?}: {blob}: {said}");
    }
}

#[test]
fn configurations_and_pieces_of_data_sets() {
    let (w, server) = (Workplace::new(), hub());
    let rows = |n: usize, skip: usize| -> Vec<u8> {
        let text = first_rows("data/demo/chat.jsonl", n + skip);
        text.lines().skip(skip).map(|l| format!("{l}\n")).collect::<String>().into_bytes()
    };
    let card = b"---\nconfigs:\n- config_name: talk\n  data_files:\n  - split: train\n    path: a/talk-*\n- config_name: other\n  data_files: b.jsonl\n---\n";
    server.put(
        "datasets/org/many",
        &[
            ("README.md", card.to_vec()),
            ("a/talk-00000-of-00002.jsonl", rows(8, 0)),
            ("a/talk-00001-of-00002.jsonl", rows(4, 8)),
            ("b.jsonl", rows(4, 12)),
        ],
    );
    fails(
        &online(&w, &server, "download hf:org/many"),
        2,
        &["several configurations, expected the name of one; found talk, other"],
    );
    ok(online(&w, &server, "convert hf:org/many/talk talk.jsonl"));
    assert_eq!(fs::read_to_string(w.path("talk.jsonl")).unwrap().lines().count(), 12);
    // One weight for the pieces of a data set.
    let words = sft("out").replace("hf:org/rows ", "hf:org/many/talk hf:org/many/other --dataset-weights 0.5 0.5 ");
    ok(online(&w, &server, &words));
    // A part of the pieces is not taken for all, where nobody knows what else there is.
    fs::remove_dir_all(w.path("hf/hub/datasets--org--many/.ringtune")).unwrap();
    fs::remove_file(snapshot(&w, "datasets--org--many").join("a/talk-00001-of-00002.jsonl")).unwrap();
    fails(&w.run(&["download", "hf:org/many/talk"]), 1, &["1 of 2 pieces of a/talk are not in the cache"]);
}

/// The commands that the README shows for the hub, word for word, with small files under the names they use.
#[test]
fn the_readmes_commands_run() {
    let (w, server) = (Workplace::new(), HubServer::start());
    let file = |name: &str| bytes(&format!("{MODEL}/{name}"));
    let model: Vec<(&str, Vec<u8>)> = vec![
        ("config.json", file("config.json")),
        ("model.safetensors", file("model.safetensors")),
        ("tokenizer.model", bytes("tests/data/tokenizer/spm4k.model")),
    ];
    server.put("models/HuggingFaceTB/SmolLM2-135M", &model);
    let rows = first_rows("data/demo/chat.jsonl", 6).into_bytes();
    server.put("datasets/databricks/databricks-dolly-15k", &[("databricks-dolly-15k.jsonl", rows)]);
    let readme = fs::read_to_string(repository().join("README.md")).unwrap();
    let blocks = code_blocks(&readme, "console");
    let lines: Vec<&str> = blocks.iter().flat_map(|b| b.lines()).filter_map(|l| l.strip_prefix("$ ")).collect();
    assert_eq!(lines.len(), 3, "{lines:?}");
    for line in lines {
        ok(online(&w, &server, line.strip_prefix("ringtune ").unwrap()));
    }
}

/// Of the ranks of a machine one asks the hub and fetches.
#[test]
fn one_rank_asks_for_all() {
    let (w, server) = (Workplace::new(), hub());
    let program = ringrun();
    let words = sft("out").replace("--gradient-accumulation-steps 1", "");
    let line =
        format!("HF_HUB_OFFLINE=0 HF_ENDPOINT={} {} -n 2 ringtune {words}", server.endpoint(), program.display());
    let outcome = ok(w.shell(&line));
    let asked = server.seen();
    // The model, the rows, the rows' split for validation.
    assert_eq!(
        asked.iter().filter(|r| r.starts_with("get /api/models") || r.starts_with("get /api/datasets")).count(),
        3,
        "{asked:?}"
    );
    assert_eq!(server.stored().len(), 2);
    assert_eq!(outcome.stderr.matches("org/tiny: fetching").count(), 1, "{}", outcome.stderr);
    assert_eq!(json(&w, "out/adapter_config.json")["base_model_name_or_path"], "org/tiny");
}
