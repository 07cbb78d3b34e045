//! The page: its frame and switches, the table of figures, the charts and the numbers behind them.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::chart::{Chart, Kind, Line, fixed, number, smooth, thin};
use super::files::{Run, StepPoint};
use super::html::{escape, json as script_json, swatch};
use super::sections::{checkpoints, machines, mix, notes, samples, settings};
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

/// The whole page for one or several runs.
pub fn page(runs: &[Run]) -> String {
    let title = match runs {
        [one] => format!("{}: ringtune report", one.name),
        _ => format!("{} runs: ringtune report", runs.len()),
    };
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n\
         <title>{}</title>\n<style>\n{}{}</style>\n</head>\n<body>\n",
        escape(&title),
        include_str!("page.css"),
        run_rules(runs.len()),
    );
    controls(&mut out, runs, &title);
    out += "<main>\n";
    summary(&mut out, runs);
    notes(&mut out, runs);
    charts(&mut out, runs);
    samples(&mut out, runs);
    mix(&mut out, runs);
    checkpoints(&mut out, runs);
    settings(&mut out, runs);
    machines(&mut out, runs);
    let _ = write!(
        out,
        "</main>\n<footer>Made by ringtune {} from the runs&#39; own files. Losses are means over supervised tokens; the bold line is a \
         running mean over a twentieth of the run.</footer>\n<div id=\"tip\"></div>\n\
         <script type=\"application/json\" id=\"data\">{}</script>\n<script>\n{}</script>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION"),
        script_json(&hover_data(runs)),
        include_str!("page.js"),
    );
    out
}

/// Rules by which the toggles of the runs work without a script.
fn run_rules(n: usize) -> String {
    let rule = |i: usize| {
        format!(
            "#run-{i}:not(:checked) ~ main .r{i} {{ display: none; }}\n\
             #run-{i}:not(:checked) ~ .bar label[for=run-{i}] {{ opacity: 0.45; text-decoration: line-through; }}\n"
        )
    };
    (0..n).map(rule).collect()
}

/// The switches stand before what they switch, so that the style sheet can see them.
fn controls(out: &mut String, runs: &[Run], title: &str) {
    let input = |id: &str, kind: &str, name: &str, on: bool| {
        format!(
            "<input class=\"toggle\" type=\"{kind}\" id=\"{id}\" name=\"{name}\"{}>\n",
            if on { " checked" } else { "" }
        )
    };
    *out += &input("x-step", "radio", "x", true);
    *out += &input("x-tokens", "radio", "x", false);
    *out += &input("mean", "checkbox", "mean", true);
    *out += &input("raw", "checkbox", "raw", true);
    *out += &input("only", "checkbox", "only", false);
    for i in 0..runs.len() {
        *out += &input(&format!("run-{i}"), "checkbox", &format!("run-{i}"), true);
    }
    let _ = write!(out, "<header><h1>{}</h1>", escape(title.trim_end_matches(": ringtune report")));
    if let [run] = runs {
        let _ = write!(out, "<p class=\"path\">{}</p>", escape(&run.dir.display().to_string()));
    }
    *out += "</header>\n<nav class=\"bar\"><div>";
    *out += "<span class=\"group\"><span class=\"name\">by</span><label for=\"x-step\">step</label><label for=\"x-tokens\">tokens</label></span>";
    *out += "<span class=\"group\"><span class=\"name\">lines</span><label for=\"mean\">running mean</label><label for=\"raw\">every step</label></span>";
    let what = if runs.len() > 1 { "only what differs" } else { "only what was set" };
    let _ = write!(
        out,
        "<span class=\"group\"><span class=\"name\">settings</span><label for=\"only\">{what}</label></span>"
    );
    if runs.len() > 1 {
        *out += "<span class=\"group\"><span class=\"name\">runs</span>";
        for (i, run) in runs.iter().enumerate() {
            let _ = write!(out, "<label for=\"run-{i}\">{}{}</label>", swatch(i), escape(&run.name));
        }
        *out += "</span>";
    }
    *out += "</div></nav>\n";
}

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

