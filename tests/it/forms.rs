//! Data as people have it: tables, folders, patterns, columns of other names, validation files; and what `convert` makes of them.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::{Value, json};

use crate::program::{Workplace, first_rows, repository};
use crate::runs::MODEL;

/// A column of texts, and where each stands: definition and repetition levels, of columns that have them.
type Column<'a> = (Vec<&'a str>, Option<Vec<i16>>, Option<Vec<i16>>);

fn write_parquet(path: &Path, schema: &str, columns: &[Column<'_>]) {
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().build());
    let mut file = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    let mut group = file.next_row_group().unwrap();
    for (texts, definition, repetition) in columns {
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> = texts.iter().map(|t| ByteArray::from(*t)).collect();
        let written =
            column.typed::<ByteArrayType>().write_batch(&values, definition.as_deref(), repetition.as_deref());
        written.unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    file.close().unwrap();
}

/// Twelve questions and answers; text that separators, quotes and line ends can spoil.
fn pairs() -> Vec<(String, String)> {
    (0..12).map(|i| (format!("What is {i}, \"said\";\nshe\t?"), format!("It is {}.", i * 7))).collect()
}

fn place() -> Workplace {
    let w = Workplace::new();
    w.copy("tests/data/tokenizer/spm4k.model", "spm.model");
    w
}

/// Prompts and responses of the rows that a training on `data` would take.
fn rows_of(w: &Workplace, data: &str) -> Vec<(String, String)> {
    let command =
        format!("ringtune inspect rows --tokenizer_path spm.model --val_fraction 0 --json --dataset_paths {data}");
    let outcome = w.shell(&command);
    assert_eq!(outcome.code, Some(0), "{data}: {}", outcome.stderr);
    let text = |v: &Value, key: &str| v[key].as_str().unwrap().to_string();
    let rows = outcome.stdout.lines().map(|l| serde_json::from_str(l).unwrap());
    rows.map(|v: Value| (text(&v, "prompt"), text(&v, "response"))).collect()
}

fn sorted(mut rows: Vec<(String, String)>) -> Vec<(String, String)> {
    rows.sort();
    rows
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

fn delimited(separator: &str, names: [&str; 2]) -> String {
    let rows = pairs().into_iter().map(|(p, r)| format!("{}{separator}{}\r\n", quoted(&p), quoted(&r)));
    format!("{}{separator}{}\r\n{}", names[0], names[1], rows.collect::<String>())
}

fn gz(text: &str) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut out, text.as_bytes()).unwrap();
    out.finish().unwrap()
}

#[test]
fn a_table_is_read_as_the_same_rows_in_json_lines() {
    let w = place();
    let names = ["prompt", "response"];
    w.write("rows.csv", delimited(",", names));
    w.write("semicolons.csv", format!("\u{feff}{}", delimited(";", names)));
    w.write("rows.tsv", delimited("\t", names));
    w.write("rows.csv.gz", gz(&delimited(",", names)));
    w.write("asked.csv", delimited(",", ["question", "answer"]));
    let all = pairs();
    let (prompts, responses): (Vec<&str>, Vec<&str>) = all.iter().map(|(p, r)| (p.as_str(), r.as_str())).unzip();
    let schema = "message rows { required binary prompt (UTF8); required binary response (UTF8); }";
    write_parquet(&w.path("rows.parquet"), schema, &[(prompts, None, None), (responses, None, None)]);
    let lines = all.iter().map(|(p, r)| format!("{}\n", json!({"prompt": p, "response": r})));
    w.write("rows.jsonl", lines.collect::<String>());
    let expected = rows_of(&w, "rows.jsonl");
    assert_eq!(sorted(expected.clone()), sorted(pairs()));
    for data in ["rows.csv", "semicolons.csv", "rows.tsv", "rows.csv.gz", "rows.parquet"] {
        assert_eq!(rows_of(&w, data), expected, "{data}");
    }
    assert_eq!(rows_of(&w, "asked.csv --columns prompt=question response=answer"), expected);
    assert_eq!(rows_of(&w, "asked.csv --columns prompt=question,response=answer"), expected);
    let outcome = w.run(&["inspect", "file", "rows.csv.gz"]);
    assert!(outcome.stdout.contains("prompt and response, CSV, gzip"), "{}{}", outcome.stdout, outcome.stderr);
}

