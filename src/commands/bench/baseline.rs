//! `--baseline FILE`: the figures of an earlier `--json` beside those of now, case by case.

use std::path::Path;

use serde_json::{Value, json};

use super::timing::Times;
use crate::error::{Context, Error, Result};
use crate::files::read_text;
use crate::say::visible;

/// What `--json` printed at another time.
#[derive(Clone, Debug)]
pub struct Baseline {
    /// Where it is, as typed.
    file: String,
    document: Value,
    cases: Vec<Earlier>,
}

/// The times of a case then.
#[derive(Clone, Debug)]
struct Earlier {
    key: String,
    median: f64,
    quartiles: (f64, f64),
}

/// A case now against the same one then.
#[derive(Clone, Debug, PartialEq)]
pub struct Ratio {
    /// Speed now over speed then, of the medians: above 1 is faster.
    pub speed: f64,
    /// Whether the middle halves of the rounds lie apart.
    pub beyond: bool,
    /// Median then, in seconds.
    pub then: f64,
}

impl Ratio {
    /// As the table has it: `1.08x` within the spread, `0.91x slower` beyond it.
    pub fn text(&self) -> String {
        match (self.beyond, self.speed >= 1.0) {
            (false, _) => format!("{:.2}x", self.speed),
            (true, true) => format!("{:.2}x faster", self.speed),
            (true, false) => format!("{:.2}x slower", self.speed),
        }
    }

    /// As `--json` has it.
    pub fn json(&self) -> Value {
        json!({ "median": self.then, "ratio": self.speed, "beyond_spread": self.beyond })
    }
}

/// What a case is called in both documents: every word that says what was run.
pub fn key(case: &Value) -> String {
    let word = |name: &str| match &case[name] {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    };
    // Bytes of a kernel follow from its shape; those of a collective are what it is called by.
    let words: &[&str] =
        if case["collective"].is_string() { &["collective", "bytes"] } else { &["name", "shape", "dtype", "tokens"] };
    words.iter().filter_map(|name| word(name)).collect::<Vec<_>>().join(", ")
}

/// Every case of `document` against the baseline, if there is one: noted in it, and given in the order of the cases.
pub fn compare(
    baseline: Option<&Baseline>,
    document: &mut Value,
    times: impl Iterator<Item = Option<Times>>,
) -> Vec<Option<Ratio>> {
    let mut ratios = Vec::new();
    for (i, times) in times.enumerate() {
        let ratio = baseline.zip(times).and_then(|(b, t)| b.ratio(&key(&document["cases"][i]), &t));
        if baseline.is_some() {
            document["cases"][i]["baseline"] = ratio.as_ref().map_or(Value::Null, Ratio::json);
        }
        ratios.push(ratio);
    }
    if let Some(baseline) = baseline {
        document["baseline"] = baseline.json(document);
    }
    ratios
}

impl Baseline {
    /// Reads what `bench` of this command printed with `--json`.
    ///
    /// # Errors
    /// If the file cannot be read, is no such document, is of another command, or nothing in it was timed.
    pub fn read(file: &str, command: &str) -> Result<Self> {
        let text = read_text(Path::new(file), 256 << 20).context(|| "--baseline".into())?;
        let wrong = |found: String| {
            Error::new(format!("--baseline: {file}: expected what `ringtune {command} --json` prints, found {found}"))
        };
        let document: Value = serde_json::from_str(&text).map_err(|e| wrong(format!("no JSON: {e}")))?;
        match document["command"].as_str() {
            Some(found) if found == command => {}
            Some(found) => return Err(wrong(format!("what `ringtune {}` prints", visible(found)))),
            None => return Err(wrong("a document without `command`".into())),
        }
        let cases = document["cases"].as_array().ok_or_else(|| wrong("no list `cases`".into()))?;
        let earlier = |case: &Value| {
            let of = |field: &str| {
                let seconds = match &case["seconds"] {
                    // Of a collective: the median, its quartiles beside it.
                    number @ Value::Number(_) if field == "median" => number,
                    Value::Number(_) => &case[format!("seconds_{field}")],
                    times => &times[field],
                };
                seconds.as_f64().filter(|s| s.is_finite() && *s > 0.0)
            };
            Some(Earlier { key: key(case), median: of("median")?, quartiles: (of("quartile1")?, of("quartile3")?) })
        };
        let timed: Vec<Earlier> = cases.iter().filter_map(earlier).collect();
        if timed.is_empty() {
            return Err(wrong("no case with times (an emulated device has none)".into()));
        }
        Ok(Self { file: file.into(), document, cases: timed })
    }

