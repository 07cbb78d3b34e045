//! `ringtune merge`: the merged model of training again, shards, element types, and nothing lost or left when it fails.

use std::fs;
use std::path::Path;

use ringtune::hf::safetensors::{ModelFiles, TensorFile};
use ringtune::hf::{SaveDType, TensorSource};
use ringtune::model::weights::Weights;

use crate::program::Workplace;
use crate::runs::{copy_dir, same_file};
use crate::tuned::{fails, json, ok, tuned, untuned};

/// Names in a folder, sorted; hidden ones too.
fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A base and a PEFT adapter on it, without any tokenizer.
fn golden() -> Workplace {
    let w = untuned();
    copy_dir(Path::new("tests/data/golden/tiny-llama-tied/adapter_all"), &w.path("adapter"));
    w
}

#[test]
fn it_gives_what_training_gives() {
    let w = tuned(&["--merge_adapters"]);
    let outcome = ok(w.shell("ringtune merge --model-path out --output-dir merged"));
    assert!(outcome.stdout.contains("logits differ from base + adapter by"), "{}", outcome.stdout);
    // Every update of the adapter's file was found in the merged weights by a second reading.
    let adapter = TensorFile::open(&w.path("out/adapter_model.safetensors")).unwrap();
    let updates = adapter.names().filter(|name| name.contains(".lora_A.")).count();
    let found = format!("; {updates} updates found again in the weights");
    assert!(updates > 0 && outcome.stdout.contains(&found), "{updates}: {}", outcome.stdout);
    let (ours, theirs) = (w.path("merged"), w.path("out/merged"));
    assert_eq!(listing(&ours), listing(&theirs));
    for name in listing(&theirs) {
        same_file(&ours.join(&name), &theirs.join(&name));
    }
    // From the base before it grew as well: the adapter carries the embedding.
    ok(w.shell("ringtune merge --model_path out --base_model base --output_dir again"));
    for name in listing(&theirs) {
        same_file(&w.path("again").join(&name), &theirs.join(&name));
    }
}

#[test]
fn shards_and_element_types() {
    let w = golden();
    let run = |words: &str| ok(w.shell(&format!("ringtune merge --model-path adapter --base-model base {words}")));
    let outcome = run("--output-dir whole --dtype float32");
    assert!(outcome.stderr.contains("neither the adapter nor the base has a tokenizer"), "{}", outcome.stderr);
    run("--output-dir sharded --dtype f32 --max-shard-size 300KB");
    run("--output-dir half --dtype f16");
    run("--output-dir brain --dtype bf16");
    let open = |name: &str| ModelFiles::open(&w.path(name)).unwrap();
    let (whole, sharded) = (open("whole"), open("sharded"));
    assert_eq!((whole.n_files(), whole.dtype()), (1, SaveDType::F32));
    assert!(sharded.n_files() > 2, "{} shards", sharded.n_files());
    let index = json(&w, "sharded/model.safetensors.index.json");
    assert_eq!(index["weight_map"].as_object().unwrap().len(), Weights::of(whole.config()).places().len());
    for (at, _) in Weights::of(whole.config()).places() {
        assert_eq!(whole.load(at).unwrap(), sharded.load(at).unwrap(), "{at}");
    }
    assert_eq!((open("half").dtype(), open("brain").dtype()), (SaveDType::F16, SaveDType::Bf16));
    assert_eq!(json(&w, "half/config.json")["dtype"], "float16");
    // `auto` is the base's type.
    run("--output-dir auto");
    assert_eq!(open("auto").dtype(), open("base").dtype());
}

#[test]
fn a_folder_is_replaced_only_when_asked_and_only_a_model() {
    let w = golden();
    let merge = |words: &str| w.shell(&format!("ringtune merge --model-path adapter --base-model base {words}"));
    ok(merge("--output-dir m"));
    fs::write(w.path("m/stale.txt"), "x").unwrap();
    let before = fs::read(w.path("m/model.safetensors")).unwrap();
    fails(&merge("--output-dir m"), 2, &["m: exists and is not empty", "--overwrite"]);
    ok(merge("--output-dir m --overwrite --dtype bf16"));
    assert_ne!(fs::read(w.path("m/model.safetensors")).unwrap(), before);
    assert!(!w.path("m/stale.txt").exists(), "the old folder is gone whole");
    // An empty folder is nobody's; one with other things in it is not replaced.
    fs::create_dir(w.path("empty")).unwrap();
    ok(merge("--output-dir empty"));
    w.write("precious/thesis.txt", "x");
    fails(&merge("--output-dir precious --overwrite"), 1, &["precious", "no config.json"]);
    assert!(w.path("precious/thesis.txt").is_file());
    for own in ["adapter", "base", "."] {
        fails(&merge(&format!("--output-dir {own} --overwrite")), 1, &["holds what is merged", "--output-dir"]);
    }
    fails(&merge("--output-dir spm.model"), 1, &["spm.model: expected a folder to write to, found a file"]);
    fails(&merge("--output-dir spm.model/below"), 1, &["spm.model"]);
    fails(&merge("--output-dir x/.."), 2, &["expected the name of a folder"]);
    let left: Vec<String> = listing(&w.path("")).into_iter().filter(|n| n.starts_with('.')).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_full_disk_leaves_what_was_there() {
    let w = golden();
    ok(w.shell("ringtune merge --model-path adapter --base-model base --output-dir m"));
    let before = fs::read(w.path("m/model.safetensors")).unwrap();
    // A limit on the size of files fails a write as a full disk or quota does.
    let line =
        "trap '' XFSZ; ulimit -f 200; ringtune merge --model-path adapter --base-model base --output-dir m --overwrite";
    fails(&w.shell(line), 1, &["m/model.safetensors", "disk or quota is full", "another place"]);
    assert_eq!(fs::read(w.path("m/model.safetensors")).unwrap(), before);
    fails(
        &w.shell(&line.replace("-dir m --overwrite", "-dir n")),
        1,
        &["n/model.safetensors", "disk or quota is full"],
    );
    assert!(!w.path("n").exists());
    let left: Vec<String> = listing(&w.path("")).into_iter().filter(|n| n.starts_with('.')).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn mistakes_are_named() {
    let w = golden();
    let merge = |words: &str| w.shell(&format!("ringtune merge --output-dir m {words}"));
    fails(&merge("--model-path base"), 1, &["base: expected an adapter folder", "nothing to merge"]);
    fails(&merge("--model-path nowhere"), 1, &["nowhere: expected a model folder"]);
    fails(&merge("--model-path adapter"), 1, &["base_model_name_or_path", "--base-model"]);
    let good = "--model-path adapter --base-model base";
    fails(&merge(&format!("{good} --max-shard-size 5XB")), 2, &["--max-shard-size", "5GB"]);
    fails(&merge(&format!("{good} --max-shard-size 0")), 2, &["--max-shard-size"]);
    assert_eq!(merge(&format!("{good} --dtype int8")).code, Some(2));
    // An adapter of another model.
    copy_dir(Path::new("tests/data/model/qwen3-tied"), &w.path("other"));
    fails(&merge("--model-path adapter --base-model other"), 1, &["expected shape", "for this base model"]);
    // Values that do not fit the type, or are not finite once merged.
    let path = w.path("adapter/adapter_model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&3.0e38f32.to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    fails(&merge(&format!("{good} --dtype f16")), 1, &["does not fit float16"]);
    bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    fails(&merge(good), 1, &["lora_", "NaN"]);
    assert!(!w.path("m").exists());
}
