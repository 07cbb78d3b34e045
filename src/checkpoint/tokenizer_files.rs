//! What a saved model carries besides weights: the tokenizer with its special tokens, the chat template, generation settings.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::fs::{At, create_dir_all, write_bytes, write_json};
use crate::ensure;
use crate::error::Result;

/// A special token: its text and id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    /// As in the vocabulary, for example `</s>` or `<|im_end|>`.
    pub text: String,
    /// Its id.
    pub id: u32,
}

/// Everything the files are made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerFiles<'a> {
    /// The SentencePiece model, copied byte for byte.
    pub model: &'a [u8],
    /// Beginning of a text.
    pub bos: SpecialToken,
    /// End of a turn or text as the tokenizer was made: `</s>`.
    pub eos: SpecialToken,
    /// Unknown text.
    pub unk: SpecialToken,
    /// Padding; never the end token, else a trainer would mask every end.
    pub pad: SpecialToken,
    /// `<|im_start|>` and `<|im_end|>` in this order, with ChatML; the second one then is the model's end token.
    pub chatml: Option<[SpecialToken; 2]>,
    /// Tokens that the SentencePiece model does not hold, in the order of their ids: those added for ChatML.
    pub added: Vec<SpecialToken>,
    /// Whether a text begins with bos (every template but ChatML).
    pub add_bos: bool,
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

    /// Ids that end generation: with ChatML `[im_end, eos]`, else `[eos]`.
    pub fn stop_ids(&self) -> Vec<u32> {
        let mut ids = vec![self.end().id];
        if self.eos.id != self.end().id {
            ids.push(self.eos.id);
        }
        ids
    }

    /// Writes tokenizer.model, tokenizer_config.json, special_tokens_map.json, generation_config.json and, where there are
    /// such, added_tokens.json and chat_template.jinja.
    ///
    /// # Errors
    /// If the padding token is an end token, or a file cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        for end in self.stop_ids() {
            ensure!(
                self.pad.id != end,
                "the padding token has the id {end} of an end token; every end would be masked as padding"
            );
        }
        create_dir_all(dir)?;
        write_bytes(&dir.join("tokenizer.model"), self.model)?;
        write_json(&dir.join("tokenizer_config.json"), &self.tokenizer_config())?;
        write_json(&dir.join("special_tokens_map.json"), &self.special_tokens_map())?;
        write_json(&dir.join("generation_config.json"), &self.generation_config())?;
        let optional = [
            ("added_tokens.json", self.added_tokens()),
            ("chat_template.jinja", self.chat_template.map(String::from)),
        ];
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
        let mut all: Vec<&SpecialToken> = vec![&self.pad, &self.unk, &self.bos, &self.eos];
        all.extend(self.chatml.iter().flatten().chain(&self.added));
        all.sort_by_key(|t| t.id);
        all.dedup_by_key(|t| t.id);
        all
    }

    fn tokenizer_config(&self) -> Value {
        let mut decoder = Map::new();
        for t in self.specials() {
            let entry = json!({
                "content": t.text, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true,
            });
            decoder.insert(t.id.to_string(), entry);
        }
        let mut v = json!({
            "tokenizer_class": "LlamaTokenizer",
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
            "added_tokens_decoder": decoder,
        });
        for (key, value) in self.special_tokens_map().as_object().expect("an object was made") {
            v[key] = value.clone();
        }
        if let Some(template) = self.chat_template {
            v["chat_template"] = json!(template);
        }
        v
    }

    fn special_tokens_map(&self) -> Value {
        let mut v = json!({
            "bos_token": self.bos.text,
            "eos_token": self.end().text,
            "unk_token": self.unk.text,
            "pad_token": self.pad.text,
        });
        if let Some([im_start, im_end]) = &self.chatml {
            v["additional_special_tokens"] = json!([im_start.text, im_end.text]);
        }
        v
    }

    fn generation_config(&self) -> Value {
        let stops = self.stop_ids();
        let eos = if stops.len() == 1 {
            json!(stops[0])
        } else {
            json!(stops)
        };
        json!({"bos_token_id": self.bos.id, "eos_token_id": eos, "pad_token_id": self.pad.id})
    }
}

/// Tokens that a model folder adds to its SentencePiece model, from added_tokens.json; none where there is no such file.
///
/// # Errors
/// If the file is no object of texts and ids.
pub fn read_added_tokens(dir: &Path) -> Result<Vec<SpecialToken>> {
    let path = dir.join("added_tokens.json");
    if !path.is_file() {
        return Ok(Vec::new());
    }
    let value = super::state::read_json(&path)?;
    let mut tokens = Vec::new();
    for (text, id) in value.as_object().expect("read_json gives objects") {
        let found = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let Some(id) = found else {
            crate::bail!("{}: {text:?}: expected a token id, found {id}", path.display())
        };
        tokens.push(SpecialToken { text: text.clone(), id });
    }
    tokens.sort_by_key(|t| t.id);
    Ok(tokens)
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
    let has = |dir: &Path| {
        ["tokenizer.model", "tokenizer.json"]
            .iter()
            .any(|n| dir.join(n).is_file())
    };
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

    fn token(text: &str, id: u32) -> SpecialToken {
        SpecialToken { text: text.into(), id }
    }

    fn files(chatml: bool) -> TokenizerFiles<'static> {
        let pair = [token("<|im_start|>", 4096), token("<|im_end|>", 4097)];
        TokenizerFiles {
            model: b"model",
            bos: token("<s>", 2),
            eos: token("</s>", 3),
            unk: token("<unk>", 1),
            pad: token("<pad>", 0),
            added: if chatml { pair.to_vec() } else { Vec::new() },
            chatml: chatml.then_some(pair),
            add_bos: !chatml,
            max_length: 512,
            chat_template: Some("{{ x }}"),
        }
    }

    fn json(dir: &Path, name: &str) -> Value {
        super::super::state::read_json(&dir.join(name)).unwrap()
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
        assert_eq!(
            json(dir.path(), "generation_config.json")["eos_token_id"],
            json!([4097, 3])
        );
        assert_eq!(std::fs::read(dir.path().join("tokenizer.model")).unwrap(), b"model");
        assert_eq!(
            std::fs::read_to_string(dir.path().join("chat_template.jinja")).unwrap(),
            "{{ x }}"
        );
        assert_eq!(read_added_tokens(dir.path()).unwrap(), files(true).added);
        // Saving a model without added tokens in the same folder leaves none behind.
        files(false).write(dir.path()).unwrap();
        assert_eq!(read_added_tokens(dir.path()).unwrap(), []);
        assert_eq!(json(dir.path(), "generation_config.json")["eos_token_id"], 3);
        assert_eq!(json(dir.path(), "tokenizer_config.json")["eos_token"], "</s>");
    }

    #[test]
    fn padding_is_never_an_end() {
        let dir = tempfile::tempdir().unwrap();
        for pad in [3, 4097] {
            let mut f = files(true);
            f.pad.id = pad;
            let message = f.write(dir.path()).unwrap_err().to_string();
            assert!(
                message.contains("padding token") && message.contains(&pad.to_string()),
                "{message}"
            );
        }
        std::fs::write(dir.path().join("added_tokens.json"), "{\"a\": -1}").unwrap();
        assert!(
            read_added_tokens(dir.path())
                .unwrap_err()
                .to_string()
                .contains("expected a token id")
        );
    }
}
