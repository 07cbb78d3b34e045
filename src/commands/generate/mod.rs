//! `ringtune generate`: answers to prompts from the command line, a file or standard input, or a conversation.

mod answers;
mod chat;
mod flags;
mod lines;

use std::io::{IsTerminal, Read, Write};
use std::path::Path;

use self::answers::Answers;
pub use self::flags::about;
use self::flags::{Asked, GenerateArgs, Style};
use super::device::{self, OnDevice};
use super::model_folder::ModelFolder;
use crate::backend::Backend;
use crate::data::encode::{encode_prompt, stop_ids};
use crate::data::row::{Message, Role};
use crate::data::template::Template;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Context, Error, Result};
use crate::files::{read_bytes, unmarked};
use crate::generate::{GenerateOptions, generate};
use crate::model::Model;
use crate::say::Out;
use crate::say::visible;
use crate::settings::Settings;
use crate::{ensure, say};

/// A model with everything that turns text into tokens and back.
struct Speaker<'a, B: Backend> {
    dev: &'a B,
    loaded: Model<B>,
    tokenizer: Tokenizer,
    template: Template,
    args: &'a GenerateArgs,
    /// Tokens that end an answer.
    stop_ids: Vec<u32>,
    /// Texts that do.
    stop_texts: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// If the model or tokenizer is not usable, a prompt is empty or too long, or the device fails.
pub fn run(settings: &Settings, typed: Vec<String>) -> Result<()> {
    let args = GenerateArgs::of(settings, typed)?;
    say::set_quiet(settings.train.quiet);
    args.sampling.check()?;
    // Before the weights: standard input may hold nothing.
    let prompts = match args.asked {
        Asked::Chat => None,
        _ if args.asked == Asked::Input && std::io::stdin().is_terminal() => None,
        _ => Some(prompts(&args)?),
    };
    if prompts.is_none() && args.style == Style::Raw {
        return Err(Error::usage("--raw: a conversation needs a template; give a prompt or leave --raw out"));
    }
    device::run(&settings.device, settings.train.threads, Job { args, prompts })
}

/// The command with its prompts; without any it is a conversation.
struct Job {
    args: GenerateArgs,
    prompts: Option<Vec<String>>,
}

impl OnDevice for Job {
    fn run<B: Backend>(self, dev: &B) -> Result<()> {
        let Self { args, prompts } = self;
        let (folder, tokenizer, template) = ModelFolder::open_all(&args.model)?;
        if args.style == Style::Template {
            tokenizer.newline_id()?;
        }
        tokenizer.warnings().iter().for_each(|w| say::warning(w));
        let loaded = folder.load(dev, &tokenizer, args.model.seed, args.model.dtype)?;
        let (stop_ids, stop_texts) = stops(&args, &tokenizer, &template, loaded.config.vocab_size)?;
        let speaker = Speaker { dev, loaded, tokenizer, template, args: &args, stop_ids, stop_texts };
        match prompts {
            Some(prompts) => speaker.answer(&prompts),
            None => chat::run(&speaker, lines::Lines::open()),
        }
    }
}

/// The prompts asked for; none is empty.
fn prompts(args: &GenerateArgs) -> Result<Vec<String>> {
    let (name, text) = match &args.asked {
        Asked::Words(words) => {
            for (i, word) in words.iter().enumerate() {
                if word.is_empty() {
                    return Err(Error::usage(format!("prompt {}: expected text, found nothing", i + 1)));
                }
            }
            return Ok(words.clone());
        }
        Asked::File(path) => (path.display().to_string(), read_file(path)?),
        Asked::Input | Asked::Chat => {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes).context(|| "standard input".to_string())?;
            ("standard input".to_string(), utf8("standard input", bytes)?)
        }
    };
    let text = unmarked(&text);
    let prompts: Vec<String> = match args.batch {
        true => text.lines().filter(|l| !l.trim().is_empty()).map(String::from).collect(),
        // An editor or `echo` ends a file with a newline that nobody means.
        false => {
            let one = text.strip_suffix('\n').unwrap_or(text);
            let one = one.strip_suffix('\r').unwrap_or(one);
            (!one.is_empty()).then(|| one.to_string()).into_iter().collect()
        }
    };
    ensure!(!prompts.is_empty(), "{name}: expected a prompt, found nothing");
    Ok(prompts)
}

