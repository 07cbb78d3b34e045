//! Variables of the environment in the paths of a config file.

use super::{Kind, Value};

impl Value {
    /// Of a config file, which no shell reads: paths with the values of the variables that they name, `$NAME` or `${NAME}`.
    ///
    /// # Errors
    /// The name of a variable that is not set, in words.
    pub(super) fn with_variables(self, kind: Kind) -> Result<Self, String> {
        let of = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        match self {
            Value::Text(path) if kind == Kind::Path => with_variables(&path, of).map(Value::Text),
            Value::Texts(paths) if kind == Kind::Paths => {
                paths.iter().map(|path| with_variables(path, of)).collect::<Result<_, _>>().map(Value::Texts)
            }
            other => Ok(other),
        }
    }
}

/// A path with what `of` gives for the names of variables in it; a dollar sign before anything else is itself.
fn with_variables(path: &str, of: impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut all = String::new();
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('$') {
        all += before;
        let (braced, inner) = after.strip_prefix('{').map_or((false, after), |inner| (true, inner));
        let letters = inner.bytes().take_while(|&b| b == b'_' || b.is_ascii_alphanumeric()).count();
        let (name, behind) = inner.split_at(letters);
        let behind = if braced { behind.strip_prefix('}') } else { Some(behind) };
        match behind.filter(|_| name.starts_with(|c: char| c == '_' || c.is_ascii_alphabetic())) {
            Some(behind) => {
                all += &of(name).ok_or_else(|| format!("{path:?}, and the variable {name} is not set"))?;
                rest = behind;
            }
            None => {
                all.push('$');
                rest = after;
            }
        }
    }
    Ok(all + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_in_paths_are_read() {
        let of = |name: &str| [("HOME", "/h"), ("N", "1")].iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        for (path, read) in [
            ("${HOME}/out", "/h/out"),
            ("$HOME/a$N.jsonl", "/h/a1.jsonl"),
            ("a/${N}b$", "a/1b$"),
            ("cost$5/${a b}/${HOME", "cost$5/${a b}/${HOME"),
            ("plain", "plain"),
        ] {
            assert_eq!(with_variables(path, of), Ok(read.to_string()), "{path}");
        }
        let unset = with_variables("$SCRATCH/out", of).unwrap_err();
        assert_eq!(unset, "\"$SCRATCH/out\", and the variable SCRATCH is not set");
        assert_eq!(Value::Text("$HOME".into()).with_variables(Kind::Text), Ok(Value::Text("$HOME".into())));
    }
}
