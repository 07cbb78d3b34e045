//! The data sets that a `dataset_info.json` of LLaMA-Factory lists, as what is typed for them here: the list itself is not read as data.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::files::read_text;

/// Name of the list.
pub const LIST: &str = "dataset_info.json";
/// Most data sets that a message shows.
const SHOWN: usize = 12;

/// What is typed for each data set of a list; `None` where the file is no such list.
pub fn typed_for_all(list: &Path) -> Option<String> {
    let sets = read(list)?;
    let mut out = String::new();
    for (name, answer) in sets.iter().take(SHOWN) {
        let _ = write!(out, "\n  {name:?}: {answer}");
    }
    if sets.len() > SHOWN {
        let _ = write!(out, "\n  and {} more", sets.len() - SHOWN);
    }
    Some(out)
}

/// What is typed for a data set `name` that is no file, and the list here or in `data` that has it.
pub fn typed_for(name: &str) -> Option<(PathBuf, String)> {
    [LIST.into(), Path::new("data").join(LIST)].into_iter().find_map(|list: PathBuf| {
        let (_, answer) = read(&list)?.into_iter().find(|(listed, _)| listed == name)?;
        Some((list, answer))
    })
}

/// The names of a list, each with its answer.
fn read(list: &Path) -> Option<Vec<(String, String)>> {
    let text = read_text(list, 4 << 20).ok()?;
    let Value::Object(sets) = serde_json::from_str(&text).ok()? else { return None };
    let known = |set: &Value| {
        ["file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"]
            .iter()
            .any(|k| set[k].is_string())
    };
    let folder = list.parent().unwrap_or(Path::new(""));
    let all: Vec<_> =
        sets.iter().filter(|(_, set)| known(set)).map(|(name, set)| (name.clone(), answer(folder, set))).collect();
    (!all.is_empty()).then_some(all)
}

fn answer(folder: &Path, set: &Value) -> String {
    let text = |key: &str| set[key].as_str().filter(|text| !text.is_empty());
    if set["ranking"] == true {
        return "it holds preferences, which are not trained on".into();
    }
    if set["columns"]["images"].is_string()
        || set["columns"]["videos"].is_string()
        || set["columns"]["audios"].is_string()
    {
        return "it holds more than text, which is not read".into();
    }
    let path = match (text("file_name"), text("hf_hub_url")) {
        (_, Some(hub)) => {
            let config = text("subset").map(|subset| format!("/{subset}")).unwrap_or_default();
            let split = text("split").map(|split| format!(":{split}")).unwrap_or_default();
            format!("hf:{hub}{config}{split}")
        }
        (Some(file), None) => folder.join(file).display().to_string(),
        _ => return "it is on no hub that is read; download it and name the file".into(),
    };
    let columns = columns(set);
    let columns = if columns.is_empty() { String::new() } else { format!(" --columns {}", columns.join(" ")) };
    format!("write --dataset-paths {path}{columns}{}", foreign_tags(&set["tags"]).unwrap_or_default())
}

/// `FIELD=COLUMN` for the columns that are not found by their names.
fn columns(set: &Value) -> Vec<String> {
    let named = |key: &str| set["columns"][key].as_str();
    let turns = set["formatting"] == "sharegpt" || set["formatting"] == "openai";
    let fields: &[(&str, &str, &[&str])] = match turns {
        true => &[("messages", "conversations", &["conversations", "messages"]), ("system", "system", &["system"])],
        // A prompt and a response stand alone as well; with an input it is an instruction.
        false if named("query").is_none() && named("prompt") == Some("prompt") => {
            &[("response", "response", &["response", "completion"]), ("system", "system", &["system"])]
        }
        false => &[
            ("prompt", "instruction", &["instruction"]),
            ("query", "input", &["input", "context"]),
            ("response", "output", &["output", "response", "completion"]),
            ("system", "system", &["system"]),
        ],
    };
    let pair = |(key, field, found): &(&str, &str, &[&str])| {
        let column = named(key).filter(|column| !found.contains(column))?;
        Some(format!("{field}={column}"))
    };
    fields.iter().filter_map(pair).collect()
}

/// What is done about turns whose keys or roles have names of their own.
fn foreign_tags(tags: &Value) -> Option<String> {
    let known: [(&str, &[&str]); 5] = [
        ("role_tag", &["from", "role"]),
        ("content_tag", &["value", "content"]),
        ("user_tag", &["human", "user"]),
        ("assistant_tag", &["gpt", "assistant"]),
        ("system_tag", &["system"]),
    ];
    let other =
        known.iter().find_map(|(key, names)| Some((key, tags[key].as_str().filter(|tag| !names.contains(tag))?)))?;
    Some(format!(
        ", with {} {:?} of its turns renamed first (role, content; user, assistant, system are read)",
        other.0, other.1
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_data_set_of_a_list_is_answered_with_what_to_type() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join(LIST);
        let sets = json!({
            "identity": {"file_name": "identity.json"},
            "asked": {"file_name": "qa.json", "columns": {"prompt": "question", "query": "passage", "response": "answer"}},
            "pairs": {"file_name": "pairs.jsonl", "columns": {"prompt": "prompt", "response": "reply"}},
            "chats": {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "conversations", "system": "sys"},
                "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}},
            "turns": {"file_name": "turns.json", "formatting": "sharegpt", "columns": {"messages": "turns"}, "tags": {"role_tag": "speaker"}},
            "hub": {"hf_hub_url": "org/name", "subset": "en", "split": "train"},
            "dpo": {"file_name": "dpo.json", "ranking": true},
            "seen": {"file_name": "seen.json", "columns": {"messages": "messages", "images": "images"}},
        });
        std::fs::write(&list, sets.to_string()).unwrap();
        let here = dir.path().display();
        let expected = format!(
            "\n  \"identity\": write --dataset-paths {here}/identity.json\
             \n  \"asked\": write --dataset-paths {here}/qa.json --columns instruction=question input=passage output=answer\
             \n  \"pairs\": write --dataset-paths {here}/pairs.jsonl --columns response=reply\
             \n  \"chats\": write --dataset-paths {here}/chats.json --columns system=sys\
             \n  \"turns\": write --dataset-paths {here}/turns.json --columns conversations=turns, with role_tag \"speaker\" of its turns \
             renamed first (role, content; user, assistant, system are read)\
             \n  \"hub\": write --dataset-paths hf:org/name/en:train\
             \n  \"dpo\": it holds preferences, which are not trained on\
             \n  \"seen\": it holds more than text, which is not read"
        );
        assert_eq!(typed_for_all(&list).unwrap(), expected);
        // What the hub writes beside a data set is no list.
        for other in ["{\"features\": {\"a\": {\"dtype\": \"string\"}}, \"splits\": {}}", "[]", "x"] {
            std::fs::write(&list, other).unwrap();
            assert_eq!(typed_for_all(&list), None, "{other}");
        }
    }
}
