//! Reading safetensors files: memory-mapped, every offset checked before it is used, weights checked against the model.
//!
//! The header is parsed and validated by the safetensors crate; the sums against the file's length are done here with
//! checked arithmetic, because a hostile header may overflow them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::Value;

use super::config::{self as hf_config, HfConfig};
use super::header;
use super::stored::Stored;
use super::{HostTensor, InFile, Pieces, SaveDType, TensorSource};
use crate::error::{Context, Error, Result};
use crate::files::{is_there, read_text, refuse_pointer};
use crate::mapped::{FilePart, Mapped};
use crate::model::config::ModelConfig;
use crate::model::weights::{Kind, Place, Weights};
use crate::text::plural;
use crate::{bail, ensure};

/// Before the name of every weight but the head.
const DECODER: &str = "model.";

/// One open safetensors file.
pub struct TensorFile {
    path: PathBuf,
    map: Arc<Mapped>,
    /// Where tensor data begins.
    data_start: usize,
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

impl TensorFile {
    /// Maps a file and checks its header: lengths, offsets without gap or overlap, sizes that fit the shapes.
    ///
    /// # Errors
    /// If the file cannot be opened, is cut short, or its header is not what the format asks for.
    pub fn open(path: &Path) -> Result<Self> {
        let map = Mapped::open(path)?;
        ensure!(map.len() >= 8, "{}: {} are too few for a safetensors file", path.display(), plural(map.len(), "byte"));
        refuse_pointer(path, &map[..map.len().min(64)])?;
        Self::parse(path, map).context(|| path.display().to_string())
    }

