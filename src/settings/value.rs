//! Values of settings: what kinds there are, and reading one from the command line or from JSON.

use std::fmt;
use std::path::PathBuf;

use crate::words::Words;

/// What values a setting takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// On or off.
    Bool,
    /// A whole number of at least this and at most that.
    Int(u64, u64),
    /// A number in this range.
    Float(Range),
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Several of these words.
    Choices(&'static [&'static str]),
    /// Any text.
    Text,
    /// A file or folder.
    Path,
    /// Several texts.
    Texts,
    /// Several texts, each after the flag's name; they may hold commas.
    Repeated,
    /// Several files or folders.
    Paths,
    /// Several numbers above 0.
    Weights,
    /// Several token ids.
    Ids,
}

/// The numbers a setting allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Range {
    /// x > 0
    Positive,
    /// x >= 0
    NotNegative,
    /// 0 <= x < 1
    BelowOne,
    /// 0 <= x <= 1
    Share,
    /// 0 < x <= 1
    PositiveShare,
    /// 0 < x <= the number
    UpTo(u64),
    /// Any number: where it is used, it is checked.
    Any,
}

impl Range {
    /// Whether the number is of the range, and so is the one that it becomes in single precision: numbers are computed with in
    /// f32, where 1e-60 is 0, 1e60 is infinite and 0.999999999 is 1.
    fn contains(self, x: f64) -> bool {
        self.holds(x) && (x == 0.0 || (x as f32).is_normal() && self.holds(f64::from(x as f32)))
    }

    fn holds(self, x: f64) -> bool {
        x.is_finite()
            && match self {
                Range::Positive => x > 0.0,
                Range::NotNegative => x >= 0.0,
                Range::BelowOne => (0.0..1.0).contains(&x),
                Range::Share => (0.0..=1.0).contains(&x),
                Range::PositiveShare => x > 0.0 && x <= 1.0,
                Range::UpTo(most) => x > 0.0 && x <= most as f64,
                Range::Any => true,
            }
    }

    /// What was found in place of a number of the range.
    fn refused(self, found: String, x: Option<f64>) -> String {
        match (self, x) {
            (Range::UpTo(most), Some(x)) if x > most as f64 => too_large(&found, most),
            (_, Some(x)) if self.holds(x) && !self.contains(x) => {
                let single = x as f32;
                let becomes = if single.is_normal() {
                    single.to_string()
                } else if single.is_finite() {
                    "0".into()
                } else {
                    "infinite".into()
                };
                format!("{found}, which is {becomes} in single precision")
            }
            _ => found,
        }
    }
}

impl Kind {
    /// What is expected, for messages: `expected {..}, found ..`.
    pub fn expected(self) -> String {
        match self {
            Kind::Bool => "true or false".into(),
            Kind::Int(0, _) => "a whole number".into(),
            Kind::Int(least, _) => format!("a whole number of at least {least}"),
            Kind::Float(Range::Positive) => "a number above 0".into(),
            Kind::Float(Range::NotNegative) => "a number of 0 or more".into(),
            Kind::Float(Range::BelowOne) => "a number from 0 to below 1".into(),
            Kind::Float(Range::Share) => "a number from 0 to 1".into(),
            Kind::Float(Range::PositiveShare) => "a number above 0 and at most 1".into(),
            Kind::Float(Range::UpTo(_)) => "a number above 0".into(),
            Kind::Float(Range::Any) => "a number".into(),
            Kind::Choice(words) => format!("one of {}", words.join(", ")),
            Kind::Choices(words) => format!("some of {}", words.join(", ")),
            Kind::Text => "text".into(),
            Kind::Path => "a path".into(),
            Kind::Texts | Kind::Repeated => "a list of texts".into(),
            Kind::Paths => "a list of paths".into(),
            Kind::Weights => "a list of numbers above 0".into(),
            Kind::Ids => "a list of token ids".into(),
        }
    }

    /// The largest whole number that it takes.
    pub fn most(self) -> u64 {
        match self {
            Kind::Int(_, most) => most,
            _ => u64::MAX,
        }
    }

