//! Flags of the commands that take no config file: `eval`, `generate`, `merge`, `prepare`, `parity`, each list in the order of its help.
//! What a training takes too is a copy of its row, so that range, default and field stand once; what differs is said here.

use std::sync::LazyLock;

use super::table::{ROWS, set};
use super::train::GenTest;
use super::value::{Kind, Range, Value};
use super::{Commands, Row, Setting, find};
use crate::datasets::{Dataset, Paths};
use crate::hf::SaveDType;
use crate::words::Words;

use Kind::{Bool, Choice, Choices, Float, Ids, Int, Path, Repeated, Text};

/// A row of the command's own.
fn own(key: &'static str, kind: Kind, help: &'static str) -> Row<()> {
    set("", Commands::NO_CONFIG, key, kind, help)
}

fn switch(key: &'static str, help: &'static str) -> Row<()> {
    own(key, Bool, help).default("false")
}

/// The row of a training under the same key. Other settings never switch it off here.
fn of(key: &str) -> Setting {
    let row = *find(key).filter(|s| s.key == key).expect("a key of the table");
    Row { group: "", commands: Commands::NO_CONFIG, needs: None, ..row }
}

impl<T> Row<T> {
    fn key(self, key: &'static str) -> Self {
        Self { key, ..self }
    }

    fn help(self, help: &'static str) -> Self {
        Self { help, ..self }
    }

    fn placeholder(self, placeholder: &'static str) -> Self {
        Self { placeholder, ..self }
    }
}

fn base_model() -> Setting {
    own("base_model", Path, "Base of the adapter")
        .unset("the one its configuration names")
        .to(|s, v| s.model.base = v.given().map(Value::path))
}

/// Which model, tokenizer and template.
fn model() -> Vec<Setting> {
    vec![
        of("model_path")
            .help("Folder of a model, of an adapter, the output folder of sft, or org/name[@revision] of the hub"),
        base_model(),
        switch("no_lora", "Take the merged or whole model in the folder, even where an adapter lies there")
            .to(|s, v| s.model.no_lora = v.bool()),
        of("tokenizer_path").help("Tokenizer: .model, tokenizer.json or a folder").unset("the model's"),
        of("special_ids").help("Ids that a SentencePiece model has to have, as pad,unk,bos,eos").placeholder("IDS"),
        of("prompt_template").unset("the model's, else chatml").placeholder("TEMPLATE"),
        of("template_date").placeholder("DAY"),
        of("mixed_precision").help("bf16: weights and activations in bfloat16; no: all f32"),
        of("seed"),
        of("device"),
        of("threads"),
        of("quiet").help("Print results alone"),
    ]
}

/// Rows at once.
fn batch_size(help: &'static str) -> Setting {
    of("per_device_eval_batch_size").key("batch_size").alias(&[]).help(help)
}

pub(super) static EVAL: LazyLock<Vec<Setting>> = LazyLock::new(|| {
    let own = [
        of("dataset_paths").help(
            "Data sets: rows (JSON Lines, Parquet, CSV) or token files; a folder or a pattern stands for its files",
        ),
        of("columns").help("Columns under other names, as FIELD=COLUMN: prompt=question response=answer"),
        own("max_eval_samples", Int(1, ROWS), "Evaluate at most this many rows of each data set, a seeded choice")
            .unset("all")
            .to(|s, v| s.eval.max_samples = v.given().map(Value::count)),
        batch_size("Rows at once; changes speed and memory only").alias(&["per_device_eval_batch_size"]),
        of("max_seq_len").unset("the model's maximum, at most 1024"),
        of("overflow").help("What happens to a longer row"),
        of("skip_bad_rows").help("Count and skip malformed rows instead of stopping"),
        of("supervise_turn_newline")
            .help("Count the newline after a closing token too, as the training flag of this name"),
        switch("gen_only", "Answer prompts only; no loss").to(|s, v| s.eval.gen_only = v.bool()),
        own("num_gen_samples", Int(0, 1_000_000), "Prompts to answer, greedily and by sampling")
            .unset("none; with --gen-only 5")
            .to(|s, v| {
                let alone = if s.eval.gen_only { of("num_gen_samples").default_value().count() } else { 0 };
                let num_samples = v.given().map_or(alone, Value::count);
                s.train.gen_test = Some(GenTest { num_samples, ..GenTest::blank() });
            }),
        of("max_new_tokens"),
        of("gen_temperature"),
        of("gen_top_p"),
        own("output", Path, "JSON file for the report").to(|s, v| s.output = v.given().map(Value::path)),
        of("cache_dir").help("Where token files are kept").unset("the user's cache folder"),
    ];
    [model(), own.to_vec()].concat()
});

