//! What a saved model carries besides weights: the tokenizer with its special tokens, the chat template, generation settings.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::ensure;
use crate::error::Result;
use crate::files::{At, create_dir_all, read_text, write_bytes, write_json};

/// A special token: its text and id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    /// As in the vocabulary, for example `</s>` or `<|im_end|>`.
    pub text: String,
    /// Its id.
    pub id: u32,
}

/// Where the tokenizer's vocabulary is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Vocabulary<'a> {
    /// A SentencePiece model, copied byte for byte as `tokenizer.model`; `tokenizer.json` is made from it.
    SentencePiece(&'a [u8]),
    /// `tokenizer.json` alone, and the `tokenizer_config.json` that came with it, whose other keys are kept.
    Json(Option<&'a Value>),
}

/// Everything the files are made from.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenizerFiles<'a> {
    /// Where the vocabulary is.
    pub vocabulary: Vocabulary<'a>,
    /// Beginning of a text, where there is such a token.
    pub bos: Option<SpecialToken>,
    /// End of a turn or text as the tokenizer was made: `</s>`.
    pub eos: SpecialToken,
    /// Unknown text, where there is such a token.
    pub unk: Option<SpecialToken>,
    /// Padding, where there is such a token; never the end token, else a trainer would mask every end.
    pub pad: Option<SpecialToken>,
    /// Ids besides at which an answer ends.
    pub more_stops: Vec<u32>,
    /// `<|im_start|>` and `<|im_end|>` in this order, with ChatML; the second one then is the model's end token.
    pub chatml: Option<[SpecialToken; 2]>,
    /// Tokens that the SentencePiece model does not hold, in the order of their ids: those added for ChatML.
    pub added: Vec<SpecialToken>,
    /// Whether a text begins with bos (every template but ChatML).
    pub add_bos: bool,
    /// Whether `tokenizer.json` is written too: the class is then one that takes it as it is.
    pub with_json: bool,
    /// Whether transformers 5 takes another class for models of this family, whatever the files say (Qwen2).
    pub class_by_model: bool,
    /// Longest sequence of the model.
    pub max_length: usize,
    /// The template in Jinja, for `chat_template.jinja`.
    pub chat_template: Option<&'a str>,
}

