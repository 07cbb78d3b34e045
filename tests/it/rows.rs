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
    check(r#"{"instruction": "a", "output": "b"}"#, r#"field "prompt" is missing"#, r#""instruction", "output""#);
    check(r#"{"prompt": "", "response": "a"}"#, r#"field "prompt" is empty"#, r#"found """#);
    check(r#"{"prompt": "a", "response": " \n"}"#, r#"field "response" is empty"#, "found only white space");
    check(r#"{"prompt": "a", "response": "b", "system": ""}"#, r#"field "system" is empty"#, "found");
    check(r#"{"prompt": 5, "response": "a"}"#, r#"field "prompt" is not a string"#, "found a number");
    check(r#"{"prompt": "a", "response": null}"#, r#"field "response" is not a string"#, "found null");
    check(r#"{"prompt": ["a"], "response": "a"}"#, r#"field "prompt" is not a string"#, "found an array");
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
    assert_eq!(file.rows.iter().map(|r| r.line).collect::<Vec<_>>(), [1, 8]);
    assert_eq!(file.rows[1].prompt(), "nul\0byte");
    assert_eq!(file.bad.iter().map(|b| b.line).collect::<Vec<_>>(), [3, 4, 5, 6, 7, 9, 10, 11, 12, 13]);
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