    /// A case now against the same one then, if it was there.
    pub fn ratio(&self, key: &str, now: &Times) -> Option<Ratio> {
        let then = self.cases.iter().find(|c| c.key == key)?;
        let beyond = now.quartile1 > then.quartiles.1 || now.quartile3 < then.quartiles.0;
        Some(Ratio { speed: then.median / now.median, beyond, then: then.median })
    }

    /// The line above the table: what the figures are compared with, and what was another then.
    pub fn heading(&self, now: &Value) -> String {
        let then = &self.document;
        let word = |v: &Value| match v {
            Value::Null => "unknown".to_string(),
            Value::String(text) => visible(text).into_owned(),
            other => other.to_string(),
        };
        let label = then["label"].as_str().map_or(String::new(), |l| format!(", {}", visible(l)));
        let mut text = format!(
            "baseline: {}, ringtune {}{label}; ratio: speed now over then, of the medians; slower, faster: the middle halves of the rounds lie apart\n",
            self.file,
            word(&then["version"])
        );
        // Of collectives the device is a word, of the others an object.
        let device = |d: &Value, field: &str| match &d["device"] {
            Value::Object(fields) => fields.get(field).cloned().unwrap_or(Value::Null),
            word if field == "description" => word.clone(),
            _ => Value::Null,
        };
        let parts = |d: &Value| -> Vec<Value> {
            let fields = ["flags", "ranks", "ranks_of_host", "transport"].map(|field| d[field].clone());
            [device(d, "description"), device(d, "processor")].into_iter().chain(fields).collect()
        };
        let names =
            ["device", "processor", "line of flags", "number of ranks", "number of ranks of this host", "transport"];
        for ((name, then), _) in names.into_iter().zip(parts(then)).zip(parts(now)).filter(|((_, a), b)| a != b) {
            text += &format!("baseline: another {name} then: {}\n", word(&then));
        }
        text
    }

    /// What `--json` says of it: the file, and which of its cases are not among those of now.
    pub fn json(&self, now: &Value) -> Value {
        let keys: Vec<String> = now["cases"].as_array().into_iter().flatten().map(key).collect();
        let missing: Vec<&str> =
            self.cases.iter().map(|c| c.key.as_str()).filter(|k| !keys.iter().any(|n| n == k)).collect();
        json!({ "file": self.file, "version": self.document["version"], "label": self.document["label"], "missing": missing })
    }