/// A table of texts says what is trained of a row as other files do.
#[test]
fn train_and_weight_are_columns_of_a_table_too() {
    let w = place();
    let trained = |text: &str| {
        w.write("t.csv", text);
        let outcome =
            w.shell("ringtune inspect rows --tokenizer_path spm.model --val_fraction 0 --json --dataset_paths t.csv");
        assert_eq!(outcome.code, Some(0), "{text}: {}", outcome.stderr);
        outcome.stdout.lines().count()
    };
    // A row without anything trained is left out.
    assert_eq!(trained("prompt,response,train\na,b,true\nc,d,False\ne,f,\ng,h,1\n"), 3);
    assert_eq!(trained("prompt,response,weight\na,b,0\nc,d,1\ne,f,0.0\ng,h, 1.0\n"), 2);
    for (text, what) in [
        (
            "prompt,response,train\na,b,maybe\n",
            "field \"train\" is not a boolean, expected true or false, found the text \"maybe\"",
        ),
        (
            "prompt,response,weight\na,b,0.5\n",
            "field \"weight\" is neither 0 nor 1, expected 0 (not trained) or 1, found 0.5",
        ),
        (
            "What is it?,A ring.\nAnd that?,A stone.\n",
            "(row 1 of the table; its first line has to name the columns, as in prompt,response)",
        ),
    ] {
        w.write("t.csv", text);
        let outcome = w.run(&["convert", "t.csv", "t.jsonl"]);
        assert!(outcome.code == Some(1) && outcome.error().contains(what), "{text}: {}", outcome.stderr);
    }
    // What is written is read as what its name says.
    w.write("t.csv", "prompt,response\na,b\n");
    for name in ["out.csv", "out.jsonl.gz", "out.parquet"] {
        let outcome = w.run(&["convert", "t.csv", name]);
        assert!(
            outcome.code == Some(2) && outcome.error().contains("a name that ends in .jsonl"),
            "{}",
            outcome.stderr
        );
        assert!(!w.path(name).exists());
    }
    let replaced = w.shell("ringtune convert t.csv t.jsonl --columns prompt=question response=answer");
    assert!(
        replaced.error().contains("(not read, as --columns names others for them: \"prompt\", \"response\")"),
        "{}",
        replaced.stderr
    );
}

#[test]
fn parquet_with_lists_and_texts_that_are_lists_are_conversations() {
    let w = place();
    let schema = "message rows { optional group messages (LIST) { repeated group list { optional group element {
        optional binary role (UTF8); optional binary content (UTF8); } } } }";
    // Two turns, then four, as definition levels (all are there) and repetition levels (a row begins with 0).
    let levels = || (Some(vec![4i16; 6]), Some(vec![0i16, 1, 0, 1, 1, 1]));
    let roles = ["user", "assistant", "user", "assistant", "user", "assistant"].to_vec();
    let contents = ["a?", "a.", "b?", "b.", "c?", "c."].to_vec();
    let column = |texts| (texts, levels().0, levels().1);
    write_parquet(&w.path("chat.parquet"), schema, &[column(roles), column(contents)]);
    assert_eq!(sorted(rows_of(&w, "chat.parquet")), [("a?", "a."), ("b?", "c.")].map(|(p, r)| (p.into(), r.into())));
    let list = json!([{"from": "human", "value": "a?"}, {"from": "gpt", "value": "a."}]).to_string();
    w.write("chat.csv", format!("id,conversations\n1,{}\n", quoted(&list)));
    assert_eq!(rows_of(&w, "chat.csv"), [("a?".to_string(), "a.".to_string())]);
}

