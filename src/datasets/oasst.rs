//! OpenAssistant conversations (OASST1): message trees or flat messages to English pairs or conversations.
//!
//! Source: Köpf et al. 2023, arXiv:2304.07327. A tree starts with a prompter's message; replies alternate; annotators ranked
//! the replies of one message, 0 the best.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use super::rows::{Collected, Row, Turn, field, kind};
use crate::words::words;

/// Which branches of a tree become rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Paths {
    /// From the root along the best-ranked usable reply at every fork: one path a tree.
    #[default]
    Best,
    /// Every reply of every usable prompt.
    All,
}
words!(Paths { Best = "best", All = "all" });

/// How to convert.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which branches.
    pub paths: Paths,
    /// Whole conversations as `messages` instead of one pair for each prompt and its answer.
    pub multi_turn: bool,
}

struct Message {
    text: String,
    prompter: bool,
    /// Why this message cannot be used, if so.
    unusable: Option<&'static str>,
    rank: Option<i64>,
    children: Vec<usize>,
}

/// Converts records of either upstream form: trees (`{"message_tree_id", "tree_state", "prompt": {..., "replies": [...]}}`) or
/// one message a record (`parent_id`, `tree_state`).
///
/// Used are messages in English, not deleted, not rejected by review, in trees that are ready for export. Messages whose
/// parent is not in the file are dropped and counted.
///
/// # Errors
/// The first record with a missing or mistyped field, by its number from 1.
pub fn convert(records: &[Value], options: Options) -> Result<Collected, String> {
    let mut out = Collected::default();
    let mut messages: Vec<Message> = Vec::new();
    let mut roots = Vec::new();
    if records.iter().any(|r| r.get("prompt").is_some()) {
        for (i, record) in records.iter().enumerate() {
            let root = record.get("prompt").ok_or_else(|| format!("record {}: field \"prompt\" is missing", i + 1))?;
            let state = record.get("tree_state").and_then(Value::as_str);
            roots.push(add_tree(root, state, &mut messages).map_err(|e| format!("record {}: {e}", i + 1))?);
        }
    } else {
        roots = link_flat(records, &mut messages, &mut out)?;
    }
    for &root in &roots {
        count_unusable(&messages, root, &mut out);
        let mut path = Vec::new();
        walk(&messages, root, options, &mut path, &mut out);
    }
    Ok(out)
}

/// Adds a tree without recursion, so that a hostile depth cannot exhaust the stack; gives the root's index.
fn add_tree(root: &Value, state: Option<&str>, messages: &mut Vec<Message>) -> Result<usize, String> {
    let first = messages.len();
    let mut open: Vec<(&Value, Option<usize>)> = vec![(root, None)];
    while let Some((value, parent)) = open.pop() {
        let index = messages.len();
        messages.push(parse(value, state)?);
        if let Some(p) = parent {
            messages[p].children.push(index);
        }
        match value.get("replies") {
            None | Some(Value::Null) => {}
            // Reversed, because the stack gives the last one first.
            Some(Value::Array(replies)) => open.extend(replies.iter().rev().map(|r| (r, Some(index)))),
            Some(other) => return Err(format!("field \"replies\": expected an array, found {}", kind(other))),
        }
    }
    Ok(first)
}

/// Links flat messages by `parent_id`; gives the roots in file order.
fn link_flat(records: &[Value], messages: &mut Vec<Message>, out: &mut Collected) -> Result<Vec<usize>, String> {
    let mut by_id: HashMap<&str, usize> = HashMap::new();
    for (i, record) in records.iter().enumerate() {
        let id = record
            .get("message_id")
            .and_then(Value::as_str)
            .ok_or_else(|| format!("record {}: field \"message_id\": expected a string", i + 1))?;
        let state = record.get("tree_state").and_then(Value::as_str);
        messages.push(parse(record, state).map_err(|e| format!("record {}: {e}", i + 1))?);
        if by_id.insert(id, i).is_some() {
            return Err(format!("record {}: message_id {id} appears twice", i + 1));
        }
    }
    let mut roots = Vec::new();
    for (i, record) in records.iter().enumerate() {
        match record.get("parent_id").and_then(Value::as_str) {
            None => roots.push(i),
            Some(parent) => match by_id.get(parent) {
                Some(&p) if p != i => messages[p].children.push(i),
                _ => out.drop("message without its parent"),
            },
        }
    }
    Ok(roots)
}