    /// Holds every case to a least ratio.
    ///
    /// # Errors
    /// If one is below it: which, how far. If no case of now was there then.
    pub fn judge(&self, least: Option<f64>, now: &Value, ratios: &[Option<Ratio>]) -> Result<()> {
        let known = || ratios.iter().enumerate().filter_map(|(i, r)| Some((key(&now["cases"][i]), r.as_ref()?)));
        if known().next().is_none() {
            return Err(Error::new(format!(
                "--baseline: {}: no case of this run is in it; it has {}",
                self.file,
                self.cases.iter().take(3).map(|c| format!("\"{}\"", visible(&c.key))).collect::<Vec<_>>().join(", ")
            )));
        }
        let Some(least) = least else { return Ok(()) };
        let below: Vec<_> = known().filter(|(_, r)| r.speed < least).collect();
        let Some((key, worst)) = below.iter().min_by(|a, b| a.1.speed.total_cmp(&b.1.speed)) else { return Ok(()) };
        let more = if below.len() > 1 { format!(", and {} more", below.len() - 1) } else { String::new() };
        Err(Error::new(format!(
            "--fail-below {least}: {key} has {:.3} of the speed in {}{more}",
            worst.speed, self.file
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(cases: Value) -> Value {
        json!({ "command": "bench kernels", "version": "0", "label": "old", "flags": "--x", "device": { "description": "cpu" }, "cases": cases })
    }

    fn case(name: &str, median: f64, spread: f64) -> Value {
        json!({ "name": name, "shape": "2 x 2", "seconds": { "median": median, "quartile1": median - spread, "quartile3": median + spread } })
    }

    fn read(document: &Value) -> Result<Baseline> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("old.json");
        std::fs::write(&path, document.to_string()).unwrap();
        Baseline::read(path.to_str().unwrap(), "bench kernels")
    }

    /// Times of three rounds.
    fn times(median: f64, spread: f64) -> Times {
        Times::of(vec![median - 2.0 * spread, median, median + 2.0 * spread])
    }

    #[test]
    fn a_case_is_compared_with_itself_and_its_spread() {
        let b = read(&document(json!([case("a", 2.0, 0.1), case("b", 1.0, 0.5)]))).unwrap();
        let faster = b.ratio("a, 2 x 2", &times(1.0, 0.1)).unwrap();
        assert_eq!((faster.speed, faster.beyond, faster.text().as_str()), (2.0, true, "2.00x faster"));
        assert_eq!(b.ratio("a, 2 x 2", &times(4.0, 0.1)).unwrap().text(), "0.50x slower");
        // The quartiles overlap: the difference may be noise.
        assert_eq!(b.ratio("b, 2 x 2", &times(1.25, 0.1)).unwrap().text(), "0.80x");
        assert_eq!(b.ratio("a, 2 x 3", &times(1.0, 0.1)), None);
        let now = document(json!([case("a", 1.0, 0.1)]));
        assert_eq!(b.json(&now)["missing"], json!(["b, 2 x 2"]));
        let said = b.heading(&json!({ "flags": "--y", "device": { "description": "cpu" } }));
        assert!(said.contains("ringtune 0, old") && said.contains("another line of flags then: --x"), "{said}");
        assert!(!said.contains("another device"), "{said}");
    }

    #[test]
    fn what_is_too_slow_is_named() {
        let b = read(&document(json!([case("a", 2.0, 0.1)]))).unwrap();
        let ratio = |speed| Some(Ratio { speed, beyond: true, then: 2.0 });
        let (now, all) = (json!({ "cases": [{ "name": "a" }, { "name": "b" }, {}] }), [ratio(0.7), ratio(0.8), None]);
        b.judge(None, &now, &all).unwrap();
        b.judge(Some(0.7), &now, &all).unwrap();
        let e = b.judge(Some(0.9), &now, &all).unwrap_err();
        assert!(
            e.to_string().starts_with("--fail-below 0.9: a has 0.700 of the speed in ") && e.exit_code() == 1,
            "{e}"
        );
        assert!(e.to_string().ends_with(", and 1 more"), "{e}");
        let none = b.judge(None, &now, &all[2..]).unwrap_err().to_string();
        assert!(none.contains("no case of this run is in it; it has \"a, 2 x 2\""), "{none}");
    }

    #[test]
    fn a_file_that_is_none_is_refused() {
        let found = |v: &Value| read(v).unwrap_err().to_string();
        assert!(found(&json!([1])).contains("a document without `command`"));
        assert!(found(&json!({ "command": "bench step" })).contains("found what `ringtune bench step` prints"));
        assert!(found(&json!({ "command": "bench kernels" })).contains("no list `cases`"));
        assert!(found(&document(json!([{ "name": "a" }]))).contains("no case with times"));
        assert!(found(&document(json!([case("a", 0.0, 0.0)]))).contains("no case with times"));
        let missing = Baseline::read("/surely/missing", "bench kernels").unwrap_err().to_string();
        assert!(missing.starts_with("--baseline: /surely/missing: No such file"), "{missing}");
    }
}
