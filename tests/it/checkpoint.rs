//! Training checkpoints: no instant of a crash, no damage and no full disk may lose a finished one or pass off a partial one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ringtune::checkpoint::manifest::{self, CheckpointWriter, MANIFEST};
use ringtune::checkpoint::state::{Fingerprints, write_state_tensors};
use ringtune::files;
use ringtune::hf::HostTensor;
use ringtune::hf::safetensors::TensorFile;
use ringtune::rng::Stream;

use crate::program::{Workplace, first_rows, repository};

/// The content of a small checkpoint: two files and one in a folder.
fn content(step: u64) -> [(&'static str, Vec<u8>); 3] {
    [
        ("state.json", format!("{{\"step\": {step}}}").into_bytes()),
        ("optimizer.bin", vec![step as u8; 5000]),
        ("model/w.bin", vec![7; 3000]),
    ]
}

fn write_files(writer: &CheckpointWriter, step: u64) {
    for (name, bytes) in content(step) {
        if let Some((folder, _)) = name.split_once('/') {
            fs::create_dir_all(writer.dir().join(folder)).unwrap();
        }
        writer.write(name, &bytes).unwrap();
    }
}

fn save(output: &Path, step: u64) -> PathBuf {
    let writer = CheckpointWriter::begin(output, step).unwrap();
    write_files(&writer, step);
    writer.finish().unwrap()
}

fn intact(checkpoint: &Path, step: u64) -> bool {
    manifest::verify(checkpoint).is_ok_and(|m| m.step == step)
        && content(step).iter().all(|(name, bytes)| fs::read(checkpoint.join(name)).unwrap() == *bytes)
}

fn chosen(output: &Path) -> Option<u64> {
    manifest::find_newest(output).unwrap().chosen.map(|p| manifest::step_of(&p).unwrap())
}

fn names(dir: &Path) -> Vec<String> {
    let mut all: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    all.sort();
    all
}

#[test]
fn a_checkpoint_is_listed_verified_and_chosen() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(chosen(&dir.path().join("not/there")), None);
    assert_eq!(chosen(dir.path()), None);
    for step in [5, 10, 100] {
        assert!(intact(&save(dir.path(), step), step));
    }
    fs::create_dir(dir.path().join("checkpoint-007")).unwrap();
    fs::create_dir(dir.path().join("checkpoint-best")).unwrap();
    fs::write(dir.path().join("checkpoint-500"), "a file").unwrap();
    let steps: Vec<u64> = manifest::list(dir.path()).unwrap().into_iter().map(|(s, _)| s).collect();
    assert_eq!(steps, [5, 10, 100]);
    assert_eq!(chosen(dir.path()), Some(100));
    let m = manifest::verify(&dir.path().join("checkpoint-10")).unwrap();
    assert_eq!(m.files.keys().collect::<Vec<_>>(), ["model/w.bin", "optimizer.bin", "state.json"]);
    assert_eq!(m.files["model/w.bin"].blake3, blake3::hash(&[7; 3000]).to_hex().to_string());
}

/// Every state the disk passes through while a checkpoint is written; `mem::forget` stands for the death of the process.
#[test]
fn dying_at_any_point_keeps_the_checkpoint_before() {
    for replaces in [false, true] {
        let deaths = 9;
        for death in 0..deaths {
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path();
            save(out, 5);
            if replaces {
                save(out, 10);
            }
            let path = out.join("checkpoint-10");
            let temp = out.join(".checkpoint-10.tmp");
            let aside = out.join(".checkpoint-10.old");
            let writer = CheckpointWriter::begin(out, 10).unwrap();
            // 0: an empty folder; 1 to 3: some files, the last one cut; 4: all files, no manifest.
            let all = content(10);
            fs::create_dir_all(writer.dir().join("model")).unwrap();
            for (name, bytes) in &all[..death.min(all.len())] {
                writer.write(name, bytes).unwrap();
            }
            if (1..4).contains(&death) {
                fs::write(writer.dir().join(all[death - 1].0), &all[death - 1].1[..10]).unwrap();
            }
            match death {
                0..=4 => {}
                // 5: half of a manifest, as if the file system had written it out of order.
                5 => fs::write(writer.dir().join(MANIFEST), "{\"format\": \"ringtune").unwrap(),
                // 6: sealed but not renamed; 7: the old one moved aside; 8: renamed, the old one not yet removed.
                _ => {
                    writer.seal().unwrap();
                    if replaces && death >= 7 {
                        fs::rename(&path, &aside).unwrap();
                    }
                    if death == 8 {
                        fs::rename(&temp, &path).unwrap();
                    }
                }
            }
            std::mem::forget(writer);

            manifest::clean_up(out).unwrap();
            let expected = if replaces || death == 8 { 10 } else { 5 };
            assert_eq!(chosen(out), Some(expected), "death {death}, replaces {replaces}");
            assert!(intact(&out.join("checkpoint-5"), 5));
            assert!(expected == 5 || intact(&path, 10), "death {death}, replaces {replaces}");
            assert!(names(out).iter().all(|n| !n.starts_with('.')), "death {death}: {:?}", names(out));
            // The next run goes on from there and writes the checkpoint again.
            assert!(intact(&save(out, 10), 10) && chosen(out) == Some(10));
        }
    }
}

