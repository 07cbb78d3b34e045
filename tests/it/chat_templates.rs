//! Chat templates as published models have them: ids as transformers gives them, special tokens, begin tokens, the day, and the
//! model's own template in training and use.

use std::fs;
use std::path::Path;

use ringtune::commands::open::{TemplateArgs, template};
use ringtune::data::encode::{encode_prompt, encode_rendered};
use ringtune::data::row::{Message, Role};
use ringtune::data::template::{Control, ControlNames, Date, Part, Purpose, Template, TemplateOptions, Unmarked};
use ringtune::data::tokenizer::{SpecialIds, Specials, Tokenizer};
use ringtune::hf::companions::Companions;
use serde_json::{Value, json};
use tokenizers::Tokenizer as Library;

use crate::tuned::{fails, ok, untuned};

/// What transformers made of the forms of published templates; see tests/python/record_templates.py.
fn golden() -> Value {
    serde_json::from_slice(&fs::read("tests/data/chat_templates.json").unwrap()).unwrap()
}

fn messages(talk: &Value) -> Vec<Message> {
    let text = |m: &Value, key: &str| m[key].as_str().unwrap().to_string();
    let turn = |m: &Value| Message::new(Role::parse(&text(m, "role")).unwrap(), text(m, "content"));
    talk.as_array().unwrap().iter().map(turn).collect()
}