    /// The word for a value in the help: `--lora-r <N>`.
    pub fn placeholder(self) -> &'static str {
        match self {
            Kind::Bool => "BOOL",
            Kind::Int(..) => "N",
            Kind::Float(_) => "X",
            Kind::Choice(_) | Kind::Choices(_) => "CHOICE",
            Kind::Text | Kind::Texts | Kind::Repeated => "TEXT",
            Kind::Path | Kind::Paths => "PATH",
            Kind::Weights => "X",
            Kind::Ids => "IDS",
        }
    }

    /// Whether it takes several values after the flag's name.
    pub fn is_list(self) -> bool {
        matches!(self, Kind::Texts | Kind::Paths | Kind::Weights | Kind::Choices(_))
    }

    /// Reads typed words; `Err` holds the word that does not fit.
    ///
    /// # Errors
    /// The first word that is not what the kind expects.
    pub fn parse(self, words: &[&str]) -> Result<Value, String> {
        let one = words.first().copied().unwrap_or("");
        let bad = |w: &str| format!("{w:?}");
        let number = |w: &str, range: Range| {
            let x = w.parse::<f64>().ok();
            x.filter(|&x| range.contains(x)).ok_or_else(|| range.refused(bad(w), x))
        };
        match self {
            Kind::Bool => one.parse().map(Value::Bool).map_err(|_| bad(one)),
            Kind::Int(least, most) => {
                let digits = !one.is_empty() && one.bytes().all(|b| b.is_ascii_digit());
                match one.parse() {
                    Ok(n) if (least..=most).contains(&n) => Ok(Value::Int(n)),
                    Ok(n) if n < least => Err(bad(one)),
                    _ if digits => Err(too_large(&bad(one), most)),
                    _ => Err(bad(one)),
                }
            }
            Kind::Float(range) => number(one, range).map(Value::Float),
            Kind::Choice(allowed) => match allowed.iter().find(|&&a| a == one) {
                Some(word) => Ok(Value::Text(word.to_string())),
                None => Err(bad(one)),
            },
            // `tensorboard,json` and `tensorboard json` mean the same.
            Kind::Choices(allowed) => {
                let words: Vec<&str> = words.iter().flat_map(|w| w.split(',')).map(str::trim).collect();
                match words.iter().find(|w| !allowed.contains(w)) {
                    Some(w) => Err(bad(w)),
                    None => Ok(Value::Texts(words.iter().map(|w| w.to_string()).collect())),
                }
            }
            Kind::Text | Kind::Path if one.is_empty() => Err(bad(one)),
            Kind::Text | Kind::Path => Ok(Value::Text(one.into())),
            // `--lora_targets q,v` and `--lora_targets q v` mean the same; paths may hold commas.
            Kind::Texts => {
                let items = words.iter().flat_map(|w| w.split(','));
                let items: Vec<String> = items.map(|w| w.trim().to_string()).filter(|w| !w.is_empty()).collect();
                if items.is_empty() { Err(bad(one)) } else { Ok(Value::Texts(items)) }
            }
            Kind::Paths => match words.iter().find(|w| w.is_empty()) {
                Some(w) => Err(bad(w)),
                None => Ok(Value::Texts(words.iter().map(|w| w.to_string()).collect())),
            },
            Kind::Repeated => Ok(Value::Texts(words.iter().map(|w| w.to_string()).collect())),
            Kind::Ids => {
                let ids = words.iter().flat_map(|w| w.split(','));
                ids.map(|w| w.parse().map_err(|_| bad(w))).collect::<Result<_, _>>().map(Value::Ints)
            }
            Kind::Weights => {
                let items = words.iter().flat_map(|w| w.split(',')).filter(|w| !w.is_empty());
                // Shares are worked out in double precision.
                let weight = |w: &str| w.parse().ok().filter(|&x| Range::Positive.holds(x)).ok_or_else(|| bad(w));
                items.map(weight).collect::<Result<_, _>>().map(Value::Floats)
            }
        }
    }

    /// Reads a JSON value; `Err` says what was found instead.
    ///
    /// # Errors
    /// A description of the value when it is of another type or out of range.
    pub fn from_json(self, json: &serde_json::Value) -> Result<Value, String> {
        use serde_json::Value as J;
        let bad = || describe(json);
        let texts = |items: &[J]| items.iter().map(|v| v.as_str().map(String::from)).collect::<Option<Vec<_>>>();
        match (self, json) {
            (Kind::Bool, J::Bool(b)) => Ok(Value::Bool(*b)),
            // 3.0 is a whole number: tools that write floats everywhere mean it.
            (Kind::Int(least, most), J::Number(n)) => {
                // A float of 2^64 or more is not the number that was written.
                let fits = |x: &f64| x.fract() == 0.0 && (0.0..18_446_744_073_709_551_616.0).contains(x);
                let whole = n.as_u64().or_else(|| n.as_f64().filter(fits).map(|x| x as u64));
                match whole {
                    Some(n) if (least..=most).contains(&n) => Ok(Value::Int(n)),
                    _ if n.as_f64().is_some_and(|x| x >= most as f64) => Err(too_large(&bad(), most)),
                    _ => Err(bad()),
                }
            }
            (Kind::Float(range), J::Number(n)) => {
                let x = n.as_f64();
                x.filter(|&x| range.contains(x)).map(Value::Float).ok_or_else(|| range.refused(bad(), x))
            }
            // Readers of YAML take the word `no` for false.
            (Kind::Choice(words), J::Bool(false)) if words.contains(&"no") => Ok(Value::Text("no".into())),
            (
                Kind::Choice(_) | Kind::Choices(_) | Kind::Text | Kind::Path | Kind::Texts | Kind::Paths,
                J::String(s),
            ) => self.parse(&[s]).map_err(|_| bad()),
            (Kind::Choices(_) | Kind::Texts | Kind::Paths, J::Array(items)) => {
                let items = texts(items).ok_or_else(bad)?;
                self.parse(&items.iter().map(String::as_str).collect::<Vec<_>>()).map_err(|_| bad())
            }
            (Kind::Weights, J::Array(items)) => {
                let items: Option<Vec<f64>> = items.iter().map(J::as_f64).collect();
                let items = items.filter(|v| !v.is_empty() && v.iter().all(|&x| Range::Positive.holds(x)));
                items.map(Value::Floats).ok_or_else(bad)
            }
            _ => Err(bad()),
        }
    }
}

