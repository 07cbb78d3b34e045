//! The trace of launches: one line of JSON each, appended to the file that `VGPU_TRACE` names.

use std::fs::OpenOptions;
use std::io::Write;

use crate::error::{Error, Result};
use crate::exec::counters::Counters;
use crate::exec::launch::Shape;

/// A string as JSON.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if (c as u32) < 0x20 => out += &format!("\\u{:04x}", c as u32),
            c => out.push(c),
        }
    }
    out + "\""
}

/// Appends a launch, if the environment asks for a trace.
pub(crate) fn append(kernel: &str, shape: &Shape, static_shared: usize, counters: &Counters) -> Result<()> {
    let Some(path) = std::env::var_os("VGPU_TRACE").filter(|p| !p.is_empty()) else {
        return Ok(());
    };
    let head = format!(
        "\"kernel\":{},\"grid\":{:?},\"block\":{:?},\"cluster\":{:?},\"shared_bytes\":{}",
        quoted(kernel),
        shape.grid,
        shape.block,
        shape.cluster,
        static_shared + shape.dynamic_shared
    );
    let line = counters.json(&head) + "\n";
    // One write of the whole line: processes may share the file.
    let file = OpenOptions::new().append(true).create(true).open(&path);
    file.and_then(|mut f| f.write_all(line.as_bytes()))
        .map_err(|e| Error::Invalid(format!("VGPU_TRACE={}: {e}", path.to_string_lossy())))
}