/// Writes the tokenizer of the recorded forms, with the template where it is said to be.
fn folder(dir: &Path, golden: &Value, form: &str, place: &str) {
    let mut config = golden["forms"][form]["config"].clone();
    let source = &golden["forms"][form]["template"];
    match place {
        "file" => fs::write(dir.join("chat_template.jinja"), source.as_str().unwrap()).unwrap(),
        "text" => config["chat_template"] = source.clone(),
        _ => {
            config["chat_template"] =
                json!([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": source}]);
        }
    }
    fs::write(dir.join("tokenizer.json"), golden["tokenizer"].to_string()).unwrap();
    fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

fn own(dir: &Path, args: TemplateArgs) -> (Tokenizer, Template) {
    let mut t = Tokenizer::open(dir, SpecialIds::default()).unwrap();
    let args = TemplateArgs { name: Some("model".into()), ..args };
    let own = template(&args, &[dir], "chatml", &mut t).unwrap();
    (t, own)
}

#[test]
fn the_models_own_template_gives_the_ids_of_transformers() {
    let golden = golden();
    let mut compared = 0;
    for (i, case) in golden["cases"].as_array().unwrap().iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let form = case["form"].as_str().unwrap();
        folder(dir.path(), &golden, form, ["file", "text", "list"][i % 3]);
        let (t, own) = own(dir.path(), TemplateArgs { unmarked: Unmarked::Whole, ..Default::default() });
        let talk = messages(&golden["talks"][case["talk"].as_u64().unwrap() as usize]);
        let rendered = own.render(&talk, Purpose::Train);
        if case["ids"].is_null() {
            assert!(rendered.is_err(), "{form}");
            continue;
        }
        let what = format!("{form} {}", case["talk"]);
        assert_eq!(json!(encode_rendered(&t, &rendered.unwrap()).unwrap().tokens), case["ids"], "{what}");
        let prompt = encode_prompt(&t, &own, &talk[..talk.len() - 1]).unwrap();
        assert_eq!(json!(prompt), case["prompt_ids"], "{what}: prompt");
        compared += 1;
    }
    assert_eq!(compared, 35);
}

/// What was trained with one form is what its saved files make of the saved template.
#[test]
fn saved_files_give_the_ids_of_training_with_special_tokens_of_the_template() {
    let golden = golden();
    for form in ["llama3", "phi3", "mistral", "gemma", "both"] {
        let dir = tempfile::tempdir().unwrap();
        folder(dir.path(), &golden, form, "file");
        let (t, own) = own(dir.path(), TemplateArgs { unmarked: Unmarked::Whole, ..Default::default() });
        let talk = messages(&golden["talks"][0]);
        let rendered = own.render(&talk, Purpose::Train).unwrap();
        let want = encode_rendered(&t, &rendered).unwrap().tokens;
        let out = dir.path().join("out");
        let text = rendered.text(&t.control_names());
        Companions::new(t.into(), Some(&own), 512).write(&out).unwrap();
        let library = Library::from_file(out.join("tokenizer.json")).unwrap();
        assert_eq!(library.encode(text.as_str(), false).unwrap().get_ids(), want, "{form}");
        let config: Value = serde_json::from_slice(&fs::read(out.join("tokenizer_config.json")).unwrap()).unwrap();
        assert_eq!(config["tokenizer_class"], "PreTrainedTokenizerFast", "{form}");
        assert_eq!(config["chat_template"], golden["forms"][form]["template"], "{form}");
    }
}

#[test]
fn what_ends_a_turn_of_the_template_ends_an_answer() {
    let golden = golden();
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path(), &golden, "llama3", "file");
    // The tokenizer's end is that of a text; the template closes a turn with another token.
    let config = json!({"eos_token": "<|end_of_text|>", "bos_token": "<|begin_of_text|>"});
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let (t, own) = own(dir.path(), TemplateArgs::default());
    let [eot, end] = ["<|eot_id|>", "<|end_of_text|>"].map(|name| t.id_of(name).unwrap());
    assert_eq!(ringtune::data::encode::stop_ids(&t, &own).unwrap(), [eot, end]);
    Companions::new(t.into(), Some(&own), 512).write(dir.path()).unwrap();
    let said: Value = serde_json::from_slice(&fs::read(dir.path().join("generation_config.json")).unwrap()).unwrap();
    assert_eq!(said["eos_token_id"], json!([end, eot]));
}

#[test]
fn a_template_without_marks_trains_what_each_answer_adds() {
    let golden = golden();
    let talk = messages(&golden["talks"][1]);
    for (form, trained) in [
        ("llama3", ["Yes.<|eot_id|>", "Because.<|eot_id|>"]),
        ("qwen2.5", ["Yes.<|im_end|>", "Because.<|im_end|>"]),
        ("mistral", [" Yes.</s>", " Because.</s>"]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        folder(dir.path(), &golden, form, "text");
        let (t, own) = own(dir.path(), TemplateArgs::default());
        let rendered = own.render(&talk, Purpose::Train);
        if form == "mistral" {
            // It puts the system turn before the last user turn, wherever that is.
            let e = rendered.unwrap_err().to_string();
            assert!(e.contains("messages[2] it does not go on where the prompt before it ends"), "{e}");
            continue;
        }
        let (text, spans) = rendered.unwrap().text_and_spans(own.names());
        assert_eq!(spans.iter().map(|s| &text[s[0]..s[1]]).collect::<Vec<_>>(), trained, "{form}");
        let mut half = talk.clone();
        half[2].train = false;
        let (text, spans) = own.render(&half, Purpose::Train).unwrap().text_and_spans(own.names());
        assert_eq!(spans.iter().map(|s| &text[s[0]..s[1]]).collect::<Vec<_>>(), trained[1..], "{form}");
        // A prompt is where the trained tokens begin.
        let encoded = encode_rendered(&t, &own.render(&talk, Purpose::Train).unwrap()).unwrap();
        let prompt = encode_prompt(&t, &own, &talk[..4]).unwrap();
        assert_eq!(encoded.tokens[..prompt.len()], prompt, "{form}");
        assert!(encoded.supervised[prompt.len()] && !encoded.supervised[prompt.len() - 1], "{form}");
    }
    // Thinking that leaves the history: earlier turns are not what was generated.
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path(), &golden, "qwen3", "file");
    let (_, own) = own(dir.path(), TemplateArgs::default());
    let e = own.render(&talk, Purpose::Train).unwrap_err().to_string();
    assert!(e.contains("messages[2] look different") && e.contains("no {% generation %} marks"), "{e}");
    assert!(own.render(&talk[..3], Purpose::Train).is_ok());
}

fn marked(source: &str, options: TemplateOptions) -> Template {
    let answer = "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}";
    let turns = format!(
        "{{% for m in messages %}}{{% if m.role == 'assistant' %}}{answer}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
    );
    Template::from_jinja("mine", &source.replace("TURNS", &turns), options).unwrap()
}

fn text(t: &Template, talk: &[Message]) -> String {
    let mut rendered = t.render(talk, Purpose::Train).unwrap();
    rendered.segments.iter_mut().for_each(|s| s.implicit = false);
    rendered.text(t.names())
}

fn talk() -> Vec<Message> {
    [(Role::System, "S "), (Role::User, "U "), (Role::Assistant, "A")].map(|(r, t)| Message::new(r, t)).to_vec()
}

#[test]
fn the_begin_token_comes_once() {
    let refuses = "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}";
    for (source, adds) in [
        ("{{ bos_token }}TURNS".to_string(), false),
        (format!("{{{{ bos_token }}}}{refuses}TURNS"), false),
        (format!("{refuses}<s>TURNS"), false),
        ("{% if messages|length > 2 %}{{ bos_token }}{% endif %}TURNS".to_string(), false),
        ("{% if messages|length > 2 %}<s>{% endif %}TURNS".to_string(), false),
        ("{% if messages|length > 9 or messages[0].role == 'system' and messages[0].content == 'S ' %}<s>{% endif %}TURNS".to_string(), true),
        (format!("{refuses}TURNS"), true),
        ("TURNS".to_string(), true),
    ] {
        let t = marked(&source, TemplateOptions::default());
        assert_eq!(text(&t, &talk()), "<s>S U A</s>", "{source}");
        assert_eq!(t.jinja_source().starts_with("{{ bos_token }}{"), adds || source.starts_with("{{ bos"), "{source}");
    }
    // The model's own template is used as it is.
    let t = marked("TURNS", TemplateOptions { of_model: true, ..Default::default() });
    assert_eq!(text(&t, &talk()), "S U A</s>");
}

#[test]
fn what_is_not_given_is_none_or_has_no_name_as_in_transformers() {
    let source = "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}\
                  {% if tools is defined and documents is defined %}both {% endif %}\
                  {% if pad_token is defined %}{{ pad_token }}{% endif %}{% if unk_token is defined %}unk{% endif %}\
                  {% if strftime_now is defined %}now{% endif %}{% if date_string is defined %}day{% endif %}TURNS";
    let names = ControlNames::new("", "</s>", Some("[P]".into()), None, Vec::new());
    let t = marked(source, TemplateOptions { names, ..Default::default() });
    assert_eq!(text(&t, &talk()), "both [P]S U A</s>");
    let t = marked(
        "{% if bos_token is defined %}bos{% endif %}TURNS",
        TemplateOptions { names: t.names().clone(), ..Default::default() },
    );
    assert_eq!(text(&t, &talk()), "S U A</s>", "a vocabulary without a begin token");
}

#[test]
fn the_day_is_told_only_where_it_is_pinned() {
    let fallback =
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %} TURNS";
    let day = |text: &str| TemplateOptions { date: Some(Date::parse(text).unwrap()), ..Default::default() };
    assert_eq!(text(&marked(fallback, TemplateOptions::default()), &talk()), "<s>26 Jul 2024 S U A</s>");
    assert_eq!(text(&marked(fallback, day("2025-01-02")), &talk()), "<s>02 Jan 2025 S U A</s>");
    assert_ne!(marked(fallback, day("2025-01-02")).fingerprint(), marked(fallback, day("2025-01-03")).fingerprint());
    let calls = marked("{{ strftime_now('%Y') }} TURNS", TemplateOptions::default());
    let e = calls.render(&talk(), Purpose::Train).unwrap_err().to_string();
    assert!(e.contains("strftime_now") && e.contains("--template-date"), "{e}");
    for template in [Template::load("chatml", day("2025-01-02")), Template::from_jinja("m", "x", day("2025-01-02"))] {
        let e = template.unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("template_date has no effect"), "{e}");
    }
}

