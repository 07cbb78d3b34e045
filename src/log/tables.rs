//! What is printed before the first step: settings and their origins, parameters, memory by class against the machine's.

use std::fmt::Write;

use crate::settings::ResolvedSetting;

/// Bytes of one class of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryClass {
    /// `weights`, `gradients`, `moments`, …
    pub name: &'static str,
    /// Bytes on the device.
    pub bytes: u64,
}

/// Columns as wide as their widest cell, two blanks apart; the last one ragged. The first row is the header.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, w) in row.iter().zip(&widths) {
            let _ = write!(line, "  {cell:<w$}");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Setting, value, origin.
pub fn settings_table(settings: &[ResolvedSetting]) -> String {
    let header = ["setting", "value", "from"].map(String::from).to_vec();
    let rows = settings.iter().map(|s| vec![s.name.clone(), s.value.clone(), s.origin.clone()]);
    table(&std::iter::once(header).chain(rows).collect::<Vec<_>>())
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

/// `812 B`, `1.5 MiB`.
pub fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1023.95 {
            return if unit == "B" { format!("{n} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// `12 500 352` as `12,500,352`.
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Bytes that may still be allocated: what the kernel calls available, or what the control group leaves if that is less.
pub fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let machine = line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024;
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // `memory.max` reads "max" where there is no limit, which is no number.
    let group = match (number("/sys/fs/cgroup/memory.max"), number("/sys/fs/cgroup/memory.current")) {
        (Some(limit), Some(used)) => limit.saturating_sub(used),
        _ => u64::MAX,
    };
    Some(machine.min(group))
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
        let text = settings_table(&[setting("lora_r", "16", "--lora_r"), setting("seed", "42", "default")]);
        assert_eq!(text, "  setting  value  from\n  lora_r   16     --lora_r\n  seed     42     default\n");
    }

    #[test]
    fn sizes_and_groups() {
        assert_eq!(bytes(812), "812 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(24 << 30), "24.0 GiB");
        assert_eq!(bytes(u64::MAX), "16777216.0 TiB");
        assert_eq!(grouped(12_500_352), "12,500,352");
        assert_eq!(grouped(999), "999");
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
        assert!(available_memory().is_some_and(|b| b > 1 << 20));
    }
}
