//! The sections below the charts: mix, settings, machines, checkpoints, samples, warnings. Each is left out where no run has it.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use serde_json::{Map, Value};

use super::chart::{COLOURS, fixed, number};
use super::files::Run;
use super::html::{escape, heading, swatch};
use crate::checkpoint::manifest;
use crate::text::{bytes, date, grouped};

/// Requested and achieved shares as bars.
pub fn mix(out: &mut String, runs: &[Run]) {
    if !runs.iter().any(|r| r.record["mix"].as_array().is_some_and(|m| !m.is_empty())) {
        return;
    }
    *out += "<h2>Mix of the data</h2>\n<div class=\"one\">\n";
    for (i, run) in runs.iter().enumerate() {
        let rows = run.record["mix"].as_array().cloned().unwrap_or_default();
        if rows.is_empty() {
            continue;
        }
        let _ = write!(
            out,
            "<section class=\"card scroll r{i}\">{}<table><thead><tr><th>data set</th><th class=\"n\">rows</th><th class=\"n\">in an epoch</th>",
            heading(runs, i)
        );
        let units = ["samples", "tokens", "supervised-tokens"];
        units.iter().for_each(|u| *out += &format!("<th>{}</th>", u.replace('-', " ")));
        *out += "</tr></thead><tbody>";
        for row in &rows {
            let count = |key: &str| row[key].as_u64().map_or("–".into(), grouped);
            let _ = write!(
                out,
                "<tr><th class=\"path\">{}</th><td class=\"n\">{}</td><td class=\"n\">{}</td>",
                escape(row["name"].as_str().unwrap_or("?")),
                count("rows"),
                count("rows_of_an_epoch")
            );
            for unit in units {
                let share = &row["shares"][unit];
                let part = |key: &str| share[key].as_f64().unwrap_or(0.0).clamp(0.0, 1.0) * 100.0;
                let (asked, got) = (part("requested"), part("achieved"));
                let _ = write!(
                    out,
                    "<td><div class=\"share c{}\" title=\"asked for {asked:.1}%, achieved {got:.1}%\"><span class=\"track\"><i style=\"width:{got:.1}%\"></i>\
                     <b style=\"left:{asked:.1}%\"></b></span><span class=\"n\">{got:.1}%</span></div></td>",
                    i % COLOURS
                );
            }
            *out += "</tr>";
        }
        *out += "</tbody></table><p class=\"key\">bar: achieved in the first epoch; line: asked for</p></section>\n";
    }
    *out += "</div>\n";
}

/// One row a setting; rows that differ between runs, or were set in a single run, are marked.
pub fn settings(out: &mut String, runs: &[Run]) {
    let all: Vec<_> = runs.iter().map(Run::settings).collect();
    if all.iter().all(|s| s.is_empty()) {
        return;
    }
    // The order of the run's own table.
    let mut names: Vec<String> = Vec::new();
    let mut seen = BTreeSet::new();
    for run in runs {
        for s in run.record["settings"].as_array().into_iter().flatten() {
            if let Some(name) = s["name"].as_str().filter(|n| seen.insert(n.to_string())) {
                names.push(name.into());
            }
        }
    }
    *out += "<h2>Settings</h2>\n<div class=\"card scroll\"><table class=\"settings\"><thead><tr><th>setting</th>";
    for (i, run) in runs.iter().enumerate() {
        let name = if runs.len() > 1 { format!("{}{}", swatch(i), escape(&run.name)) } else { "value".into() };
        let _ = write!(out, "<th class=\"r{i}\">{name}</th>");
    }
    *out += "</tr></thead><tbody>\n";
    let mut marked = false;
    for name in &names {
        let values: Vec<Option<&(String, String)>> = all.iter().map(|s| s.get(name)).collect();
        let differs = values.iter().any(|v| v.map(|x| &x.0) != values[0].map(|x| &x.0));
        let set = values.iter().flatten().any(|v| v.1 != "default");
        let class = match (runs.len(), differs, set) {
            (1, _, true) => "set",
            (2.., true, _) => "differs",
            _ => "same",
        };
        marked |= class != "same";
        let _ = write!(out, "<tr class=\"{class}\"><th>{}</th>", escape(name));
        for (i, value) in values.iter().enumerate() {
            match value {
                Some((value, origin)) => {
                    let strong = if origin == "default" { "" } else { " set" };
                    let origin = if origin == "default" {
                        String::new()
                    } else {
                        format!("<span class=\"origin\">{}</span>", escape(origin))
                    };
                    let _ = write!(out, "<td class=\"r{i}{strong}\"><code>{}</code>{origin}</td>", escape(value));
                }
                None => *out += &format!("<td class=\"r{i}\">–</td>"),
            }
        }
        *out += "</tr>\n";
    }
    if !marked {
        let what = if runs.len() > 1 { "nothing differs" } else { "nothing was set" };
        let _ = writeln!(out, "<tr class=\"none\"><td colspan=\"{}\">{what}</td></tr>", runs.len() + 1);
    }
    *out += "</tbody></table></div>\n";
}

