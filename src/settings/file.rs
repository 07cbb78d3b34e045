//! Reading a config file: one JSON object of settings, or one YAML mapping, every mistake an error that names the key.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::{Setting, TABLE, Value, find, habits, nearest};
use crate::error::{Error, Result};
use crate::files::unmarked;
use crate::text::plural;

/// The settings of a config file in its order.
///
/// Keys that begin with `//` are comments. `text` is the file's content and `name` what messages call it: YAML where it ends in `.yaml` or
/// `.yml`, else JSON.
///
/// # Errors
/// Usage errors: not one object, an unknown key (with the nearest known one), a key given twice, a value of another
/// type than its setting takes.
pub fn read(text: &str, name: &str) -> Result<Vec<(&'static Setting, Value)>> {
    let fail = |message: String| Error::usage(message).context(name);
    let text = unmarked(text);
    if name.to_ascii_lowercase().ends_with(".toml") {
        return Err(fail(
            "TOML is not read; write its lines as YAML (`key: value`, lists as [a, b]) in a file that ends in .yaml"
                .into(),
        ));
    }
    let pairs = match is_yaml(name) {
        true => serde_saphyr::from_str::<Pairs>(text)
            .map_err(|e| fail(format!("expected one YAML mapping of settings: {}", e.to_string().trim_end())))?,
        false => serde_json::from_str::<Pairs>(text)
            .map_err(|e| fail(format!("expected one JSON object of settings: {e}")))?,
    };
    let Pairs(pairs) = pairs;
    let mut settings: Vec<(&'static Setting, Value)> = Vec::new();
    let mut named: Vec<String> = Vec::new();
    let mut unknown: Vec<(String, String)> = Vec::new();
    let mut wrong: Vec<(String, String)> = Vec::new();
    for (key, json) in pairs.into_iter().filter(|(k, _)| !k.starts_with("//")) {
        let Some(setting) = find(&key) else {
            // All of them at once: a file of another tool has many.
            unknown.push((key.clone(), instead_of(&key, &json, is_yaml(name))));
            continue;
        };
        if let Some(i) = settings.iter().position(|(s, _)| s.key == setting.key) {
            let other = &named[i];
            return Err(fail(match *other == key {
                true => format!("key \"{key}\" stands twice"),
                false => format!("keys \"{other}\" and \"{key}\" are the same setting; leave one out"),
            }));
        }
        // null is how tools write "not set".
        if json.is_null() {
            continue;
        }
        match setting.kind.from_json(&json).and_then(|value| value.with_variables(setting.kind)) {
            Ok(value) => {
                settings.push((setting, value));
                named.push(key);
            }
            Err(found) => {
                let hint = hint(setting.key, &json);
                wrong.push((key, format!("expected {}, found {found}{hint}", setting.kind.expected())));
            }
        }
    }
    match (&unknown[..], &wrong[..]) {
        ([], []) => Ok(settings),
        ([(key, answer)], []) => Err(fail(format!("unknown key \"{key}\"; {answer}"))),
        ([], [(key, answer)]) => Err(fail(format!("key \"{key}\": {answer}"))),
        (unknown, wrong) => {
            let all = unknown.iter().chain(wrong);
            let lines: Vec<String> = all.map(|(key, answer)| format!("\n  \"{key}\": {answer}")).collect();
            let what = match (unknown, wrong) {
                (_, []) => format!("{} unknown keys", unknown.len()),
                ([], _) => format!("{} keys with a value of another kind", wrong.len()),
                _ => format!("{} unknown, {} with a value of another kind", plural(unknown.len(), "key"), wrong.len()),
            };
            Err(fail(what + &lines.concat()))
        }
    }
}

/// Whether a file of this name holds YAML.
pub(super) fn is_yaml(name: &str) -> bool {
    [".yaml", ".yml"].iter().any(|ending| name.to_ascii_lowercase().ends_with(ending))
}

/// What to write instead of a key that is no setting: another tool's, or the nearest name.
fn instead_of(key: &str, value: &serde_json::Value, yaml: bool) -> String {
    let found = value.as_str().map_or_else(|| value.to_string(), str::to_string);
    if let Some(instead) = habits::instead_of("", key, &found) {
        return instead.in_file(yaml, value);
    }
    match nearest(key, TABLE.iter().flat_map(|s| s.aliases.iter().copied().chain([s.key]))) {
        Some(near) => format!("did you mean \"{near}\"?"),
        None => "configs/README.md lists every key".into(),
    }
}

/// A word more where a value is a common wish that is refused for a reason.
pub fn hint(key: &str, found: &serde_json::Value) -> String {
    match found {
        serde_json::Value::Array(items) => {
            items.iter().map(|item| hint(key, item)).find(|hint| !hint.is_empty()).unwrap_or_default()
        }
        serde_json::Value::String(text) => habits::value_hint(key, text),
        other => habits::value_hint(key, &other.to_string()),
    }
}

/// Key-value pairs in the file's order, duplicates kept: `serde_json::Map` would silently take the last.
struct Pairs(Vec<(String, serde_json::Value)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        d.deserialize_map(PairsVisitor)
    }
}

