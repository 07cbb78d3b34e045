//! What is printed before the first step: settings and their origins, parameters, memory by class against the machine's.

use std::fmt::Write;

use crate::settings::{DEFAULT, ResolvedSetting};
use crate::text::{Style, bytes, lines_in, table};

/// Bytes of one class of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryClass {
    /// `weights`, `gradients`, `moments`, …
    pub name: &'static str,
    /// Bytes on the device.
    pub bytes: u64,
}

/// Setting, value, origin: of those that somebody set, or of all, defaults dim.
pub fn settings_table(settings: &[ResolvedSetting], all: bool, style: Style, width: Option<usize>) -> String {
    let header = ["setting", "value", "from"].map(String::from).to_vec();
    let shown: Vec<&ResolvedSetting> = settings.iter().filter(|s| all || s.origin != DEFAULT).collect();
    let rows = shown.iter().map(|s| vec![s.name.clone(), s.value.clone(), s.origin.clone()]);
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let is_default = |row: usize| row > 0 && shown[row - 1].origin == DEFAULT;
    let dim = |(row, line): (usize, String)| if is_default(row) { style.context(&line) } else { line };
    let mut out: String = lines_in(&rows, width).into_iter().map(|line| dim(line) + "\n").collect();
    if shown.len() < settings.len() {
        let _ = writeln!(out, "  {} more have their defaults (--verbose shows them)", settings.len() - shown.len());
    }
    out
}

/// Memory by class, the sum, and what the machine has; a warning where it will not fit.
pub fn memory_table(classes: &[MemoryClass], available: Option<u64>) -> String {
    let total: u64 = classes.iter().map(|c| c.bytes).sum();
    let mut rows: Vec<Vec<String>> = classes.iter().map(|c| vec![c.name.to_string(), bytes(c.bytes)]).collect();
    rows.push(vec!["sum".into(), bytes(total)]);
    if let Some(available) = available {
        rows.push(vec!["available".into(), bytes(available)]);
    }
    let mut out = table(&rows);
    if let Some(available) = available.filter(|&a| total > a) {
        let _ = writeln!(
            out,
            "warning: this run needs about {} and {} are free; lower per_device_train_batch_size or max_seq_len, or use \
             recompute layer",
            bytes(total),
            bytes(available)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align() {
        let setting = |name: &str, value: &str, origin: &str| ResolvedSetting {
            name: name.into(),
            value: value.into(),
            origin: origin.into(),
        };
        let settings = [setting("lora_r", "16", "--lora_r"), setting("seed", "42", "default")];
        let text = |all, colour| settings_table(&settings, all, Style::new(colour), None);
        let set = "  setting  value  from\n  lora_r      16  --lora_r\n";
        assert_eq!(text(false, true), format!("{set}  1 more have their defaults (--verbose shows them)\n"));
        assert_eq!(text(true, false), format!("{set}  seed        42  default\n"));
        assert_eq!(text(true, true), format!("{set}\x1b[2m  seed        42  default\x1b[0m\n"));
    }

    #[test]
    fn too_little_memory_is_said() {
        let classes =
            [MemoryClass { name: "weights", bytes: 3 << 20 }, MemoryClass { name: "moments", bytes: 1 << 20 }];
        let text = memory_table(&classes, Some(2 << 20));
        assert!(
            text.starts_with(
                "  weights    3.0 MiB\n  moments    1.0 MiB\n  sum        4.0 MiB\n  available  2.0 MiB\n"
            )
        );
        assert!(text.contains("warning: this run needs about 4.0 MiB"), "{text}");
        assert!(!memory_table(&classes, Some(8 << 20)).contains("warning"));
    }
}