/// Program, device, processor, memory.
pub fn machines(out: &mut String, runs: &[Run]) {
    if runs.iter().all(|r| r.record.is_null()) {
        return;
    }
    type Row = (&'static str, fn(&Value) -> Option<String>);
    let rows: [Row; 11] = [
        ("program", |r| r["program"].as_str().map(String::from)),
        ("started", |r| r["started"].as_u64().map(date)),
        ("resumed after step", |r| r["first_step"].as_u64().filter(|&s| s > 0).map(grouped)),
        ("device", |r| r["device"].as_str().map(String::from)),
        ("ranks", |r| r["world_size"].as_u64().map(grouped)),
        ("processor", |r| r["machine"]["processor"].as_str().map(String::from)),
        ("cores", |r| r["machine"]["cores"].as_u64().map(grouped)),
        ("memory of the machine", |r| r["machine"]["memory"].as_u64().map(bytes)),
        ("system", |r| r["machine"]["system"].as_str().map(String::from)),
        ("parameters", |r| r["parameters"]["all"].as_u64().map(grouped)),
        ("trained parameters", |r| r["parameters"]["trained"].as_u64().map(grouped)),
    ];
    *out += "<h2>Environment</h2>\n<div class=\"card scroll\"><table><thead><tr><th></th>";
    for (i, run) in runs.iter().enumerate() {
        let _ = write!(out, "<th class=\"r{i}\">{}{}</th>", swatch(i), escape(&run.name));
    }
    *out += "</tr></thead><tbody>\n";
    let mut line = |name: &str, values: Vec<Option<String>>| {
        if values.iter().all(Option::is_none) {
            return;
        }
        let _ = write!(out, "<tr><th>{}</th>", escape(name));
        for (i, v) in values.into_iter().enumerate() {
            let _ = write!(out, "<td class=\"r{i}\">{}</td>", escape(&v.unwrap_or_else(|| "–".into())));
        }
        *out += "</tr>\n";
    };
    for (name, value) in rows {
        line(name, runs.iter().map(|r| value(&r.record)).collect());
    }
    let mut classes: Vec<String> = Vec::new();
    for run in runs {
        for name in run.record["memory"].as_object().into_iter().flat_map(Map::keys) {
            if !classes.contains(name) {
                classes.push(name.clone());
            }
        }
    }
    for class in classes {
        let values = runs.iter().map(|r| r.record["memory"][class.as_str()].as_u64().map(bytes));
        line(&format!("memory: {class}"), values.collect());
    }
    *out += "</tbody></table></div>\n";
}

/// Folders with their validation loss and size.
pub fn checkpoints(out: &mut String, runs: &[Run]) {
    if runs.iter().all(|r| r.checkpoints.is_empty()) {
        return;
    }
    *out += "<h2>Checkpoints</h2>\n<div class=\"two\">\n";
    for (i, run) in runs.iter().enumerate().filter(|(_, r)| !r.checkpoints.is_empty()) {
        let _ = write!(
            out,
            "<section class=\"card scroll r{i}\">{}<table><thead><tr><th>folder</th><th class=\"n\">validation loss</th><th class=\"n\">size</th></tr></thead><tbody>",
            heading(runs, i)
        );
        for c in &run.checkpoints {
            let eval = run.metrics.evals.iter().rfind(|e| e.step == c.step as f64);
            let best = if c.best { " <span class=\"tag good\">best</span>" } else { "" };
            let _ = write!(
                out,
                "<tr><td><code>{}</code>{best}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
                manifest::path_of(Path::new(""), c.step).display(),
                eval.map_or("–".into(), |e| fixed(e.loss)),
                bytes(c.bytes)
            );
        }
        *out += "</tbody></table></section>\n";
    }
    *out += "</div>\n";
}

/// Answers of the generation test, and figures over them.
pub fn samples(out: &mut String, runs: &[Run]) {
    let of = |run: &Run| run.samples["samples"].as_array().cloned().unwrap_or_default();
    if runs.iter().all(|r| of(r).is_empty()) {
        return;
    }
    *out += "<h2>Generation test</h2>\n<div class=\"samples\">\n";
    for (i, run) in runs.iter().enumerate().filter(|(_, r)| !of(r).is_empty()) {
        let _ = write!(
            out,
            "<section class=\"card scroll r{i}\">{}<table><thead><tr><th></th><th class=\"n\">stopped by themselves</th>\
             <th class=\"n\">mean tokens</th><th class=\"n\">longest</th><th class=\"n\">control tokens leaked</th></tr></thead><tbody>",
            heading(runs, i)
        );
        for name in ["greedy", "sampled"] {
            let s = &run.samples[name];
            let n = |key: &str| s[key].as_f64().map_or("–".into(), number);
            let rate = s["stop_rate"].as_f64().map_or("–".into(), |r| format!("{:.0}%", 100.0 * r));
            let _ = write!(
                out,
                "<tr><th>{name}</th><td class=\"n\">{rate}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>",
                n("mean_tokens"),
                n("longest"),
                n("control_tokens_leaked")
            );
        }
        *out += "</tbody></table></section>\n";
        for sample in of(run) {
            let _ = write!(out, "<section class=\"card sample r{i}\">{}<dl>", heading(runs, i));
            for name in ["prompt", "reference", "greedy", "sampled"] {
                let text = escape(sample[name].as_str().unwrap_or("–").trim());
                let _ = write!(out, "<dt>{name}</dt><dd>{text}</dd>");
            }
            *out += "</dl></section>\n";
        }
    }
    *out += "</div>\n";
}

/// Warnings of the runs, and what could not be read.
pub fn notes(out: &mut String, runs: &[Run]) {
    let of = |run: &Run| -> Vec<String> {
        let said = run.record["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str).map(String::from);
        said.chain(run.metrics.warnings.iter().cloned()).chain(run.metrics.notes.iter().cloned()).collect()
    };
    if runs.iter().all(|r| of(r).is_empty()) {
        return;
    }
    *out += "<h2>Warnings and notes</h2>\n<div class=\"two\">\n";
    for (i, run) in runs.iter().enumerate() {
        let list = of(run);
        if list.is_empty() {
            continue;
        }
        let _ = write!(out, "<section class=\"card r{i}\">{}<ul class=\"notes\">", heading(runs, i));
        for note in list.iter().take(200) {
            let _ = write!(out, "<li>{}</li>", escape(note));
        }
        if list.len() > 200 {
            let _ = write!(out, "<li>and {} more</li>", list.len() - 200);
        }
        *out += "</ul></section>\n";
    }
    *out += "</div>\n";
}
