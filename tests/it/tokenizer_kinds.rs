//! Every kind of step that a `tokenizer.json` of today has: the ids that Python's `tokenizers` gives (with its other engine of regular
//! expressions), and chats whose saved template and tokenizer give the ids of training.
//! `tests/python/record_tokenizer_kinds.py` records them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use ringtune::data::encode::encode_rendered;
use ringtune::data::row::{Message, Role};
use ringtune::data::template::{Purpose, Template, TemplateOptions};
use ringtune::data::tokenizer::{Newline, SpecialIds, Tokenizer};
use ringtune::hf::companions::Companions;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer as Library;

fn recorded() -> Value {
    serde_json::from_slice(&fs::read("tests/data/tokenizer/kinds.json").unwrap()).unwrap()
}

fn strings(recorded: &Value) -> Vec<&str> {
    recorded["strings"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect()
}

/// Writes the folder of a kind's tokenizer.
fn write(recorded: &Value, kind: &Value, dir: &Path) {
    let mut file = recorded["bases"][kind["base"].as_str().unwrap()].clone();
    for part in ["normalizer", "pre_tokenizer", "decoder"] {
        file[part] = kind[part].clone();
    }
    for (key, value) in kind["model"].as_object().unwrap() {
        file["model"][key] = value.clone();
    }
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("tokenizer.json"), file.to_string()).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"});
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

fn each_kind(mut each: impl FnMut(&Value, &Value, &Path)) -> usize {
    let recorded = recorded();
    let dir = tempfile::tempdir().unwrap();
    let kinds = recorded["kinds"].as_array().unwrap();
    for (i, kind) in kinds.iter().enumerate() {
        let path = dir.path().join(i.to_string());
        write(&recorded, kind, &path);
        each(&recorded, kind, &path);
    }
    kinds.len()
}

fn open(path: &Path) -> Tokenizer {
    Tokenizer::open(path, SpecialIds::default()).unwrap()
}

#[test]
fn every_kind_gives_the_ids_and_text_of_the_python_library() {
    let kinds = each_kind(|recorded, kind, path| {
        let t = open(path);
        let group = recorded["group"].as_u64().unwrap() as usize;
        let strings = strings(recorded);
        assert_eq!(strings.len(), 1000);
        for (at, want) in strings.chunks(group).zip(kind["sha256"].as_array().unwrap()) {
            let mut hash = Sha256::new();
            for text in at {
                let ids = t.encode_raw(text).unwrap();
                let shown: Vec<String> = ids.iter().map(u32::to_string).collect();
                hash.update(format!("{}\n{}\n", shown.join(" "), t.decode_raw(&ids).unwrap()));
            }
            let got: String = hash.finalize().iter().take(8).map(|b| format!("{b:02x}")).collect();
            assert_eq!(&got, want, "{}: strings from {:?} on", kind["name"], at[0]);
        }
    });
    assert_eq!(kinds, 53);
}

/// A vocabulary of bytes has no piece that a saved template could print for a newline that the file's steps lose: such newlines are
/// encoded with the text around them, as transformers does.
#[test]
fn chats_are_trained_with_the_ids_of_the_files_that_are_written() {
    let [mut kept, mut lost, mut text] = [0; 3];
    each_kind(|recorded, kind, path| {
        let mut t = open(path);
        match t.newline() {
            Newline::Kept(_) => kept += 1,
            Newline::Lost(_) => lost += 1,
            Newline::Text(_) => {
                text += 1;
                let warned = t.warnings().join("\n");
                assert!(warned.contains("those of the template too; the ids are those of transformers"), "{warned}");
            }
            Newline::Missing => panic!("{}", kind["name"]),
        }
        let options = TemplateOptions { names: t.control_names(), ..Default::default() };
        let template = Template::load("chatml", options).unwrap();
        t.add_chatml();
        let t = Arc::new(t);
        let out = path.join("out");
        Companions::new(Arc::clone(&t), Some(&template), 512).write(&out).unwrap();
        let exported = Library::from_file(out.join("tokenizer.json")).unwrap();
        // What spells a special token is text in training, and the token in a text that is encoded as a whole.
        let plain = |s: &&str| !s.trim().is_empty() && !s.contains('<') && !s.contains('\0');
        let all = strings(recorded);
        let contents: Vec<&str> = [" Hello there ", "  Hi\n\nyou \n", "Be kind\n", " y", "a\tb 1234, ok?"]
            .into_iter()
            .chain(all.into_iter().filter(plain).take(200))
            .collect();
        for pair in contents.windows(2) {
            let row = [Message::new(Role::User, pair[0]), Message::new(Role::Assistant, pair[1])];
            let mut rendered = template.render(&row, Purpose::Train).unwrap();
            // Text is cut where a token would cross the border of what is trained; without such borders nothing is.
            rendered.segments.iter_mut().for_each(|s| s.supervised = false);
            let spelled = rendered.text(&t.control_names());
            let want = encode_rendered(&t, &rendered).unwrap().tokens;
            let got = exported.encode(spelled.as_str(), false).unwrap();
            // Where `<0x0A>` stands for the template's newlines (`Newline::Lost`), the library does not find it in the file that is written.
            let held = !matches!(t.newline(), Newline::Lost(_));
            assert!(
                !held || got.get_ids() == want,
                "{}: {spelled:?}: {:?}, expected {want:?}",
                kind["name"],
                got.get_ids()
            );
        }
    });
    assert_eq!((kept, lost, text), (39, 2, 12));
}