/// One row of figures a run.
fn summary(out: &mut String, runs: &[Run]) {
    *out += "<h2>Figures</h2>\n<div class=\"card scroll\"><table class=\"summary\"><thead><tr><th>run</th>";
    let columns = [
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
    columns.iter().for_each(|c| *out += &format!("<th class=\"n\">{c}</th>"));
    *out += "</tr></thead><tbody>\n";
    for (i, run) in runs.iter().enumerate() {
        let m = &run.metrics;
        let last = m.steps.last().copied().unwrap_or_default();
        let points: Vec<(f64, f64)> = m.steps.iter().map(|p| (p.step, p.loss)).collect();
        let loss = smooth(&points).last().map_or(f64::NAN, |p| p.1);
        let evals = || m.evals.iter().filter(|e| e.loss.is_finite());
        let best = evals().min_by(|a, b| a.loss.total_cmp(&b.loss));
        let end = evals().next_back();
        let of_end = |f: fn(&super::files::EvalPoint) -> f64| end.map_or(f64::NAN, f);
        let planned = run.record["max_steps"].as_u64().or(run.state["max_steps"].as_u64());
        let steps = match planned {
            Some(n) => format!("{} / {}", grouped(last.step as u64), grouped(n)),
            None => grouped(last.step as u64),
        };
        let epochs = run.state["epoch"].as_f64().unwrap_or(f64::NAN);
        let seconds: f64 = m.steps.iter().map(|p| p.ms).filter(|v| v.is_finite()).sum::<f64>() / 1e3;
        let parameters = &run.record["parameters"];
        let trained = match (parameters["trained"].as_f64(), parameters["all"].as_f64()) {
            (Some(t), Some(a)) if a > 0.0 => format!("{} ({:.2}%)", number(t), 100.0 * t / a),
            _ => "–".into(),
        };
        let cells = [
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
        ];
        let _ = write!(out, "<tr class=\"r{i}\"><th>{}{}</th>", swatch(i), escape(&run.name));
        cells.iter().for_each(|c| *out += &format!("<td class=\"n\">{}</td>", escape(c)));
        *out += "</tr>\n";
    }
    *out += "</tbody></table></div>\n";
}

/// A line's name, how it is drawn, and its points: step, tokens, value.
type NamedLine = (&'static str, Kind, Vec<(f64, f64, f64)>);

/// Every line of a run with its name, by chart: what is drawn, and what hovering shows.
fn lines_of(run: &Run, key: &str) -> Vec<NamedLine> {
    let mut all = Vec::new();
    if let Some((_, _, value, kind)) = PLOTS.iter().find(|p| p.0 == key) {
        let points: Vec<(f64, f64, f64)> = run.metrics.steps.iter().map(|p| (p.step, p.tokens, value(p))).collect();
        all.push((if key == "loss" { "training" } else { "" }, *kind, points));
    }
    let evals = |f: fn(&super::files::EvalPoint) -> f64| -> Vec<(f64, f64, f64)> {
        run.metrics.evals.iter().map(|e| (e.step, e.tokens, f(e))).collect()
    };
    match key {
        "loss" => all.push(("validation", Kind::Marked, evals(|e| e.loss))),
        "accuracy" => all.push(("", Kind::Marked, evals(|e| e.accuracy))),
        _ => {}
    }
    all.retain(|l| l.2.iter().any(|p| p.2.is_finite()));
    all
}

fn charts(out: &mut String, runs: &[Run]) {
    *out += "<h2>Curves</h2>\n<div class=\"charts\">\n";
    let accuracy = [("accuracy", "Accuracy on validation tokens (%)")];
    let titles = PLOTS.iter().map(|p| (p.0, p.1)).chain(accuracy);
    for (key, title) in titles {
        let mut svgs = String::new();
        let size = if key == "loss" { (1240.0, 340.0) } else { (640.0, 280.0) };
        for x in ["step", "tokens"] {
            let mut lines = Vec::new();
            for (i, run) in runs.iter().enumerate() {
                for (_, kind, points) in lines_of(run, key) {
                    let across = |p: &(f64, f64, f64)| (if x == "step" { p.0 } else { p.1 }, p.2);
                    lines.push(Line { run: i, kind, points: points.iter().map(across).collect() });
                }
            }
            let svg = Chart { key, title, x, size, lines }.svg();
            if !svg.is_empty() {
                let _ = write!(svgs, "<div class=\"by-{x}\">{svg}</div>");
            }
        }
        if svgs.is_empty() {
            continue;
        }
        let wide = if key == "loss" { " wide" } else { "" };
        let legend = match key {
            "loss" => "<p class=\"key\">solid: training; dashed with circles: validation</p>",
            _ => "",
        };
        let _ = writeln!(out, "<section class=\"card{wide}\"><h3>{title}</h3>{svgs}{legend}</section>");
    }
    *out += "</div>\n";
}

/// The numbers behind the charts, thinned.
fn hover_data(runs: &[Run]) -> Value {
    let keys = PLOTS.iter().map(|p| p.0).chain(["accuracy"]);
    let keys: Vec<&str> = keys.collect();
    let of = |run: &Run| {
        let mut charts = Map::new();
        for key in &keys {
            let mut lines = Map::new();
            for (name, kind, points) in lines_of(run, key) {
                // Steps carry the thinning; tokens of a step are looked up.
                let by_step: Vec<(f64, f64)> = points.iter().map(|p| (p.0, p.2)).collect();
                let shown = match kind {
                    Kind::Noisy => every_nth(&smooth(&by_step), HOVER_POINTS),
                    _ => thin(&by_step, HOVER_POINTS),
                };
                let tokens: Vec<f64> = shown
                    .iter()
                    .map(|s| {
                        let at = points.partition_point(|p| p.0 < s.0).min(points.len() - 1);
                        points[at].1
                    })
                    .collect();
                lines.insert(
                    name.into(),
                    json!({
                        "step": shown.iter().map(|p| p.0).collect::<Vec<_>>(),
                        "tokens": tokens,
                        "y": shown.iter().map(|p| p.1).collect::<Vec<_>>(),
                    }),
                );
            }
            charts.insert((*key).into(), Value::Object(lines));
        }
        json!({"name": run.name, "lines": charts})
    };
    Value::Array(runs.iter().map(of).collect())
}

fn every_nth(points: &[(f64, f64)], n: usize) -> Vec<(f64, f64)> {
    let stride = points.len().div_ceil(n).max(1);
    points.iter().copied().step_by(stride).collect()
}
