//! Runs the `ringtune` program in a folder of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A temporary folder to run commands in, with a token cache of its own.
pub struct Workplace {
    dir: TempDir,
}

/// What a command printed and how it ended.
pub struct Outcome {
    /// Exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    fn of(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The last line of stderr that begins with `error: `, without it.
    pub fn error(&self) -> &str {
        let line = self.stderr.lines().rev().find_map(|l| l.strip_prefix("error: "));
        line.unwrap_or_else(|| panic!("no error line in:\n{}", self.stderr))
    }
}

impl Workplace {
    /// An empty folder.
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file, and its folders.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// Copies a file of the repository.
    pub fn copy(&self, from: &str, to: &str) {
        self.write(to, fs::read(repository().join(from)).unwrap());
    }

    /// Runs `ringtune` with words.
    pub fn run(&self, words: &[&str]) -> Outcome {
        Outcome::of(self.program().args(words).output().unwrap())
    }

    /// Runs a line of shell, where `ringtune` is the program under test.
    pub fn shell(&self, line: &str) -> Outcome {
        let program = Path::new(env!("CARGO_BIN_EXE_ringtune"));
        let folder = program.parent().unwrap().display().to_string();
        let path = std::env::var("PATH").unwrap_or_default();
        let mut sh = Command::new("sh");
        sh.args(["-c", line]).env("PATH", format!("{folder}:{path}"));
        Outcome::of(self.prepare(sh).output().unwrap())
    }

    fn program(&self) -> Command {
        self.prepare(Command::new(env!("CARGO_BIN_EXE_ringtune")))
    }

    fn prepare(&self, mut command: Command) -> Command {
        command.current_dir(self.dir.path()).env("RINGTUNE_CACHE", self.path("cache"));
        // No test asks the world's hub.
        command.env("HF_HOME", self.path("hf")).env("HF_HUB_OFFLINE", "1").env("NO_PROXY", "127.0.0.1");
        ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE"]
            .into_iter()
            .for_each(|name| {
                command.env_remove(name);
            });
        command
    }
}

/// The root of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The fenced code blocks of a Markdown file in this language.
pub fn code_blocks(markdown: &str, language: &str) -> Vec<String> {
    let opening = format!("```{language}\n");
    let blocks = markdown.split(&opening).skip(1);
    blocks.map(|b| b.split("\n```").next().unwrap_or_default().to_string()).collect()
}

/// The first rows of a JSONL file of the repository.
pub fn first_rows(file: &str, n: usize) -> String {
    let text = fs::read_to_string(repository().join(file)).unwrap();
    text.lines().take(n).map(|l| format!("{l}\n")).collect()
}
