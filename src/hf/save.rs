//! Writing models: safetensors shards with an index, one tensor in memory at a time, each file under its name only once it is
//! whole and on disk.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::{Map, Value, json};

use super::{HostTensor, SaveDType, TensorSource, config as hf_config};
use crate::error::{Context, Error, Result};
use crate::files::{create_dir_all, write_atomic, write_json};
use crate::model::config::ModelConfig;
use crate::model::weights::{Place, Weights};
use crate::{bail, ensure};

/// How a model is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SaveOptions {
    /// Element type of the files.
    pub dtype: SaveDType,
    /// Largest size of a shard in bytes (`--max-shard-size`); a tensor that is larger gets a shard of its own.
    pub max_shard_bytes: u64,
}

impl Default for SaveOptions {
    /// bf16 in shards of 5 GB, transformers' default.
    fn default() -> Self {
        Self { dtype: SaveDType::Bf16, max_shard_bytes: 5_000_000_000 }
    }
}

/// Reads a size such as `5GB`, `500MB`, `200KB` or a plain number of bytes (powers of 1000; `GiB` and so on of 1024).
///
/// # Errors
/// If it is no such size, or 0.
pub fn parse_size(text: &str) -> Result<u64> {
    let t = text.trim();
    let digits = t.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(t.len());
    let unit = match t[digits..].trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1u64,
        "KB" | "K" => 1000,
        "MB" | "M" => 1_000_000,
        "GB" | "G" => 1_000_000_000,
        "KIB" => 1 << 10,
        "MIB" => 1 << 20,
        "GIB" => 1 << 30,
        _ => 0,
    };
    let bytes = t[..digits].parse::<f64>().map_or(0.0, |n| n * unit as f64);
    if !(1.0..1e18).contains(&bytes) {
        return Err(Error::usage(format!("expected a size such as 5GB or 500MB, found {text:?}")));
    }
    Ok(bytes as u64)
}

/// Writes config.json and the weights of `source` into `dir`, which is created. Files of an earlier model in `dir` are replaced
/// one by one; shards that no longer belong to it are removed at the end.
///
/// # Errors
/// If a weight cannot be read, is not finite in the file's element type, or a file cannot be written.
pub fn save_model(dir: &Path, source: &dyn TensorSource, options: SaveOptions) -> Result<()> {
    create_dir_all(dir)?;
    let config = source.config();
    let weights: Vec<Place> = Weights::of(config).places().into_iter().map(|(at, _)| at).collect();
    let shards = split_shards(config, &weights, options);
    let single = shards.len() == 1;
    let file_name = |i: usize| match single {
        true => "model.safetensors".to_string(),
        false => format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len()),
    };
    let mut weight_map = Map::new();
    let mut written = Vec::new();
    for (i, shard) in shards.iter().enumerate() {
        let entry = |at: &Place| Entry { name: at.to_string(), shape: at.file_shape(config, 0), dtype: options.dtype };
        let entries: Vec<Entry> = shard.iter().map(entry).collect();
        write_tensors(&dir.join(file_name(i)), &entries, |k, _| source.load(shard[k]))?;
        entries.into_iter().for_each(|e| drop(weight_map.insert(e.name, json!(file_name(i)))));
        written.push(file_name(i));
    }
    if !single {
        let total: usize = weights.iter().map(|at| at.len(config, 0) * options.dtype.bytes()).sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": Value::Object(weight_map)});
        write_json(&dir.join("model.safetensors.index.json"), &index)?;
        written.push("model.safetensors.index.json".to_string());
    }
    write_json(&dir.join("config.json"), &hf_config::to_json(config, options.dtype))?;
    remove_others(dir, &written)
}

/// Removes weight files of an earlier save, which a reader would mistake for this model's.
fn remove_others(dir: &Path, written: &[String]) -> Result<()> {
    for entry in std::fs::read_dir(dir).context(|| dir.display().to_string())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let shard = name.starts_with("model-") && name.ends_with(".safetensors");
        let weights = shard || name == "model.safetensors" || name == "model.safetensors.index.json";
        if weights && !written.contains(&name) {
            std::fs::remove_file(dir.join(&name)).context(|| dir.join(&name).display().to_string())?;
        }
    }
    Ok(())
}