/// Hive, Impala and old Spark write texts as bytes without saying that they are text.
#[test]
fn bytes_in_parquet_are_text_or_no_text_but_never_nothing() {
    let w = place();
    let schema = "message rows { required binary prompt; required binary response (UTF8); optional binary system; }";
    let column = |text| (vec![text], None, None);
    write_parquet(&w.path("old.parquet"), schema, &[column("q?"), column("a."), (vec!["s"], Some(vec![1]), None)]);
    assert_eq!(rows_of(&w, "old.parquet"), [("q?".to_string(), "a.".to_string())]);
    let inspect = "ringtune inspect rows --tokenizer_path spm.model --val_fraction 0 --json --dataset_paths";
    let said = w.shell(&format!("{inspect} old.parquet")).stdout;
    assert!(said.contains(r#"{"role":"system","content":"s"}"#), "{said}");
    let fixed =
        "message rows { required binary prompt (UTF8); required binary response (UTF8); required binary system; }";
    write_parquet(&w.path("raw.parquet"), fixed, &[column("q?"), column("a."), column("s")]);
    let mut raw = std::fs::read(w.path("raw.parquet")).unwrap();
    // The one value of the last column, behind its length.
    let at = raw.windows(5).rposition(|part| part == b"\x01\0\0\0s").unwrap();
    raw[at + 4] = 0xff;
    w.write("raw.parquet", raw);
    let outcome = w.shell(&format!("{inspect} raw.parquet"));
    assert_eq!(outcome.code, Some(1), "{}", outcome.stdout);
    assert!(
        outcome.error().contains("field \"system\" is not a string, expected a string, found an array"),
        "{}",
        outcome.error()
    );
    let twice = "message rows { required binary prompt (UTF8); required binary prompt (UTF8); required binary response (UTF8); }";
    write_parquet(&w.path("twice.parquet"), twice, &[column("q?"), column("r?"), column("a.")]);
    let outcome = w.shell(&format!("{inspect} twice.parquet"));
    assert!(outcome.error().contains("two columns named \"prompt\", expected different names"), "{}", outcome.error());
}

#[test]
fn what_is_wrong_with_a_table_is_said_by_row_and_column() {
    let w = place();
    let error = |data: &str| {
        let outcome = w.shell(&format!("ringtune inspect rows --tokenizer_path spm.model --dataset_paths {data}"));
        assert!(matches!(outcome.code, Some(1 | 2)), "{data}: {:?} {}", outcome.code, outcome.stderr);
        outcome.error().to_string()
    };
    w.write("a.csv", "question,answer\nx,y\n,z\n");
    w.write("b.csv", "prompt,response\nx,y\nx,y,z\n");
    w.write("none.csv", "prompt,response\n");
    w.write("cut.parquet", b"PAR1 and nothing else PAR1");
    w.write("packed.parquet.gz", gz("PAR1 and nothing else PAR1"));
    w.write("table.jsonl", "prompt,response\nx,y\n");
    for (data, expected) in [
        ("a.csv", "a.csv:1: field \"prompt\" is missing"),
        ("a.csv", "read them with --columns prompt=question response=answer (row 1 of the table)"),
        (
            "a.csv --columns prompt=question response=answer",
            "a.csv:2: column \"question\", read as \"prompt\", is empty, expected text, found \"\" (row 2 of the table)",
        ),
        ("a.csv --columns prompt=query response=answer", "column \"query\", read as \"prompt\", is missing"),
        ("a.csv --columns question=prompt", "did you mean prompt=question?"),
        ("a.csv --columns text=question response=answer", "field \"prompt\" is missing"),
        ("b.csv", "b.csv: row 2 (line 3): expected 2 values as in the first line, found 3"),
        ("none.csv", "none.csv: no rows, expected at least one, found a table without any"),
        ("cut.parquet", "cut.parquet: not a readable Parquet file"),
        ("packed.parquet.gz", "a Parquet file inside a gzip file, expected it alone; unpack it with gunzip"),
        ("table.jsonl", "(a table? its name has to end in .csv or .tsv)"),
    ] {
        let e = error(data);
        assert!(e.contains(expected), "{data}: expected {expected:?} in {e}");
    }
    // Skipping leaves out the row that says nothing, and keeps the other.
    assert_eq!(
        rows_of(&w, "a.csv --columns prompt=question response=answer --skip_bad_rows"),
        [("x".into(), "y".into())]
    );
}

#[test]
fn folders_patterns_and_validation_files_of_an_sft() {
    let w = place();
    let rows: Vec<String> = first_rows("data/demo/chat.jsonl", 12).lines().map(|l| format!("{l}\n")).collect();
    w.write("data/a.jsonl", rows[..5].concat());
    w.write("data/b.jsonl", rows[5..9].concat());
    w.write("data/test.jsonl", rows[9..].concat());
    let (by_folder, by_pattern) = (rows_of(&w, "data"), rows_of(&w, "'data/[ab].jsonl'"));
    assert_eq!((by_folder.len(), &by_folder), (9, &by_pattern));
    let model = repository().join(MODEL).display().to_string();
    let sft = |more: &str| {
        w.shell(&format!(
            "ringtune sft --model_path {model} --output_dir out --max_seq_len 64 --no_tensorboard --max_steps 2 {more}"
        ))
    };
    let outcome = sft("--dataset_paths data --val_paths data/test.jsonl data/b.jsonl --eval_on_start");
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("left out, by their names no training data: data/test.jsonl"),
        "{}",
        outcome.stderr
    );
    let metrics = std::fs::read_to_string(w.path("out/metrics.jsonl")).unwrap();
    let first: Value =
        metrics.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()).find(|v| v["eval_loss"].is_f64()).unwrap();
    assert!(first.to_string().contains("test") && first["eval_loss"].is_f64(), "{first}");
    let outcome = sft("--dataset_paths data --dataset_weights 1");
    assert_eq!(outcome.code, Some(2));
    assert!(
        outcome.error().contains("expected one for each of the 2 files that dataset_paths stand for, found 1"),
        "{}",
        outcome.stderr
    );
    std::fs::remove_dir_all(w.path("out")).unwrap();
    let outcome = sft("--dataset_paths data/a.jsonl --val_paths nothing.jsonl");
    assert_eq!(outcome.code, Some(1), "{}", outcome.stderr);
    assert!(outcome.error().contains("nothing.jsonl"), "{}", outcome.stderr);
}

