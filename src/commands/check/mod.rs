//! `ringtune check`: what `sft` or `pretrain` with the same flags would do, without training.
//!
//! It goes through the start of a training with the training's own functions and goes on after a mistake as far as it can,
//! so that one call names every problem. Nothing is written but token files in the cache, which the training then reuses.

mod budget;
mod corpus;
mod finding;
mod folder;
mod opened;

use std::io::Write;

pub use finding::{Finding, Severity};
use serde_json::{Map, Value, json};

use super::start;
use crate::error::{Error, Result};
use crate::say::Out;
use crate::settings::{Command, Resolved};
use crate::text::{Style, plural};

/// What the help says of findings.
pub const CODES: &str = "\
Exit codes: 0 no problem (there may be warnings), 1 a problem: the training would fail or be wrong, 2 flags or configuration.
Each finding has a code in brackets:
  settings, no-effect, schedule, warmup, few-steps      settings among each other
  model, lora, lora-rank, vocabulary, token-ids         the model, and whether the tokenizer is its own
  tokenizer, newline, byte-fallback, template           the tokenizer and the template
  data, data-missing, bad-row, row-length, over-long    data sets and rows, with file and line
  newlines-lost, blanks-lost, unknown-characters        text that the tokenizer does not keep
  unread-keys, unsupervised, low-supervision, end-not-trained   what is trained of the rows
  duplicate-rows, validation-leak, no-validation, mix   data sets among each other
  packing, memory, time, disk, output-folder, resume    what the run needs and where it writes";

/// What `check` takes besides the training's flags.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Print one JSON object.
    pub json: bool,
    /// Rows to show with their mask.
    pub preview_rows: usize,
    /// Take a few steps and measure them.
    pub time: bool,
    /// Memory of the device to train on, in bytes; without it, what is free here.
    pub device_memory: Option<u64>,
    /// Floating-point operations a second of the device to train on.
    pub flops_rate: Option<f64>,
    /// Ranks to train on.
    pub ranks: usize,
}

/// Findings and facts as they come in.
pub struct Check {
    style: Style,
    findings: Vec<Finding>,
    sections: Vec<(String, String)>,
    facts: Map<String, Value>,
}

impl Check {
    fn new(json: bool) -> Self {
        Self {
            style: if json { Style::new(false) } else { Style::stdout() },
            findings: Vec::new(),
            sections: Vec::new(),
            facts: Map::new(),
        }
    }

    /// Adds a finding, once: a file may be named twice, to train on and to validate with.
    fn push(&mut self, finding: Finding) {
        if !self.findings.contains(&finding) {
            self.findings.push(finding);
        }
    }

    /// The value, or `None` and a problem where there is an error.
    fn take<T>(&mut self, code: &'static str, place: &str, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(e) => {
                self.push(Finding::error(code, place, &e));
                None
            }
        }
    }

    /// Adds lines below a heading, and the same as data.
    fn section(&mut self, title: &str, text: impl Into<String>, facts: Value) {
        self.sections.push((title.into(), text.into()));
        self.facts.insert(title.replace(' ', "_"), facts);
    }

    fn count(&self, severity: Severity) -> usize {
        self.findings.iter().filter(|f| f.severity == severity).count()
    }

    fn to_json(&self, command: Command) -> Value {
        let of = |severity: Severity| -> Vec<Value> {
            let these = self.findings.iter().filter(|f| f.severity == severity);
            these.map(Finding::to_json).collect()
        };
        let mut all = Map::new();
        all.insert("command".into(), json!(if command == Command::Sft { "sft" } else { "pretrain" }));
        all.insert("ok".into(), json!(self.count(Severity::Problem) == 0));
        all.insert("problems".into(), json!(of(Severity::Problem)));
        all.insert("warnings".into(), json!(of(Severity::Warning)));
        all.extend(self.facts.clone());
        Value::Object(all)
    }

    /// The verdict and the problems first, where they are seen without scrolling, and again at the end, where the eye is.
    fn print(&self, out: &mut impl Write) -> Result<()> {
        let (problems, warnings) = (self.count(Severity::Problem), self.count(Severity::Warning));
        let verdict = match problems {
            0 => self.style.good(&format!("no problem found, {}", plural(warnings, "warning"))),
            n => {
                let what = format!(
                    "{}, {}: this training would fail or be wrong",
                    plural(n, "problem"),
                    plural(warnings, "warning")
                );
                self.style.finding(true, &what)
            }
        };
        writeln!(out, "{verdict}")?;
        self.print_findings(out, Severity::Problem)?;
        writeln!(out)?;
        for (title, text) in &self.sections {
            writeln!(out, "{}\n{}\n", self.style.heading(title), text.trim_end())?;
        }
        self.print_findings(out, Severity::Warning)?;
        self.print_findings(out, Severity::Problem)?;
        writeln!(out, "{verdict}")?;
        Ok(())
    }

    fn print_findings(&self, out: &mut impl Write, severity: Severity) -> Result<()> {
        for f in self.findings.iter().filter(|f| f.severity == severity) {
            writeln!(out, "{}", self.style.finding(severity == Severity::Problem, &f.to_string()))?;
        }
        Ok(())
    }
}

/// Checks a training and says what was found.
///
/// # Errors
/// If a problem was found (exit code 1), or the settings name no model or data at all (2).
pub fn run(settings: &Resolved, options: &Options) -> Result<()> {
    let mut check = Check::new(options.json);
    for warning in &settings.warnings {
        check.push(Finding::warning("no-effect", "", warning.as_str()));
    }
    check.take("settings", "device", super::device::check(&settings.settings.device));
    let start = match settings.command() {
        Command::Pretrain => {
            let job = super::data::pretrain_job(settings)?;
            start::settings(&mut check, &job.settings)?;
            start::of_pretrain(&mut check, &job)?
        }
        _ => {
            let job = super::data::sft_job(settings)?;
            let lora = start::settings(&mut check, &job.settings)?;
            start::of_sft(&mut check, &job, lora)?
        }
    };
    corpus::examine(&mut check, &start, options.preview_rows);
    let ranks = options.ranks.max(1);
    let steps = budget::steps(&mut check, &start, ranks);
    budget::memory(&mut check, &start, steps, &settings.settings.device, options.device_memory, ranks);
    budget::time(&mut check, &start, steps, options, &settings.settings.device);
    folder::examine(&mut check, &start, steps);
    let mut out = Out::new();
    if options.json {
        writeln!(out, "{:#}", check.to_json(settings.command()))?;
    } else {
        check.print(&mut out)?;
    }
    out.flush()?;
    match check.count(Severity::Problem) {
        0 => Ok(()),
        n => Err(Error::new(format!("{} would make this training fail or be wrong", plural(n, "problem")))),
    }
}
