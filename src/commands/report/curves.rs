//! The charts of the page, and the numbers that hovering shows.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::chart::{COLOURS, Chart, Kind, Line, number};
use super::files::{EvalPoint, Run, StepPoint};
use super::html::{escape, swatch};
use super::points::{outline, smooth};
use crate::text::grouped;

/// Points of a line that hovering knows.
const HOVER_POINTS: usize = 400;

/// A chart's key, title, what a value is of a step, and how it is drawn.
type Plot = (&'static str, &'static str, fn(&StepPoint) -> f64, Kind);

const PLOTS: [Plot; 5] = [
    ("loss", "Loss (nats per supervised token)", |p| p.loss, Kind::Noisy),
    ("lr", "Learning rate", |p| p.lr, Kind::Plain),
    ("norm", "Gradient norm before clipping", |p| p.norm, Kind::Noisy),
    ("rate", "Tokens a second", |p| p.rate, Kind::Noisy),
    ("share", "Supervised share of tokens (%)", |p| p.share, Kind::Noisy),
];
/// Charts of evaluations alone.
const EVALUATED: [(&str, &str); 2] =
    [("accuracy", "Accuracy on validation tokens (%)"), ("sets", "Validation loss of each data set")];

/// A line's name, how it is drawn, and its points: step, tokens, value.
struct Named {
    name: String,
    kind: Kind,
    points: Vec<(f64, f64, f64)>,
    colour: usize,
}

/// Every line of a run in a chart: what is drawn, and what hovering shows.
fn lines_of(run: &Run, i: usize, key: &str, alone: bool) -> Vec<Named> {
    let mut all = Vec::new();
    let line = |name: &str, kind, points| Named { name: name.into(), kind, points, colour: i % COLOURS };
    if let Some((_, _, value, kind)) = PLOTS.iter().find(|p| p.0 == key) {
        let points = run.metrics.steps.iter().map(|p| (p.step, p.tokens, value(p))).collect();
        all.push(line(if key == "loss" { "training" } else { "" }, *kind, points));
    }
    let evals = |f: &dyn Fn(&EvalPoint) -> f64| run.metrics.evals.iter().map(|e| (e.step, e.tokens, f(e))).collect();
    match key {
        "loss" => all.push(line("validation", Kind::Marked, evals(&|e| e.loss))),
        "accuracy" => all.push(line("", Kind::Marked, evals(&|e| e.accuracy))),
        "sets" => {
            let names: BTreeSet<&str> = run.metrics.evals.iter().flat_map(|e| &e.sets).map(|s| s.0.as_str()).collect();
            for (k, name) in names.into_iter().enumerate() {
                let of = |e: &EvalPoint| e.sets.iter().find(|s| s.0 == name).map_or(f64::NAN, |s| s.1);
                // The colours are those of runs where there are several of them.
                let colour = if alone { k % COLOURS } else { i % COLOURS };
                all.push(Named { colour, ..line(name, Kind::Marked, evals(&of)) });
            }
        }
        _ => {}
    }
    all.retain(|l| l.points.iter().any(|p| p.2.is_finite()));
    all
}

fn titles() -> impl Iterator<Item = (&'static str, &'static str)> {
    PLOTS.iter().map(|p| (p.0, p.1)).chain(EVALUATED)
}