/// Greedy split in the order of the weights, so that a shard stays below the limit.
fn split_shards(config: &ModelConfig, weights: &[Place], options: SaveOptions) -> Vec<Vec<Place>> {
    let mut shards: Vec<Vec<Place>> = Vec::new();
    let mut size = 0u64;
    for &at in weights {
        let bytes = (at.len(config, 0) * options.dtype.bytes()) as u64;
        if shards.is_empty() || size + bytes > options.max_shard_bytes {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes;
        shards.last_mut().expect("one was pushed").push(at);
    }
    shards
}

/// One tensor of a file to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name in the file.
    pub name: String,
    /// Shape in the file.
    pub shape: Vec<usize>,
    /// Element type in the file.
    pub dtype: SaveDType,
}

/// Writes a safetensors file atomically; `load` is asked for one tensor after the other, in the order of `entries`, by
/// number and name.
///
/// # Errors
/// If `load` fails, a tensor has another size than its entry says or a value that is not finite in its element type, or the
/// file cannot be written.
pub fn write_tensors<T: std::borrow::Borrow<HostTensor>>(
    path: &Path,
    entries: &[Entry],
    load: impl FnMut(usize, &str) -> Result<T>,
) -> Result<()> {
    write_tensors_with(path, entries, &[], load)
}

/// As [`write_tensors`], with entries of text in the header besides its format.
///
/// # Errors
/// As [`write_tensors`].
pub fn write_tensors_with<T: std::borrow::Borrow<HostTensor>>(
    path: &Path,
    entries: &[Entry],
    more: &[(&str, String)],
    mut load: impl FnMut(usize, &str) -> Result<T>,
) -> Result<()> {
    let header = header(entries, more)?;
    write_atomic(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for (i, entry) in entries.iter().enumerate() {
            let tensor = load(i, &entry.name)?;
            let tensor: &HostTensor = tensor.borrow();
            let expected: usize = entry.shape.iter().product();
            assert_eq!(tensor.data.len(), expected, "{}: elements for shape {:?}", entry.name, entry.shape);
            write_values(out, tensor, entry)?;
        }
        Ok(())
    })
}

/// The header with `{"format": "pt"}`, padded with blanks so that data begin at a multiple of 8.
fn header(entries: &[Entry], more: &[(&str, String)]) -> Result<Vec<u8>> {
    let mut offset = 0usize;
    let mut infos = Vec::with_capacity(entries.len());
    for e in entries {
        let bytes = e.shape.iter().product::<usize>() * e.dtype.bytes();
        let dtype = match e.dtype {
            SaveDType::F32 => Dtype::F32,
            SaveDType::Bf16 => Dtype::BF16,
            SaveDType::F16 => Dtype::F16,
        };
        infos.push((
            e.name.clone(),
            TensorInfo { dtype, shape: e.shape.clone(), data_offsets: (offset, offset + bytes) },
        ));
        offset += bytes;
    }
    // transformers (4) refuses files without this entry.
    let format = ("format".to_string(), "pt".to_string());
    let metadata: HashMap<String, String> =
        more.iter().map(|(k, v)| (k.to_string(), v.clone())).chain([format]).collect();
    let header = Metadata::new(Some(metadata), infos).map_err(|e| Error::new(format!("safetensors header: {e}")))?;
    let mut header = serde_json::to_value(&header).expect("a header always prints");
    // The entries of a hash table come in an order of their own each time, and the same state is the same file.
    header["__metadata__"].as_object_mut().expect("it has a format").sort_keys();
    let mut bytes = serde_json::to_vec(&header).expect("a header always prints");
    bytes.resize(bytes.len().next_multiple_of(8), b' ');
    Ok(bytes)
}

/// Rounds once, to nearest even, and refuses what is not finite afterwards.
fn write_values(out: &mut dyn Write, tensor: &HostTensor, entry: &Entry) -> Result<()> {
    ensure!(!tensor.data.is_empty(), "{}: the tensor has no element", entry.name);
    tensor.check_finite(&entry.name)?;
    let mut bytes = Vec::with_capacity((1 << 16) * entry.dtype.bytes());
    for chunk in tensor.data.chunks(1 << 16) {
        bytes.clear();
        let fits = match entry.dtype {
            SaveDType::F32 => {
                chunk.iter().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes()));
                true
            }
            SaveDType::Bf16 => {
                let rounded = chunk.iter().map(|&x| bf16::from_f32(x));
                rounded.clone().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes()));
                rounded.clone().all(bf16::is_finite)
            }
            SaveDType::F16 => {
                let rounded = chunk.iter().map(|&x| f16::from_f32(x));
                rounded.clone().for_each(|x| bytes.extend_from_slice(&x.to_le_bytes()));
                rounded.clone().all(f16::is_finite)
            }
        };
        if !fits {
            let largest = chunk.iter().fold(0.0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
            bail!("{}: value {largest} does not fit {}", entry.name, entry.dtype.torch_name());
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}
