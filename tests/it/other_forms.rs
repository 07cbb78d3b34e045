//! Data files as other tools publish and write them: each trains unchanged, or the answer is the thing to type.

use serde_json::{Value, json};

use crate::program::{Workplace, repository};
use crate::runs::MODEL;

fn lines(row: &Value) -> String {
    format!("{row}\n").repeat(6)
}

fn turns(of: [&str; 2], names: [&str; 2]) -> Value {
    let turn = |i: usize, text: &str| json!({of[0]: names[i], of[1]: text});
    json!([turn(0, "What is a ring?"), turn(1, "A band.")])
}

fn openai() -> Value {
    turns(["role", "content"], ["user", "assistant"])
}

/// Name, content, and whether `sft` takes it as it is: else what it answers.
fn files() -> Vec<(&'static str, String, &'static str)> {
    let sharegpt = turns(["from", "value"], ["human", "gpt"]);
    let quoted = |list: &Value| format!("\"{}\"", list.to_string().replace('"', "\"\""));
    let part = |text: &str| json!([{"type": "text", "text": text}]);
    let call = json!([{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]);
    vec![
        (
            "openai.jsonl",
            lines(&json!({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "weight": 0}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1}]})),
            "",
        ),
        (
            "developer.jsonl",
            lines(
                &json!({"messages": [{"role": "developer", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
            ),
            "",
        ),
        (
            "parts.jsonl",
            lines(
                &json!({"messages": [{"role": "user", "content": part("a")}, {"role": "assistant", "content": part("b")}]}),
            ),
            "",
        ),
        ("sharegpt.json", json!(vec![json!({"id": "x", "conversations": sharegpt}); 6]).to_string(), ""),
        ("sharegpt_system.jsonl", lines(&json!({"system": "s", "conversations": sharegpt})), ""),
        (
            "alpaca.json",
            serde_json::to_string_pretty(&vec![json!({"instruction": "a", "input": "", "output": "b"}); 6]).unwrap(),
            "",
        ),
        ("dolly.jsonl", lines(&json!({"instruction": "a", "context": "", "response": "b", "category": "open_qa"})), ""),
        ("trl.jsonl", lines(&json!({"prompt": [openai()[0]], "completion": [openai()[1]]})), ""),
        ("kto.jsonl", lines(&json!({"prompt": "a", "completion": "b", "label": true})), ""),
        ("text_of_list.jsonl", lines(&json!({"messages": openai().to_string()})), ""),
        ("chat.csv", format!("messages,source\n{}", format!("{},s\n", quoted(&openai())).repeat(6)), ""),
        ("chat.tsv", format!("conversations\n{}", format!("{}\n", quoted(&sharegpt)).repeat(6)), ""),
        (
            "thoughts.jsonl",
            lines(&json!({"messages": [openai()[0], {"role": "assistant", "content": "b", "reasoning_content": "r"}]})),
            "",
        ),
        (
            "tools.jsonl",
            lines(
                &json!({"messages": [openai()[0], {"role": "assistant", "content": null, "tool_calls": call}], "tools": []}),
            ),
            "calls are not trained: leave the row out or write the call as text",
        ),
        (
            "image.jsonl",
            lines(
                &json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, openai()[1]]}),
            ),
            "expected parts of type \"text\" alone, found \"image_url\"",
        ),
        (
            "dpo.jsonl",
            lines(&json!({"prompt": "a", "chosen": "b", "rejected": "c"})),
            "read one side with --columns response=chosen",
        ),
        ("text.jsonl", lines(&json!({"text": "a"})), "text without a response is trained on by ringtune pretrain"),
        (
            "qa.jsonl",
            lines(&json!({"question": "a", "answer": "b"})),
            "read them with --columns prompt=question response=answer",
        ),
        ("dialog.jsonl", lines(&json!({"dialog": openai()})), "read them with --columns messages=dialog"),
        (
            "repr.csv",
            format!("messages\n{}", "\"[{'role': 'user', 'content': 'a'}]\"\n".repeat(6)),
            "Python's repr? write lists with json.dumps",
        ),
    ]
}

#[test]
fn each_trains_unchanged_or_is_answered_with_what_to_type() {
    let w = Workplace::new();
    let model = repository().join(MODEL);
    let mut trained = 0;
    for (name, content, answer) in files() {
        w.write(name, content);
        let sft = |more: &str| {
            let line = format!(
                "ringtune sft --model_path {} --dataset_paths {name} --output_dir out_{name} --max_seq_len 128 --max_steps 1 --quiet \
                 --val_fraction 0 --no_tensorboard {more}",
                model.display()
            );
            w.shell(&line)
        };
        let outcome = sft("");
        if answer.is_empty() {
            assert_eq!(outcome.code, Some(0), "{name}: {}", outcome.stderr);
            assert!(outcome.stdout.starts_with("step 1/1 | loss "), "{name}: {}", outcome.stdout);
            trained += 1;
            continue;
        }
        assert_eq!(outcome.code, Some(1), "{name}: {}", outcome.stderr);
        let error = outcome.error();
        assert!(error.starts_with(&format!("{name}:1: ")) && error.contains(answer), "{name}: {error}");
        // What is to be typed, typed.
        if let Some(columns) = answer.strip_prefix("read them with ").or(answer.strip_prefix("read one side with ")) {
            let outcome = sft(columns);
            assert_eq!(outcome.code, Some(0), "{name} {columns}: {}", outcome.stderr);
        }
    }
    assert_eq!(trained, 13);
}
