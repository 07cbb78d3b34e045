//! What both commands print: the machine, a table of right-aligned numbers, or one JSON document.

use serde_json::{Value, json};

use super::options::{Options, Which};
use super::timing::Times;
use crate::backend::Backend;
use crate::machine;
use crate::measure::{Counted, Nature};

/// Columns two blanks apart: those of text to the left, those of numbers to the right. The first row is the header.
pub fn table(rows: &[Vec<String>], text_columns: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(c, (cell, &w))| match c < text_columns {
            true => format!("{cell:<w$}"),
            false => format!("{cell:>w$}"),
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n"
    };
    rows.iter().map(line).collect()
}

/// The lines above a table: machine, build, flags.
pub fn heading<B: Backend>(dev: &B, nature: &Nature, o: &Options, flags: &str, no_gpu: Option<&str>) -> String {
    let mut device = dev.describe();
    if let Some(driver) = &nature.driver {
        device += &format!(", driver {driver}");
    } else if let Some(processor) = machine::processor() {
        device += &format!(", {processor}");
    }
    if let Some(why) = no_gpu {
        device += &format!("; no GPU: {why}");
    }
    let label = o.label.as_ref().map_or(String::new(), |l| format!(", {l}"));
    format!("device: {device}\nbuild: ringtune {}{label}\nflags: {flags}\n", env!("CARGO_PKG_VERSION"))
}

/// The fields that both documents begin with.
pub fn machine_json<B: Backend>(dev: &B, which: Which, nature: &Nature, o: &Options, flags: &str) -> Value {
    json!({
        "command": which.command(),
        "version": env!("CARGO_PKG_VERSION"),
        "label": o.label,
        "device": {
            "description": dev.describe(),
            "processor": machine::processor(),
            "driver": nature.driver,
            "emulated": nature.emulated,
            "cache_bytes": nature.cache,
            "sheet_flops_per_second": nature.sheet_flops,
            "sheet_bytes_per_second": nature.sheet_bandwidth,
        },
        "flags": flags,
        "measured": !nature.emulated,
    })
}

/// Times as JSON, in seconds.
pub fn times_json(t: &Times) -> Value {
    json!({
        "median": t.median, "min": t.min, "max": t.max, "quartile1": t.quartile1, "quartile3": t.quartile3, "rounds": t.rounds,
    })
}

/// How far the quartiles lie apart, in percent of the median.
pub fn spread(t: &Times) -> String {
    format!("{:.1}", 100.0 * (t.quartile3 - t.quartile1) / t.median)
}

/// Counters of the emulator as JSON.
pub fn counted_json(c: &Counted) -> Value {
    json!({
        "warp_instructions": c.instructions, "tensor_flops": c.tensor_flops, "requested_bytes": c.requested,
        "shared_passes": c.shared_passes, "bank_conflicts": c.bank_conflicts,
    })
}

/// Microseconds with as many digits as a reader needs.
pub fn us(seconds: f64) -> String {
    let us = seconds * 1e6;
    if us < 999.5 { format!("{us:.1}") } else { format!("{us:.0}") }
}

/// A count in thousands, millions or milliards.
pub fn short(n: f64) -> String {
    match n {
        n if n < 1e4 => format!("{n:.0}"),
        n if n < 1e7 => format!("{:.1}k", n / 1e3),
        n if n < 1e10 => format!("{:.1}M", n / 1e6),
        n => format!("{:.1}G", n / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_to_the_right() {
        let rows = [["kernel", "us"], ["rope", "5.0"], ["attention", "1234"]].map(|r| r.map(String::from).to_vec());
        assert_eq!(table(&rows, 1), "kernel       us\nrope        5.0\nattention  1234\n");
    }

    #[test]
    fn numbers_are_as_short_as_they_may_be() {
        assert_eq!((us(1.25e-6), us(0.0123)), ("1.2".into(), "12300".into()));
        assert_eq!([512.0, 12_345.0, 2.5e7, 3.2e11].map(short), ["512", "12.3k", "25.0M", "320.0G"]);
    }
}
