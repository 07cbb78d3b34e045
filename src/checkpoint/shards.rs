//! The optimiser's state in a checkpoint: one file, or one of each rank, and one reader for both.
//!
//! ```text
//! optimizer.safetensors                      m.NAME, v.NAME, master.NAME in the shape of the weight
//! optimizer-00002-of-00004.safetensors       m.NAME@FIRST: flat, the elements from FIRST on that rank 1 of 4 held
//! ```
//! A reader takes of each tensor the elements that it wants from whichever file has them: state that any number of ranks wrote is read
//! by any other.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::state::{OPTIMIZER, write_state_tensors_with};
use crate::comm::bucket::sources;
use crate::error::{Context, Error, Result};
use crate::files::At;
use crate::hf::HostTensor;
use crate::hf::safetensors::TensorFile;
use crate::optim::StatePart;
use crate::{bail, ensure};

const PREFIX: &str = "optimizer-";
const SUFFIX: &str = ".safetensors";

/// The name of a rank's file.
pub fn file_of(rank: usize, size: usize) -> String {
    format!("{PREFIX}{:05}-of-{size:05}{SUFFIX}", rank + 1)
}

/// The rank and the number of ranks in the name of a rank's file.
pub fn rank_of(name: &str) -> Option<(usize, usize)> {
    let (number, size) = name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.split_once("-of-")?;
    let (number, size): (usize, usize) = (number.parse().ok()?, size.parse().ok()?);
    (number > 0 && file_of(number - 1, size) == name).then_some((number - 1, size))
}

/// Writes what a rank holds, as [`crate::optim::Optimizer::export`] gives it, to its file in `dir`.
///
/// # Errors
/// If the file cannot be written.
pub fn write(dir: &Path, rank: usize, size: usize, tensors: &[(String, HostTensor)]) -> Result<()> {
    let more = [("world", size.to_string()), ("rank", rank.to_string())];
    write_state_tensors_with(&dir.join(file_of(rank, size)), tensors, &more)
}

/// A tensor's elements in a file.
struct Held {
    file: usize,
    /// Its name there.
    name: String,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// The state files of a checkpoint, opened.
pub struct StateFiles {
    files: Vec<TensorFile>,
    /// Who holds what of each tensor.
    held: BTreeMap<String, Vec<Held>>,
}

impl StateFiles {
    /// Opens `optimizer.safetensors`, or the files of all ranks.
    ///
    /// # Errors
    /// If a file is missing, damaged, or of another run than its name says.
    pub fn open(checkpoint: &Path) -> Result<Self> {
        let mut state = Self { files: Vec::new(), held: BTreeMap::new() };
        for path in files(checkpoint)? {
            let file = TensorFile::open(&path)?;
            state.add(file).context(|| path.display().to_string())?;
        }
        Ok(state)
    }

    fn add(&mut self, file: TensorFile) -> Result<()> {
        let shard = file.path().file_name().and_then(|n| rank_of(n.to_str()?));
        if let Some((rank, size)) = shard {
            for (key, expected) in [("world", size), ("rank", rank)] {
                let found = file.metadata().get(key).map_or("none", String::as_str);
                ensure!(found == expected.to_string(), "{key}: expected {expected} as in the name, found {found}");
            }
        }
        for name in file.names() {
            let (shape, _) = file.info(name).expect("a name of the file");
            let (whole, first) = match name.rsplit_once('@') {
                Some((whole, first)) => {
                    (whole, first.parse().map_err(|_| Error::new(format!("{name}: expected NAME@FIRST")))?)
                }
                None => (name, 0usize),
            };
            let end = first.checked_add(shape.iter().product());
            let end = end.ok_or_else(|| Error::new(format!("{name}: elements beyond any tensor's")))?;
            let (file, name, shape) = (self.files.len(), name.to_string(), shape.to_vec());
            self.held.entry(whole.into()).or_default().push(Held { file, name, shape, range: first..end });
        }
        self.files.push(file);
        Ok(())
    }

    /// The elements of every part that is not empty, under its name in a file. `parts` are all tensors of the run.
    ///
    /// # Errors
    /// If a tensor is missing, has other elements than expected or some of them twice, or the files have one that is none of `parts`.
    pub fn read(&self, parts: &[StatePart]) -> Result<Vec<(String, HostTensor)>> {
        let known: BTreeSet<&str> = parts.iter().map(|part| part.name.as_str()).collect();
        if let Some(other) = self.held.keys().find(|name| !known.contains(name.as_str())) {
            bail!(
                "optimiser state: {other} is not trained in this run; the checkpoint is of a run with other settings"
            );
        }
        let wanted = parts.iter().filter(|part| !part.range.is_empty());
        wanted.map(|part| Ok((part.file_name(), self.part(part)?))).collect()
    }

