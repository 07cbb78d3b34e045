//! `ringtune convert`: rows of any form that trainings read, mixed, shuffled, cut, as JSON Lines of one form.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction};
use clap::{ArgMatches, Command, value_parser};
use serde_json::{Value, json};

use super::data::named;
use super::fetch::ALONE;
use crate::data::columns::Columns;
use crate::data::jsonl::{BadRows, RowOptions, RowReader};
use crate::data::mix::largest_remainder;
use crate::data::row::{Message, Role, Row};
use crate::data::source::Source;
use crate::error::{Error, Result};
use crate::files::{At, nameless_beside, takes_a_stream, write_atomic};
use crate::rng::Stream;
use crate::settings::{Kind, Value as Setting};
use crate::text::grouped;
use crate::{ensure, say};

/// Names of the random numbers that the order of rows is made of.
const STREAM: u64 = 0x636f_6e76;

/// The command line of it.
pub fn command() -> Command {
    let count = |id: &'static str, help: &'static str| {
        let range = value_parser!(u64).range(..=u64::from(u32::MAX));
        Arg::new(id).long(id).value_name("N").value_parser(range).help(help)
    };
    let switch =
        |id: &'static str, name: &'static str, help| Arg::new(id).long(name).action(ArgAction::SetTrue).help(help);
    Command::new("convert")
        .about("Write rows of any form that sft reads as JSON Lines: mixed, shuffled, cut")
        .override_usage("ringtune convert [OPTIONS] <IN>... <OUT>")
        .after_help(
            "Rows are written as {\"prompt\", \"response\", \"system\"} where they are one question and its answer, else as {\"messages\"}.\n\
             The order of files and rows is kept, unless --mix or --shuffle says otherwise; --skip and --take count in the new order.",
        )
        .arg(
            Arg::new("files")
                .value_name("FILES")
                .num_args(2..)
                .required(true)
                .value_parser(value_parser!(PathBuf))
                .help("Files of rows (JSON Lines, JSON, Parquet, CSV, gzip too), folders or patterns; last the file to write"),
        )
        .arg(
            Arg::new("mix")
                .long("mix")
                .value_name("X")
                .num_args(1..)
                .allow_negative_numbers(true)
                .help("Share of each file in the rows; as many rows as the shares allow, none twice, shuffled"),
        )
        .arg(switch("shuffle", "shuffle", "Shuffle the rows"))
        .arg(Arg::new("seed").long("seed").value_name("N").default_value("42").value_parser(value_parser!(u64)).help("Seed of the order"))
        .arg(count("skip", "Leave out this many rows at the start"))
        .arg(count("take", "Write at most this many rows"))
        .arg(
            Arg::new("columns")
                .long("columns")
                .value_name("TEXT")
                .num_args(1..)
                .help("Columns under other names, as FIELD=COLUMN: prompt=question response=answer"),
        )
        .arg(switch("skip_bad_rows", "skip-bad-rows", "Leave malformed rows out instead of stopping").alias("skip_bad_rows"))
        .arg(switch("overwrite", "overwrite", "Replace the file to write if it is there"))
}

/// Runs the command.
///
/// # Errors
/// Usage errors; if a file or row is bad, there are too few rows, or the result cannot be written.
pub fn run(m: &ArgMatches) -> Result<()> {
    let files: Vec<PathBuf> = m.get_many("files").into_iter().flatten().cloned().collect();
    let (to, from) = files.split_last().expect("clap wants two");
    let streams = takes_a_stream(to);
    if !m.get_flag("overwrite") && !streams && to.exists() {
        return Err(Error::usage(format!(
            "{}: the last name is that of the file to write, which is there already; choose another, or add --overwrite",
            to.display()
        )));
    }
    let other_kind = [".csv", ".tsv", ".parquet", ".txt", ".gz", ".zst", ".bin", ".tok", ".xlsx"];
    let name = to.to_string_lossy().to_lowercase();
    if let Some(ending) = other_kind.iter().find(|ending| name.ends_with(*ending) && !streams) {
        return Err(Error::usage(format!(
            "{}: JSON Lines are written, and a file that ends in {ending} is read as something else; give it a name that ends in .jsonl",
            to.display()
        )));
    }
    let from = named(&ALONE.data(from, None)?.0)?;
    if let Some(path) = from.iter().find(|p| same_file(p, to)) {
        return Err(Error::usage(format!(
            "{}: read and written at once; choose another file to write",
            path.display()
        )));
    }
    let words = |id: &str| m.get_many::<String>(id).into_iter().flatten().map(String::as_str).collect::<Vec<_>>();
    let (mix, columns) = (words("mix"), words("columns"));
    let shares = (!mix.is_empty()).then(|| shares(&mix, &from)).transpose()?;
    let columns = match Kind::Texts.parse(&columns) {
        Ok(Setting::Texts(pairs)) => Columns::parse(&pairs)?,
        _ => Columns::default(),
    };
    let bad_rows = if m.get_flag("skip_bad_rows") { BadRows::Skip } else { BadRows::Fail };
    let mut spool = Spool::read(&from, to, &RowOptions { bad_rows, columns, ..RowOptions::default() })?;
    let number = |id: &str| m.get_one::<u64>(id).map(|&n| n as usize);
    let (skip, take) = (number("skip").unwrap_or(0), number("take"));
    let seed = *m.get_one::<u64>("seed").expect("it has a default");
    let wanted = take.map(|n| skip.saturating_add(n));
    let mut order = spool.order(&from, shares.as_deref(), wanted, m.get_flag("shuffle").then_some(seed), seed)?;
    ensure!(
        skip < order.len(),
        "--skip {skip}: expected fewer than the {} rows there are, so that one is left",
        order.len()
    );
    order.drain(..skip);
    order.truncate(take.unwrap_or(usize::MAX));
    let all = order.len();
    write_atomic(to, |out| spool.write(&order, out))?;
    let done = format!("{}: {} rows from {}", to.display(), grouped(all as u64), counts(&from, &spool, &order));
    // Rows may have gone where results are printed.
    if streams {
        say::note(&done)
    } else {
        say::result(&done)
    }
    Ok(())
}

