//! What people type who come from TRL, transformers, Axolotl, LLaMA-Factory or Unsloth, and what to type here instead.

mod names;
mod values;

/// What to do in place of a name that is no setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instead {
    /// Write this setting with this value; the text says why where it is not plain.
    Write(&'static str, &'static str, &'static str),
    /// The same setting under this name.
    Name(&'static str),
    /// A sentence.
    Do(&'static str),
}

use Instead::{Do, Name, Write};

use names::{LORA, TABLE};
use values::{ELSEWHERE, OF_MODELS, VALUES};

fn snake(name: &str) -> String {
    name.trim_start_matches('-').replace('-', "_").to_ascii_lowercase()
}

/// What to type instead of `name`, in any spelling of its words; `None` for a name that nobody is known to use.
pub fn instead(name: &str) -> Option<Instead> {
    let snake = snake(name);
    TABLE.iter().find(|(names, _)| names.contains(&snake.as_str())).map(|(_, instead)| *instead)
}

/// As [`instead`], where `command` has a word of its own for it.
pub fn instead_on(command: &str, name: &str) -> Option<Instead> {
    let snake = snake(name);
    let own = ELSEWHERE.iter().find(|(of, names, _)| *of == command && names.contains(&snake.as_str()));
    own.map(|(.., instead)| *instead).or_else(|| instead(name))
}

/// As [`instead_on`], where the name stood with this value: what is switched off or not set asks for nothing, and whoever names another way
/// to train than LoRA does not want the default.
pub fn instead_of(command: &str, name: &str, value: &str) -> Option<Instead> {
    let value = value.trim_matches(['"', '\'']).to_ascii_lowercase();
    let unset = ["null", "none", "~", ""].contains(&value.as_str());
    let off = unset || ["false", "no", "off", "0"].contains(&value.as_str());
    Some(match instead_on(command, name)? {
        // An empty `adapter` is Axolotl's way to train all weights.
        LORA if off || ["full", "fft"].contains(&value.as_str()) => Write("use_lora", "false", ""),
        LORA if ["freeze", "oft", "ia3", "prefix", "prompt", "llama-adapter"].contains(&value.as_str()) => {
            Do("LoRA (the default) and all weights (no_lora) are what can be trained")
        }
        Write(key, "true", why) if off && !unset => Write(key, "false", why),
        Write(key, "false", why) if off && !unset => Write(key, "true", why),
        Write(..) if off => Do("it is off; leave it out"),
        Name(_) if unset => Do("it is not set; leave it out"),
        Name("prompt_template") if OF_MODELS.iter().any(|family| value.starts_with(family)) => {
            Write("prompt_template", "model", "the model's own template comes with it: ")
        }
        instead => instead,
    })
}

/// What to write for a value of another tool, as `; …`; empty where nothing is known.
pub fn value_hint(key: &str, found: &str) -> String {
    let word = found.to_ascii_lowercase();
    if let Some((.., answer)) = VALUES.iter().find(|(of, words, _)| *of == key && words.contains(&word.as_str())) {
        return format!("; {answer}");
    }
    let share = word.parse::<f64>().ok().filter(|x| *x > 0.0 && *x < 1.0);
    match (key, share) {
        ("warmup_steps", Some(x)) => format!("; a share of the steps is warmup_ratio {x}"),
        ("eval_steps" | "save_steps" | "logging_steps", Some(_)) => {
            "; shares of the run are not taken: write a number of steps".into()
        }
        _ => String::new(),
    }
}

impl Instead {
    /// As a key of a JSON file, or of a YAML file, for a key that stood there with the value `found`.
    pub fn in_file(self, yaml: bool, found: &serde_json::Value) -> String {
        let key = |key: &str| if yaml { key.to_string() } else { format!("\"{key}\"") };
        let text = |text: &str| if yaml { text.to_string() } else { format!("\"{text}\"") };
        match self {
            Write(name, value, why) if matches!(value, "true" | "false") => {
                format!("{why}write {}: {value}", key(name))
            }
            Write(name, value, why) => format!("{why}write {}: {}", key(name), text(value)),
            Name(name) => match paths_in(found) {
                Some(value) => format!("write {}: {value}", key(name)),
                None => format!("write {}", key(name)),
            },
            Do(what) => what.to_string(),
        }
    }

    /// As a flag, for one that stood there with these `words`.
    pub fn as_flag(self, words: &[String]) -> String {
        match self {
            Name(key) if words.is_empty() => format!("write --{key}"),
            Do(what) => what.to_string(),
            Write(_, _, why) => format!("{why}write {}", self.typed(words).join(" ")),
            Name(_) => format!("write {}", self.typed(words).join(" ")),
        }
    }

    /// The words to type for it; none where it is to be left out.
    pub fn typed(self, words: &[String]) -> Vec<String> {
        match self {
            Write(key, "true", _) => vec![format!("--{key}")],
            Write(key, "false", _) => vec![format!("--no_{}", key.trim_start_matches("use_"))],
            Write(key, value, _) => vec![format!("--{key}"), value.into()],
            Name(key) => std::iter::once(format!("--{key}")).chain(words.iter().cloned()).collect(),
            Do(_) => Vec::new(),
        }
    }
}

/// A value that can be written under another key as it is; of Axolotl's list of data sets the paths.
fn paths_in(found: &serde_json::Value) -> Option<String> {
    use serde_json::Value as J;
    match found {
        J::Null | J::Object(_) => None,
        J::Array(items) if items.iter().any(J::is_object) => {
            let paths: Vec<&str> = items.iter().filter_map(|item| item["path"].as_str()).collect();
            (paths.len() == items.len()).then(|| serde_json::json!(paths).to_string())
        }
        J::String(text) if text.contains(',') && !text.contains(['{', '[']) => {
            let names: Vec<&str> = text.split(',').map(str::trim).collect();
            Some(serde_json::json!(names).to_string()).filter(|text| text.len() <= 200)
        }
        _ => Some(found.to_string()).filter(|text| text.len() <= 200),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Command, find};

    #[test]
    fn every_advice_names_a_setting_and_no_name_is_one() {
        let mut seen = std::collections::BTreeSet::new();
        for (names, instead) in TABLE {
            if let Write(key, ..) | Name(key) = instead {
                assert!(find(key).is_some(), "{key} is no setting");
            }
            for name in *names {
                assert!(seen.insert(*name), "{name} stands twice");
                // Flags of other commands are answered; off-flags are written otherwise in a file.
                let other = find(name).filter(|s| s.commands.contains(Command::Sft));
                assert!(other.is_none(), "{name} is a setting of sft");
            }
        }
    }

    #[test]
    fn both_forms_say_what_to_type() {
        use serde_json::json;
        let of = |name: &str| instead(name).unwrap();
        let file = |name: &str, value: serde_json::Value| of(name).in_file(false, &value);
        let yaml = |name: &str, value: serde_json::Value| of(name).in_file(true, &value);
        assert_eq!(of("--bf16").as_flag(&["true".into()]), "write --mixed_precision bf16");
        assert_eq!(file("bf16", json!(true)), "write \"mixed_precision\": \"bf16\"");
        assert_eq!(yaml("bf16", json!("auto")), "write mixed_precision: bf16");
        assert_eq!(of("--gradient-checkpointing").as_flag(&[]), "write --recompute layer");
        assert_eq!(file("no_packing", json!(true)), "write \"packing\": false");
        assert_eq!(of("--sample_packing").as_flag(&[]), "write --packing");
        assert_eq!(of("Cutoff-Len").as_flag(&["512".into()]), "write --max_seq_len 512");
        assert_eq!(yaml("cutoff_len", json!(512)), "write max_seq_len: 512");
        let sets = json!([{"path": "a.jsonl", "type": "alpaca"}, {"path": "b.jsonl"}]);
        assert_eq!(yaml("datasets", sets), "write dataset_paths: [\"a.jsonl\",\"b.jsonl\"]");
        assert_eq!(instead("zzz"), None);
        assert_eq!(yaml("dataset", json!("a, b")), "write dataset_paths: [\"a\",\"b\"]");
        assert_eq!(instead_on("merge", "adapter"), Some(Name("model_path")));
        assert_eq!(instead_on("sft", "adapter"), instead("adapter"));
    }

    /// What is off, not set, or another way to train.
    #[test]
    fn the_value_decides_what_is_meant() {
        let of = |name: &str, value: &str| instead_of("sft", name, value).unwrap();
        let off = Do("it is off; leave it out");
        assert_eq!((of("bf16", "true"), of("bf16", "False")), (instead("bf16").unwrap(), off));
        assert_eq!((of("fp16", "null"), of("gradient_checkpointing", "false")), (off, off));
        assert_eq!(of("sample_packing", "false"), Write("packing", "false", ""));
        assert_eq!(of("cutoff_len", "null"), Do("it is not set; leave it out"));
        assert_eq!(
            (of("no_lora", "true"), of("no_lora", "false")),
            (Write("use_lora", "false", ""), Write("use_lora", "true", ""))
        );
        for (name, value) in [("finetuning_type", "full"), ("adapter", "null"), ("full_finetuning", "true")] {
            assert_eq!(of(name, value), Write("use_lora", "false", ""), "{name} {value}");
        }
        assert_eq!((of("adapter", "lora"), of("adapter", "qlora")), (LORA, LORA));
        for (value, own) in
            [("llama3", true), ("Qwen2.5", true), ("default", true), ("llama2", false), ("alpaca", false)]
        {
            assert_eq!(matches!(of("template", value), Write("prompt_template", "model", _)), own, "{value}");
        }
        assert!(matches!(of("finetuning_type", "freeze"), Do(what) if what.contains("no_lora")));
    }

    #[test]
    fn words_of_other_tools_for_a_value_are_answered() {
        assert_eq!(value_hint("warmup_steps", "0.1"), "; a share of the steps is warmup_ratio 0.1");
        assert!(value_hint("lr_scheduler_type", "constant_with_warmup").contains("write constant"));
        assert_eq!(value_hint("lr_scheduler_type", "banana"), "");
        for (key, words, _) in VALUES {
            let kind = find(key).unwrap().kind;
            words.iter().for_each(|word| assert!(kind.parse(&[word]).is_err(), "{key} takes {word}"));
        }
    }
}