/// Sizes of a chart and the room for its labels: on a screen or on paper, and on a phone, where the letters have to stay as large and
/// the loss is the highest of all.
const fn sizes(key_is_loss: bool) -> [(&'static str, (f64, f64), f64); 2] {
    match key_is_loss {
        true => [("at-wide", (1180.0, 360.0), 62.0), ("at-narrow", (340.0, 330.0), 48.0)],
        false => [("at-wide", (570.0, 250.0), 62.0), ("at-narrow", (340.0, 210.0), 48.0)],
    }
}

/// The section of the charts.
pub fn charts(out: &mut String, runs: &[Run]) {
    *out += "<h2>Curves</h2>\n<div class=\"charts\">\n";
    for (key, title) in titles() {
        let named: Vec<(usize, Named)> = runs
            .iter()
            .enumerate()
            .flat_map(|(i, run)| lines_of(run, i, key, runs.len() == 1).into_iter().map(move |l| (i, l)))
            .collect();
        if named.is_empty() {
            continue;
        }
        let chart = |x: &'static str, size, left| {
            let across = |p: &(f64, f64, f64)| (if x == "step" { p.0 } else { p.1 }, p.2);
            let line = |(i, l): &(usize, Named)| Line {
                run: *i,
                colour: l.colour,
                kind: l.kind,
                points: l.points.iter().map(across).collect(),
            };
            Chart { key, title, x, size, left, lines: named.iter().map(line).collect() }
        };
        let wide = if key == "loss" { " wide" } else { "" };
        let _ = write!(out, "<section class=\"card{wide}\"><h3>{title}</h3>");
        if chart("step", (1.0, 1.0), 0.0).is_of_single_points() {
            single_values(out, runs, &named);
        } else {
            for x in ["step", "tokens"] {
                let _ = write!(out, "<div class=\"by-{x}\">");
                for (at, size, left) in sizes(key == "loss") {
                    let _ = write!(out, "<div class=\"{at}\">{}</div>", chart(x, size, left).svg());
                }
                let beyond = chart(x, (1.0, 1.0), 0.0).beyond();
                if !beyond.is_empty() {
                    let _ = write!(out, "<p class=\"key\">&#9650; {}</p>", escape(&beyond));
                }
                *out += "</div>";
            }
            match key {
                "loss" => *out += "<p class=\"key\">solid: training; dashed with circles: validation</p>",
                "sets" if runs.len() == 1 => {
                    *out += "<p class=\"key\">";
                    for (_, l) in &named {
                        let _ = write!(out, "<span class=\"entry\">{}{}</span> ", swatch(l.colour), escape(&l.name));
                    }
                    *out += "</p>";
                }
                _ => {}
            }
        }
        *out += "</section>\n";
    }
    *out += "</div>\n";
}

/// A chart of which no line has more than a point, as numbers.
fn single_values(out: &mut String, runs: &[Run], named: &[(usize, Named)]) {
    *out += "<dl class=\"figures\">";
    for (i, l) in named {
        let Some(p) = l.points.iter().find(|p| p.2.is_finite()) else { continue };
        let run = if runs.len() > 1 { format!("{}{} ", swatch(*i), escape(&runs[*i].name)) } else { String::new() };
        let name = if l.name.is_empty() { "value" } else { &l.name };
        let _ = write!(
            out,
            "<div class=\"r{i}\"><dt>{run}{}, step {}</dt><dd>{}</dd></div>",
            escape(name),
            grouped(p.0 as u64),
            escape(&number(p.2))
        );
    }
    *out += "</dl>";
}

/// The numbers behind the charts, thinned: of each line its values, and their mean where one is drawn.
pub fn hover_data(runs: &[Run]) -> Value {
    let of = |(i, run): (usize, &Run)| {
        let mut charts = Map::new();
        for (key, _) in titles() {
            let mut lines = Map::new();
            for l in lines_of(run, i, key, runs.len() == 1) {
                lines.insert(l.name.clone(), hover_line(&l));
            }
            charts.insert(key.into(), Value::Object(lines));
        }
        json!({"name": run.name, "lines": charts})
    };
    Value::Array(runs.iter().enumerate().map(of).collect())
}

fn hover_line(l: &Named) -> Value {
    let kept: Vec<_> = l.points.iter().filter(|p| p.0.is_finite() && p.2.is_finite()).collect();
    let values: Vec<f64> = kept.iter().map(|p| p.2).collect();
    let shown = outline(&values, HOVER_POINTS);
    let pick = |f: &dyn Fn(usize) -> f64| shown.iter().map(|&i| f(i)).collect::<Vec<f64>>();
    let mut line = json!({
        "step": pick(&|i| kept[i].0), "tokens": pick(&|i| kept[i].1), "y": pick(&|i| values[i]), "colour": l.colour,
    });
    if l.kind == Kind::Noisy {
        let by_step: Vec<(f64, f64)> = kept.iter().map(|p| (p.0, p.2)).collect();
        let mean = smooth(&by_step);
        let at = |step: f64| mean.get(mean.partition_point(|p| p.0 < step)).or(mean.last()).map_or(f64::NAN, |p| p.1);
        line["mean"] = json!(pick(&|i| at(kept[i].0)));
    }
    line
}