#[test]
fn text_to_pretrain_on_from_a_column_of_a_table() {
    let w = place();
    w.write("docs.csv", "id,body\n1,\"One document, with a comma.\"\n2,Another one.\n");
    let pack = |more: &str| {
        w.shell(&format!("ringtune pack --tokenizer_path spm.model --dataset_paths docs.csv --content text {more}"))
    };
    let outcome = pack("--output a.tok --columns text=body");
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stdout.contains("a.tok: 2 documents"), "{}", outcome.stdout);
    let outcome = pack("--output b.tok");
    assert!(outcome.error().contains("docs.csv:1: field \"text\" is missing"), "{}", outcome.stderr);
    let outcome = pack("--output b.tok --columns prompt=body");
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.error().contains("expected text=COLUMN for text to pretrain on"), "{}", outcome.stderr);
}

fn lines(w: &Workplace, name: &str) -> Vec<String> {
    std::fs::read_to_string(w.path(name)).unwrap().lines().map(String::from).collect()
}

#[test]
fn convert_writes_rows_that_train_the_same() {
    let w = place();
    w.write("asked.csv", delimited(",", ["question", "answer"]));
    let mixed = [
        r#"{"instruction": "i", "input": "x", "output": "o", "system": "s"}"#,
        r#"{"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "a."}, {"from": "human", "value": "b?"}, {"from": "gpt", "value": "b."}]}"#,
        r#"{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "r", "weight": 0}, {"role": "user", "content": "v"}, {"role": "assistant", "content": "t"}], "id": 4}"#,
    ];
    w.write("mixed.json", format!("[{}]", mixed.join(",\n")));
    let outcome = w.shell("ringtune convert mixed.json asked.csv all.jsonl --columns prompt=question response=answer");
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.stdout, "all.jsonl: 15 rows from mixed.json (3), asked.csv (12)\n");
    assert!(outcome.stderr.contains("mixed.json: not read and not written: \"id\" (1 rows)"), "{}", outcome.stderr);
    let all = lines(&w, "all.jsonl");
    let parsed: Vec<Value> = all[..3].iter().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(parsed[0], json!({"prompt": "i\nx", "response": "o", "system": "s"}));
    assert_eq!(parsed[1]["messages"][3], json!({"role": "assistant", "content": "b."}));
    assert_eq!(parsed[2]["messages"][1], json!({"role": "assistant", "content": "r", "train": false}));
    let expected: Vec<String> = pairs().iter().map(|(p, r)| json!({"prompt": p, "response": r}).to_string()).collect();
    assert_eq!(all[3..], expected);
    // Converting again changes nothing.
    assert_eq!(w.shell("ringtune convert all.jsonl again.jsonl").code, Some(0));
    assert_eq!(lines(&w, "again.jsonl"), all);
}

