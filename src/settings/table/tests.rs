//! What holds for every row of the table.

use super::super::{Command, find};
use super::*;

const ALL: [Command; 9] = [
    Command::Pretrain,
    Command::Sft,
    Command::Pack,
    Command::Inspect,
    Command::Eval,
    Command::Generate,
    Command::Merge,
    Command::Prepare,
    Command::Parity,
];

#[test]
fn the_table_is_sound() {
    let mut names: Vec<&str> = TABLE.iter().flat_map(|s| s.aliases.iter().copied().chain([s.key])).collect();
    let n = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), n, "a name stands twice");
    for s in TABLE {
        assert!(s.default.is_some() == s.unset.is_empty(), "{}: a default or what happens without one", s.key);
        assert!(s.kind != Bool || s.default.is_some(), "{}", s.key);
        if let Some(n) = s.needs {
            let other = find(n.key).filter(|o| o.key == n.key);
            let other = other.unwrap_or_else(|| panic!("{}: needs {}", s.key, n.key));
            if let Choice(words) = other.kind {
                assert!(n.values.iter().all(|v| words.contains(v)), "{}: needs {:?}", s.key, n.values);
            }
        }
    }
    for s in ALL.into_iter().flat_map(Command::rows) {
        assert!(!s.help.ends_with('.'), "{}: no full stop", s.key);
        if let Some(d) = s.default {
            let words: Vec<&str> = d.split(' ').collect();
            s.kind.parse(&words).unwrap_or_else(|e| panic!("{}: default {e}", s.key));
        }
    }
}

#[test]
fn names_of_a_command_are_its_own() {
    for command in ALL {
        let rows = command.rows();
        let mut names: Vec<String> = rows.iter().flat_map(|s| [vec![s.flag()], s.other_names()].concat()).collect();
        let n = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), n, "{command:?}: a name stands twice");
    }
}

/// Some other value than the default and than the empty one.
fn odd(s: &Setting) -> Value {
    match s.kind {
        Bool => Value::Bool(true),
        Int(least, _) => Value::Int(least + 3),
        Float(_) => Value::Float(0.75),
        Choice(words) => Value::Text(words[1].into()),
        Text | Path => Value::Text("odd".into()),
        Texts | Paths | Kind::Repeated => Value::Texts(vec!["odd".into()]),
        Kind::Choices(words) => Value::Texts(vec![words[1].into()]),
        Weights => Value::Floats(vec![0.75]),
        Kind::Ids => Value::Ints(vec![7]),
    }
}

/// Fields of a struct as `{:#?}` prints it, each with its name.
fn printed(all: &impl std::fmt::Debug) -> Vec<String> {
    let text = format!("{all:#?}");
    let body = text.split_once('\n').unwrap().1;
    body.split("\n    ").fold(Vec::new(), |mut fields: Vec<String>, line| {
        match (line.starts_with(' ') || line.starts_with(['}', ']', ')']), fields.last_mut()) {
            (true, Some(field)) => *field += line,
            _ => fields.push(line.trim().to_string()),
        }
        fields
    })
}

/// What rows write does not depend on what stood there before, and no field is left that no row writes.
#[test]
fn every_field_is_written() {
    let mut written = Settings::blank();
    for s in ALL.into_iter().flat_map(Command::rows) {
        (s.to)(&mut written, &odd(s));
    }
    let blank = Settings::blank();
    for (was, is) in [
        (printed(&blank.model), printed(&written.model)),
        (printed(&blank.data), printed(&written.data)),
        (printed(&blank.train), printed(&written.train)),
        (printed(&blank.train.schedule), printed(&written.train.schedule)),
        (printed(&GenTest::blank()), printed(written.train.gen_test.as_ref().unwrap())),
        (printed(&blank.eval), printed(&written.eval)),
        (printed(&blank.generate), printed(&written.generate)),
        (printed(&blank.merge), printed(&written.merge)),
        (printed(&blank.prepare), printed(&written.prepare)),
    ] {
        assert_eq!(was.len(), is.len());
        let unwritten: Vec<_> = was.iter().zip(&is).filter(|(was, is)| was == is).map(|(was, _)| was).collect();
        assert!(unwritten.is_empty(), "no row writes {unwritten:?}");
    }
    let LoraSpec { r, alpha, dropout, rslora, targets: _ } = written.train.lora.clone().unwrap();
    assert!(r > 0 && alpha > 0.0 && dropout > 0.0 && rslora);
    for command in ALL {
        let mut again = written.clone();
        let mut defaults = Settings::blank();
        for s in command.rows() {
            (s.to)(&mut again, &s.default_value());
            (s.to)(&mut defaults, &s.default_value());
        }
        if command == Command::Sft {
            assert_eq!(again.train, defaults.train);
        }
        assert_eq!(defaults, Settings::defaults(command));
    }
}
