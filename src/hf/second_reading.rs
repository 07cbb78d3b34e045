//! A merged model against its adapter as PEFT applies it: the adapter's two files are read anew, by PEFT's names and PEFT's rule, with
//! nothing of [`super::peft`] but the layout of a safetensors file. What the first reading overlooks or understands wrongly shows here.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use super::safetensors::{ModelFiles, TensorFile};
use super::{HostTensor, SaveDType, TensorSource};
use crate::checkpoint::state::read_json;
use crate::error::{Context, Error, Result};
use crate::model::weights::{Place, Weights};
use crate::{bail, ensure};

/// Rows of a matrix that are compared, evenly spread: a wrong scale, tensor or layer shows in each of them.
const ROWS: usize = 64;

/// Compares every weight of `written` with `W + scale · B A`, W of `base`, or with the copy of it that the adapter holds whole. Returns
/// how many have an update.
///
/// Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; scale `alpha / sqrt(r)` with use_rslora: Kalajdzievski 2023,
/// arXiv:2312.03732. Names as PEFT saves them: `base_model.model.MODULE.lora_A.weight`, `….MODULE.modules_to_save.weight`.
///
/// # Errors
/// If a weight is another than the adapter's files make of it, or they hold a tensor that no weight of the model shows.
pub fn check(base: &dyn TensorSource, adapter: &Path, written: &ModelFiles) -> Result<usize> {
    let path = adapter.join("adapter_config.json");
    let config = read_json(&path)?;
    let scale = scale(&config).ok_or_else(|| Error::new(format!("{}: no scale in it", path.display())))?;
    let file = TensorFile::open(&adapter.join("adapter_model.safetensors"))?;
    let mut unread: BTreeSet<String> =
        file.names().filter(|n| !n.contains(".original_module.")).map(String::from).collect();
    let mut updates = 0;
    for (at, _) in Weights::of(written.config()).places() {
        let name = at.to_string();
        let module = format!("base_model.model.{}", name.strip_suffix(".weight").unwrap_or(&name));
        let mut take = |tail: &str| -> Result<Option<HostTensor>> {
            let key = format!("{module}{tail}");
            unread.remove(&key).then(|| file.load(&key)).transpose()
        };
        let (a, b) = (take(".lora_A.weight")?, take(".lora_B.weight")?);
        let mut saved = None;
        for tail in [".modules_to_save.weight", ".modules_to_save.default.weight", ".weight"] {
            saved = take(tail)?.or(saved);
        }
        let update = match (&a, &b) {
            (Some(a), Some(b)) => Some((a, b, scale)),
            (None, None) => None,
            _ => bail!("{}: {module}: one of lora_A and lora_B is missing", file.path().display()),
        };
        updates += usize::from(update.is_some());
        let w = match saved {
            Some(w) => w,
            None => base.load(if at == Place::Head && base.config().tied { Place::Embed } else { at })?,
        };
        compare(&w, update, &written.load(at)?, written.dtype())
            .context(|| format!("{name} is not what {} makes of the base", adapter.display()))?;
    }
    // With tied weights PEFT may save the one matrix under both names.
    let tied = |key: &str| written.config().tied && key.starts_with("base_model.model.lm_head.");
    if let Some(key) = unread.iter().find(|key| !tied(key)) {
        bail!("{}: {key}: no weight of the merged model shows it", file.path().display());
    }
    Ok(updates)
}

/// What the update is multiplied with.
fn scale(config: &Value) -> Option<f64> {
    let (alpha, r) = (config["lora_alpha"].as_f64()?, config["r"].as_f64()?);
    Some(if config["use_rslora"] == true { alpha / r.sqrt() } else { alpha / r })
}