fn same_file(a: &Path, b: &Path) -> bool {
    a.canonicalize().ok().zip(b.canonicalize().ok()).is_some_and(|(a, b)| a == b)
}

fn shares(words: &[&str], files: &[PathBuf]) -> Result<Vec<f64>> {
    let Ok(Setting::Floats(shares)) = Kind::Weights.parse(words) else {
        return Err(Error::usage(format!("--mix: expected numbers above 0, found {}", words.join(" "))));
    };
    if shares.len() != files.len() {
        let names: Vec<String> = files.iter().map(|p| p.display().to_string()).collect();
        return Err(Error::usage(format!(
            "--mix: expected a share for each of the {} files, found {}: {}",
            files.len(),
            shares.len(),
            names.join(", ")
        )));
    }
    Ok(shares)
}

/// How many rows each file gave.
fn counts(files: &[PathBuf], spool: &Spool, order: &[u32]) -> String {
    let mut of = vec![0u64; files.len()];
    order.iter().for_each(|&row| of[spool.file_of(row)] += 1);
    let parts = files.iter().zip(of).map(|(path, n)| format!("{} ({})", path.display(), grouped(n)));
    parts.collect::<Vec<_>>().join(", ")
}

/// The rows of all files as they will be written, in a file without a name: 16 bytes a row are held.
struct Spool {
    file: File,
    /// Where each row begins, and where the last ends.
    starts: Vec<u64>,
    /// The number of the first row of each file, and how many there are.
    firsts: Vec<u32>,
}

impl Spool {
    fn read(from: &[PathBuf], to: &Path, options: &RowOptions) -> Result<Self> {
        let beside = if takes_a_stream(to) { std::env::temp_dir().join("rows") } else { to.to_path_buf() };
        let mut out = BufWriter::with_capacity(1 << 20, nameless_beside(&beside)?);
        let (mut starts, mut firsts) = (vec![0u64], vec![0u32]);
        for path in from {
            let source = Source::open(path)?;
            let mut reader = RowReader::new(&path.display().to_string(), &source, options)?;
            while let Some((rows, _)) = reader.next_rows()? {
                for row in rows {
                    let line = to_json(&row).to_string();
                    writeln!(out, "{line}").at(to)?;
                    starts.push(starts[starts.len() - 1] + line.len() as u64 + 1);
                }
            }
            let found = reader.finish()?;
            if !found.bad.is_empty() {
                let first = &found.bad[0];
                let (n, path) = (found.bad.len(), path.display());
                say::warning(&format!(
                    "{path}: {n} bad rows left out; the first, {path}:{}: {}",
                    first.line, first.what
                ));
            }
            if !found.ignored.is_empty() {
                let keys: Vec<_> = found.ignored.iter().map(|(key, n, _)| format!("\"{key}\" ({n} rows)")).collect();
                say::note(&format!("{}: not read and not written: {}", path.display(), keys.join(", ")));
            }
            let rows = u32::try_from(starts.len() - 1).ok();
            firsts.push(rows.ok_or_else(|| Error::new("expected fewer than 2^32 rows, found more"))?);
        }
        let file = out.into_inner().map_err(std::io::IntoInnerError::into_error).at(to)?;
        Ok(Self { file, starts, firsts })
    }

    /// Which file a row is of.
    fn file_of(&self, row: u32) -> usize {
        self.firsts.partition_point(|&first| first <= row) - 1
    }