/// What was found instead of a smaller number.
fn too_large(found: &str, most: u64) -> String {
    format!("{found}, more than the largest value, {most}")
}

/// A JSON value in a few words, for messages.
fn describe(json: &serde_json::Value) -> String {
    use serde_json::Value as J;
    let mut shown = json.to_string();
    if shown.chars().count() > 60 {
        shown = shown.chars().take(57).collect::<String>() + "...";
    }
    match json {
        J::Null => "null".into(),
        J::Bool(_) => shown,
        J::Number(_) => format!("the number {shown}"),
        J::String(_) => format!("the text {shown}"),
        J::Array(_) => format!("the list {shown}"),
        J::Object(_) => format!("the object {shown}"),
    }
}

/// The value of a setting.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// None: nobody set it, and it has no default.
    Unset,
    /// On or off.
    Bool(bool),
    /// A whole number.
    Int(u64),
    /// A number.
    Float(f64),
    /// A text, a choice or a path.
    Text(String),
    /// Several of them.
    Texts(Vec<String>),
    /// Several numbers.
    Floats(Vec<f64>),
    /// Several whole numbers.
    Ints(Vec<u64>),
}

/// What a row takes out of its value, whose kind the row itself says; another kind is a mistake in the table.
impl Value {
    /// The value, where there is one.
    pub fn given(&self) -> Option<&Self> {
        (*self != Value::Unset).then_some(self)
    }

    fn expected(&self, what: &str) -> ! {
        panic!("the row takes {what}, its kind gave {self:?}")
    }

    /// On or off.
    pub fn bool(&self) -> bool {
        let Value::Bool(b) = self else { self.expected("a switch") };
        *b
    }

    /// A whole number.
    pub fn int(&self) -> u64 {
        let Value::Int(n) = self else { self.expected("a whole number") };
        *n
    }

    /// A number of things.
    pub fn count(&self) -> usize {
        usize::try_from(self.int()).unwrap_or(usize::MAX)
    }

    /// A number of things that are never many.
    pub fn small(&self) -> u32 {
        u32::try_from(self.int()).unwrap_or(u32::MAX)
    }

    /// A number.
    pub fn float(&self) -> f64 {
        let Value::Float(x) = self else { self.expected("a number") };
        *x
    }

    /// A text.
    pub fn text(&self) -> String {
        let Value::Text(s) = self else { self.expected("a text") };
        s.clone()
    }

    /// A path.
    pub fn path(&self) -> PathBuf {
        at_home(&self.text())
    }

    /// The variant that a word stands for.
    pub fn choice<T: Words>(&self) -> T {
        let Value::Text(word) = self else { self.expected("a word") };
        T::of_word(word).unwrap_or_else(|| self.expected(&T::WORDS.join(" or ")))
    }

    /// Texts; none without a value.
    pub fn texts(&self) -> Vec<String> {
        match self {
            Value::Texts(v) => v.clone(),
            Value::Unset => Vec::new(),
            _ => self.expected("texts"),
        }
    }

    /// Paths; none without a value.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.texts().iter().map(|path| at_home(path)).collect()
    }

    /// Numbers.
    pub fn floats(&self) -> Vec<f64> {
        let Value::Floats(v) = self else { self.expected("numbers") };
        v.clone()
    }

    /// Token ids; none without a value.
    pub fn ids(&self) -> Vec<u32> {
        match self {
            Value::Ints(v) => v.iter().map(|&n| u32::try_from(n).unwrap_or(u32::MAX)).collect(),
            Value::Unset => Vec::new(),
            _ => self.expected("token ids"),
        }
    }
}