/// Some rows of `w + scale · b a` in f64 against those of the file.
fn compare(
    w: &HostTensor,
    update: Option<(&HostTensor, &HostTensor, f64)>,
    found: &HostTensor,
    dtype: SaveDType,
) -> Result<()> {
    let shape = (w.rows, w.cols);
    ensure!((found.rows, found.cols) == shape, "expected shape {shape:?}, found {:?}", (found.rows, found.cols));
    if let Some((a, b, _)) = update {
        let (want, found) = ((w.rows, w.cols, a.rows), (b.rows, a.cols, b.cols));
        ensure!(want == found, "expected an update of shape and rank {want:?}, found {found:?}");
    }
    let (unit, smallest) = dtype.unit();
    for row in (0..w.rows).step_by(w.rows.div_ceil(ROWS).max(1)) {
        for col in 0..w.cols {
            let (mut sum, mut size) = (0.0, 0.0);
            if let Some((a, b, scale)) = update {
                for k in 0..a.rows {
                    let term = scale * f64::from(b.row(row)[k]) * f64::from(a.row(k)[col]);
                    sum += term;
                    size += term.abs();
                }
            }
            let (w, found) = (f64::from(w.row(row)[col]), f64::from(found.row(row)[col]));
            let want = w + sum;
            // The sum was formed in f32, term by term, and rounded once to the file's type.
            let error = (w.abs() + size) * 2f64.powi(-18) + want.abs() * unit + smallest;
            ensure!(
                (found - want).abs() <= error,
                "row {row}, column {col}: expected {want:.6e} within {error:.1e}, found {found:.6e}"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hf::merge::Merged;
    use crate::hf::peft::Adapter;
    use crate::hf::save::{Entry, SaveOptions, save_model, write_tensors};

    const BASE: &str = "tests/data/model/tiny-llama-tied";

    /// The tensors of an adapter by name.
    type Named = Vec<(String, HostTensor)>;

    /// Merges the recorded adapter, then lets `change` change what the second reading reads of it, and reads.
    fn read(dtype: SaveDType, change: impl FnOnce(&mut Value, &mut Named)) -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let base = ModelFiles::open(Path::new(BASE)).unwrap();
        let golden = Path::new("tests/data/golden/tiny-llama-tied/adapter_all");
        let adapter = Adapter::open(golden).unwrap();
        let merged = dir.path().join("merged");
        save_model(&merged, &Merged::new(&base, &adapter).unwrap(), SaveOptions { dtype, ..Default::default() })
            .unwrap();
        let mut config = read_json(&golden.join("adapter_config.json")).unwrap();
        let file = TensorFile::open(&golden.join("adapter_model.safetensors")).unwrap();
        let mut tensors: Named = file.names().map(|name| (name.to_string(), file.load(name).unwrap())).collect();
        change(&mut config, &mut tensors);
        std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
        let entry = |(name, t): &(String, HostTensor)| Entry {
            name: name.clone(),
            shape: vec![t.rows, t.cols],
            dtype: SaveDType::F32,
        };
        let entries: Vec<Entry> = tensors.iter().map(entry).collect();
        write_tensors(&dir.path().join("adapter_model.safetensors"), &entries, |i, _| Ok(&tensors[i].1)).unwrap();
        check(&base, dir.path(), &ModelFiles::open(&merged).unwrap()).map(drop)
    }

    #[test]
    fn what_was_merged_is_what_the_files_say() {
        for dtype in [SaveDType::F32, SaveDType::Bf16, SaveDType::F16] {
            read(dtype, |_, _| ()).unwrap();
        }
    }

    #[test]
    fn another_meaning_of_the_files_is_noticed() {
        let refused = |what: &str, change: &dyn Fn(&mut Value, &mut Named)| {
            for dtype in [SaveDType::F32, SaveDType::Bf16] {
                let said = read(dtype, change).unwrap_err().to_string();
                assert!(said.contains(what), "expected {what:?}, found {said}");
            }
        };
        let q = |layer: usize, part: char| {
            format!("base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight")
        };
        refused("q_proj.weight is not what", &|config, _| config["lora_alpha"] = 17.into());
        refused("q_proj.weight is not what", &|config, _| config["use_rslora"] = true.into());
        refused("layers.0.self_attn.q_proj.weight is not what", &|_, all| {
            let at = |name: String| all.iter().position(|t| t.0 == name).unwrap();
            let (first, second) = (at(q(0, 'A')), at(q(1, 'A')));
            (all[first].0, all[second].0) = (q(1, 'A'), q(0, 'A'));
        });
        refused("model.norm.weight is not what", &|_, all| {
            let ours = HostTensor { rows: 1, cols: 64, data: vec![0.5; 64] };
            all.push(("base_model.model.model.norm.modules_to_save.weight".into(), ours));
        });
        refused("one of lora_A and lora_B is missing", &|_, all| all.retain(|t| t.0 != q(0, 'B')));
        refused("lora_C.weight: no weight of the merged model shows it", &|_, all| {
            let mut other = all[0].clone();
            other.0 = q(0, 'C');
            all.push(other);
        });
    }
}