#[test]
fn before_the_clean_up_no_partial_folder_is_chosen_either() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), 5);
    let writer = CheckpointWriter::begin(dir.path(), 10).unwrap();
    write_files(&writer, 10);
    assert_eq!(chosen(dir.path()), Some(5));
    writer.seal().unwrap();
    assert_eq!(chosen(dir.path()), Some(5));
    drop(writer);
    assert_eq!(names(dir.path()), ["checkpoint-5"], "an abandoned writer removes what it wrote");
    fs::create_dir(dir.path().join(".checkpoint-3.del")).unwrap();
    fs::create_dir(dir.path().join(".checkpoint-x.tmp")).unwrap();
    fs::create_dir(dir.path().join(".other.tmp")).unwrap();
    fs::write(dir.path().join(".checkpoint-4.tmp"), "a file of somebody").unwrap();
    manifest::clean_up(dir.path()).unwrap();
    assert_eq!(names(dir.path()), [".checkpoint-4.tmp", ".checkpoint-x.tmp", ".other.tmp", "checkpoint-5"]);
    manifest::clean_up(&dir.path().join("not there")).unwrap();
}

#[test]
fn damage_is_named_and_the_one_before_is_taken() {
    type Damage = fn(&Path);
    let cases: [(&str, Damage); 9] = [
        ("optimizer.bin: expected 5000 bytes, found 4999", |d| fs::write(d.join("optimizer.bin"), [10; 4999]).unwrap()),
        ("optimizer.bin: its content differs", |d| {
            let mut bytes = vec![10u8; 5000];
            bytes[4000] ^= 1;
            fs::write(d.join("optimizer.bin"), bytes).unwrap();
        }),
        ("state.json is missing", |d| fs::remove_file(d.join("state.json")).unwrap()),
        ("model/w.bin is missing", |d| fs::remove_dir_all(d.join("model")).unwrap()),
        ("manifest.json is missing", |d| fs::remove_file(d.join(MANIFEST)).unwrap()),
        ("manifest.json is damaged", |d| fs::write(d.join(MANIFEST), "{\"step\": 10").unwrap()),
        ("manifest.json is damaged", |d| fs::write(d.join(MANIFEST), "").unwrap()),
        ("is of step 11, the folder's name says 10", |d| edit(d, "\"step\": 10", "\"step\": 11")),
        ("is not the name of a file in the checkpoint", |d| {
            edit(d, "\"state.json\"", "\"../checkpoint-5/state.json\"")
        }),
    ];
    for (expected, damage) in cases {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), 5);
        let newest = save(dir.path(), 10);
        damage(&newest);
        let auto = manifest::find_newest(dir.path()).unwrap();
        assert_eq!(auto.chosen, Some(dir.path().join("checkpoint-5")), "{expected}");
        let [(path, why)] = auto.passed_over.as_slice() else { panic!("{:?}", auto.passed_over) };
        assert!(path == &newest && why.to_string().contains(expected), "{why}");
        assert!(why.to_string().contains("checkpoint-10"), "{why}");
        assert_eq!(manifest::verify(&newest).unwrap_err().to_string(), why.to_string());
        fs::remove_dir_all(dir.path().join("checkpoint-5")).unwrap();
        let e = manifest::find_newest(dir.path()).unwrap_err().to_string();
        assert!(e.contains("none of the 1 checkpoints") && e.contains(expected), "{e}");
    }
}