    fn parse(path: &Path, map: Mapped) -> Result<Self> {
        let (header, data_start) = header::bytes(&map)?;
        let header: Metadata = serde_json::from_slice(header).map_err(|e| {
            Error::new(format!("the header is not that of a safetensors file: {}", header::fault(header, &e)))
        })?;
        let (need, have) = (header.data_len(), map.len() - data_start);
        let missing = need.saturating_sub(have);
        ensure!(
            missing == 0,
            "the file is cut short: the header describes {need} bytes of data, {missing} of them are missing"
        );
        ensure!(need == have, "{} beyond the data that the header describes", plural(have - need, "byte"));
        let metadata = header.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        let tensors = header.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { path: path.to_path_buf(), map: Arc::new(map), data_start, tensors, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The text entries of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape and element type of a tensor (`F32`, `BF16`, …).
    pub fn info(&self, name: &str) -> Option<(&[usize], String)> {
        self.tensors.get(name).map(|t| (t.shape.as_slice(), format!("{:?}", t.dtype)))
    }

    /// Decodes a tensor of one or two dimensions to f32; bf16 and f16 widen exactly. Values that are not finite are refused.
    ///
    /// # Errors
    /// If there is no such tensor, its element type is not F32, BF16 or F16, it has more than two dimensions, is empty, or
    /// holds a NaN or infinity; or another program cut the file meanwhile.
    pub fn load(&self, name: &str) -> Result<HostTensor> {
        let what = || format!("{}: {name}", self.path.display());
        let tensor = self.decode(name).context(what)?;
        self.map.check()?;
        // What is copied is not held twice.
        self.map.release(self.range(&self.tensors[name]));
        tensor.check_finite(&what())?;
        Ok(tensor)
    }

    /// Decodes some of a tensor's elements, as [`TensorFile::load`] does all of them.
    ///
    /// # Errors
    /// As [`TensorFile::load`]; or if the tensor has fewer elements.
    pub fn load_range(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>> {
        let what = || format!("{}: {name}", self.path.display());
        let values = self.decode_range(name, range).context(what)?;
        self.map.check()?;
        let tensor = HostTensor { rows: 1, cols: values.len(), data: values };
        tensor.check_finite(&what())?;
        Ok(tensor.data)
    }

    fn decode(&self, name: &str) -> Result<HostTensor> {
        let Some(info) = self.tensors.get(name) else { bail!("no such tensor") };
        let (rows, cols) = match *info.shape.as_slice() {
            [n] => (1, n),
            [r, c] => (r, c),
            _ => bail!("expected one or two dimensions, found shape {:?}", info.shape),
        };
        ensure!(rows > 0 && cols > 0, "shape {:?} has no element", info.shape);
        let data = self.decode_range(name, 0..rows * cols)?;
        Ok(HostTensor { rows, cols, data })
    }

    fn decode_range(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>> {
        const CHUNK: usize = 1 << 16;
        let stored = self.stored(name)?;
        let elements = stored.elements();
        ensure!(range.end <= elements, "{elements} elements, expected {} or more", range.end);
        let mut data = vec![0.0f32; range.len()];
        let parts = data.par_chunks_mut(CHUNK).enumerate();
        parts.for_each(|(i, out)| stored.widen(range.start + i * CHUNK, out));
        Ok(data)
    }

    /// Where a tensor's bytes are.
    fn range(&self, info: &TensorInfo) -> Range<usize> {
        self.data_start + info.data_offsets.0..self.data_start + info.data_offsets.1
    }

    /// A tensor as it stands in the file.
    fn stored(&self, name: &str) -> Result<Stored<'_>> {
        let Some(info) = self.tensors.get(name) else { bail!("no such tensor") };
        let bytes = &self.map[self.range(info)];
        let Some(dtype) = self.dtype(name) else {
            bail!("element type {:?} is not supported; expected F32, BF16 or F16", info.dtype)
        };
        Ok(Stored { bytes, dtype })
    }

    fn dtype(&self, name: &str) -> Option<SaveDType> {
        match self.tensors.get(name)?.dtype {
            Dtype::F32 => Some(SaveDType::F32),
            Dtype::BF16 => Some(SaveDType::Bf16),
            Dtype::F16 => Some(SaveDType::F16),
            _ => None,
        }
    }
}

/// A weight that is read from its file piece by piece.
struct FilePieces<'a> {
    file: &'a TensorFile,
    name: &'a str,
    info: &'a TensorInfo,
    shape: (usize, usize),
    stored: Stored<'a>,
    /// Whether a value was not finite.
    refused: AtomicBool,
}

impl Pieces for FilePieces<'_> {
    fn shape(&self) -> (usize, usize) {
        self.shape
    }

    fn fill(&self, first: usize, out: &mut [f32]) {
        self.stored.widen(first, out);
        // Without a way out of the loop, so that it becomes vectors.
        let ones = |x: &f32| x.to_bits() & 0x7f80_0000 == 0x7f80_0000;
        if out.iter().fold(false, |any, x| any | ones(x)) {
            self.refused.store(true, Ordering::Relaxed);
        }
    }

    fn finish(&self) -> Result<()> {
        self.file.map.check()?;
        self.file.map.release(self.file.range(self.info));
        if self.refused.load(Ordering::Relaxed) {
            self.file.load(self.name)?;
            bail!("{}: {}: values changed while they were read", self.file.path.display(), self.name);
        }
        Ok(())
    }
}

/// The weights of a Hugging Face model folder, opened and checked but not yet decoded.
pub struct ModelFiles {
    dir: PathBuf,
    config: HfConfig,
    files: Vec<TensorFile>,
    /// Which file holds a weight, and its name there.
    place: BTreeMap<String, (usize, String)>,
}

impl ModelFiles {
    /// Opens `dir/config.json` and `dir/model.safetensors`, or the shards of `dir/model.safetensors.index.json`, and checks that
    /// exactly the weights of the model are there, with their shapes.
    ///
    /// # Errors
    /// If a file is missing or damaged, or a weight is missing, unexpected or of another shape than config.json says.
    pub fn open(dir: &Path) -> Result<Self> {
        ensure!(dir.is_dir(), "{}: expected a model folder, found {}", dir.display(), found_instead(dir));
        if !dir.join("config.json").is_file() && dir.join("adapter_config.json").is_file() {
            bail!("{}: this is an adapter, not a model; expected config.json", dir.display());
        }
        let gguf = gguf_alone(dir);
        ensure!(
            gguf.is_none(),
            "{}: found {}; GGUF is not read, take the original model",
            dir.display(),
            gguf.unwrap_or_default()
        );
        let config = hf_config::read(dir)?;
        let (files, index) = open_shards(dir)?;
        // A decoder saved without its head (LlamaModel) leaves out the first part of the names.
        let has = |name: &str| files.iter().any(|f| f.info(name).is_some());
        let embed = Place::Embed.to_string();
        let bare = !has(&embed) && embed.strip_prefix(DECODER).is_some_and(has);
        let mut place: BTreeMap<String, (usize, String)> = BTreeMap::new();
        for (i, file) in files.iter().enumerate() {
            for name in file.names() {
                let whole =
                    if bare && !name.starts_with("lm_head.") { format!("{DECODER}{name}") } else { name.to_string() };
                if let Some((first, _)) = place.insert(whole, (i, name.to_string())) {
                    let (a, b) = (files[first].path.display(), file.path.display());
                    bail!("{name} is in two shards: {a} and {b}");
                }
            }
        }
        if let Some(index) = index {
            check_index(dir, &index, &files)?;
        }
        let mut model = Self { dir: dir.to_path_buf(), config, files, place };
        model.untie_another_head();
        model.check_weights()?;
        Ok(model)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What config.json says, with its warnings.
    pub fn hf_config(&self) -> &HfConfig {
        &self.config
    }

    /// Element type of the embedding in the file.
    pub fn dtype(&self) -> SaveDType {
        let name = Place::Embed.to_string();
        let (file, name) = &self.place[&name];
        self.files[*file].dtype(name).expect("the element types were checked")
    }

    /// Number of files the weights are in.
    pub fn n_files(&self) -> usize {
        self.files.len()
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|f| f.map.len() as u64).sum()
    }

