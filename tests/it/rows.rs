//! Rows: every kind of bad line has its own message, and skipping counts and names what it leaves out.

use std::path::Path;

use ringtune::data::jsonl::{BadRows, RowOptions, parse_rows, read_rows};
use ringtune::data::row::{Message, Role};

const GOOD: &str = r#"{"prompt": "p", "response": "r"}"#;

fn options() -> RowOptions {
    RowOptions::default()
}

/// The message for a second line that is bad.
fn error_of(line: &[u8]) -> String {
    let mut bytes = format!("{GOOD}\n").into_bytes();
    bytes.extend(line);
    bytes.push(b'\n');
    parse_rows("f.jsonl", &bytes, &options()).unwrap_err().to_string()
}

#[test]
fn each_kind_of_bad_line_names_place_expected_and_found() {
    let check = |line: &str, what: &str, found: &str| {
        let e = error_of(line.as_bytes());
        assert!(e.starts_with("f.jsonl:2: "), "{e}");
        assert!(e.contains(what) && e.contains("expected") && e.contains(found), "{line}: {e}");
    };
    check(r#"{"prompt": "a"}"#, r#"field "response" is missing"#, r#"found the fields "prompt""#);
    check(r#"{"response": "a"}"#, r#"field "prompt" is missing"#, r#"found the fields "response""#);
    check("{}", r#"field "prompt" is missing"#, "found no fields");
    check(r#"{"instruction": "a"}"#, r#"field "output" is missing"#, r#"found the fields "instruction""#);
    check(r#"{"conversations": {}}"#, r#"field "conversations" is not a list"#, "found an object");
    check(r#"{"conversations": [{"from": "tool", "value": "a"}]}"#, "expected system, human or gpt", r#"found "tool""#);
    check(r#"{"prompt": "a", "response": "b", "completion": "c"}"#, "two answers at once", r#""completion""#);
    check(r#"{"messages": [{"role": "user", "content": "a"}], "conversations": [{}]}"#, "two forms at once", "conv");
    check(r#"{"messages": [{"role": "system", "content": "a"}], "system": "b"}"#, "beside a first turn", "system");
    check(r#"{"instruction": "a", "output": "b", "response": "c"}"#, "two answers at once", r#""response""#);
    check(r#"{"instruction": "a", "completion": "b", "response": "c"}"#, "two answers at once", r#""completion""#);
    check(r#"{"prompt": "a", "response": "b", "weight": 0.5}"#, r#"field "weight" is neither 0 nor 1"#, "found 0.5");
    check(
        r#"{"prompt": "a", "response": "b", "weight": 0, "train": true}"#,
        "contradict each other",
        "found true and 0",
    );
    let content = |c: &str| format!(r#"{{"messages": [{{"role": "user", "content": {c}}}]}}"#);
    check(&content(r#"[{"type": "image_url", "image_url": {}}]"#), "content[0] of messages[0] is no text", "image_url");
    check(&content(r#"[{"type": "text"}]"#), r#"field "text" of content[0] of messages[0]"#, "found nothing");
    check(&content(r#"["a"]"#), "content[0] of messages[0] is not an object", "found a string");
    check(&content("[]"), "is not a string", "found an array");
    check(&content("null"), r#"field "content" of messages[0] is not a string"#, "found null");
    let calls = r#"{"messages": [{"role": "assistant", "content": null, "tool_calls": [{}]}]}"#;
    check(calls, r#"field "content" of messages[0]"#, r#"found null beside "tool_calls"; calls are not trained"#);
    check(r#"{"prompt": "", "response": "a"}"#, r#"field "prompt" is empty"#, r#"found """#);
    check(r#"{"prompt": "a", "response": " \n"}"#, r#"field "response" is empty"#, "found only white space");
    check(r#"{"prompt": 5, "response": "a"}"#, r#"field "prompt" is not a string"#, "found a number");
    check(r#"{"prompt": "a", "response": null}"#, r#"field "response" is not a string"#, "found null");
    check(r#"{"prompt": ["a"], "response": "a"}"#, "prompt[0] is not an object", "found a string");
    check(r#"{"prompt": [], "response": "a"}"#, r#"field "prompt" is empty"#, "found []");
    check(r#"{"prompt": {"a": 1}, "response": "a"}"#, r#"field "prompt" is not a string"#, "found an object");
    check(r#"{"prompt": true, "response": "a"}"#, r#"field "prompt" is not a string"#, "found a boolean");
    check(r#"{"prompt": "a", "prompt": "b", "response": "c"}"#, r#"field "prompt" appears twice"#, "dup");
    check("not json", "invalid JSON", "near `not json`");
    check(r#"{"prompt": "a", "response": "b"} x"#, "invalid JSON", "trailing characters");
    check(r#"{"prompt": "a", "response": "b",}"#, "invalid JSON", "column");
    check(r#"{"prompt": "a\u12", "response": "b"}"#, "invalid JSON", "column");
    check("{\"prompt\": \"a\tb\", \"response\": \"b\"}", "invalid JSON", "control character");
    check(r#"{"prompt": "\ud83d", "response": "b"}"#, "invalid JSON", "surrogate");
    check(r#"{"prompt": "a", "resp"#, "invalid JSON", "found the end of the line");
    check(r#"["a","b"]"#, "not a JSON object", "found an array");
    check("5", "not a JSON object", "found a number");
    check("null", "not a JSON object", "found null");
    check(r#""a""#, "not a JSON object", "found a string");
    check(r#"{"messages": []}"#, r#"field "messages" is empty"#, "found []");
    check(r#"{"messages": "a"}"#, r#"field "messages" is not a list"#, "found a string");
    check(r#"{"messages": ["a"]}"#, "messages[0] is not an object", "found a string");
    check(r#"{"messages": [{"role": "user"}]}"#, r#"field "content" of messages[0] is missing"#, r#""role""#);
    check(r#"{"messages": [{"content": "a"}]}"#, r#"field "role" of messages[0] is missing"#, r#""content""#);
    check(r#"{"messages": [{"role": "human", "content": "a"}]}"#, "role", r#"found "human""#);
    check(r#"{"messages": [{"role": "user", "content": ""}]}"#, "is empty", "found");
    check(r#"{"messages": [{"role": "user", "content": 1}]}"#, "is not a string", "found a number");
    check(r#"{"messages": [{"role": "user", "content": "a", "train": 1}]}"#, r#"field "train""#, "found a number");
    check(r#"{"messages": [{"role": "user", "role": "user", "content": "a"}]}"#, "appears twice", "dup");
    check(r#"{"messages": [{"role": "user", "content": "a"}], "prompt": "b"}"#, "two forms at once", r#""prompt""#);
    check(&format!("{}1{}", "[".repeat(500), "]".repeat(500)), "expected", "found");
    check(&format!("{{\"prompt\": {}", "[".repeat(500)), "invalid JSON", "found the end of the line");
}

#[test]
fn invalid_utf8_and_long_lines_are_named() {
    let e = error_of(b"{\"prompt\": \"caf\xe9\", \"response\": \"x\"}");
    assert!(e.starts_with("f.jsonl:2: invalid UTF-8") && e.contains("0xe9 at column 16"), "{e}");
    let short = RowOptions { max_line_bytes: 40, ..options() };
    let long = format!("{GOOD}\n{{\"prompt\": \"{}\", \"response\": \"b\"}}", "x".repeat(50));
    let e = parse_rows("f.jsonl", long.as_bytes(), &short).unwrap_err().to_string();
    assert!(e.contains("f.jsonl:2: the line is too long, expected at most 40 bytes, found"), "{e}");
}

#[test]
fn a_truncated_last_line_says_so() {
    let e =
        parse_rows("f", format!("{GOOD}\n{{\"prompt\": \"a\", \"re").as_bytes(), &options()).unwrap_err().to_string();
    assert!(e.contains("f:2") && e.contains("truncated"), "{e}");
}

#[test]
fn empty_files_are_errors() {
    for (bytes, found) in [("", "0 bytes"), ("\n", "blank"), ("\n \r\n\t\n", "blank"), ("\u{feff}", "blank")] {
        let e = parse_rows("f", bytes.as_bytes(), &options()).unwrap_err().to_string();
        assert!(e.contains("expected one JSON object a line") && e.contains(found), "{bytes:?}: {e}");
    }
    assert!(read_rows(Path::new("tests/data/handmade/empty.jsonl"), &options()).is_err());
    let e = read_rows(Path::new("no/such.jsonl"), &options()).unwrap_err().to_string();
    assert!(e.starts_with("no/such.jsonl: "), "{e}");
}

#[test]
fn crlf_bom_and_blank_lines_are_accepted() {
    let file = read_rows(Path::new("tests/data/handmade/crlf_bom.jsonl"), &options()).unwrap();
    let texts: Vec<&str> = file.rows.iter().map(|r| r.response()).collect();
    assert_eq!(texts, ["one", "two"]);
    let file = parse_rows("f", format!("{GOOD}\n\n  \r\n{GOOD}").as_bytes(), &options()).unwrap();
    assert_eq!((file.rows.len(), file.blank_lines, file.rows[1].line), (2, 2, 4));
}

#[test]
fn handmade_files_fail_at_their_first_bad_line_or_skip_all_of_them() {
    let path = Path::new("tests/data/handmade/bad_rows.jsonl");
    let e = read_rows(path, &options()).unwrap_err().to_string();
    assert!(e.contains("bad_rows.jsonl:3: field \"response\" is missing"), "{e}");
    let file = read_rows(path, &RowOptions { bad_rows: BadRows::Skip, ..options() }).unwrap();
    assert_eq!(file.rows.iter().map(|r| r.line).collect::<Vec<_>>(), [1, 8, 12]);
    assert_eq!(file.rows[1].prompt(), "nul\0byte");
    assert_eq!(file.bad.iter().map(|b| b.line).collect::<Vec<_>>(), [3, 4, 5, 6, 7, 9, 10, 11, 13]);
    assert_eq!(file.blank_lines, 1);
    let e = read_rows(Path::new("tests/data/handmade/latin1.jsonl"), &options()).unwrap_err().to_string();
    assert!(e.contains("latin1.jsonl:1: invalid UTF-8"), "{e}");
}

#[test]
fn both_forms_give_conversations() {
    let text = r#"{"system": "s", "prompt": "p", "response": "r", "id": 7}
{"messages": [{"role": "system", "content": "s", "x": 1}, {"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}"#;
    let file = parse_rows("f", text.as_bytes(), &options()).unwrap();
    assert_eq!(file.rows[0].messages, file.rows[1].messages);
    assert_eq!(file.rows[0].context(), [Message::new(Role::System, "s"), Message::new(Role::User, "p")]);
    assert_eq!((file.rows[1].prompt(), file.rows[1].response()), ("p", "r"));
}

#[test]
fn the_first_error_in_file_order_is_reported_whatever_the_threads() {
    let mut text = format!("{GOOD}\n").repeat(5000);
    text.push_str("{}\n");
    text.push_str(&format!("{GOOD}\n").repeat(5000));
    text.push_str("nonsense\n");
    for _ in 0..5 {
        let e = parse_rows("f", text.as_bytes(), &options()).unwrap_err().to_string();
        assert!(e.starts_with("f:5001: "), "{e}");
    }
}

/// Bytes at random, and good lines with bytes changed, give rows or an error.
#[test]
fn damaged_lines_never_panic() {
    let stream = ringtune::rng::Stream::new(&[11]);
    let good = r#"{"messages": [{"role": "user", "content": "aé\ud83d\ude42"}, {"role": "assistant", "content": "b", "train": true}]}"#;
    let skip = RowOptions { bad_rows: BadRows::Skip, ..options() };
    for i in 0..3000u64 {
        let mut bytes = good.as_bytes().to_vec();
        for k in 0..1 + i % 4 {
            let at = stream.u64_at(16 * i + 2 * k) as usize % bytes.len();
            bytes[at] = stream.u64_at(16 * i + 2 * k + 1) as u8;
        }
        let _ = parse_rows("f", &bytes, &skip);
        let _ = parse_rows("f", &bytes, &options());
    }
}

/// The only row of a text, its form, and the keys that were not read.
fn read(text: &str) -> (Vec<Message>, String, Vec<String>) {
    let mut file = parse_rows("f", text.as_bytes(), &options()).unwrap();
    let (form, ignored) = (file.form(), file.ignored.iter().map(|i| i.0.clone()).collect());
    (file.rows.remove(0).messages, form, ignored)
}

fn turn(role: Role, content: &str, train: bool) -> Message {
    Message { train, ..Message::new(role, content) }
}

#[test]
fn null_is_a_field_left_out_and_an_empty_system_is_none() {
    let plain = [Message::new(Role::User, "p"), Message::new(Role::Assistant, "r")];
    for row in [
        r#"{"prompt": "p", "response": "r", "system": null, "train": null, "weight": null, "messages": null}"#,
        r#"{"prompt": "p", "response": "r", "system": "", "completion": null, "conversations": null, "instruction": null}"#,
        r#"{"prompt": "p", "response": "r", "system": " \n"}"#,
        r#"{"prompt": null, "response": null, "messages": [{"role": "user", "content": "p", "train": null, "tool_calls": null},
            {"role": "assistant", "content": "r", "weight": null, "from": null}], "system": null}"#,
        r#"{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]}"#,
        r#"{"instruction": "p", "input": null, "output": "r", "prompt": null}"#,
        r#"{"instruction": "p", "input": "", "output": "r", "history": []}"#,
    ] {
        let (messages, _, ignored) = read(&row.replace('\n', " "));
        assert_eq!((&messages[..], ignored.len()), (&plain[..], 0), "{row}");
    }
}

#[test]
fn every_form_is_read_and_named() {
    let check = |row: &str, form: &str, expected: &[(Role, &str, bool)]| {
        let (messages, found, ignored) = read(row);
        let expected: Vec<Message> = expected.iter().map(|&(r, c, t)| turn(r, c, t)).collect();
        assert_eq!((messages, found.as_str(), ignored.len()), (expected, form, 0), "{row}");
    };
    let (system, user, assistant) = (Role::System, Role::User, Role::Assistant);
    check(
        r#"{"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#,
        "ShareGPT",
        &[(system, "s", true), (user, "a", true), (assistant, "b", true)],
    );
    check(
        r#"{"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "a"}, {"role": "assistant", "content": "b"}]}"#,
        "ShareGPT",
        &[(system, "s", true), (user, "a", true), (assistant, "b", true)],
    );
    check(
        r#"{"instruction": "a", "input": "x", "output": "b", "system": "s"}"#,
        "Alpaca",
        &[(system, "s", true), (user, "a\nx", true), (assistant, "b", true)],
    );
    check(
        r#"{"instruction": "a", "context": "x", "response": "b"}"#,
        "Alpaca",
        &[(user, "a\nx", true), (assistant, "b", true)],
    );
    check(
        r#"{"prompt": "a", "completion": "b"}"#,
        "prompt and completion",
        &[(user, "a", true), (assistant, "b", true)],
    );
    check(
        r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
            "completion": [{"role": "assistant", "content": "d"}]}"#.replace('\n', " ").as_str(),
        "conversational prompt and completion",
        &[(user, "a", false), (assistant, "b", false), (user, "c", false), (assistant, "d", true)],
    );
    check(
        r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}, {"role": "assistant", "content": "c"}]}"#,
        "messages (lists of text parts)",
        &[(user, "a b", true), (assistant, "c", true)],
    );
    // A first question that stands beside the turns again, and system turns of every form that say nothing.
    for beside in [r#""prompt": "a", "#, r#""prompt": " a\n", "#, r#""prompt": null, "#] {
        check(
            &format!(
                r#"{{{beside}"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b"}}]}}"#
            ),
            "messages",
            &[(user, "a", true), (assistant, "b", true)],
        );
    }
    for nothing in [
        "null",
        "[]",
        r#""""#,
        r#"[{"type": "text", "text": ""}]"#,
        r#"[{"type": "text", "text": null}, {"type": "text", "text": " "}]"#,
    ] {
        check(
            &format!(
                r#"{{"messages": [{{"role": "system", "content": {nothing}}}, {{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b"}}]}}"#
            ),
            "messages",
            &[(user, "a", true), (assistant, "b", true)],
        );
    }
    check(
        r#"{"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "s"}"#,
        "Alpaca",
        &[(system, "s", true), (user, "a", true), (assistant, "b", true), (user, "c", true), (assistant, "d", true)],
    );
    for none in ["null", "[]", r#""""#] {
        let row = format!(r#"{{"instruction": "c", "output": "d", "history": {none}}}"#);
        check(&row, "Alpaca", &[(user, "c", true), (assistant, "d", true)]);
    }
    check(
        r#"{"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
        "messages",
        &[(system, "s", true), (user, "a", true), (assistant, "b", true)],
    );
    check(
        r#"{"system": "s", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
        "messages",
        &[(system, "s", true), (user, "a", true), (assistant, "b", true)],
    );
}

#[test]
fn weight_and_train_say_what_is_trained_of_a_turn_and_of_a_row() {
    let trained =
        |row: &str| read(row).0.iter().filter(|m| m.role == Role::Assistant).map(|m| m.train).collect::<Vec<_>>();
    let turns = |a: &str, b: &str| {
        let turn = |more: &str| {
            format!(r#"{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "x"{more}}}"#)
        };
        format!(r#"{{"messages": [{}, {}]"#, turn(a), turn(b))
    };
    assert_eq!(trained(&(turns(r#", "weight": 0"#, r#", "weight": 1"#) + "}")), [false, true]);
    assert_eq!(trained(&(turns(r#", "weight": 0.0, "train": false"#, "") + "}")), [false, true]);
    assert_eq!(trained(&(turns(r#", "train": true"#, "") + r#", "train": false}"#)), [false, false]);
    assert_eq!(trained(r#"{"prompt": "p", "response": "r", "train": false}"#), [false]);
    assert_eq!(trained(r#"{"prompt": "p", "response": "r", "weight": 0}"#), [false]);
    assert_eq!(trained(r#"{"instruction": "p", "output": "r", "weight": 1}"#), [true]);
    let said = r#"{"prompt": [{"role": "assistant", "content": "a", "train": true}], "completion": "b"}"#;
    assert_eq!(trained(said), [true, true]);
}

#[test]
fn keys_that_are_not_read_are_counted_with_the_first_line() {
    let text = r#"{"prompt": "p", "response": "r", "input": "x", "id": 7, "note": "", "tags": [], "meta": {}}
{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "r", "cache": 1}], "tool_calls": [{"a": 1}]}], "id": 8}"#;
    let file = parse_rows("f", text.as_bytes(), &options()).unwrap();
    let of = |key: &str, n: u64, line: u32| (key.to_string(), n, line);
    let expected = [of("input", 1, 1), of("id", 2, 1), of("content[].cache", 1, 2), of("messages[].tool_calls", 1, 2)];
    assert_eq!(file.ignored, expected);
    let many: String =
        (0..500).map(|i| format!("{{\"prompt\": \"p\", \"response\": \"r\", \"key{i}\": 1}}\n")).collect();
    assert_eq!(parse_rows("f", many.as_bytes(), &options()).unwrap().ignored.len(), 64);
}

#[test]
fn forms_of_other_trainers_say_what_to_do() {
    let check = |row: &str, advice: &str| {
        let e = error_of(row.as_bytes());
        assert!(e.contains(advice), "{row}: {e}");
    };
    check(r#"{"question": "a", "answer": "b"}"#, "read them with --columns prompt=question response=answer");
    check(r#"{"input": "a", "output": "b"}"#, "read them with --columns prompt=input response=output");
    check(
        r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#,
        "preference pairs are not trained on: read one side with --columns response=chosen",
    );
    check(r#"{"chosen": [{}], "rejected": [{}]}"#, "read one side with --columns messages=chosen");
    check(r#"{"text": "a"}"#, "ringtune pretrain");
    check(r#"{"data": [{"prompt": "a"}]}"#, "jq -c '.data[]'");
    check(r#"{"role": "user", "content": "a"}"#, "put the turns of a conversation under \"messages\"");
    check("{", "an object over several lines? make one line of each with jq -c .");
    check("prompt,response", "a table? its name has to end in .csv or .tsv");
    check("<!DOCTYPE html>", "a page instead of the file?");
    check("{'prompt': 'a'}", "Python's repr? write rows with json.dumps");
    check(r#"{"prompt": "a", "response": "b", "score": NaN}"#, "NaN and Infinity are no JSON: write null");
    for history in [r#"["a", "b"]"#, r#"[["a"]]"#, r#"[["a", 1]]"#, r#""x""#] {
        check(
            &format!(r#"{{"instruction": "a", "output": "b", "history": {history}}}"#),
            "field \"history\" is no list of pairs, expected [[",
        );
    }
    check(r#"{"INSTRUCTION": "a", "Response": "b"}"#, "--columns prompt=INSTRUCTION response=Response");
    check(r#"{"Messages": [{}]}"#, "--columns messages=Messages");
    check(r#"{"id": 1, "dialog": [{"role": "user", "content": "a"}]}"#, "read them with --columns messages=dialog");
    check(r#"{"turns": [{"from": "human", "value": "a"}]}"#, "read them with --columns messages=turns");
    check(
        r#"{"messages": "[{'role': 'user', 'content': 'a'}]"}"#,
        "found a string (Python's repr? write lists with json.dumps)",
    );
    check(r#"{"train": [{"prompt": "a"}], "test": []}"#, "jq -c '.train[]'");
    check(
        r#"{"messages": [{"role": "tool", "content": "a"}]}"#,
        "found \"tool\"; tools, their calls and what they give",
    );
    check(r#"{"conversations": [{"from": "observation", "value": "a"}]}"#, "leave the row out or write them as text");
    check(r#"{"prompt": "a", "response": "b"},"#, "objects a line, without commas between them");
    check("What is a ring?", "plain text? ringtune pretrain trains on it");
    check("\u{200b}{}", "near `\\u200b{}`");
    check("\u{a0}{}", "near `\\u00a0{}`");
}

#[test]
fn a_mark_at_the_start_of_any_line_is_passed_over() {
    let file = parse_rows("f", format!("{GOOD}\n\u{feff}{GOOD}\r\n\u{feff}\n{GOOD}\n").as_bytes(), &options()).unwrap();
    assert_eq!((file.rows.len(), file.blank_lines), (3, 1));
}

#[test]
fn an_array_and_gzip_are_read_and_a_broken_one_is_named() {
    let array = format!("[\n  {GOOD},\n {{\n\"instruction\": \"a\",\n\"output\": \"],[\"\n}}\n]\n");
    let file = parse_rows("f", array.as_bytes(), &options()).unwrap();
    assert_eq!(file.rows.iter().map(|r| (r.line, r.response())).collect::<Vec<_>>(), [(1, "r"), (2, "],[")]);
    assert_eq!(file.form(), "prompt and response (1), Alpaca (1), JSON array");
    for (bad, what) in [
        (
            format!("[{GOOD}, {{\"prompt\": 1}}]"),
            "f:2: field \"prompt\" is not a string, expected a string, found a number (element 2",
        ),
        (format!("[{GOOD},\n{GOOD}"), "f:3: invalid JSON"),
        (format!("[{GOOD},\n{{\"prompt\": \"a"), "truncated"),
        (format!("[{GOOD},]"), "f:2: invalid JSON"),
        ("[]".to_string(), "found an empty array"),
        (format!("[{GOOD}]\n[{GOOD}]"), "f:1: not a JSON object"),
    ] {
        let e = parse_rows("f", bad.as_bytes(), &options()).unwrap_err().to_string();
        assert!(e.contains(what), "{bad}: {e}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl.gz");
    let gz = |text: &str| {
        let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        std::io::Write::write_all(&mut out, text.as_bytes()).unwrap();
        out.finish().unwrap()
    };
    // Two members, as `cat a.gz b.gz` makes them.
    let packed = [gz(&format!("\u{feff}{GOOD}\n")), gz(&format!("{GOOD}\n"))].concat();
    std::fs::write(&path, &packed).unwrap();
    let file = read_rows(&path, &options()).unwrap();
    assert_eq!((file.rows.len(), file.form().as_str()), (2, "prompt and response, gzip"));
    // Padding, as who writes in blocks leaves it: behind the last member, and between them.
    for padded in [[&packed[..], &[0; 700]].concat(), [&gz(&format!("{GOOD}\n"))[..], &[0; 9], &packed].concat()] {
        let rows = if padded.len() > packed.len() + 500 { 2 } else { 3 };
        std::fs::write(&path, &padded).unwrap();
        assert_eq!(read_rows(&path, &options()).unwrap().rows.len(), rows);
    }
    std::fs::write(&path, [&packed[..], b"\0\0garbage"].concat()).unwrap();
    assert!(read_rows(&path, &options()).unwrap_err().to_string().contains("damaged gzip file: "));
    std::fs::write(&path, &packed[..packed.len() - 9]).unwrap();
    let e = read_rows(&path, &options()).unwrap_err().to_string();
    assert!(e.contains("damaged gzip file: "), "{e}");
}

#[test]
fn files_of_other_kinds_are_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let utf16: Vec<u8> = GOOD.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (bytes, what) in [
        ([b"\xff\xfe".as_slice(), &utf16].concat(), "UTF-16 text, expected UTF-8 text; convert it with iconv"),
        (utf16.clone(), "UTF-16 text"),
        (b"PAR1\x15\x04".to_vec(), "not a readable Parquet file"),
        (b"PK\x03\x04rest".to_vec(), "unzip"),
        (b"\x28\xb5\x2f\xfdrest".to_vec(), "zstd -d"),
        (b"version https://git-lfs.github.com/spec/v1\noid".to_vec(), "git lfs pull"),
    ] {
        let path = dir.path().join("f");
        std::fs::write(&path, &bytes).unwrap();
        let e = read_rows(&path, &options()).unwrap_err().to_string();
        assert!(e.contains(what), "{what}: {e}");
    }
    let e = read_rows(dir.path(), &options()).unwrap_err().to_string();
    assert!(e.contains("expected a file that can be read again, found a folder"), "{e}");
}