    fn part(&self, part: &StatePart) -> Result<HostTensor> {
        let StatePart { name, shape, range } = part;
        let at = || format!("optimiser state: {name}");
        let Some(held) = self.held.get(name) else {
            bail!("{}: missing; the checkpoint is of a run with other settings", at());
        };
        let elements = shape.0 * shape.1;
        for Held { name: found, shape: of, range, .. } in held {
            let whole = !found.contains('@');
            let fits = if whole { *of == [shape.0, shape.1] } else { range.end <= elements };
            ensure!(fits, "{}: expected shape {shape:?}, found {of:?} as {found}", at());
        }
        let ranges: Vec<Range<usize>> = held.iter().map(|h| h.range.clone()).collect();
        let mut data = Vec::with_capacity(range.len());
        for source in sources(range, &ranges).context(at)? {
            let Held { file, name, .. } = &held[source.holder];
            data.extend(self.files[*file].load_range(name, source.range)?);
        }
        let (rows, cols) = if range.len() == elements { *shape } else { (1, data.len()) };
        Ok(HostTensor { rows, cols, data })
    }
}

/// The files with the state, in the order of ranks.
fn files(checkpoint: &Path) -> Result<Vec<PathBuf>> {
    let mut sizes = BTreeSet::new();
    for entry in std::fs::read_dir(checkpoint).at(checkpoint)? {
        let name = entry.at(checkpoint)?.file_name();
        sizes.extend(name.to_str().and_then(rank_of).map(|(_, size)| size));
    }
    let one = checkpoint.join(OPTIMIZER);
    let Some(&size) = sizes.first() else { return Ok(vec![one]) };
    ensure!(
        sizes.len() == 1 && !one.exists(),
        "{}: optimiser state of several runs: files of {sizes:?} ranks{}",
        checkpoint.display(),
        if one.exists() { " and of one" } else { "" }
    );
    (0..size)
        .map(|rank| {
            let path = checkpoint.join(file_of(rank, size));
            ensure!(path.is_file(), "{}: missing; the state of rank {rank} of {size} is in it", path.display());
            Ok(path)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::state::write_state_tensors;
    use crate::comm::bucket::tensor_cuts;

    const SHAPES: [(usize, usize); 3] = [(3, 16_384), (1, 5), (40_001, 1)];

    fn parts(size: usize, rank: usize) -> Vec<StatePart> {
        let lengths: Vec<usize> = SHAPES.iter().map(|(r, c)| r * c).collect();
        let cuts = tensor_cuts(&lengths, size);
        let part = |(i, shape): (usize, &(usize, usize))| StatePart {
            name: format!("m.{i}"),
            shape: *shape,
            range: cuts[i][rank]..cuts[i][rank + 1],
        };
        SHAPES.iter().enumerate().map(part).collect()
    }

    fn value(name: &str, i: usize) -> f32 {
        (i * 7 + name.len() + usize::from(name.as_bytes()[2])) as f32
    }

    fn tensors(parts: &[StatePart]) -> Vec<(String, HostTensor)> {
        let of = |p: &StatePart| {
            let data: Vec<f32> = p.range.clone().map(|i| value(&p.name, i)).collect();
            let (rows, cols) = if data.len() == p.shape.0 * p.shape.1 { p.shape } else { (1, data.len()) };
            (p.file_name(), HostTensor { rows, cols, data })
        };
        parts.iter().filter(|p| !p.range.is_empty()).map(of).collect()
    }

    fn written(size: usize) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        match size {
            1 => write_state_tensors(&dir.path().join(OPTIMIZER), &tensors(&parts(1, 0))).unwrap(),
            _ => (0..size).for_each(|r| write(dir.path(), r, size, &tensors(&parts(size, r))).unwrap()),
        }
        dir
    }

    #[test]
    fn state_of_any_number_of_ranks_is_read_by_any_other() {
        for w in 1..=9 {
            let dir = written(w);
            for (v, rank) in (1..=9).flat_map(|v| (0..v).map(move |rank| (v, rank))) {
                let parts = parts(v, rank);
                let found = StateFiles::open(dir.path()).unwrap().read(&parts).unwrap();
                assert_eq!(found, tensors(&parts), "{w} to rank {rank} of {v}");
            }
        }
    }

    #[test]
    fn the_same_state_is_the_same_file() {
        let bytes = || std::fs::read(written(3).path().join(file_of(2, 3))).unwrap();
        let first = bytes();
        assert!((0..12).all(|_| bytes() == first));
    }

    #[test]
    fn what_is_missing_twice_or_of_another_run_is_named() {
        let error = |change: &dyn Fn(&Path)| {
            let dir = written(3);
            change(dir.path());
            let parts = parts(1, 0);
            StateFiles::open(dir.path()).and_then(|files| files.read(&parts)).map(drop).unwrap_err().to_string()
        };
        let e = error(&|dir| std::fs::remove_file(dir.join(file_of(1, 3))).unwrap());
        assert!(e.contains("optimizer-00002-of-00003.safetensors: missing; the state of rank 1 of 3"), "{e}");
        let copy = |dir: &Path, to: &str| {
            std::fs::copy(dir.join(file_of(0, 3)), dir.join(to)).unwrap();
        };
        let e = error(&|dir| copy(dir, &file_of(1, 3)));
        assert!(e.contains("rank: expected 1 as in the name, found 0"), "{e}");
        let e = error(&|dir| copy(dir, OPTIMIZER));
        assert!(e.contains("optimiser state of several runs"), "{e}");
        let e = error(&|dir| write(dir, 1, 3, &tensors(&parts(3, 1)[..2])).unwrap());
        assert!(e.contains("optimiser state: m.2: elements ") && e.contains("are held by nobody"), "{e}");
        let e = error(&|dir| write(dir, 1, 3, &tensors(&parts(3, 0))).unwrap());
        assert!(e.contains("optimiser state: m.0: elements 0..") && e.contains("are held twice"), "{e}");
        let other = [("m.other@0".to_string(), HostTensor::zeros(1, 3))];
        let e = error(&|dir| write(dir, 1, 3, &other).unwrap());
        assert!(e.contains("optimiser state: m.other is not trained in this run"), "{e}");
        let e = error(&|dir| {
            let mut all = tensors(&parts(3, 2));
            all.push(("m.1@4".into(), HostTensor::zeros(1, 3)));
            write(dir, 2, 3, &all).unwrap();
        });
        assert!(e.contains("m.1: expected shape (1, 5), found [3] as m.1@4"), "{e}");
    }
}