    /// A head that is not the embedding stays, whatever config.json says of ties, as in transformers 5.
    fn untie_another_head(&mut self) {
        let bytes = |at: Place| {
            let (file, name) = self.place.get(&at.to_string())?;
            let (file, info) = (&self.files[*file], self.files[*file].tensors.get(name)?);
            Some((info.dtype, &info.shape, &file.map[file.data_start..][info.data_offsets.0..info.data_offsets.1]))
        };
        if self.config.model.tied && bytes(Place::Head).is_some_and(|head| bytes(Place::Embed) != Some(head)) {
            self.config.model.tied = false;
            self.config.warnings.push(format!(
                "{}: config.json says tie_word_embeddings, but {} differs from the embedding; the head of the file is kept",
                self.dir.display(),
                Place::Head
            ));
        }
    }

    fn check_weights(&self) -> Result<()> {
        let places = Weights::of(&self.config.model);
        let expected: Vec<(Place, String)> = places.places().into_iter().map(|(at, _)| (at, at.to_string())).collect();
        let dir = self.dir.display();
        let missing: Vec<&(Place, String)> = expected.iter().filter(|(_, n)| !self.place.contains_key(n)).collect();
        if let Some((at, first)) = missing.first() {
            let hint = match at {
                Place::Head => "; set tie_word_embeddings to true in config.json if the head is the embedding",
                _ => "",
            };
            bail!("{dir}: missing weight {first}{}{hint}", and_more(missing.len()));
        }
        let known: std::collections::BTreeSet<&str> = expected.iter().map(|(_, n)| n.as_str()).collect();
        let tied = self.config.model.tied;
        let unexpected: Vec<&String> =
            self.place.keys().filter(|n| !known.contains(n.as_str()) && !ignorable(n, tied)).collect();
        if let Some(first) = unexpected.first() {
            bail!("{dir}: unexpected weight {first}{}; config.json does not describe it", and_more(unexpected.len()));
        }
        expected.iter().try_for_each(|(at, name)| self.check_weight(*at, name))
    }

    /// Reads every weight, and refuses infinities and NaN as a training does when it takes them.
    ///
    /// # Errors
    /// If a value is not finite: the message has the file, the weight, the row and column of the first one, and how many there are.
    pub fn check_finite(&self) -> Result<()> {
        self.place.values().try_for_each(|(file, name)| {
            let file = &self.files[*file];
            if file.stored(name).is_ok_and(|stored| !stored.finite()) {
                file.load(name)?;
            }
            // What was only looked at does not stay in the process.
            file.map.release(file.range(&file.tensors[name]));
            file.map.check()
        })
    }

    fn check_weight(&self, at: Place, name: &str) -> Result<()> {
        let (file, name) = &self.place[name];
        let file = &self.files[*file];
        let info = &file.tensors[name];
        let (path, want, got) = (file.path.display(), at.file_shape(&self.config.model, 0), &info.shape);
        if *got != want {
            if at.kind() == Kind::Vocabulary && got.len() == 2 && got[1] == want[1] {
                let (rows, vocab) = (got[0], want[0]);
                bail!("{path}: vocabulary mismatch: {name} has {rows} rows, vocab_size in config.json is {vocab}");
            }
            bail!("{path}: {name}: expected shape {want:?} from config.json, found {got:?}");
        }
        ensure!(
            file.dtype(name).is_some(),
            "{path}: {name}: element type {:?} is not supported; expected F32, BF16 or F16",
            info.dtype
        );
        Ok(())
    }
}

impl ModelFiles {
    /// The file and name of a weight, and its elements there where they fill its shape.
    fn find(&self, at: Place) -> Option<(&TensorFile, &str, Stored<'_>, (usize, usize))> {
        let (i, name) = self.place.get(&at.to_string())?;
        let (file, shape) = (&self.files[*i], at.shape(&self.config.model, 0));
        let stored = file.stored(name).ok().filter(|s| s.elements() == shape.0 * shape.1)?;
        Some((file, name, stored, shape))
    }
}

impl TensorSource for ModelFiles {
    fn config(&self) -> &ModelConfig {
        &self.config.model
    }