impl TokenizerFiles<'_> {
    /// The token that ends an answer: `<|im_end|>` with ChatML, else eos.
    pub fn end(&self) -> &SpecialToken {
        self.chatml.as_ref().map_or(&self.eos, |[_, im_end]| im_end)
    }

    /// Ids that end generation: with ChatML `[im_end, eos]`, else `[eos]`, then those besides.
    pub fn stop_ids(&self) -> Vec<u32> {
        let mut ids = Vec::new();
        for id in [self.end().id, self.eos.id].into_iter().chain(self.more_stops.iter().copied()) {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }

    /// Writes tokenizer.model (of a SentencePiece model), tokenizer_config.json, special_tokens_map.json,
    /// generation_config.json and, where there are such, added_tokens.json and chat_template.jinja.
    ///
    /// # Errors
    /// If the padding token is an end token, or a file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        for end in [self.end().id, self.eos.id] {
            ensure!(
                self.pad.as_ref().is_none_or(|pad| pad.id != end),
                "the padding token has the id {end} of an end token; every end would be masked as padding"
            );
        }
        create_dir_all(dir)?;
        let model = dir.join("tokenizer.model");
        match self.vocabulary {
            Vocabulary::SentencePiece(bytes) => write_bytes(&model, bytes)?,
            // That of an earlier save would win over tokenizer.json.
            Vocabulary::Json(_) if model.exists() => std::fs::remove_file(&model).at(&model)?,
            Vocabulary::Json(_) => {}
        }
        write_json(&dir.join("tokenizer_config.json"), &self.tokenizer_config())?;
        write_json(&dir.join("special_tokens_map.json"), &self.special_tokens_map())?;
        write_json(&dir.join("generation_config.json"), &self.generation_config())?;
        let optional =
            [("added_tokens.json", self.added_tokens()), ("chat_template.jinja", self.chat_template.map(String::from))];
        for (name, content) in optional {
            let path = dir.join(name);
            match content {
                Some(text) => write_bytes(&path, text.as_bytes())?,
                // One of an earlier save would speak of tokens or turns that this model does not have.
                None if path.exists() => std::fs::remove_file(&path).at(&path)?,
                None => {}
            }
        }
        Ok(())
    }

    fn added_tokens(&self) -> Option<String> {
        let map: Map<String, Value> = self.added.iter().map(|t| (t.text.clone(), json!(t.id))).collect();
        let text = serde_json::to_string_pretty(&Value::Object(map)).expect("a JSON value always prints");
        (!self.added.is_empty()).then_some(text + "\n")
    }

    /// All special tokens by id.
    fn specials(&self) -> Vec<&SpecialToken> {
        let mut all: Vec<&SpecialToken> = [&self.pad, &self.unk, &self.bos].into_iter().flatten().collect();
        all.push(&self.eos);
        all.extend(self.chatml.iter().flatten().chain(&self.added));
        all.sort_by_key(|t| t.id);
        all.dedup_by_key(|t| t.id);
        all
    }

    fn tokenizer_config(&self) -> Value {
        let (mut v, mut decoder) = self.base_config();
        for t in self.specials() {
            let entry = json!({
                "content": t.text, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true,
            });
            decoder.insert(t.id.to_string(), entry);
        }
        v["added_tokens_decoder"] = Value::Object(decoder);
        let theirs = |v: &Value| v["tokenizer_class"].as_str().is_some_and(|class| class.starts_with("Qwen2Tokenizer"));
        let own = matches!(self.vocabulary, Vocabulary::Json(Some(from)) if theirs(from));
        if self.class_by_model && self.with_json && !own {
            // Named as code that nobody has to run, the class is looked up by its name after all. A tokenizer of the family's own needs it not.
            v["auto_map"] = json!({"AutoTokenizer": ["tokenization.PreTrainedTokenizerFast", null]});
        }
        for (key, value) in self.special_tokens_map().as_object().expect("an object was made") {
            v[key] = value.clone();
        }
        if let Some(template) = self.chat_template {
            v["chat_template"] = json!(template);
        }
        v
    }

    /// What tokenizer_config.json says before special tokens and template, and its table of added tokens.
    fn base_config(&self) -> (Value, Map<String, Value>) {
        // transformers 5 builds the tokenizers of other classes anew from vocabulary and merges, with other ids for some texts.
        let class = if self.with_json { "PreTrainedTokenizerFast" } else { "LlamaTokenizer" };
        if let Vocabulary::Json(from) = self.vocabulary {
            let mut v = from.cloned().unwrap_or_else(|| json!({}));
            let decoder = match v["added_tokens_decoder"].take() {
                Value::Object(map) => map,
                _ => Map::new(),
            };
            v["tokenizer_class"] = json!(class);
            v["clean_up_tokenization_spaces"] = json!(false);
            if v["model_max_length"].is_null() {
                v["model_max_length"] = json!(self.max_length);
            }
            return (v, decoder);
        }
        let v = json!({
            "tokenizer_class": class,
            "add_bos_token": self.add_bos,
            "add_eos_token": false,
            // Each text between special tokens is encoded on its own, with its own leading blank: transformers calls it legacy.
            "legacy": true,
            "add_prefix_space": null,
            "clean_up_tokenization_spaces": false,
            "spaces_between_special_tokens": false,
            "use_default_system_prompt": false,
            "sp_model_kwargs": {},
            "model_max_length": self.max_length,
        });
        (v, Map::new())
    }

    fn special_tokens_map(&self) -> Value {
        let mut v = json!({});
        let tokens = [
            ("bos_token", self.bos.as_ref()),
            ("eos_token", Some(self.end())),
            ("unk_token", self.unk.as_ref()),
            ("pad_token", self.pad.as_ref()),
        ];
        for (key, token) in tokens {
            if let Some(token) = token {
                v[key] = json!(token.text);
            }
        }
        if let Some([im_start, im_end]) = &self.chatml {
            let mut more = vec![json!(im_start.text), json!(im_end.text)];
            if let Vocabulary::Json(Some(from)) = self.vocabulary {
                let known = from["additional_special_tokens"].as_array().into_iter().flatten();
                let text = |t: &Value| t.as_str().or(t["content"].as_str()).map(String::from);
                let known: Vec<Value> = known.filter_map(text).map(Value::from).collect();
                more.extend(known.into_iter().filter(|t| *t != im_start.text.as_str() && *t != im_end.text.as_str()));
            }
            v["additional_special_tokens"] = json!(more);
        }
        v
    }

    fn generation_config(&self) -> Value {
        let stops = self.stop_ids();
        let eos = if stops.len() == 1 { json!(stops[0]) } else { json!(stops) };
        let id = |token: &Option<SpecialToken>| token.as_ref().map(|t| t.id);
        json!({"bos_token_id": id(&self.bos), "eos_token_id": eos, "pad_token_id": id(&self.pad)})
    }
}

/// The chat template of a folder and the file it is in: chat_template.jinja, else that of tokenizer_config.json; of several under
/// names the one called `default`.
///
/// # Errors
/// If a file cannot be read, or there are several templates and none is the default.
pub fn read_chat_template(dir: &Path) -> Result<Option<(PathBuf, String)>> {
    let path = dir.join("chat_template.jinja");
    if path.is_file() {
        let text = read_text(&path, 4 << 20)?;
        return Ok(Some((path, text)));
    }
    let path = dir.join("tokenizer_config.json");
    if !path.is_file() {
        return Ok(None);
    }
    let config = crate::checkpoint::state::read_json(&path)?;
    let found = match &config["chat_template"] {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) if !list.is_empty() => {
            let default = list.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str());
            let names: Vec<&str> = list.iter().filter_map(|t| t["name"].as_str()).collect();
            ensure!(
                default.is_some(),
                "{}: chat_template: expected a template called default, found {names:?}; save one as a .jinja file and name it",
                path.display()
            );
            default.map(String::from)
        }
        _ => None,
    };
    Ok(found.map(|text| (path, text)))
}

