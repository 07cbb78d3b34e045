//! A recorded case: `golden.json`, `golden.safetensors` and the tensors beside them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use ringtune::batch::{IGNORE, MicroBatch};
use ringtune::error::{Context, Error, Result};
use ringtune::{bail, ensure};

/// The file of the tensors of the whole model.
const MAIN: &str = "golden.safetensors";

/// A recorded tensor of any shape; integers are widened to f64 as well, which holds every token id exactly.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub data: Vec<f64>,
}

impl Array {
    /// Values as integers.
    pub fn ints(&self) -> Vec<i64> {
        self.data.iter().map(|&x| x as i64).collect()
    }
}

/// The tensors of a safetensors file by name, and which of them something asked for.
#[derive(Debug, Default)]
pub struct Arrays {
    tensors: BTreeMap<String, Array>,
    read: RefCell<BTreeSet<String>>,
}

impl Arrays {
    /// A tensor, if it was recorded.
    pub fn get(&self, name: &str) -> Option<&Array> {
        let found = self.tensors.get(name)?;
        self.read.borrow_mut().insert(name.to_string());
        Some(found)
    }

    /// The tensors that nothing asked for.
    pub fn unread(&self) -> Vec<&str> {
        let read = self.read.borrow();
        self.tensors.keys().map(String::as_str).filter(|&name| !read.contains(name)).collect()
    }
}

/// A recorded case.
pub struct Case {
    /// Its folder.
    pub dir: PathBuf,
    /// `golden.json`.
    pub json: Value,
    /// `golden.safetensors`.
    pub tensors: Arrays,
    /// The other tensor files of the folder, by file name.
    beside: BTreeMap<String, Arrays>,
}

/// Rows of tokens as they were recorded, and the micro-batch made of them.
pub struct Rows {
    /// Shape of the recorded ids: (rows, length).
    pub shape: (usize, usize),
    /// Recorded ids.
    pub ids: Vec<i64>,
    /// Recorded labels, -100 where there is no loss.
    pub labels: Vec<i64>,
    /// What the model runs: padding left out.
    pub batch: MicroBatch,
    /// Place in `ids` of each token of `batch`.
    pub place: Vec<usize>,
}

impl Case {
    /// Reads a case folder.
    ///
    /// # Errors
    /// If a file is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("golden.json");
        let text =
            std::fs::read_to_string(&path).context(|| format!("{}: expected a recorded case", path.display()))?;
        let json = serde_json::from_str(&text).map_err(|e| Error::new(format!("{}: {e}", path.display())))?;
        let tensors = read_arrays(&dir.join(MAIN))?;
        let mut beside = BTreeMap::new();
        for entry in std::fs::read_dir(dir).context(|| dir.display().to_string())? {
            let entry = entry.context(|| dir.display().to_string())?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != MAIN && name.ends_with(".safetensors") {
                beside.insert(name, read_arrays(&entry.path())?);
            }
        }
        Ok(Self { dir: dir.to_path_buf(), json, tensors, beside })
    }

    /// A tensor of `golden.safetensors`.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn tensor(&self, name: &str) -> Result<&Array> {
        let found = self.tensors.get(name);
        found.ok_or_else(|| Error::new(format!("{}: golden.safetensors has no {name}", self.dir.display())))
    }

    /// A tensor file beside `golden.safetensors`, if it is there.
    pub fn beside(&self, file: &str) -> Option<&Arrays> {
        self.beside.get(file)
    }

    /// Every recorded tensor that nothing asked for, as `FILE: TENSOR`.
    pub fn unread(&self) -> Vec<String> {
        let all = std::iter::once((MAIN, &self.tensors)).chain(self.beside.iter().map(|(f, a)| (f.as_str(), a)));
        all.flat_map(|(file, arrays)| arrays.unread().into_iter().map(move |name| format!("{file}: {name}"))).collect()
    }
}

/// Reads every tensor of a file.
fn read_arrays(path: &Path) -> Result<Arrays> {
    let bytes = std::fs::read(path).context(|| path.display().to_string())?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::new(format!("{}: {e}", path.display())))?;
    let mut all = Arrays::default();
    for (name, view) in file.iter() {
        let data = widen(view.dtype(), view.data()).map_err(|e| e.context(format!("{}: {name}", path.display())))?;
        all.tensors.insert(name.to_string(), Array { shape: view.shape().to_vec(), data });
    }
    Ok(all)
}

