//! One definition per setting: flags in both spellings, the pinned list of flags, and configs/README.md all agree with it.

use std::fs;
use std::path::Path;

use ringtune::cli;
use ringtune::settings::{Command, Kind, Setting, TABLE};

/// Commands whose settings may stand in a config file.
const COMMANDS: [(&str, Command); 3] =
    [("pretrain", Command::Pretrain), ("sft", Command::Sft), ("pack", Command::Pack)];
/// Commands that have flags alone.
const FLAGS_ALONE: [(&str, Command); 5] = [
    ("eval", Command::Eval),
    ("generate", Command::Generate),
    ("merge", Command::Merge),
    ("prepare", Command::Prepare),
    ("parity", Command::Parity),
];

/// Compares a file with what it should hold; `RINGTUNE_UPDATE=1` writes it instead, for a change that is meant.
fn check_file(path: &str, expected: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if std::env::var_os("RINGTUNE_UPDATE").is_some() {
        fs::write(&path, expected).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    for (i, (e, f)) in expected.lines().zip(found.lines()).enumerate() {
        assert_eq!(e, f, "{}:{}: run with RINGTUNE_UPDATE=1 if the change is meant", path.display(), i + 1);
    }
    assert_eq!(expected.lines().count(), found.lines().count(), "{}", path.display());
}

#[test]
fn the_list_of_flags_is_pinned() {
    fn list(command: &clap::Command, path: &str, out: &mut Vec<String>) {
        for arg in command.get_arguments().filter_map(|a| a.get_long()) {
            out.push(format!("{path} --{arg}"));
        }
        for sub in command.get_subcommands() {
            list(sub, &format!("{path} {}", sub.get_name()), out);
        }
    }
    let mut flags = Vec::new();
    list(&cli::command(), "ringtune", &mut flags);
    check_file("tests/data/flags.txt", &(flags.join("\n") + "\n"));
}

#[test]
fn every_flag_is_known_with_dashes_and_with_underscores() {
    for (name, command) in COMMANDS.into_iter().chain(FLAGS_ALONE) {
        let clap = cli::command();
        let clap = clap.find_subcommand(name).unwrap();
        for setting in command.rows() {
            let arg = clap.get_arguments().find(|a| a.get_id() == setting.key).unwrap();
            let mut known: Vec<&str> = arg.get_all_aliases().unwrap_or_default();
            known.extend(arg.get_long());
            let off = clap.get_arguments().find(|a| *a.get_id() == format!("no:{}", setting.key));
            known.extend(off.into_iter().flat_map(|a| a.get_all_aliases().unwrap_or_default()));
            known.extend(off.and_then(|a| a.get_long()));
            let mut spellings = vec![setting.flag(), setting.key.to_string()];
            for alias in setting.aliases {
                spellings.extend([alias.to_string(), alias.replace('_', "-")]);
            }
            if setting.kind == Kind::Bool && command.takes_config() {
                spellings.extend([setting.off_flag(), setting.off_flag().replace('-', "_")]);
            }
            for spelling in spellings {
                assert!(known.contains(&spelling.as_str()), "{name} --{spelling}");
                if !command.takes_config() {
                    continue;
                }
                let mut words = vec!["ringtune".to_string(), name.into(), format!("--{spelling}")];
                if setting.kind != Kind::Bool {
                    words.push("1".into());
                }
                cli::command().try_get_matches_from(&words).unwrap_or_else(|e| panic!("{}: {e}", words.join(" ")));
            }
        }
    }
}

fn row(s: &Setting) -> String {
    let aliases: String = s.aliases.iter().map(|a| format!(", `{a}`")).collect();
    let values = match s.kind {
        Kind::Choice(words) => words.iter().map(|w| format!("`{w}`")).collect::<Vec<_>>().join(" "),
        kind => kind.expected(),
    };
    let default = s.default.map_or_else(|| format!("({})", s.unset), |d| format!("`{}`", d.replace(',', " ")));
    let default = if s.key == "special_ids" { "`0,1,2,3`".into() } else { default };
    let used: Vec<&str> = COMMANDS.iter().filter(|(_, c)| s.commands.contains(*c)).map(|(n, _)| *n).collect();
    let needs = s.needs.map_or(String::new(), |n| match n.values {
        [] => format!(" (with `{}`)", n.key),
        values => format!(" (with `{}` {})", n.key, values.join(", ")),
    });
    format!("| `{}`{aliases} | {values} | {default} | {}{needs} | {} |\n", s.key, s.help, used.join(", "))
}

#[test]
fn configs_readme_lists_every_key() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/README.md");
    let text = fs::read_to_string(path).unwrap();
    let marker = "<!-- Every key, from the table in src/settings/table.rs; a test compares. -->\n";
    let head = text.split(marker).next().unwrap();
    let mut expected = head.to_string() + marker;
    let mut group = "";
    for s in TABLE {
        if s.group != group {
            group = s.group;
            expected +=
                &format!("\n## {group}\n\n| key | values | default | what | commands |\n|---|---|---|---|---|\n");
        }
        expected += &row(s);
    }
    check_file("configs/README.md", &expected);
}