/// Bytes of a file of prompts at most.
const LONGEST: u64 = 1 << 30;

fn read_file(path: &Path) -> Result<String> {
    let name = path.display().to_string();
    utf8(&name, read_bytes(path, LONGEST)?)
}

fn utf8(name: &str, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::new(format!("{name}: expected UTF-8 text, found another byte at offset {at}"))
    })
}

/// The tokens and the texts that end an answer: those of the template, and those asked for. A text that is the name of a control
/// token means that token.
fn stops(
    args: &GenerateArgs,
    tokenizer: &Tokenizer,
    template: &Template,
    vocab_size: usize,
) -> Result<(Vec<u32>, Vec<String>)> {
    let mut ids = stop_ids(tokenizer, template)?;
    let mut texts = Vec::new();
    for stop in &args.stop {
        match tokenizer.id_of(stop).filter(|&id| tokenizer.is_control(id)) {
            Some(id) => ids.push(id),
            None if stop.is_empty() => return Err(Error::usage("--stop: expected text, found nothing")),
            None => texts.push(stop.clone()),
        }
    }
    for &id in &args.stop_ids {
        if id as usize >= vocab_size {
            return Err(Error::usage(format!("--stop-ids: {id} is no token of the model, which has {vocab_size}")));
        }
        ids.push(id);
    }
    Ok((ids, texts))
}

impl<B: Backend> Speaker<'_, B> {
    /// Answers prompts and prints the answers in their order, a single one as it comes.
    fn answer(&self, prompts: &[String]) -> Result<()> {
        let ids: Vec<Vec<u32>> = prompts
            .iter()
            .map(|p| match self.args.style {
                Style::Raw => self.raw(p),
                Style::Template => encode_prompt(&self.tokenizer, &self.template, &self.turns(p)),
            })
            .collect::<Result<_>>()?;
        let longest = ids.iter().map(Vec::len).max().unwrap_or(0);
        let room = self.room(longest)?;
        let mut answers =
            Answers::new(&self.tokenizer, prompts, &ids, self.args, &self.stop_ids, &self.stop_texts, room);
        let mut out = Out::new();
        let options = self.options(room);
        let loaded = &self.loaded;
        let mut failed = None;
        generate(self.dev, loaded, &ids, &options, |i, token, logits| {
            answers.push(i, token, logits, &mut out).unwrap_or_else(|e| {
                failed.get_or_insert(e);
                std::ops::ControlFlow::Break(())
            })
        })?;
        match failed {
            Some(e) => Err(e.into()),
            None => Ok(out.flush()?),
        }
    }

    /// A prompt as a conversation of one turn.
    fn turns(&self, prompt: &str) -> Vec<Message> {
        let system = self.args.system.iter().map(|s| Message::new(Role::System, s));
        system.chain([Message::new(Role::User, prompt)]).collect()
    }

    /// Text to be continued as it is, after BOS where the tokenizer has it.
    fn raw(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids: Vec<u32> = self.tokenizer.special().bos.into_iter().collect();
        ids.extend(self.tokenizer.encode(text)?);
        Ok(ids)
    }

    /// New tokens that fit behind a prompt: what was asked for, or what the model has room for where nothing was.
    fn room(&self, prompt: usize) -> Result<usize> {
        let most = self.loaded.config.max_position;
        let left = most.saturating_sub(prompt);
        match self.args.max_new_tokens {
            Some(n) if n > left => Err(Error::new(format!(
                "a prompt of {prompt} tokens and --max-new-tokens {n} are more than the model's {most} positions; shorten one"
            ))),
            None if left == 0 => {
                Err(Error::new(format!("a prompt of {prompt} tokens fills the model's {most} positions; shorten it")))
            }
            Some(n) => Ok(n),
            None => Ok(left.min(flags::DEFAULT_NEW_TOKENS)),
        }
    }

    fn options(&self, max_new_tokens: usize) -> GenerateOptions {
        GenerateOptions {
            max_new_tokens,
            stop_ids: self.stop_ids.clone(),
            batch: self.args.batch_size,
            sampling: self.args.sampling,
        }
    }
}

/// Writes and flushes, so that a reader sees the text as it comes; what would steer a terminal is written out.
fn show(out: &mut Out, text: &str) -> std::io::Result<()> {
    if !text.is_empty() {
        out.write_all(visible(text).as_bytes())?;
        out.flush()?;
    }
    Ok(())
}