fn parse(value: &Value, state: Option<&str>) -> Result<Message, String> {
    if !value.is_object() {
        return Err(format!("expected an object, found {}", kind(value)));
    }
    let text = field(value, "text")?;
    let role = field(value, "role")?;
    let prompter = match role.as_str() {
        "prompter" => true,
        "assistant" => false,
        other => {
            return Err(format!("field \"role\": expected \"prompter\" or \"assistant\", found {other:?}"));
        }
    };
    let flag = |key| value.get(key).and_then(Value::as_bool);
    let unusable = if state.is_some_and(|s| s != "ready_for_export") {
        Some("tree not ready for export")
    } else if flag("deleted") == Some(true) {
        Some("deleted message")
    } else if flag("review_result") == Some(false) {
        Some("message rejected by review")
    } else if field(value, "lang")? != "en" {
        Some("message not in English")
    } else if text.is_empty() {
        Some("empty message")
    } else {
        None
    };
    Ok(Message { text, prompter, unusable, rank: value.get("rank").and_then(Value::as_i64), children: Vec::new() })
}

/// Counts each unusable message of a tree once.
fn count_unusable(messages: &[Message], root: usize, out: &mut Collected) {
    let mut open = vec![root];
    let mut reasons: BTreeMap<&'static str, usize> = BTreeMap::new();
    while let Some(m) = open.pop() {
        if let Some(reason) = messages[m].unusable {
            *reasons.entry(reason).or_default() += 1;
        }
        open.extend(&messages[m].children);
    }
    for (reason, n) in reasons {
        *out.dropped.entry(reason).or_default() += n;
    }
}

/// The usable children of the right role: all of them, or the best-ranked one. Unranked ones come last, ties in file order.
fn next(messages: &[Message], m: usize, paths: Paths) -> Vec<usize> {
    let mut usable: Vec<usize> = messages[m].children.clone();
    usable.retain(|&c| messages[c].unusable.is_none() && messages[c].prompter != messages[m].prompter);
    usable.sort_by_key(|&c| messages[c].rank.unwrap_or(i64::MAX));
    if paths == Paths::Best {
        usable.truncate(1);
    }
    usable
}