pub(super) static GENERATE: LazyLock<Vec<Setting>> = LazyLock::new(|| {
    // `Sampling::check` knows the ranges of these.
    let number = |key, default, help| own(key, Float(Range::Any), help).default(default);
    let own = [
        own("prompt_file", Path, "File with the prompt").to(|s, v| s.generate.prompt_file = v.given().map(Value::path)),
        switch("batch", "Each line of the file or of standard input is a prompt")
            .to(|s, v| s.generate.batch = v.bool()),
        switch("chat", "A conversation, a turn a line, where standard input is no terminal too")
            .to(|s, v| s.generate.chat = v.bool()),
        own("system", Text, "System turn before the prompt").to(|s, v| s.generate.system = v.given().map(Value::text)),
        switch("raw", "No template: continue the text itself").to(|s, v| s.generate.raw = v.bool()),
        of("max_new_tokens")
            .unset("256, or what the model has room for")
            .to(|s, v| s.generate.max_new_tokens = v.given().map(Value::count)),
        switch("greedy", "Always the likeliest token").to(|s, v| s.generate.greedy = v.bool()),
        number("temperature", "0.7", "Divides the logits; 0: the likeliest token")
            .to(|s, v| s.generate.sampling.temperature = if s.generate.greedy { 0.0 } else { v.float() }),
        own("top_k", Int(0, 1 << 26), "Draw from the K likeliest tokens; 0: all")
            .default("0")
            .to(|s, v| s.generate.sampling.top_k = v.count()),
        number("top_p", "0.9", "Draw from the likeliest tokens that reach this probability together; 1: all")
            .to(|s, v| s.generate.sampling.top_p = v.float()),
        number("min_p", "0", "Draw from tokens with this share of the likeliest one's probability; 0: all")
            .to(|s, v| s.generate.sampling.min_p = v.float()),
        number("repetition_penalty", "1", "Makes tokens that came before less likely; 1: off")
            .to(|s, v| s.generate.sampling.repetition_penalty = v.float()),
        own("stop", Repeated, "End an answer before this text, or at this control token; may be given again")
            .to(|s, v| s.generate.stop = v.texts()),
        own("stop_ids", Ids, "End an answer at these token ids").to(|s, v| s.generate.stop_ids = v.ids()),
        batch_size("Prompts at once; changes speed and memory only"),
        own(
            "logprobs",
            Int(1, 1 << 26),
            "With --json: the N likeliest tokens at each place and their log probabilities",
        )
        .to(|s, v| s.generate.logprobs = v.given().map_or(0, Value::count)),
        switch("json", "Print an object a prompt: prompt, text, token ids, why it ended")
            .to(|s, v| s.generate.json = v.bool()),
    ];
    [model(), own.to_vec()].concat()
});

pub(super) static MERGE: LazyLock<Vec<Setting>> = LazyLock::new(|| {
    vec![
        of("model_path").alias(&["adapter_path", "model_name_or_path"]).help("Folder of the adapter"),
        base_model(),
        of("output_dir").help("Folder of the merged model"),
        own("dtype", Choice(DTYPES), "Element type of the weights; auto: that of the base")
            .default("auto")
            .to(|s, v| s.merge.dtype = SaveDType::of_word(&v.text())),
        own("max_shard_size", Text, "Largest weight file, such as 5GB, 500MB or 2GiB")
            .default("5GB")
            .placeholder("SIZE")
            .to(|s, v| s.merge.max_shard_size = v.text()),
        switch("overwrite", "Replace a model that lies in output_dir").to(|s, v| s.merge.overwrite = v.bool()),
        of("device"),
        of("threads"),
    ]
});

/// The words of [`SaveDType`], and `auto`.
const DTYPES: &[&str] = &["auto", "bf16", "bfloat16", "f16", "float16", "f32", "float32"];

pub(super) static PREPARE: LazyLock<Vec<Setting>> = LazyLock::new(|| {
    vec![
        own("dataset", Choices(DATASETS), "Which data sets").unset("required").placeholder("NAME").to(|s, v| {
            let names = v.texts();
            let wanted = |d: &Dataset| names.iter().any(|n| n == "all" || n == d.word());
            s.prepare.datasets = Dataset::ALL.into_iter().filter(wanted).collect();
        }),
        of("output_dir").help("Folder of the JSONL files"),
        own("source_dir", Path, "Folder with copies of the upstream files, instead of a download")
            .to(|s, v| s.prepare.source_dir = v.given().map(Value::path)),
        of("cache_dir").help("Where downloads are kept").unset("the user's cache folder"),
        switch("multi_turn", "OASST1: whole conversations as messages, not one row for each answer")
            .to(|s, v| s.prepare.multi_turn = v.bool()),
        own("oasst_paths", Choice(Paths::WORDS), "OASST1: the best-ranked path of each tree, or every branch")
            .default("best")
            .to(|s, v| s.prepare.paths = v.choice()),
    ]
});

pub(super) static PARITY: LazyLock<Vec<Setting>> =
    LazyLock::new(|| vec![of("mixed_precision").help("Precision of weights and activations"), of("device")]);

/// The words of [`Dataset`], and `all`.
const DATASETS: &[&str] = &["all", "dolly15k", "oasst1", "alpaca"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_words_are_those_of_the_enums() {
        assert_eq!(DTYPES[1..], *SaveDType::WORDS);
        assert_eq!(DATASETS[1..], *Dataset::WORDS);
    }

    #[test]
    fn eval_answers_five_prompts_where_it_does_nothing_else() {
        let mut s = super::super::Settings::blank();
        let mut samples = |words: &[(&str, Value)]| {
            for row in EVAL.iter() {
                let typed = words.iter().find(|(key, _)| *key == row.key).map(|(_, v)| v.clone());
                (row.to)(&mut s, &typed.unwrap_or_else(|| row.default_value()));
            }
            s.train.gen_test.as_ref().unwrap().num_samples
        };
        let alone = ("gen_only", Value::Bool(true));
        assert_eq!(samples(&[]), 0);
        assert_eq!(samples(std::slice::from_ref(&alone)), 5);
        assert_eq!(samples(&[alone, ("num_gen_samples", Value::Int(2))]), 2);
    }
}
