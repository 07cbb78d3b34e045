//! Where a conversation's turns come from: a terminal with line editing and a history, or a pipe.

use std::fs::OpenOptions;
use std::io::{BufRead, IsTerminal};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};

use crate::dirs;
use crate::error::{Context, Error, Result};
use crate::say;
use crate::train::signals::Interrupts;

/// Lines that the history keeps.
const REMEMBERED: usize = 1000;

/// What was typed.
pub(super) enum Typed {
    /// A turn or a command.
    Line(String),
    /// Ctrl-C on a line, which is thrown away.
    Nothing,
    /// Ctrl-D, or the end of a pipe.
    End,
}

/// Turns as they come.
pub(super) enum Lines {
    /// A terminal.
    Edited(Box<Editor<(), FileHistory>>, Option<PathBuf>),
    /// Anything else.
    Plain,
}

impl Lines {
    /// Edited where somebody types and reads; a terminal that cannot be edited on is read line by line.
    pub fn open() -> Self {
        if !std::io::stdin().is_terminal() || !say::stdout_is_terminal() {
            return Self::Plain;
        }
        let config = Config::builder().max_history_size(REMEMBERED).map(|c| c.auto_add_history(true).build());
        let Ok(mut editor) = config.and_then(Editor::<(), FileHistory>::with_config) else { return Self::Plain };
        let history = history_file();
        if let Some(path) = &history {
            // A history that cannot be read is an empty one.
            let _ = editor.load_history(path);
        }
        Self::Edited(Box::new(editor), history)
    }

    /// What Ctrl-C does at a terminal while an answer is made.
    pub fn interrupts(&self) -> Option<Interrupts> {
        matches!(self, Self::Edited(..)).then_some(Interrupts)
    }

    /// The next line.
    ///
    /// # Errors
    /// If standard input cannot be read or is not UTF-8.
    pub fn next(&mut self) -> Result<Typed> {
        match self {
            Self::Edited(editor, history) => match editor.readline("> ") {
                Ok(line) => {
                    if let Some(path) = history {
                        let _ = editor.append_history(path);
                    }
                    Ok(Typed::Line(line))
                }
                Err(ReadlineError::Interrupted) => Ok(Typed::Nothing),
                Err(ReadlineError::Eof) => Ok(Typed::End),
                Err(e) => Err(Error::new(format!("standard input: {e}"))),
            },
            Self::Plain => {
                // On stderr: standard output holds answers alone.
                say::invite("> ");
                let mut line = String::new();
                let read = std::io::stdin().lock().read_line(&mut line).context(|| "standard input".to_string())?;
                let said = line.trim_end_matches(['\n', '\r']);
                Ok(if read == 0 { Typed::End } else { Typed::Line(said.to_string()) })
            }
        }
    }
}

/// The file of the history, which its owner alone can read; `None` where there can be none.
fn history_file() -> Option<PathBuf> {
    let path = dirs::cache().join("chat_history");
    private(&path).ok().map(|()| path)
}

/// Makes the file where there is none, and takes everybody else's rights away.
fn private(path: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
}
