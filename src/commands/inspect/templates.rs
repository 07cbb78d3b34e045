//! `ringtune inspect templates`: conversations rendered, and which bytes of them are trained.

use std::io::Write;
use std::path::Path;

use crate::data::template::TemplateOptions;
use crate::data::template::cases::render_cases;
use crate::error::{Context, Result};
use crate::files::read_bytes;
use crate::say::Out;
use crate::say::visible;
use crate::text::Style;

/// Prints each conversation of the file in each template (or in `template` alone), as text or as JSON lines with
/// conversation, template, text, spans_bytes.
///
/// # Errors
/// If the file is missing or of another form, or the template is unknown.
pub fn run(file: &Path, template: Option<&str>, json: bool) -> Result<()> {
    let name = || file.display().to_string();
    let bytes = read_bytes(file, 256 << 20)?;
    let cases = render_cases(&bytes, template, &TemplateOptions::default()).context(name)?;
    let style = Style::stdout();
    let mut out = Out::new();
    for case in cases {
        if json {
            writeln!(out, "{}", case.to_json())?;
            continue;
        }
        writeln!(out, "{}", style.heading(&format!("== conversation {}, {}", case.conversation, case.template)))?;
        match &case.rendering {
            Ok(r) => writeln!(out, "{}\n", style.spans(&r.text, &r.spans_bytes).trim_end_matches('\n'))?,
            Err(why) => writeln!(out, "does not apply: {}\n", visible(why))?,
        }
    }
    out.flush()?;
    Ok(())
}
