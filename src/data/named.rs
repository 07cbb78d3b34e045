//! What a data set's name stands for: a file, all files of a folder, or those that a pattern fits.

use std::fs;
use std::path::{Path, PathBuf};

use super::listed;
use crate::error::{Context, Error, Result};
use crate::files::unpacked;

/// Endings of files of rows, text and tokens; `.gz` may follow them.
const ENDINGS: [&str; 9] = ["jsonl", "ndjson", "json", "parquet", "csv", "tsv", "txt", "bin", "tok"];

/// What splits are called that are no training data.
const HELD_OUT: [&str; 6] = ["test", "validation", "valid", "val", "dev", "eval"];

/// The files of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// In order of their names.
    pub files: Vec<PathBuf>,
    /// Those of a folder that are called validation or test data beside others that are not.
    pub left_out: Vec<PathBuf>,
}

/// What `path` stands for. A name of something that is there is that, whatever signs it has.
///
/// # Errors
/// A usage error for a pattern that is none or fits nothing, and a folder without data; if a folder cannot be read.
pub fn files_of(path: &Path) -> Result<Named> {
    let whole = |files| Ok(Named { files, left_out: Vec::new() });
    if path.is_dir() {
        return of_folder(path);
    }
    let text = path.to_string_lossy();
    if path.file_name().is_some_and(|name| name == listed::LIST) {
        return Err(Error::usage(match listed::typed_for_all(path) {
            Some(sets) => format!("{text}: a list of data sets, which is not read; name the files themselves{sets}"),
            None => format!(
                "{text}: a description of data, which is not read; name the files themselves, and hf:org/name for those of the hub"
            ),
        }));
    }
    if !path.exists()
        && let Some((list, answer)) = listed::typed_for(&text)
    {
        return Err(Error::usage(format!("{text}: no file, but a data set of {}; {answer}", list.display())));
    }
    if path.exists() || !text.contains(['*', '?', '[']) {
        return whole(vec![path.to_path_buf()]);
    }
    let found = glob::glob(&text).map_err(|e| Error::usage(format!("{text}: no pattern of file names: {e}")))?;
    let files: Vec<PathBuf> = found.filter_map(|entry| entry.ok().filter(|p| p.is_file())).collect();
    if files.is_empty() {
        return Err(Error::usage(format!("{text}: no file fits this pattern, expected at least one")));
    }
    whole(files)
}

fn of_folder(dir: &Path) -> Result<Named> {
    let entries = fs::read_dir(dir).context(|| dir.display().to_string())?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).filter(|p| is_data(p)).collect();
    files.sort();
    if files.is_empty() {
        let kinds = ENDINGS.map(|e| format!(".{e}")).join(", ");
        let below = dir.join("data").is_dir().then(|| format!("; did you mean {}?", dir.join("data").display()));
        return Err(Error::usage(format!(
            "{}: a folder without data sets, expected files that end in {kinds} (or these with .gz){}",
            dir.display(),
            below.unwrap_or_default()
        )));
    }
    let (left_out, training): (Vec<_>, Vec<_>) = files.iter().cloned().partition(|p| is_held_out(p));
    if training.is_empty() {
        Ok(Named { files, left_out: Vec::new() })
    } else {
        Ok(Named { files: training, left_out })
    }
}

fn plain_name(path: &Path) -> String {
    unpacked(path).file_name().unwrap_or_default().to_string_lossy().to_lowercase()
}

fn is_data(path: &Path) -> bool {
    let name = plain_name(path);
    // What the hub and trainers put beside data.
    let described = [listed::LIST, "dataset_infos.json", "state.json", "dataset_dict.json"].contains(&name.as_str());
    let ending = name.rsplit_once('.').map(|(_, ending)| ending);
    !name.starts_with('.') && !described && ending.is_some_and(|e| ENDINGS.contains(&e)) && path.is_file()
}

/// Whether a word of the name says so: `test.jsonl`, `rows_val.csv`, `validation-00000-of-00001.parquet`.
fn is_held_out(path: &Path) -> bool {
    plain_name(path).split(|c: char| !c.is_alphanumeric()).any(|word| HELD_OUT.contains(&word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_and_patterns() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let make = |name: &str| fs::write(at(name), "x").unwrap();
        let names = |files: &[PathBuf]| -> Vec<String> {
            files.iter().map(|p| p.file_name().unwrap().to_string_lossy().into_owned()).collect()
        };
        let error = |path: &Path| files_of(path).unwrap_err().to_string();
        assert!(
            error(dir.path()).contains("a folder without data sets, expected files that end in .jsonl"),
            "{}",
            error(dir.path())
        );
        ["train-1.parquet", "train-0.parquet", "test-0.parquet", "README.md", "dataset_info.json", ".hidden.jsonl"]
            .into_iter()
            .for_each(make);
        let found = files_of(dir.path()).unwrap();
        assert_eq!(names(&found.files), ["train-0.parquet", "train-1.parquet"]);
        assert_eq!(names(&found.left_out), ["test-0.parquet"]);
        // A folder of validation data alone is meant.
        fs::create_dir(at("held")).unwrap();
        ["held/valid.csv", "held/test.csv.gz"].into_iter().for_each(make);
        assert_eq!(names(&files_of(&at("held")).unwrap().files), ["test.csv.gz", "valid.csv"]);
        assert_eq!(names(&files_of(&at("train-*.parquet")).unwrap().files), ["train-0.parquet", "train-1.parquet"]);
        assert!(error(&at("*.csv")).contains("no file fits this pattern"));
        assert!(error(&at("[.csv")).contains("no pattern of file names"));
        // A file that is called so is itself; one that is not there is named by who opens it.
        make("a[1].jsonl");
        assert_eq!(names(&files_of(&at("a[1].jsonl")).unwrap().files), ["a[1].jsonl"]);
        assert_eq!(names(&files_of(&at("none.jsonl")).unwrap().files), ["none.jsonl"]);
    }
}