fn edit(checkpoint: &Path, from: &str, to: &str) {
    let path = checkpoint.join(MANIFEST);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(&path, text.replace(from, to)).unwrap();
}

#[test]
fn manifests_of_other_programs_and_versions_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(dir.path(), 10);
    edit(&path, "\"version\": 1", "\"version\": 2");
    assert!(manifest::verify(&path).unwrap_err().to_string().contains("expected version 1, found 2"));
    edit(&path, "\"version\": 2", "\"version\": 1");
    edit(&path, "ringtune checkpoint", "something else");
    assert!(manifest::verify(&path).unwrap_err().to_string().contains("expected format \"ringtune checkpoint\""));
    let e = manifest::verify(&dir.path().join("checkpoint-99")).unwrap_err().to_string();
    assert!(e.contains("checkpoint-99: no such checkpoint folder"), "{e}");
}

#[test]
fn rotation_keeps_the_newest_the_best_and_the_newest_that_verifies() {
    let steps = |dir: &Path| manifest::list(dir).unwrap().into_iter().map(|(s, _)| s).collect::<Vec<_>>();
    let run = |keep: usize, best: Option<u64>, damaged: &[u64]| {
        let dir = tempfile::tempdir().unwrap();
        for step in [5, 10, 15, 20, 25] {
            save(dir.path(), step);
        }
        let path = |step: u64| dir.path().join(format!("checkpoint-{step}"));
        damaged.iter().for_each(|&s| fs::write(path(s).join("state.json"), "x").unwrap());
        manifest::rotate(dir.path(), keep, best.map(path).as_deref(), None).unwrap();
        assert!(names(dir.path()).iter().all(|n| n.starts_with("checkpoint-")));
        steps(dir.path())
    };
    assert_eq!(run(2, None, &[]), [20, 25]);
    assert_eq!(run(1, None, &[]), [25]);
    assert_eq!(run(9, None, &[]), [5, 10, 15, 20, 25]);
    assert_eq!(run(2, Some(5), &[]), [5, 20, 25]);
    assert_eq!(run(1, Some(25), &[]), [20, 25]);
    assert_eq!(run(1, None, &[25]), [20, 25], "the newest valid one stays");
    assert_eq!(run(2, None, &[20, 25]), [15, 20, 25]);
    assert_eq!(run(1, Some(5), &[10, 15, 20, 25]), [5, 25], "the best is also the newest valid one");

    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), 5);
    let last = save(dir.path(), 10);
    let removed = manifest::rotate(dir.path(), 1, None, Some(&last)).unwrap();
    assert_eq!(removed, [dir.path().join("checkpoint-5")]);
    manifest::remove(&last).unwrap();
    assert!(names(dir.path()).is_empty());
}

#[test]
fn changed_inputs_are_refused_by_name_unless_allowed_by_name() {
    let prints = |data: &str, config: &str| {
        let map = [("data", data), ("config", config), ("tokenizer", "t"), ("base_model", "b")];
        Fingerprints(map.into_iter().map(|(k, v)| (k.to_string(), v.to_string())).collect())
    };
    let old = prints("aaaaaaaaaaaaaaaaaaaa", "c");
    assert_eq!(old.check(&old, &[]).unwrap(), Vec::<String>::new());
    let new = prints("bbbbbbbbbbbbbbbbbbbb", "c");
    let e = old.check(&new, &[]).unwrap_err().to_string();
    assert!(
        e.contains("data differs")
            && e.contains("was aaaaaaaaaaaa, is bbbbbbbbbbbb")
            && e.contains("--allow-changed data"),
        "{e}"
    );
    let allow = |names: &[&str]| names.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    assert_eq!(old.check(&new, &allow(&["data"])).unwrap(), ["data"]);
    let both = prints("b", "d");
    assert!(old.check(&both, &allow(&["data"])).unwrap_err().to_string().contains("config differs"));
    assert_eq!(old.check(&both, &allow(&["data", "config"])).unwrap(), ["config", "data"]);
    let e = old.check(&new, &allow(&["dta"])).unwrap_err();
    assert!(
        e.to_string().contains("--allow-changed dta: expected one of base_model, config, data, tokenizer")
            && e.exit_code() == 2
    );
    let mut less = new.clone();
    less.0.remove("tokenizer");
    assert!(old.check(&less, &allow(&["data"])).unwrap_err().to_string().contains("tokenizer differs"));
    assert_eq!(Fingerprints::from_json(&old.to_json()).unwrap(), old);
    assert!(Fingerprints::from_json(&serde_json::json!({"a": 1})).is_err());
}

