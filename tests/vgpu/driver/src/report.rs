//! What the library tells its user: lines on stderr, the trace of calls, and the faults as JSON.

use std::io::Write;
use std::sync::OnceLock;

use crate::code::Code;

/// One line on stderr, in one write: other libraries of the process write there too, under locks of their own.
pub fn say(text: &str) {
    // A closed stderr is no reason to stop.
    let _ = std::io::stderr().write_all(format!("vgpu: {text}\n").as_bytes());
}

/// Whether `VGPU_CALLS` asks for calls.
fn calls() -> bool {
    static ON: OnceLock<bool> = OnceLock::new();
    *ON.get_or_init(|| std::env::var_os("VGPU_CALLS").is_some_and(|v| v != "0"))
}

/// With `VGPU_CALLS=1`, a line for each call of the interface.
pub fn call(name: &str, code: Code) {
    if calls() {
        say(&format!("{name} -> {code:?}"));
    }
}

/// With `VGPU_CALLS=1`, a line for each copy in stream order from or to memory that is not page-locked.
pub fn pageable(bytes: usize) {
    if calls() {
        say(&format!("pageable: a copy of {bytes} bytes that is not asynchronous"));
    }
}

/// Quotes a string for JSON.
pub fn quote(s: &str) -> String {
    let mut o = String::from("\"");
    for c in s.chars() {
        match c {
            '"' => o.push_str("\\\""),
            '\\' => o.push_str("\\\\"),
            '\n' => o.push_str("\\n"),
            c if (c as u32) < 0x20 => o.push_str(&format!("\\u{:04x}", c as u32)),
            c => o.push(c),
        }
    }
    o.push('"');
    o
}

/// Appends a line to the file that `VGPU_REPORT` names.
pub fn append(line: &str) {
    let Some(path) = std::env::var_os("VGPU_REPORT") else {
        return;
    };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
    if let Err(e) = file.and_then(|mut f| f.write_all(format!("{line}\n").as_bytes())) {
        say(&format!("VGPU_REPORT {}: {e}", path.to_string_lossy()));
    }
}