/// A file is replaced, a link's file too; what is no file is written to, or refused where a file is needed.
#[test]
fn what_is_written_goes_through_links_and_into_pipes() {
    let w = place();
    w.write("asked.csv", delimited(",", ["prompt", "response"]));
    let convert = |to: &str| w.shell(&format!("ringtune convert asked.csv {to} --take 2"));
    let streamed = convert("/dev/stdout");
    assert_eq!((streamed.code, streamed.stdout.lines().count()), (Some(0), 2), "{}", streamed.stderr);
    assert!(streamed.stderr.contains("/dev/stdout: 2 rows from asked.csv (2)"), "{}", streamed.stderr);
    std::fs::create_dir(w.path("far")).unwrap();
    w.write("far/rows.jsonl", "old");
    std::os::unix::fs::symlink("far/rows.jsonl", w.path("link.jsonl")).unwrap();
    assert_eq!(convert("link.jsonl --overwrite").code, Some(0));
    assert!(w.path("link.jsonl").is_symlink());
    let written = std::fs::read_to_string(w.path("far/rows.jsonl")).unwrap();
    assert_eq!(written, streamed.stdout);
    // As `>(command)` of a shell: the reader gets the rows, and the pipe stays.
    let pipe = w.path("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::read_to_string(pipe).unwrap()
    });
    assert_eq!(convert("pipe").code, Some(0));
    assert_eq!(reader.join().unwrap(), streamed.stdout);
    assert!(!pipe.is_file());
    let packed = w.shell("ringtune pack --tokenizer_path spm.model --dataset_paths asked.csv --output pipe");
    assert_eq!(packed.code, Some(2), "{}", packed.stderr);
    assert!(packed.stderr.contains("expected the name of a file, found a pipe or device: pipe"), "{}", packed.stderr);
    assert!(!pipe.is_file());
    let left: Vec<_> = std::fs::read_dir(w.path("far")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn convert_mixes_shuffles_and_cuts_without_taking_a_row_twice() {
    let w = place();
    for (name, n) in [("a.jsonl", 40), ("b.jsonl", 10)] {
        w.write(
            name,
            (0..n).map(|i| format!("{{\"prompt\": \"{name} {i}\", \"response\": \"r\"}}\n")).collect::<String>(),
        );
    }
    let convert = |words: &str| {
        let outcome = w.shell(&format!("ringtune convert {words}"));
        assert_eq!(outcome.code, Some(0), "{words}: {}", outcome.stderr);
        outcome.stdout
    };
    assert_eq!(
        convert("a.jsonl b.jsonl mix.jsonl --mix 0.6 0.4"),
        "mix.jsonl: 25 rows from a.jsonl (15), b.jsonl (10)\n"
    );
    let mixed = lines(&w, "mix.jsonl");
    assert_eq!(mixed.iter().collect::<BTreeSet<_>>().len(), 25);
    assert!(mixed[..15].iter().any(|l| l.contains("b.jsonl")), "shuffled: {mixed:?}");
    convert("a.jsonl b.jsonl mix2.jsonl --mix 6 4");
    assert_eq!(lines(&w, "mix2.jsonl"), mixed, "the same seed");
    convert("a.jsonl b.jsonl mix3.jsonl --mix 6 4 --seed 7");
    assert_ne!(lines(&w, "mix3.jsonl"), mixed);
    assert_eq!(
        convert("a.jsonl b.jsonl few.jsonl --mix 6 4 --take 10"),
        "few.jsonl: 10 rows from a.jsonl (6), b.jsonl (4)\n"
    );
    // One part to evaluate on, the rest to train on.
    convert("a.jsonl eval.jsonl --shuffle --take 8");
    convert("a.jsonl train.jsonl --shuffle --skip 8");
    let (eval, train) = (lines(&w, "eval.jsonl"), lines(&w, "train.jsonl"));
    assert_eq!((eval.len(), train.len()), (8, 32));
    assert_eq!(eval.iter().chain(&train).collect::<BTreeSet<_>>().len(), 40);
    for (words, code, what) in [
        ("a.jsonl b.jsonl", 2, "b.jsonl: the last name is that of the file to write, which is there already"),
        ("a.jsonl b.jsonl b.jsonl --overwrite", 2, "b.jsonl: read and written at once"),
        ("a.jsonl b.jsonl x.jsonl --mix 1", 2, "--mix: expected a share for each of the 2 files, found 1"),
        ("a.jsonl b.jsonl x.jsonl --mix 1 -1", 2, "--mix: expected numbers above 0, found 1 -1"),
        ("a.jsonl b.jsonl x.jsonl --mix 1 1 --take 30", 1, "b.jsonl: its share is 15 rows, found 10"),
        ("a.jsonl x.jsonl --skip 40", 1, "--skip 40: expected fewer than the 40 rows there are"),
    ] {
        let outcome = w.shell(&format!("ringtune convert {words}"));
        assert_eq!(outcome.code, Some(code), "{words}: {}", outcome.stderr);
        assert!(outcome.error().contains(what), "{words}: {}", outcome.stderr);
        assert!(!w.path("x.jsonl").exists());
    }
    assert_eq!(lines(&w, "b.jsonl").len(), 10, "what was there stays");
}