    /// The rows to write, in their order: with shares as many of each file as these allow, or as make `wanted` rows.
    fn order(
        &self,
        files: &[PathBuf],
        shares: Option<&[f64]>,
        wanted: Option<usize>,
        shuffle: Option<u64>,
        seed: u64,
    ) -> Result<Vec<u32>> {
        let of_file = |i: usize| self.firsts[i]..self.firsts[i + 1];
        let mut order: Vec<u32> = match shares {
            None => (0..self.firsts[files.len()]).collect(),
            Some(shares) => {
                let lens: Vec<usize> = (0..files.len()).map(|i| of_file(i).len()).collect();
                let counts = counts_of(shares, &lens, wanted).map_err(|(i, needed)| {
                    let (path, found) = (files[i].display(), lens[i]);
                    Error::new(format!(
                        "{path}: its share is {needed} rows, found {found}; lower its share, or take fewer rows"
                    ))
                })?;
                (0..files.len()).flat_map(|i| chosen(of_file(i), counts[i], &[STREAM, 1, seed, i as u64])).collect()
            }
        };
        if let Some(seed) = shuffle.or(shares.map(|_| seed)) {
            order =
                Stream::new(&[STREAM, 0, seed]).permutation(order.len()).iter().map(|&i| order[i as usize]).collect();
        }
        Ok(order)
    }

    fn write(&mut self, order: &[u32], out: &mut dyn Write) -> Result<()> {
        let mut line = Vec::new();
        let (mut at, mut buffered) = (None, std::io::BufReader::with_capacity(1 << 20, &mut self.file));
        for &row in order {
            let (start, end) = (self.starts[row as usize], self.starts[row as usize + 1]);
            if at != Some(start) {
                buffered.seek(SeekFrom::Start(start))?;
            }
            line.resize((end - start) as usize, 0);
            buffered.read_exact(&mut line)?;
            out.write_all(&line)?;
            at = Some(end);
        }
        Ok(())
    }
}

/// The first rows of a permutation, in the order of the file.
fn chosen(rows: std::ops::Range<u32>, n: usize, name: &[u64]) -> Vec<u32> {
    let permutation = Stream::new(name).permutation(rows.len());
    let mut chosen: Vec<u32> = permutation.iter().take(n).map(|i| rows.start + i).collect();
    chosen.sort_unstable();
    chosen
}

/// Rows of each file by shares: `wanted` in all, or as many as there are for these shares. `Err`: which file has too few, and how many
/// were needed.
fn counts_of(shares: &[f64], lens: &[usize], wanted: Option<usize>) -> Result<Vec<usize>, (usize, usize)> {
    let sum: f64 = shares.iter().sum();
    let most = shares.iter().zip(lens).map(|(s, &len)| len as f64 * sum / s).fold(f64::INFINITY, f64::min);
    let total = wanted.unwrap_or(((most + 1e-9) as usize).min(lens.iter().sum()));
    let quotas: Vec<f64> = shares.iter().map(|s| s / sum * total as f64).collect();
    let mut counts: Vec<usize> = largest_remainder(&quotas, total as u64).into_iter().map(|n| n as usize).collect();
    if wanted.is_none() {
        counts.iter_mut().zip(lens).for_each(|(n, &len)| *n = (*n).min(len));
    }
    match (0..lens.len()).find(|&i| counts[i] > lens[i]) {
        Some(i) => Err((i, counts[i])),
        None => Ok(counts),
    }
}

/// A row in the form that says all of it with the fewest words.
fn to_json(row: &Row) -> Value {
    let (system, rest) = match row.messages.split_first() {
        Some((first, rest)) if first.role == Role::System => (Some(first), rest),
        _ => (None, row.messages.as_slice()),
    };
    if let [
        Message { role: Role::User, content: prompt, .. },
        Message { role: Role::Assistant, content: response, train: true, .. },
    ] = rest
    {
        let mut pair = json!({"prompt": prompt, "response": response});
        if let Some(system) = system {
            pair["system"] = json!(system.content);
        }
        return pair;
    }
    let turn = |m: &Message| {
        let mut turn = json!({"role": m.role.name(), "content": m.content});
        if m.role == Role::Assistant && !m.train {
            turn["train"] = json!(false);
        }
        turn
    };
    json!({"messages": row.messages.iter().map(turn).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_take_what_there_is_and_no_row_twice() {
        assert_eq!(counts_of(&[0.5, 0.5], &[10, 30], None), Ok(vec![10, 10]));
        assert_eq!(counts_of(&[4.0, 4.0, 2.0], &[100, 60, 25], None), Ok(vec![50, 50, 25]));
        assert_eq!(counts_of(&[1.0, 2.0], &[50, 50], Some(10)), Ok(vec![3, 7]));
        assert_eq!(counts_of(&[1.0, 1.0], &[3, 50], Some(10)), Err((0, 5)));
        assert_eq!(counts_of(&[1.0], &[7], None), Ok(vec![7]));
    }
}