struct PairsVisitor;

impl<'de> Visitor<'de> for PairsVisitor {
    type Value = Pairs;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(Pairs(pairs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let e = read(text, "c.json").unwrap_err();
        assert_eq!(e.to_string(), format!("c.json: {expected}"));
        assert_eq!(e.exit_code(), 2);
    }

    #[test]
    fn mistakes_name_the_key() {
        check(r#"{"lora_rr": 8}"#, r#"unknown key "lora_rr"; did you mean "lora_r"?"#);
        check(r#"{"zzz": 8}"#, r#"unknown key "zzz"; configs/README.md lists every key"#);
        check(r#"{"learning_rate": "abc"}"#, r#"key "learning_rate": expected a number above 0, found the text "abc""#);
        check(r#"{"seed": 1, "seed": 2}"#, r#"key "seed" stands twice"#);
        check(
            r#"{"lr": 1, "learning_rate": 2}"#,
            r#"keys "lr" and "learning_rate" are the same setting; leave one out"#,
        );
        check(r#"{"bf16": true}"#, r#"unknown key "bf16"; write "mixed_precision": "bf16""#);
        check(
            r#"{"bf16": true, "zzz": 1, "cutoff_len": 512}"#,
            "3 unknown keys\n  \"bf16\": write \"mixed_precision\": \"bf16\"\n  \"zzz\": configs/README.md lists every key\n  \
             \"cutoff_len\": write \"max_seq_len\": 512",
        );
        check(
            r#"{"bf16": true, "lr": "abc"}"#,
            "1 key unknown, 1 with a value of another kind\n  \"bf16\": write \"mixed_precision\": \"bf16\"\n  \"lr\": expected a number above 0, \
             found the text \"abc\"",
        );
        check(
            r#"{"seed": "a", "lr": "abc"}"#,
            "2 keys with a value of another kind\n  \"seed\": expected a whole number, found the text \"a\"\n  \"lr\": expected a number above 0, \
             found the text \"abc\"",
        );
        assert!(
            read("a = 1", "c.toml")
                .unwrap_err()
                .to_string()
                .starts_with("c.toml: TOML is not read; write its lines as YAML")
        );
        check(
            "[1]",
            "expected one JSON object of settings: invalid type: sequence, expected an object at line 1 column 0",
        );
        assert!(read("{\"seed\": 1", "c").is_err() && read("{} x", "c").is_err());
    }

    #[test]
    fn yaml_says_the_same_as_json() {
        let yaml = "# why\nlr: 2e-4\nmixed_precision: no\nuse_lora: false\nmax_steps: null\nlora_targets: [q, v]\n\
                    dataset_paths:\n  - a.jsonl\n  - \"b, c.jsonl\"\nseed: 18446744073709551615\noutput_dir: 007\n";
        let json = r#"{"lr": 2e-4, "mixed_precision": "no", "use_lora": false, "max_steps": null, "lora_targets": ["q", "v"],
            "dataset_paths": ["a.jsonl", "b, c.jsonl"], "seed": 18446744073709551615, "output_dir": "007"}"#;
        let read = |text: &str, name: &str| -> Vec<(&str, Value)> {
            let pairs = read(text, name).unwrap();
            pairs.into_iter().map(|(s, v)| (s.key, v)).collect()
        };
        assert_eq!(read(&yaml.replace("007", "\"007\""), "c.yaml"), read(json, "c.json"));
        assert_eq!(read("mixed_precision: \"no\"", "c.yml"), read(r#"{"mixed_precision": "no"}"#, "c"));
        let error = |text: &str| super::read(text, "c.yaml").unwrap_err().to_string();
        assert!(error("lora_rr: 8").contains("unknown key \"lora_rr\"; did you mean \"lora_r\"?"));
        assert!(error("seed: 1\nseed: 2").contains("seed"), "{}", error("seed: 1\nseed: 2"));
        assert!(read("", "c.yaml").is_empty());
        for bad in ["- a", "seed: [", "a: &a [*a]", "learning_rate: abc"] {
            assert!(error(bad).starts_with("c.yaml: "), "{}", error(bad));
        }
    }

    #[test]
    fn comments_aliases_and_null() {
        let s = read("\u{feff}{\"// why\": 1, \"grad_accum\": 4, \"max_steps\": null, \"lora_r\": null}", "c").unwrap();
        assert_eq!(s.len(), 1);
        assert_eq!((s[0].0.key, &s[0].1), ("gradient_accumulation_steps", &Value::Int(4)));
    }
}