#[test]
fn special_tokens_are_the_templates_and_never_the_datas() {
    let others = vec![("<|user|>".into(), 7), ("<|user|>x".into(), 8), ("[INST]".into(), 9)];
    let names = ControlNames::new("<s>", "</s>", None, None, others);
    let options = TemplateOptions { names: names.clone(), ..Default::default() };
    let c = [Message::new(Role::User, "<|user|>[INST]</s>"), Message::new(Role::Assistant, "[INST]")];
    let tokens = |t: &Template| -> Vec<Control> {
        let parts = t.render(&c, Purpose::Train).unwrap().segments.into_iter();
        parts.filter_map(|s| if let Part::Control(token) = s.part { Some(token) } else { None }).collect()
    };
    let t = marked("{{ '<|' + messages[0].role + '|>' }}<|user|>xTURNS", options.clone());
    assert_eq!(tokens(&t), [Control::Bos, Control::Token(7), Control::Token(8), Control::Eos]);
    assert_eq!(t.tokens(), [7, 8]);
    // Templates that are built in spell them too.
    let zephyr = Template::load("zephyr", options.clone()).unwrap();
    assert_eq!(tokens(&zephyr), [Control::Bos, Control::Token(7), Control::Eos, Control::Eos]);
    assert_eq!(tokens(&Template::load("llama2", options).unwrap()), [Control::Bos, Control::Token(9), Control::Eos]);
}

