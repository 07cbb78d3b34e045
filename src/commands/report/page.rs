//! The page: its frame, its switches, and the order of its sections.

use std::fmt::Write;

use super::curves::{charts, hover_data};
use super::figures::summary;
use super::files::Run;
use super::html::{escape, json as script_json, swatch};
use super::sections::{checkpoints, machines, mix, notes, samples, settings};

/// Whether a page stands alone, or asks its server for what is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// A file that needs nothing else.
    File,
    /// Served: it follows the run.
    Live,
}

/// The whole page for one or several runs.
pub fn page(runs: &[Run], kind: PageKind) -> String {
    let title = match runs {
        [one] => one.name.clone(),
        _ => format!("{} runs", runs.len()),
    };
    let live = kind == PageKind::Live;
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'{}\">\n\
         <title>{}: ringtune {}</title>\n<style>\n{}{}</style>\n</head>\n<body>\n",
        if live { "; connect-src 'self'" } else { "" },
        escape(&title),
        if live { "watch" } else { "report" },
        include_str!("page.css"),
        run_rules(runs.len()),
    );
    controls(&mut out, runs, &title, live);
    let _ = write!(
        out,
        "<main>\n{}</main>\n<footer>Made by ringtune {} from the runs&#39; own files. Losses are means over supervised tokens; the bold line is their \
         mean around each step, over a twentieth of the run and without values beyond the frame.</footer>\n<div id=\"tip\"></div>\n<script>\n{}{}</script>\n</body>\n</html>\n",
        body(runs),
        env!("CARGO_PKG_VERSION"),
        include_str!("page.js"),
        if live { include_str!("live.js") } else { "" },
    );
    out
}

/// What of the page changes while runs go on: its sections, and the numbers behind the charts.
pub fn body(runs: &[Run]) -> String {
    let mut out = String::new();
    summary(&mut out, runs);
    notes(&mut out, runs);
    charts(&mut out, runs);
    samples(&mut out, runs);
    mix(&mut out, runs);
    checkpoints(&mut out, runs);
    settings(&mut out, runs);
    machines(&mut out, runs);
    let _ = writeln!(out, "<script type=\"application/json\" id=\"data\">{}</script>", script_json(&hover_data(runs)));
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
fn controls(out: &mut String, runs: &[Run], title: &str, live: bool) {
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
    *out += &input("only", "checkbox", "only", true);
    for i in 0..runs.len() {
        *out += &input(&format!("run-{i}"), "checkbox", &format!("run-{i}"), true);
    }
    let state = if live { "<span class=\"tag\" id=\"live\">connecting</span>" } else { "" };
    let _ = write!(out, "<header><h1>{}{state}</h1>", escape(title));
    if let [run] = runs {
        let _ = write!(out, "<p class=\"path\">{}</p>", escape(&run.dir.display().to_string()));
    }
    *out += "</header>\n<nav class=\"bar\"><div>";
    *out += "<span class=\"group\"><span class=\"name\">by</span><label for=\"x-step\">step</label><label for=\"x-tokens\">tokens</label></span>";
    *out += "<span class=\"group\"><span class=\"name\">lines</span><label for=\"mean\">mean</label><label for=\"raw\">every step</label></span>";
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
