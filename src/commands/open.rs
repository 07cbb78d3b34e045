//! What commands begin with, opened once each for all of them: tokenizer, template, row length.

use std::collections::HashMap;
use std::path::Path;

use crate::bail;
use crate::data::template::{Date, NEWLINE, Template, TemplateOptions, Unmarked};
use crate::data::tokenizer::{SpecialIds, Tokenizer, Type, VocabPiece};
use crate::error::{Error, Result};
use crate::hf::tokenizer_files::read_chat_template;
use crate::settings::Settings;
use crate::text::plural;

/// Longest row where neither the user nor the model asks for less.
pub const DEFAULT_SEQ_LEN: usize = 1024;

/// The tokenizer at `given`, or in the first of `folders` that has one; those folders are also asked about its special tokens.
///
/// # Errors
/// If there is none, or it is not one that can be used.
pub fn tokenizer(given: Option<&Path>, folders: &[&Path], special: SpecialIds) -> Result<Tokenizer> {
    // A folder rather than a file of it: of several files that can be read is taken.
    let inside = folders.iter().copied().find(|d| Tokenizer::in_folder(d).is_some());
    match given.or(inside) {
        Some(path) => Tokenizer::open_beside(path, special, folders.first().copied()),
        None => {
            let mut places: Vec<String> = folders.iter().map(|d| d.display().to_string()).collect();
            places.dedup();
            bail!("no tokenizer in {}; name one with --tokenizer-path", places.join(" or "))
        }
    }
}

/// How a tokenizer that was named differs from the one that lies with the model, in the first of `folders` that has one; `None` where
/// there is none, one that cannot be read, or the same.
///
/// # Errors
/// If the same piece has another id there: the model would read other words than those of the rows.
pub fn beside_own(given: &Tokenizer, folders: &[&Path], special: SpecialIds) -> Result<Option<String>> {
    let own = folders.iter().copied().find_map(|d| Some((d, Tokenizer::in_folder(d)?)));
    // The same bytes are the same pieces: most often this is all.
    if own.as_ref().is_some_and(|(_, file)| std::fs::read(file).is_ok_and(|bytes| bytes == given.bytes())) {
        return Ok(None);
    }
    let own = own.and_then(|(d, _)| Tokenizer::open_beside(d, special, folders.first().copied()).ok());
    let Some(own) = own.filter(|own| own.hash() != given.hash()) else { return Ok(None) };
    let named = |t: &Tokenizer| format!("{} ({} pieces, hash {:.12})", t.name(), t.vocab_size(), t.hash());
    let ids: HashMap<&str, usize> = own.pieces().iter().enumerate().map(|(id, p)| (p.text.as_str(), id)).collect();
    // A text that stands there twice has an equal id if one of them is.
    let moved = |(id, p): &(usize, &VocabPiece)| {
        p.kind != Type::Unused
            && own.pieces().get(*id).is_none_or(|there| there.text != p.text)
            && ids.contains_key(p.text.as_str())
    };
    let moved: Vec<(usize, &VocabPiece)> = given.pieces().iter().enumerate().filter(moved).collect();
    match moved.first() {
        Some((id, p)) => bail!(
            "vocabulary mismatch: {} has other ids than the model's own {} for {}: \"{}\" is {id}, there {}; leave --tokenizer-path out, or \
             give the tokenizer the model was trained with",
            named(given),
            named(&own),
            plural(moved.len(), "piece"),
            p.text,
            ids[p.text.as_str()]
        ),
        None => Ok(Some(format!(
            "{} is used, another tokenizer than the model's own {}; pieces of both have the same ids",
            named(given),
            named(&own)
        ))),
    }
}

/// Which template a command was told, and how it is used.
#[derive(Clone, Debug, Default)]
pub struct TemplateArgs {
    /// Its name or the path of a Jinja file, or `model`; `None`: the model's own where it has one.
    pub name: Option<String>,
    /// Train the newline after a turn too.
    pub supervise_turn_newline: bool,
    /// The day that a template may ask for.
    pub date: Option<Date>,
    /// What is trained where a named file has no generation marks.
    pub unmarked: Unmarked,
}