/// A path whose `~/` no shell has replaced by the user's home: shells leave it in `--output-dir=~/out`, and nothing reads a config
/// file before ringtune.
fn at_home(path: &str) -> PathBuf {
    let home = || std::env::var_os("HOME").filter(|home| !home.is_empty());
    match path.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with('/')) {
        Some(rest) => home().map_or_else(|| path.into(), |home| PathBuf::from(home).join(rest.trim_start_matches('/'))),
        None => path.into(),
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |items: Vec<String>| items.join(" ");
        match self {
            Value::Unset => Ok(()),
            Value::Bool(b) => write!(f, "{b}"),
            Value::Int(n) => write!(f, "{n}"),
            Value::Float(x) if *x != 0.0 && (x.abs() < 1e-3 || x.abs() >= 1e6) => write!(f, "{x:e}"),
            Value::Float(x) => write!(f, "{x}"),
            Value::Text(s) => f.write_str(s),
            Value::Texts(v) => f.write_str(&v.join(" ")),
            Value::Floats(v) => f.write_str(&list(v.iter().map(f64::to_string).collect())),
            Value::Ints(v) => f.write_str(&list(v.iter().map(u64::to_string).collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn words_and_json_agree() {
        let same = |kind: Kind, words: &[&str], json: serde_json::Value| {
            assert_eq!(kind.parse(words).unwrap(), kind.from_json(&json).unwrap(), "{kind:?}");
        };
        same(Kind::Int(1, 16), &["16"], json!(16));
        same(Kind::Int(1, 16), &["16"], json!(16.0));
        same(Kind::Float(Range::Positive), &["2e-4"], json!(0.0002));
        same(Kind::Texts, &["q,v"], json!(["q", "v"]));
        same(Kind::Weights, &["0.4", "0.6"], json!([0.4, 0.6]));
        same(Kind::Paths, &["a,b.jsonl"], json!("a,b.jsonl"));
        same(Kind::Choice(&["no", "bf16"]), &["bf16"], json!("bf16"));
    }

    #[test]
    fn what_does_not_fit_is_shown() {
        assert_eq!(Kind::Int(1, 9).parse(&["0"]), Err("\"0\"".into()));
        assert_eq!(Kind::Int(1, 9).parse(&["10"]), Err("\"10\", more than the largest value, 9".into()));
        assert_eq!(Kind::Int(0, u64::MAX).parse(&["18446744073709551615"]), Ok(Value::Int(u64::MAX)));
        assert!(Kind::Int(0, u64::MAX).parse(&["18446744073709551616"]).is_err());
        for large in ["99999999999999999999", "18446744073709551616", "1e30"] {
            let json = serde_json::from_str(large).unwrap();
            assert!(Kind::Int(0, u64::MAX).from_json(&json).is_err(), "{large}");
        }
        let float = |range: Range, word: &str| Kind::Float(range).parse(&[word]);
        let refused = |word: &str, why: &str| Err(format!("{word:?}, which is {why} in single precision"));
        assert_eq!(float(Range::Positive, "1e-60"), refused("1e-60", "0"));
        assert_eq!(float(Range::Positive, "1e-40"), refused("1e-40", "0"));
        assert_eq!(float(Range::NotNegative, "1e60"), refused("1e60", "infinite"));
        assert_eq!(float(Range::BelowOne, "0.999999999"), refused("0.999999999", "1"));
        assert_eq!(float(Range::NotNegative, "0"), Ok(Value::Float(0.0)));
        assert_eq!(float(Range::Positive, "1e-30"), Ok(Value::Float(1e-30)));
        let found = Kind::Float(Range::Positive).from_json(&json!(1e300));
        assert_eq!(found, Err("the number 1e+300, which is infinite in single precision".into()));
        assert_eq!(Kind::Weights.parse(&["1e-60", "1e60"]), Ok(Value::Floats(vec![1e-60, 1e60])));
        assert_eq!(Kind::Weights.parse(&["0.5", "nan"]), Err("\"nan\"".into()));
        assert_eq!(Kind::Weights.parse(&["0.5", "-0.1"]), Err("\"-0.1\"".into()));
        assert_eq!(Kind::Bool.from_json(&json!("yes")), Err("the text \"yes\"".into()));
        assert_eq!(Kind::Int(1, 9).from_json(&json!(-3)), Err("the number -3".into()));
        assert_eq!(Kind::Weights.from_json(&json!([1, "x"])), Err("the list [1,\"x\"]".into()));
        assert_eq!(Kind::Float(Range::BelowOne).from_json(&json!(1)), Err("the number 1".into()));
    }
}
