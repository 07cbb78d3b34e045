//! The figures at the head of the page: a tile each for one run, a row each for several.

use std::fmt::Write;

use super::chart::{fixed, number};
use super::files::{EvalPoint, Run};
use super::html::{escape, swatch};
use super::points::smooth;
use crate::text::grouped;

const COLUMNS: [&str; 11] = [
    "steps",
    "epochs",
    "tokens",
    "training loss",
    "validation loss",
    "best",
    "perplexity",
    "accuracy",
    "tokens/s",
    "time",
    "trained",
];

fn median(mut values: Vec<f64>) -> f64 {
    values.retain(|v| v.is_finite());
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// `3 h 12 min`, `4 min 5 s`, `12 s`.
fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "–".into();
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s / 60 % 60),
    }
}

/// The figures of a run, in the order of [`COLUMNS`].
fn of(run: &Run) -> [String; 11] {
    let m = &run.metrics;
    let last = m.steps.last().copied().unwrap_or_default();
    let points: Vec<(f64, f64)> = m.steps.iter().map(|p| (p.step, p.loss)).collect();
    let loss = smooth(&points).last().map_or(f64::NAN, |p| p.1);
    let evals = || m.evals.iter().filter(|e| e.loss.is_finite());
    let best = evals().min_by(|a, b| a.loss.total_cmp(&b.loss));
    let end = evals().next_back();
    let of_end = |f: fn(&EvalPoint) -> f64| end.map_or(f64::NAN, f);
    let planned = run.record["max_steps"].as_u64().or(run.state["max_steps"].as_u64());
    let steps = match planned {
        Some(n) => format!("{} / {}", grouped(last.step as u64), grouped(n)),
        None => grouped(last.step as u64),
    };
    let epochs = run.state["epoch"].as_f64().unwrap_or(last.epoch);
    let seconds: f64 = m.steps.iter().map(|p| p.ms).filter(|v| v.is_finite()).sum::<f64>() / 1e3;
    let parameters = &run.record["parameters"];
    let trained = match (parameters["trained"].as_f64(), parameters["all"].as_f64()) {
        (Some(t), Some(a)) if a > 0.0 => format!("{} ({:.2}%)", number(t), 100.0 * t / a),
        _ => "–".into(),
    };
    [
        steps,
        if epochs.is_finite() { format!("{epochs:.2}") } else { "–".into() },
        number(last.tokens),
        fixed(loss),
        fixed(of_end(|e| e.loss)),
        best.map_or("–".into(), |b| format!("{} at {}", fixed(b.loss), grouped(b.step as u64))),
        fixed(of_end(|e| e.perplexity)),
        match of_end(|e| e.accuracy) {
            v if v.is_finite() => format!("{v:.1}%"),
            _ => "–".into(),
        },
        number(median(m.steps.iter().map(|p| p.rate).collect())),
        duration(seconds),
        trained,
    ]
}

/// The section of the figures.
pub fn summary(out: &mut String, runs: &[Run]) {
    *out += "<h2>Figures</h2>\n";
    if let [run] = runs {
        *out += "<div class=\"card\"><dl class=\"figures\">";
        for (name, value) in COLUMNS.iter().zip(of(run)).filter(|(_, value)| value != "–") {
            let _ = write!(out, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&value));
        }
        *out += "</dl></div>\n";
        return;
    }
    *out += "<div class=\"card scroll\"><table class=\"summary\"><thead><tr><th>run</th>";
    COLUMNS.iter().for_each(|c| *out += &format!("<th class=\"n\">{c}</th>"));
    *out += "</tr></thead><tbody>\n";
    for (i, run) in runs.iter().enumerate() {
        let _ = write!(out, "<tr class=\"r{i}\"><th>{}{}</th>", swatch(i), escape(&run.name));
        of(run).iter().for_each(|c| *out += &format!("<td class=\"n\">{}</td>", escape(c)));
        *out += "</tr>\n";
    }
    *out += "</tbody></table></div>\n";
}