fn widen(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f64>> {
    macro_rules! each {
        ($t:ty, $n:literal) => {
            bytes.chunks_exact($n).map(|b| <$t>::from_le_bytes(b.try_into().expect("a whole element")))
        };
    }
    Ok(match dtype {
        Dtype::F64 => each!(f64, 8).collect(),
        Dtype::F32 => each!(f32, 4).map(f64::from).collect(),
        Dtype::BF16 => each!(half::bf16, 2).map(f64::from).collect(),
        Dtype::F16 => each!(half::f16, 2).map(f64::from).collect(),
        Dtype::I64 => each!(i64, 8).map(|x| x as f64).collect(),
        Dtype::I32 => each!(i32, 4).map(f64::from).collect(),
        Dtype::U8 | Dtype::BOOL => bytes.iter().map(|&b| f64::from(b)).collect(),
        other => bail!("element type {other:?} is not expected in a recorded case"),
    })
}

impl Rows {
    /// A padded batch: each row is one document, tokens with mask 0 are left out.
    ///
    /// # Errors
    /// If the vectors disagree.
    pub fn padded(shape: (usize, usize), ids: Vec<i64>, labels: Vec<i64>, mask: &[i64]) -> Result<Self> {
        let starts: Vec<usize> = (0..shape.0).map(|r| r * shape.1).collect();
        Self::new(shape, ids, labels, mask, &starts)
    }

    /// One row of several documents that begin at `starts`.
    ///
    /// # Errors
    /// If the vectors disagree.
    pub fn packed(ids: Vec<i64>, labels: Vec<i64>, starts: &[usize]) -> Result<Self> {
        let mask = vec![1; ids.len()];
        Self::new((1, ids.len()), ids, labels, &mask, starts)
    }

    fn new(shape: (usize, usize), ids: Vec<i64>, labels: Vec<i64>, mask: &[i64], starts: &[usize]) -> Result<Self> {
        let n = shape.0 * shape.1;
        ensure!(
            ids.len() == n && labels.len() == n && mask.len() == n,
            "ids, labels and mask: expected {n} values each, found {}, {} and {}",
            ids.len(),
            labels.len(),
            mask.len()
        );
        let mut batch = MicroBatch::default();
        let mut place = Vec::new();
        for (d, &start) in starts.iter().enumerate() {
            let end = starts.get(d + 1).copied().unwrap_or(n);
            ensure!(start <= end && end <= n, "documents: expected rising bounds up to {n}, found {start} and {end}");
            let first = place.len() as i32;
            let here: Vec<usize> = (start..end).filter(|&i| mask[i] != 0).collect();
            for (k, &i) in here.iter().enumerate() {
                let target = here.get(k + 1).map_or(i64::from(IGNORE), |&next| labels[next]);
                batch.n_valid += usize::from(target != i64::from(IGNORE));
                batch.tokens.push(ids[i] as i32);
                batch.targets.push(target as i32);
                batch.doc_start.push(first);
                place.push(i);
            }
        }
        ensure!(!place.is_empty(), "a batch without tokens");
        Ok(Self { shape, ids, labels, batch, place })
    }

    /// Values of width `width` per token of the batch, spread to the recorded shape; zero at padding.
    pub fn spread(&self, values: &[f32], width: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.0 * self.shape.1 * width];
        for (row, &at) in values.chunks(width).zip(&self.place) {
            out[at * width..(at + 1) * width].copy_from_slice(row);
        }
        out
    }
}

/// The micro-batches of each AdamW step.
///
/// # Errors
/// If the list has another form.
pub fn steps(json: &Value) -> Result<Vec<Vec<Rows>>> {
    let bad = || Error::new("adamw.batches: expected a list of steps, each a list of micro-batches");
    let matrix = |v: &Value| -> Option<(usize, usize, Vec<i64>)> {
        let rows = v.as_array()?;
        let width = rows.first()?.as_array()?.len();
        let flat: Option<Vec<i64>> =
            rows.iter().flat_map(|r| r.as_array().into_iter().flatten()).map(Value::as_i64).collect();
        Some((rows.len(), width, flat?))
    };
    let micro = |v: &Value| -> Result<Rows> {
        let (rows, width, ids) = matrix(&v["input_ids"]).ok_or_else(bad)?;
        let (_, _, labels) = matrix(&v["labels"]).ok_or_else(bad)?;
        let mask = matrix(&v["attention_mask"]).map_or_else(|| vec![1; ids.len()], |m| m.2);
        Rows::padded((rows, width), ids, labels, &mask)
    };
    let step = |v: &Value| v.as_array().ok_or_else(bad)?.iter().map(micro).collect::<Result<Vec<_>>>();
    json.as_array().ok_or_else(bad)?.iter().map(step).collect()
}