/// Walks one tree depth first without recursion; a row for each answer (pairs) or for each end of a path (conversations).
fn walk(messages: &[Message], root: usize, options: Options, path: &mut Vec<usize>, out: &mut Collected) {
    if messages[root].unusable.is_some() || !messages[root].prompter {
        return;
    }
    let mut open: Vec<(usize, usize)> = vec![(root, 0)];
    while let Some((m, depth)) = open.pop() {
        path.truncate(depth);
        path.push(m);
        let children = next(messages, m, options.paths);
        if !messages[m].prompter && !options.multi_turn {
            let prompt = messages[path[depth - 1]].text.clone();
            out.keep(Row::Pair { prompt, response: messages[m].text.clone() });
        }
        // A conversation ends where no usable answer follows; a trailing question without one is left out.
        let goes_on = children.iter().any(|&c| !messages[c].prompter || !next(messages, c, options.paths).is_empty());
        if options.multi_turn && !messages[m].prompter && !goes_on {
            let turns: Vec<Turn> = path
                .iter()
                .map(|&i| (if messages[i].prompter { "user" } else { "assistant" }, messages[i].text.clone()))
                .collect();
            out.keep(Row::Conversation(turns));
        }
        if messages[m].prompter && children.is_empty() {
            out.drop("prompt without a usable answer");
        }
        open.extend(children.iter().rev().map(|&c| (c, depth + 1)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(id: &str, parent: Option<&str>, role: &str, rank: Option<i64>, text: &str) -> Value {
        json!({"message_id": id, "parent_id": parent, "role": role, "lang": "en", "text": text, "deleted": false,
               "review_result": true, "tree_state": "ready_for_export", "rank": rank})
    }

    fn forest() -> Vec<Value> {
        vec![
            message("a", None, "prompter", None, "Name a prime."),
            message("b", Some("a"), "assistant", Some(1), "7"),
            message("c", Some("a"), "assistant", Some(0), "Seven."),
            message("d", Some("c"), "prompter", Some(0), "A bigger one?"),
            message("e", Some("d"), "assistant", None, "7919"),
            message("f", Some("c"), "prompter", Some(1), "Smaller?"),
            message("g", Some("f"), "assistant", Some(0), "2"),
            message("h", Some("gone"), "assistant", Some(0), "orphan"),
        ]
    }

    fn pairs(got: &Collected) -> Vec<(String, String)> {
        let pair = |r: &Row| match r {
            Row::Pair { prompt, response } => (prompt.clone(), response.clone()),
            Row::Conversation(_) => panic!("a pair was expected"),
        };
        got.rows.iter().map(pair).collect()
    }

    #[test]
    fn best_path_takes_the_best_rank_at_every_fork() {
        let got = convert(&forest(), Options { paths: Paths::Best, multi_turn: false }).unwrap();
        let want = [("Name a prime.", "Seven."), ("A bigger one?", "7919")];
        assert_eq!(pairs(&got), want.map(|(a, b)| (a.to_string(), b.to_string())));
        assert_eq!(got.dropped.get("message without its parent"), Some(&1));
    }

    #[test]
    fn all_paths_give_every_answer_and_every_conversation() {
        let got = convert(&forest(), Options { paths: Paths::All, multi_turn: false }).unwrap();
        assert_eq!(pairs(&got).len(), 4);
        let got = convert(&forest(), Options { paths: Paths::All, multi_turn: true }).unwrap();
        let lengths: Vec<usize> = got
            .rows
            .iter()
            .map(|r| match r {
                Row::Conversation(t) => t.len(),
                Row::Pair { .. } => 0,
            })
            .collect();
        assert_eq!(lengths, [4, 4, 2]);
    }

    #[test]
    fn unusable_messages_cut_their_branch_and_are_counted() {
        let mut records = forest();
        records[2]["deleted"] = json!(true);
        records[1]["lang"] = json!("de");
        let got = convert(&records, Options { paths: Paths::Best, multi_turn: false }).unwrap();
        assert!(got.rows.is_empty());
        let dropped: Vec<_> = got.dropped.into_iter().collect();
        let want = [
            ("deleted message", 1),
            ("message not in English", 1),
            ("message without its parent", 1),
            ("prompt without a usable answer", 1),
        ];
        assert_eq!(dropped, want);
    }

    #[test]
    fn trees_and_flat_messages_agree() {
        let reply = |id, role, rank, text, replies: Vec<Value>| {
            let mut m = message(id, None, role, rank, text);
            m["replies"] = json!(replies);
            m
        };
        let tree = json!({"message_tree_id": "a", "tree_state": "ready_for_export", "prompt":
            reply("a", "prompter", None, "Name a prime.", vec![
                reply("b", "assistant", Some(1), "7", vec![]),
                reply("c", "assistant", Some(0), "Seven.", vec![
                    reply("d", "prompter", Some(0), "A bigger one?", vec![reply("e", "assistant", None, "7919", vec![])]),
                    reply("f", "prompter", Some(1), "Smaller?", vec![reply("g", "assistant", Some(0), "2", vec![])])])])});
        for multi_turn in [false, true] {
            for paths in [Paths::Best, Paths::All] {
                let o = Options { paths, multi_turn };
                let trees = convert(std::slice::from_ref(&tree), o).unwrap().rows;
                assert_eq!(trees, convert(&forest(), o).unwrap().rows);
            }
        }
    }

    #[test]
    fn bad_roles_name_the_record() {
        let e = convert(&[message("a", None, "judge", None, "x")], Options { paths: Paths::Best, multi_turn: false });
        assert_eq!(e.unwrap_err(), "record 1: field \"role\": expected \"prompter\" or \"assistant\", found \"judge\"");
    }
}