    fn load(&self, at: Place) -> Result<HostTensor> {
        let name = at.to_string();
        match self.place.get(&name) {
            Some((i, name)) => self.files[*i].load(name),
            None => bail!("{}: no weight {name}", self.dir.display()),
        }
    }

    fn pieces(&self, at: Place) -> Result<Option<Box<dyn Pieces + '_>>> {
        let refused = AtomicBool::new(false);
        Ok(self.find(at).map(|(file, name, stored, shape)| {
            Box::new(FilePieces { file, name, info: &file.tensors[name], shape, stored, refused }) as Box<dyn Pieces>
        }))
    }

    fn in_file(&self, at: Place) -> Result<Option<InFile>> {
        let Some((file, name, stored, shape)) = self.find(at) else { return Ok(None) };
        let found = stored.as_tensor();
        file.map.check()?;
        let Some((dtype, true)) = found else { return Ok(None) };
        Ok(Some(InFile { part: FilePart::new(&file.map, file.range(&file.tensors[name])), dtype, shape }))
    }
}

/// Tensors that files carry beside the weights: rotary tables of old versions, and the head of a tied model.
fn ignorable(name: &str, tied: bool) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (tied && name == Place::Head.to_string())
}

fn and_more(n: usize) -> String {
    if n > 1 { format!(" (and {} more)", n - 1) } else { String::new() }
}

/// The name of a GGUF file where a folder has no weights in another form.
fn gguf_alone(dir: &Path) -> Option<String> {
    let names = std::fs::read_dir(dir).ok()?.filter_map(|e| e.ok()?.file_name().into_string().ok());
    let names: Vec<String> = names.collect();
    let ends = |end: &str| names.iter().filter(|n| n.ends_with(end)).min().cloned();
    ends(".gguf").filter(|_| ends(".safetensors").or(ends(".safetensors.index.json")).or(ends(".bin")).is_none())
}

fn found_instead(dir: &Path) -> &'static str {
    match dir.extension() {
        Some(e) if e == "gguf" => "a GGUF file, which is not read; take the original model",
        _ if dir.is_file() => "a file",
        _ => "nothing there",
    }
}

/// Opens the one file or all shards, in the order of their names; with the parsed index where there is one.
fn open_shards(dir: &Path) -> Result<(Vec<TensorFile>, Option<Value>)> {
    let single = dir.join("model.safetensors");
    let index_path = dir.join("model.safetensors.index.json");
    if is_there(&single) {
        return Ok((vec![TensorFile::open(&single)?], None));
    }
    if !is_there(&index_path) {
        let pickle = dir.join("pytorch_model.bin").is_file() || dir.join("pytorch_model.bin.index.json").is_file();
        let hint = if pickle { "; pytorch_model.bin is not read, save the model with safe_serialization" } else { "" };
        bail!("{}: neither model.safetensors nor model.safetensors.index.json is there{hint}", dir.display());
    }
    let text = read_text(&index_path, 256 << 20)?;
    let index: Value =
        serde_json::from_str(&text).map_err(|e| Error::new(format!("{}: invalid JSON: {e}", index_path.display())))?;
    let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
        bail!("{}: missing key weight_map", index_path.display());
    };
    let mut shards = std::collections::BTreeSet::new();
    for (name, file) in map {
        let Some(file) = file.as_str() else { bail!("{}: {name}: expected a file name", index_path.display()) };
        // A name with a folder in it could reach outside the model folder.
        let plain = Path::new(file).components().count() == 1 && !file.contains(['/', '\\']) && file != "..";
        ensure!(plain, "{}: {name}: {file:?} is not a plain file name", index_path.display());
        shards.insert(file.to_string());
    }
    ensure!(!shards.is_empty(), "{}: weight_map is empty", index_path.display());
    let files = shards.iter().map(|s| TensorFile::open(&dir.join(s))).collect::<Result<_>>()?;
    Ok((files, Some(index)))
}

/// Whether the index tells the truth about its shards.
fn check_index(dir: &Path, index: &Value, files: &[TensorFile]) -> Result<()> {
    let map = index.get("weight_map").and_then(Value::as_object).expect("checked when the shards were opened");
    for (name, shard) in map {
        let shard = shard.as_str().expect("checked when the shards were opened");
        let found = files.iter().find(|f| f.info(name).is_some()).and_then(|f| f.path.file_name()?.to_str());
        let dir = dir.display();
        match found {
            Some(file) if file == shard => {}
            Some(file) => bail!("{dir}: the index places {name} in {shard}, it is in {file}"),
            None => bail!("{dir}: the index places {name} in {shard}, it is in no shard"),
        }
    }
    Ok(())
}