/// What makes up a tokenizer in a model folder, with what goes along with it.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];

/// Copies the tokenizer's files of the first of `folders` that has a tokenizer; which one that is, `None` if none has.
///
/// # Errors
/// If a file cannot be read or written.
pub fn copy_tokenizer(folders: &[&Path], to: &Path) -> Result<Option<PathBuf>> {
    let has = |dir: &Path| ["tokenizer.model", "tokenizer.json"].iter().any(|n| dir.join(n).is_file());
    let Some(from) = folders.iter().find(|d| has(d)) else {
        return Ok(None);
    };
    for name in TOKENIZER_FILES {
        let path = from.join(name);
        if path.is_file() {
            write_bytes(&to.join(name), &std::fs::read(&path).at(&path)?)?;
        }
    }
    Ok(Some(from.to_path_buf()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::named_tokens;

    fn token(text: &str, id: u32) -> SpecialToken {
        SpecialToken { text: text.into(), id }
    }

    fn files(chatml: bool) -> TokenizerFiles<'static> {
        let pair = [token("<|im_start|>", 4096), token("<|im_end|>", 4097)];
        TokenizerFiles {
            vocabulary: Vocabulary::SentencePiece(b"model"),
            bos: Some(token("<s>", 2)),
            eos: token("</s>", 3),
            unk: Some(token("<unk>", 1)),
            pad: Some(token("<pad>", 0)),
            more_stops: Vec::new(),
            added: if chatml { pair.to_vec() } else { Vec::new() },
            chatml: chatml.then_some(pair),
            add_bos: !chatml,
            with_json: true,
            class_by_model: false,
            max_length: 512,
            chat_template: Some("{{ x }}"),
        }
    }

    fn json(dir: &Path, name: &str) -> Value {
        crate::checkpoint::state::read_json(&dir.join(name)).unwrap()
    }

    #[test]
    fn chatml_ends_with_im_end_everywhere() {
        let dir = tempfile::tempdir().unwrap();
        files(true).write(dir.path()).unwrap();
        let config = json(dir.path(), "tokenizer_config.json");
        assert_eq!(config["eos_token"], "<|im_end|>");
        assert_eq!(config["added_tokens_decoder"]["4097"]["content"], "<|im_end|>");
        assert_eq!(config["chat_template"], "{{ x }}");
        assert_eq!(json(dir.path(), "special_tokens_map.json")["eos_token"], "<|im_end|>");
        assert_eq!(json(dir.path(), "generation_config.json")["eos_token_id"], json!([4097, 3]));
        assert_eq!(std::fs::read(dir.path().join("tokenizer.model")).unwrap(), b"model");
        assert_eq!(std::fs::read_to_string(dir.path().join("chat_template.jinja")).unwrap(), "{{ x }}");
        let behind = |dir: &Path| -> Vec<SpecialToken> {
            let named = named_tokens(dir).unwrap().into_iter().filter(|(id, _)| *id >= 4096);
            named.map(|(id, text)| token(&text, id)).collect()
        };
        assert_eq!(behind(dir.path()), files(true).added);
        // Saving a model without added tokens in the same folder leaves none behind.
        files(false).write(dir.path()).unwrap();
        assert_eq!(behind(dir.path()), []);
        assert_eq!(json(dir.path(), "generation_config.json")["eos_token_id"], 3);
        assert_eq!(json(dir.path(), "tokenizer_config.json")["eos_token"], "</s>");
    }

    /// transformers 5 takes Qwen2Tokenizer for every model of that family; what it gives with another tokenizer's file are other ids.
    #[test]
    fn a_class_that_comes_with_the_model_is_passed_over() {
        let written = |vocabulary, with_json| {
            let files = TokenizerFiles { class_by_model: true, with_json, vocabulary, ..files(false) };
            files.tokenizer_config()
        };
        let config = written(Vocabulary::SentencePiece(b"model"), true);
        assert_eq!(
            (&config["tokenizer_class"], config["auto_map"].is_object()),
            (&json!("PreTrainedTokenizerFast"), true)
        );
        let theirs = json!({"tokenizer_class": "Qwen2TokenizerFast"});
        assert!(written(Vocabulary::Json(Some(&theirs)), true)["auto_map"].is_null());
        assert_eq!(written(Vocabulary::SentencePiece(b"model"), false)["tokenizer_class"], "LlamaTokenizer");
    }

    #[test]
    fn padding_is_never_an_end() {
        let dir = tempfile::tempdir().unwrap();
        for pad in [3, 4097] {
            let mut f = files(true);
            f.pad = Some(token("<pad>", pad));
            let message = f.write(dir.path()).unwrap_err().to_string();
            assert!(message.contains("padding token") && message.contains(&pad.to_string()), "{message}");
        }
        std::fs::write(dir.path().join("added_tokens.json"), "{\"a\": -1}").unwrap();
        assert!(named_tokens(dir.path()).unwrap_err().to_string().contains("expected a token id"));
    }
}