#[test]
fn state_tensors_round_trip_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("optimizer.safetensors");
    let data = vec![0.1f32, -0.0, f32::MIN_POSITIVE / 8.0, 1e30, 0.0, f32::MAX];
    let tensors =
        vec![("a.m".to_string(), HostTensor { rows: 2, cols: 3, data }), ("b.v".to_string(), HostTensor::zeros(1, 4))];
    write_state_tensors(&path, &tensors).unwrap();
    let read = |path: &Path| -> ringtune::error::Result<Vec<_>> {
        let file = TensorFile::open(path)?;
        file.names().map(|name| Ok((name.to_string(), file.load(name)?))).collect()
    };
    let back = read(&path).unwrap();
    assert_eq!(back, tensors);
    assert_eq!(back[0].1.data[1].to_bits(), (-0.0f32).to_bits());
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(read(&path).unwrap_err().to_string().contains("cut short"));
}

#[test]
fn files_are_replaced_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.json");
    files::write_bytes(&path, b"first").unwrap();
    let fail = files::write_atomic(&path, |out| {
        out.write_all(b"half of the sec")?;
        Err(ringtune::error::Error::new("stopped"))
    });
    assert!(fail.unwrap_err().to_string().contains("x.json: stopped"));
    assert_eq!((fs::read(&path).unwrap(), names(dir.path())), (b"first".to_vec(), vec!["x.json".to_string()]));
    files::write_bytes(&path, b"second").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"second");
    let e = files::write_bytes(&dir.path().join("no/such/folder"), b"x").unwrap_err().to_string();
    assert!(e.contains("no/such/") && e.contains("No such file"), "{e}");
    let e = files::create_dir_all(&path.join("below a file")).unwrap_err().to_string();
    assert!(e.contains("cannot create the folder") && e.contains("x.json"), "{e}");
}

/// Runs this very test again in a child process, with `role` telling it what to do.
fn in_child(test: &str, role: &str, dir: &Path) -> std::process::Output {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([test, "--exact", "--nocapture"]).env("RINGTUNE_TEST_ROLE", role).env("RINGTUNE_TEST_DIR", dir);
    child.output().unwrap()
}

/// A checkpoint that does not fit: the error says so, what was there before is untouched, nothing partial is left.
fn writes_until_it_is_full(out: &Path) {
    let writer = CheckpointWriter::begin(out, 10).unwrap();
    writer.write("state.json", b"{}").unwrap();
    let big = HostTensor { rows: 1000, cols: 1000, data: vec![0.5; 1_000_000] };
    let e =
        write_state_tensors(&writer.dir().join("optimizer.safetensors"), &[("m".into(), big)]).unwrap_err().to_string();
    println!("{e}");
    assert!(e.contains("optimizer.safetensors") && e.contains("the disk or quota is full"), "{e}");
    let e = writer.write("big.bin", &vec![1; 4_000_000]).unwrap_err().to_string();
    assert!(e.contains("big.bin") && e.contains("the disk or quota is full"), "{e}");
    drop(writer);
    assert_eq!(names(out), ["checkpoint-5"]);
    assert!(intact(&out.join("checkpoint-5"), 5));
    assert_eq!(chosen(out), Some(5));
}