/// The name of the template that lies with the model.
pub const OWN: &str = "model";

impl TemplateArgs {
    /// What the settings say; in training a Jinja file needs marks.
    ///
    /// # Errors
    /// A usage error if the day is none.
    pub fn of(s: &Settings) -> Result<Self> {
        let date = s.model.template_date.as_deref().map(Date::parse).transpose()?;
        let (name, unmarked) = (s.model.template.clone(), Unmarked::Refuse);
        Ok(Self { name, supervise_turn_newline: s.model.supervise_turn_newline, date, unmarked })
    }

    fn options(&self, tokenizer: &Tokenizer) -> TemplateOptions {
        let Self { supervise_turn_newline, date, unmarked, .. } = *self;
        TemplateOptions { supervise_turn_newline, names: tokenizer.control_names(), date, unmarked, of_model: false }
    }
}

/// The template asked for, or `default`, with the tokenizer's names of control tokens; ChatML's tokens are added to a tokenizer
/// that lacks them. The model's own is looked for in `folders` and beside the tokenizer.
///
/// # Errors
/// If the template is unknown, is not there or does not parse.
pub fn template(args: &TemplateArgs, folders: &[&Path], default: &str, tokenizer: &mut Tokenizer) -> Result<Template> {
    let own = match args.name.as_deref() {
        None | Some(OWN) => own_template(args, folders, tokenizer)?,
        Some(_) => None,
    };
    let template = match (own, args.name.as_deref()) {
        (Some(own), _) => own,
        (None, Some(OWN)) => {
            let places: Vec<String> = folders.iter().map(|d| d.display().to_string()).collect();
            return Err(Error::usage(format!(
                "prompt_template model: no chat template in {}, neither chat_template.jinja nor in tokenizer_config.json; name one",
                places.join(" or ")
            )));
        }
        (None, name) => Template::load(name.unwrap_or(default), args.options(tokenizer))?,
    };
    if template.needs_chatml() {
        tokenizer.add_chatml();
    }
    tokenizer.reserve(&template.tokens());
    Ok(template)
}

/// The template that lies with a model: the built-in one where it has its text, else as transformers reads it, masked turn by
/// turn where it has no marks.
///
/// # Errors
/// If it is there but cannot be used.
pub fn own_template(args: &TemplateArgs, folders: &[&Path], tokenizer: &Tokenizer) -> Result<Option<Template>> {
    let beside = Path::new(tokenizer.name()).parent();
    let mut found = None;
    for dir in folders.iter().copied().chain(beside) {
        found = found.or(read_chat_template(dir)?);
    }
    let Some((place, source)) = found else { return Ok(None) };
    let options = args.options(tokenizer);
    // As the built-in ones are saved with a tokenizer that loses newlines, and as they were saved before.
    let saved = if options.names.byte_newlines { source.replace("\\n", NEWLINE) } else { source.clone() };
    for newline in [false, true] {
        for name in Template::NAMES {
            let options = TemplateOptions { supervise_turn_newline: newline, ..options.clone() };
            // An option that a template does not have is an error there, and no candidate here.
            if let Ok(template) = Template::load(name, options)
                && template.jinja_source() == saved
            {
                return Ok(Some(template));
            }
        }
    }
    let unmarked = if args.unmarked == Unmarked::Whole { Unmarked::Whole } else { Unmarked::Turns };
    let options = TemplateOptions { unmarked, of_model: true, ..options };
    let loaded = Template::from_jinja("chat_template", &source, options);
    loaded.map(Some).map_err(|e| e.context(format!("{}", place.display())))
}

/// Rows as long as asked for, or as a model of `most` positions allows.
///
/// # Errors
/// A usage error when more is asked for than the model has positions.
pub fn row_length(asked: Option<usize>, most: usize) -> Result<usize> {
    match asked {
        Some(n) if n > most => Err(Error::usage(format!(
            "max_seq_len {n} is longer than the model's maximum: at most {most} (max_position_embeddings); lower --max-seq-len"
        ))),
        Some(n) => Ok(n),
        None => Ok(most.min(DEFAULT_SEQ_LEN)),
    }
}
