//! A frozen base is read where it stands in its file: the same adapter as from a copy, and a file that changes under the run is an error.

use std::fs;

use crate::program::{Workplace, first_rows};

/// A folder with a model, a tokenizer and rows.
fn workplace(model: &str) -> Workplace {
    let w = Workplace::new();
    for file in ["config.json", "model.safetensors"] {
        w.copy(&format!("tests/data/model/{model}/{file}"), &format!("model/{file}"));
    }
    w.copy("tests/data/tokenizer/spm4k.model", "spm.model");
    w.write("rows.jsonl", first_rows("data/demo/chat.jsonl", 20));
    w
}

const SFT: &str = "ringtune sft --model_path model --tokenizer_path spm.model --dataset_paths rows.jsonl --use_lora --lora_dropout 0 \
                   --max_seq_len 128 --val_fraction 0.2 --quiet";

#[test]
fn the_adapter_has_the_bits_of_one_trained_on_a_copy() {
    for (model, precision) in [("tiny-llama-untied", "bf16"), ("tiny-llama-tied", "no")] {
        let w = workplace(model);
        let train = |out: &str| {
            let line = format!(
                "{SFT} --output_dir {out} --max_steps 4 --eval_steps 2 --mixed_precision {precision} \
                 && cat $(find {out} -name adapter_model.safetensors | sort) | cksum"
            );
            let outcome = w.shell(&line);
            assert_eq!(outcome.code, Some(0), "{model}: {}", outcome.stderr);
            outcome.stdout.lines().last().unwrap().to_string()
        };
        let there = train("there");
        assert!(!there.ends_with(" 0"), "no adapter was written");
        // Behind a header that is a byte longer no element is aligned: each is copied.
        let mut file = fs::read(w.path("model/model.safetensors")).unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap());
        file.insert(8 + length as usize, b' ');
        file[..8].copy_from_slice(&(length + 1).to_le_bytes());
        w.write("model/model.safetensors", file);
        assert_eq!(train("copied"), there, "{model} {precision}");
    }
}

#[test]
fn a_base_that_changes_under_the_run_is_named() {
    let w = workplace("tiny-llama-untied");
    // A run that does not notice would go on for long.
    let run = |precision: &str, change: &str| {
        let line = format!(
            "rm -rf out; timeout 120 {SFT} --output_dir out --max_steps 100000 --eval_strategy no --save_strategy no --mixed_precision {precision} & \
             while ! grep -qs '\"step\"' $(find out -name metrics.jsonl 2>/dev/null) /dev/null; do sleep 0.05; kill -0 $! || exit 9; done; \
             {change}; wait $!"
        );
        let outcome = w.shell(&line);
        assert_eq!(outcome.code, Some(1), "{precision}, {change}: {}", outcome.stderr);
        assert!(!outcome.stderr.contains("panicked"), "{}", outcome.stderr);
        outcome.stderr
    };
    let copy = fs::read(w.path("model/model.safetensors")).unwrap();
    let said = run("bf16", "truncate -s 9000 model/model.safetensors");
    assert!(
        said.contains("model.safetensors: the file was cut while it was read, expected 1235744 bytes, found 9000"),
        "{said}"
    );
    w.write("model/model.safetensors", copy);
    let said = run("bf16", "touch -d '2030-01-01' model/model.safetensors");
    assert!(said.contains("model.safetensors: the file was written to while it is in use"), "{said}");
    // In f32 every product reads the file.
    w.copy("tests/data/model/tiny-llama-tied/config.json", "model/config.json");
    w.copy("tests/data/model/tiny-llama-tied/model.safetensors", "model/model.safetensors");
    let said = run("no", "truncate -s 9000 model/model.safetensors");
    assert!(said.contains("the file was cut while it was read, expected 1420608 bytes"), "{said}");
}