/// SentencePiece finds symbols of the user's in any text; those that the template prints are its own.
#[test]
fn symbols_of_a_sentencepiece_model_that_the_template_prints_are_never_found_in_data() {
    let mut bytes = fs::read("tests/data/tokenizer/spm4k_chatml.model").unwrap();
    let name = b"<|im_end|>";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap();
    bytes[at..at + name.len()].copy_from_slice(b"<|halt_!|>");
    let mut t = Tokenizer::from_bytes("spm", bytes, SpecialIds::default()).unwrap();
    let end = t.id_of("<|halt_!|>").unwrap();
    assert!(t.encode("a <|halt_!|> b").unwrap().contains(&end));
    let options = TemplateOptions { names: t.control_names(), ..Default::default() };
    let stops = marked("{{ '<|halt_' + '!|>' }}TURNS", options);
    t.reserve(&stops.tokens());
    assert_eq!((t.reserved(), t.is_control(end)), (&[end][..], true));
    let ids = t.encode("a <|halt_!|> b").unwrap();
    assert!(!ids.contains(&end));
    assert_eq!(t.decode(&ids, Specials::Show), "a <|halt_!|> b");
    let rendered = stops.render(&talk(), Purpose::Train).unwrap();
    assert!(encode_rendered(&t, &rendered).unwrap().tokens.contains(&end));
}

/// A tokenizer that loses newlines has those of the template as a byte; the saved template spells it, so that any reader has it too.
#[test]
fn saved_templates_keep_newlines_that_the_tokenizer_loses() {
    for name in Template::NAMES {
        let mut t =
            Tokenizer::open("tests/data/tokenizer/spm4k_unigram.model".as_ref(), SpecialIds::default()).unwrap();
        let args = TemplateArgs { name: Some(name.to_string()), ..Default::default() };
        let asked = template(&args, &[], name, &mut t).unwrap();
        let talk = [Message::new(Role::User, "one two  three <0x0A>"), Message::new(Role::Assistant, "Four.")];
        let want = encode_rendered(&t, &asked.render(&talk, Purpose::Train).unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let names = t.control_names();
        Companions::new(t.into(), Some(&asked), 512).write(dir.path()).unwrap();
        // Opened again it is the built-in one, and so is the template of a folder that was written before.
        let (t, again) = own(dir.path(), TemplateArgs::default());
        assert_eq!(again.name(), name);
        let source = fs::read_to_string(dir.path().join("chat_template.jinja")).unwrap();
        fs::write(dir.path().join("chat_template.jinja"), source.replace("<0x0A>", "\\n")).unwrap();
        assert_eq!(own(dir.path(), TemplateArgs::default()).1.name(), name);
        // What a reader of the saved template and tokenizer gets, data's own spelling of the byte left aside.
        let jinja = Template::from_jinja("saved", &source, TemplateOptions { names, ..Default::default() }).unwrap();
        let rendered = jinja.render(&talk, Purpose::Train).unwrap();
        assert_eq!(encode_rendered(&t, &rendered).unwrap(), want, "{name}");
        let plain = [Message::new(Role::User, "one\ntwo  three"), talk[1].clone()];
        let text = jinja.render(&plain, Purpose::Train).unwrap().text(jinja.names());
        let library = Library::from_file(dir.path().join("tokenizer.json")).unwrap();
        let want = encode_rendered(&t, &asked.render(&plain, Purpose::Train).unwrap()).unwrap().tokens;
        assert_eq!(library.encode(text.as_str(), false).unwrap().get_ids(), want, "{name}");
        assert!(library.decode(&want, true).unwrap().contains('\n') || name == "llama2" || name == "plain", "{name}");
    }
}

/// Files beside a SentencePiece model may call an added token `eos_token`; the model's own template prints that one.
#[test]
fn the_models_template_prints_the_end_token_that_its_files_name() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy("tests/data/tokenizer/spm4k.model", dir.path().join("tokenizer.model")).unwrap();
    fs::write(dir.path().join("added_tokens.json"), json!({"<|end|>": 4096}).to_string()).unwrap();
    let source = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}";
    let config = json!({"eos_token": {"content": "<|end|>"}, "chat_template": source});
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let (t, own) = own(dir.path(), TemplateArgs::default());
    let talk = [Message::new(Role::User, "one"), Message::new(Role::Assistant, "two")];
    let want = encode_rendered(&t, &own.render(&talk, Purpose::Train).unwrap()).unwrap();
    assert_eq!(want.tokens.iter().filter(|&&id| id == 4096).count(), 2);
    assert_eq!((want.tokens.last(), want.supervised.last()), (Some(&4096), Some(&true)));
    assert_eq!(ringtune::data::encode::stop_ids(&t, &own).unwrap(), [4096, 3]);
    // The saved files name the model's own end; the saved template goes on printing the other.
    let out = dir.path().join("out");
    Companions::new(t.into(), Some(&own), 512).write(&out).unwrap();
    let (t, again) = self::own(&out, TemplateArgs::default());
    assert_eq!(encode_rendered(&t, &again.render(&talk, Purpose::Train).unwrap()).unwrap(), want);
}