#[test]
fn a_full_disk_is_said_and_loses_nothing() {
    let this = "checkpoint::a_full_disk_is_said_and_loses_nothing";
    let role = std::env::var("RINGTUNE_TEST_ROLE").unwrap_or_default();
    let dir = std::env::var_os("RINGTUNE_TEST_DIR").map(PathBuf::from);
    match (role.as_str(), dir) {
        // A limit on the size of files works for everybody and takes the same path as a full disk.
        ("limit", Some(dir)) => {
            let limit = libc::rlimit { rlim_cur: 100_000, rlim_max: 100_000 };
            // SAFETY: both calls only change settings of this child process, which runs nothing but this test.
            let rc = unsafe {
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                libc::setrlimit(libc::RLIMIT_FSIZE, &limit)
            };
            assert_eq!(rc, 0);
            writes_until_it_is_full(&dir);
        }
        // A small file system of its own, in a mount namespace that ends with the child; needs the right to mount.
        ("tmpfs", Some(dir)) => {
            let target = std::ffi::CString::new(dir.to_str().unwrap()).unwrap();
            // SAFETY: the strings end in NUL and outlive the calls; the mounts are visible to this child alone.
            let mounted = unsafe {
                libc::unshare(libc::CLONE_NEWNS) == 0
                    && libc::mount(
                        c"none".as_ptr(),
                        c"/".as_ptr(),
                        std::ptr::null(),
                        libc::MS_REC | libc::MS_PRIVATE,
                        std::ptr::null(),
                    ) == 0
                    && libc::mount(
                        c"tmpfs".as_ptr(),
                        target.as_ptr(),
                        c"tmpfs".as_ptr(),
                        0,
                        c"size=100k".as_ptr().cast(),
                    ) == 0
            };
            if mounted {
                save(&dir, 5);
                writes_until_it_is_full(&dir);
            } else {
                println!("no right to mount: {}", std::io::Error::last_os_error());
            }
        }
        _ => {
            for role in ["limit", "tmpfs"] {
                let dir = tempfile::tempdir().unwrap();
                save(dir.path(), 5);
                let out = in_child(this, role, dir.path());
                let text = String::from_utf8_lossy(&out.stdout);
                assert!(
                    out.status.success() && text.contains("1 passed"),
                    "{role}: {text}{}",
                    String::from_utf8_lossy(&out.stderr)
                );
                assert!(intact(&dir.path().join("checkpoint-5"), 5));
            }
        }
    }
}

/// Whatever byte of whatever file changes, the checkpoint no longer verifies, and nothing panics.
#[test]
fn any_changed_byte_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    save(dir.path(), 5);
    let newest = save(dir.path(), 10);
    let stream = Stream::new(&[2026]);
    for case in 0..400u64 {
        let name = ["state.json", "optimizer.bin", "model/w.bin", MANIFEST][(case % 4) as usize];
        let path = newest.join(name);
        let whole = fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        let at = stream.u64_at(2 * case) as usize % bytes.len();
        bytes[at] ^= 1 + (stream.u64_at(2 * case + 1) % 255) as u8;
        // White space of JSON carries no meaning in the manifest.
        let blank = |b: u8| matches!(b, b' ' | b'\n' | b'\r' | b'\t');
        let meaningless = name == MANIFEST && blank(bytes[at]) && blank(whole[at]);
        fs::write(&path, &bytes).unwrap();
        let expected = Some(if meaningless { 10 } else { 5 });
        assert_eq!(chosen(dir.path()), expected, "case {case}: byte {at} of {name}");
        fs::write(&path, &whole).unwrap();
    }
    assert_eq!(chosen(dir.path()), Some(10));
}

/// The last checkpoint of a run is written from the state itself, an earlier one from a copy while the training goes on: the same bytes.
#[test]
fn a_checkpoint_from_a_copy_is_the_one_written_at_the_end() {
    let w = Workplace::new();
    w.copy("tests/data/tokenizer/spm4k.model", "spm.model");
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 40));
    let model = repository().join("tests/data/model/tiny-llama-tied");
    for (case, of_case) in
        ["--no_lora --mixed_precision bf16", "--no_lora", "--use_lora --mixed_precision bf16"].iter().enumerate()
    {
        for (name, steps) in [("end", "2"), ("way", "3")] {
            let line = format!(
                "sft --model_path {} --tokenizer_path spm.model --dataset_paths rows.jsonl --output_dir {name}{case} --max_seq_len 64 \
                 --max_steps {steps} --save_steps 2 --lr_scheduler_type constant --warmup_steps 0 --eval_strategy no {of_case}",
                model.display()
            );
            let outcome = w.run(&line.split_whitespace().collect::<Vec<_>>());
            assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        }
        let weights = if case == 2 { "adapter_model.safetensors" } else { "model.safetensors" };
        for file in [weights, "optimizer.safetensors"] {
            let [end, way] =
                ["end", "way"].map(|name| fs::read(w.path(&format!("{name}{case}/checkpoint-2/{file}"))).unwrap());
            assert!(end == way && end.len() > 1000, "{of_case}: {file}");
        }
    }
}