/// With ChatML the saved `eos_token` is `<|im_end|>`; a template that prints the other one goes on printing it.
#[test]
fn a_saved_template_prints_the_end_token_of_training() {
    let source = "<|im_start|>TURNS<|im_end|>";
    let t = marked(source, TemplateOptions::default());
    let names = ControlNames::new("<s>", "<|im_end|>", None, None, Vec::new());
    let again =
        Template::from_jinja("again", &t.jinja_source(), TemplateOptions { names, ..Default::default() }).unwrap();
    assert_eq!(text(&again, &talk()), text(&t, &talk()));
}

const PLAIN: &str = "{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + eos_token }}{% endfor %}\
                     {% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}";

#[test]
fn generation_needs_no_marks_and_training_says_which_template_it_takes() {
    let w = untuned();
    w.write("base/chat_template.jinja", PLAIN);
    let base = "--model_path base --tokenizer_path spm.model";
    let prompt = |line: &str| {
        let out = ok(w.shell(line)).stdout;
        serde_json::from_str::<Value>(out.lines().next().unwrap()).unwrap()["prompt_ids"].clone()
    };
    let ids = prompt(&format!("ringtune generate {base} --max-new-tokens 2 --json hello"));
    assert_eq!(
        ids,
        prompt(&format!("ringtune generate {base} --prompt-template model --max-new-tokens 2 --json hello"))
    );
    let file = prompt(&format!(
        "ringtune generate {base} --prompt-template base/chat_template.jinja --max-new-tokens 2 --json hello"
    ));
    assert_eq!(ids, json!(file.as_array().unwrap()[1..]), "a file that is not the model's gets a begin token");
    ok(w.shell(&format!("echo hello | ringtune generate {base} --chat --max-new-tokens 2")));
    let rows = "--dataset_paths rows.jsonl";
    ok(w.shell(&format!("ringtune eval {base} {rows} --gen_only --num_gen_samples 2 --max_new_tokens 2")));
    ok(w.shell(&format!("ringtune eval {base} {rows} --max_eval_samples 4")));
    let sft = format!("ringtune sft {base} {rows} --max_steps 1 --max_seq_len 64 --no_tensorboard --no_lora");
    let out = ok(w.shell(&format!("{sft} --output_dir other")));
    assert!(
        out.stderr.contains("has a chat template of its own") && out.stderr.contains("--prompt-template model"),
        "{}",
        out.stderr
    );
    let out = ok(w.shell(&format!("{sft} --output_dir own --prompt_template model")));
    assert!(!out.stderr.contains("of its own"), "{}", out.stderr);
    assert_eq!(fs::read_to_string(w.path("own/chat_template.jinja")).unwrap(), PLAIN);
    fs::remove_file(w.path("base/chat_template.jinja")).unwrap();
    fails(&w.shell(&format!("{sft} --output_dir none --prompt_template model")), 2, &["no chat template in base"]);
    w.write("base/tokenizer_config.json", json!({"chat_template": [{"name": "a", "template": "x"}]}).to_string());
    fails(
        &w.shell(&format!("ringtune generate {base} hello")),
        1,
        &["tokenizer_config.json", "called default", "\"a\""],
    );
}
