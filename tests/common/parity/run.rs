//! The parts of a case, run one after the other.

use std::path::{Path, PathBuf};

use ringtune::backend::Backend;
use ringtune::error::{Error, Result};
use ringtune::files::write_atomic;
use ringtune::generate::{GenerateOptions, Sampling, generate};
use ringtune::hf::device::{DeviceSource, download, load_adapter, load_params};
use ringtune::hf::merge::{Adapted, Merged};
use ringtune::hf::merged::lora_spec;
use ringtune::hf::peft::{Adapter, save_adapter};
use ringtune::hf::safetensors::ModelFiles;
use ringtune::hf::save::{SaveOptions, save_model};
use ringtune::hf::{SaveDType, TensorSource};
use ringtune::model::weights::{Kind, Place, Weights};
use ringtune::model::{Acts, ActsOptions, Grads, Model};
use ringtune::tensor::{DType, HostTensor};
use ringtune::{ensure, model};
use serde_json::{Value, json};

use super::case::{Array, Arrays, Case, Rows, steps};
use super::dump::Dump;
use super::report::{Report, Tolerances, columns, relative, stride};
use super::steps::{largest_batch, weights_of};

/// Prefix of PEFT's names.
const PEFT: &str = "base_model.model.";

/// A case being run.
pub struct Run<'a, B: Backend> {
    pub dev: &'a B,
    pub case: &'a Case,
    pub model: &'a ModelFiles,
    pub out: &'a Path,
    pub dtype: DType,
    pub allowed: Tolerances,
    pub report: Report,
}

/// Weights with gradients and activations for one micro-batch at a time.
pub(super) struct Loaded<B: Backend> {
    pub model: Model<B>,
    pub grads: Grads<B>,
    pub acts: Acts<B>,
}

/// Logits, losses and gradients of one batch.
pub(super) struct Pass {
    pub logits: Vec<f32>,
    pub logsumexp: Vec<f32>,
    pub token_loss: Vec<f32>,
    pub loss: f64,
    pub supervised: usize,
    grads: Vec<(Place, HostTensor)>,
}

impl<B: Backend> Run<'_, B> {
    /// Everything that was recorded.
    pub fn all(&mut self) -> Result<()> {
        let mut dump = Dump::default();
        let batch = self.batch_rows()?;
        self.whole_batch(&batch, &mut dump)?;
        self.packed(&mut dump)?;
        self.resized(&mut dump)?;
        dump.write(&self.out.join("dump.safetensors"))?;
        self.generation()?;
        if self.case.json.get("adamw").is_some() {
            self.full_steps()?;
        }
        let loras: Vec<String> =
            self.case.json["lora"].as_object().into_iter().flatten().map(|(k, _)| k.clone()).collect();
        for name in loras {
            self.lora(&name, &batch)?;
        }
        for name in self.case.unread() {
            self.report.uncompared("recorded tensors that nothing compares", name);
        }
        Ok(())
    }

    /// Takes the tolerances of a part of the case.
    pub(super) fn part(&mut self, name: &str) {
        self.allowed = Tolerances::of(self.dtype).recorded(&self.case.json["noise"][name], self.dtype);
    }

    fn batch_rows(&self) -> Result<Rows> {
        let ids = self.case.tensor("batch.input_ids")?;
        let labels = self.case.tensor("batch.labels")?.ints();
        let mask = match self.case.tensors.get("batch.attention_mask") {
            Some(m) => m.ints(),
            None => vec![1; ids.data.len()],
        };
        Rows::padded(matrix_shape(ids)?, ids.ints(), labels, &mask)
    }

    pub(super) fn load(
        &self,
        source: &dyn TensorSource,
        adapter: Option<&Adapter>,
        tokens: usize,
    ) -> Result<Loaded<B>> {
        let config = source.config().clone();
        let mut params = load_params(self.dev, source, self.dtype)?;
        if let Some(a) = adapter {
            load_adapter(self.dev, &mut params, a)?;
        }
        let model = Model::fixed(config, params, adapter.map(lora_spec), self.dtype);
        let grads = model::alloc_grads(self.dev, &model)?;
        let options = ActsOptions { training: true, ..ActsOptions::FORWARD };
        let acts = Acts::new(self.dev, &model, tokens, options)?;
        Ok(Loaded { model, grads, acts })
    }

    /// Forward and backward of a batch; the gradients are those of the mean loss.
    fn pass(&self, l: &mut Loaded<B>, rows: &Rows) -> Result<Pass> {
        let (dev, vocab) = (self.dev, l.model.config.vocab_size);
        l.acts.load(dev, &rows.batch)?;
        let logits = model::logits(dev, &l.model, &mut l.acts)?;
        let sums: Vec<f32> = logits.chunks(vocab).map(logsumexp).collect();
        let (logits, logsumexp) = (rows.spread(&logits, vocab), rows.spread(&sums, 1));
        model::zero_grads(dev, &mut l.grads)?;
        model::forward(dev, &l.model, &mut l.acts)?;
        let n = rows.batch.n_valid.max(1) as f64;
        model::backward(dev, &l.model, &mut l.grads, &mut l.acts, (1.0 / n) as f32, &mut |_, _| Ok(()))?;
        let losses = l.acts.losses(dev)?;
        let loss = losses.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let token_loss = rows.spread(&losses, 1);
        let mut grads = Vec::new();
        for (at, grad) in l.grads.places() {
            if let Some(g) = grad {
                grads.push((at, download(dev, g)?));
            }
        }
        let supervised = rows.batch.n_valid;
        Ok(Pass { logits, logsumexp, token_loss, loss, supervised, grads })
    }

    fn whole_batch(&mut self, rows: &Rows, dump: &mut Dump) -> Result<()> {
        let mut l = self.load(self.model, None, rows.batch.tokens.len())?;
        let pass = self.pass(&mut l, rows)?;
        dump_rows(dump, "batch", rows, &pass, l.model.config.vocab_size);
        let case = self.case;
        self.part("batch");
        self.compare_outputs("batch", "batch.", &case.tensors, &case.json["batch"], &pass, l.model.config.vocab_size);
        for (at, g) in &pass.grads {
            dump.f32(format!("grad.{at}"), &file_shape(*at, g), &g.data);
        }
        self.compare_gradients("batch gradients", "grad.", &case.tensors, &pass.grads);
        self.compare_norms("batch gradient norms", &case.json["batch"], &pass.grads);
        Ok(())
    }

    fn packed(&mut self, dump: &mut Dump) -> Result<()> {
        let case = self.case;
        let Some(ids) = case.tensors.get("packed.input_ids") else {
            return Ok(());
        };
        let ids = ids.ints();
        let positions = case.tensors.get("packed.position_ids").map(Array::ints);
        let starts: Vec<usize> = match (case.tensors.get("packed.cu_seqlens"), &positions) {
            (Some(cu), _) => cu.ints().iter().map(|&x| x as usize).filter(|&x| x < ids.len()).collect(),
            (None, Some(p)) => (0..p.len()).filter(|&i| p[i] == 0).collect(),
            (None, None) => vec![0],
        };
        let rows = Rows::packed(ids, case.tensor("packed.labels")?.ints(), &starts)?;
        let mut l = self.load(self.model, None, rows.batch.tokens.len())?;
        let pass = self.pass(&mut l, &rows)?;
        dump_rows(dump, "packed", &rows, &pass, l.model.config.vocab_size);
        let ours: Vec<i64> = (0i64..).zip(&rows.batch.doc_start).map(|(i, &s)| i - i64::from(s)).collect();
        dump.i64("packed.position_ids", &[1, ours.len()], &ours);
        if let Some(want) = positions {
            let first = ours.iter().zip(&want).position(|(a, b)| a != b);
            let differ = u64::from(first.is_some() || ours.len() != want.len());
            self.report.equal("packed positions", format!("token {}", first.unwrap_or(0)), differ, 0);
        }
        let mut bounds: Vec<i64> = starts.iter().map(|&s| s as i64).collect();
        bounds.push(rows.ids.len() as i64);
        dump.i64("packed.cu_seqlens", &[bounds.len()], &bounds);
        for (name, want) in [
            ("tensor", case.tensors.get("packed.cu_seqlens").map(Array::ints)),
            ("golden.json", serde_json::from_value(case.json["packed"]["cu_seqlens"].clone()).ok()),
        ] {
            let differ = u64::from(want.is_some_and(|want| want != bounds));
            self.report.equal("packed bounds of documents", name, differ, 0);
        }
        self.part("packed");
        self.compare_outputs(
            "packed",
            "packed.",
            &case.tensors,
            &case.json["packed"],
            &pass,
            l.model.config.vocab_size,
        );
        for (at, g) in &pass.grads {
            dump.f32(format!("packed.grad.{at}"), &file_shape(*at, g), &g.data);
        }
        self.compare_gradients("packed gradients", "packed.grad.", &case.tensors, &pass.grads);
        self.compare_norms("packed gradient norms", &case.json["packed"], &pass.grads);
        Ok(())
    }

    fn resized(&mut self, dump: &mut Dump) -> Result<()> {
        let case = self.case;
        let Some(ids) = case.tensors.get("resized.input_ids") else {
            return Ok(());
        };
        let Some(dir) = self.resized_model() else {
            self.report.note("resized: its model folder was not found beside the case or --model; left out");
            return Ok(());
        };
        let files = ModelFiles::open(&dir)?;
        let (shape, ids) = (matrix_shape(ids)?, ids.ints());
        let rows = Rows::padded(shape, ids.clone(), vec![-100; ids.len()], &vec![1; ids.len()])?;
        let mut l = self.load(&files, None, ids.len())?;
        l.acts.load(self.dev, &rows.batch)?;
        let logits = rows.spread(&model::logits(self.dev, &l.model, &mut l.acts)?, l.model.config.vocab_size);
        let vocab = l.model.config.vocab_size;
        dump.i64("resized.input_ids", &[shape.0, shape.1], &ids);
        dump.f32("resized.logits", &[shape.0, shape.1, vocab], &logits);
        // Its noise is not recorded; it is the same model on another batch.
        self.part("batch");
        let want = case.tensor("resized.logits")?;
        let at: Vec<usize> = match case.tensors.get("resized.logit_columns") {
            Some(c) => c.ints().iter().map(|&x| x as usize).collect(),
            None => (0..vocab).collect(),
        };
        ensure!(at.iter().all(|&c| c < vocab), "{}: {vocab} classes; the case has columns beyond", dir.display());
        let ours = logits.chunks(vocab).flat_map(|row| at.iter().map(|&c| f64::from(row[c])));
        let error = relative(ours, want.data.iter().copied());
        self.report.compare("resized logits", "", error, self.allowed.logits);
        Ok(())
    }

    /// `golden.json` names the folder from the root of all cases; it lies beside the model, or below a folder above the case.
    fn resized_model(&self) -> Option<PathBuf> {
        let name = Path::new(self.case.json["resized"]["model"].as_str()?);
        let beside = self.model.dir().parent().map(|p| p.join(name.file_name().unwrap_or_default()));
        let above = self.case.dir.ancestors().skip(1).map(|p| p.join(name));
        beside.into_iter().chain(above).find(|p| p.join("config.json").is_file())
    }

    /// Greedy continuations.
    fn generation(&mut self) -> Result<()> {
        let Some(cases) = self.case.json["generation"]["cases"].as_array() else {
            return Ok(());
        };
        let params = load_params(self.dev, self.model, self.dtype)?;
        let model = Model::fixed(self.model.config().clone(), params, None, self.dtype);
        let list = |v: &Value| -> Vec<u32> {
            v.as_array().into_iter().flatten().filter_map(|x| Some(x.as_u64()? as u32)).collect()
        };
        let longest = cases.iter().map(|c| list(&c["new_ids"]).len()).max().unwrap_or(0);
        let mut lines = String::new();
        for (i, c) in cases.iter().enumerate() {
            // Without a stop token every case was recorded to one length.
            if list(&c["stop_ids"]).is_empty() {
                let n = list(&c["new_ids"]).len();
                self.report.equal("generation lengths", format!("case {i}"), n as u64, longest as u64);
            }
            let (prompt, want, stop) = (list(&c["prompt_ids"]), list(&c["new_ids"]), list(&c["stop_ids"]));
            let options = GenerateOptions {
                max_new_tokens: if stop.is_empty() { want.len() } else { longest },
                stop_ids: stop.clone(),
                batch: 1,
                sampling: Sampling::default(),
            };
            let new = generate(self.dev, &model, std::slice::from_ref(&prompt), &options, |_, _, _| {
                std::ops::ControlFlow::Continue(())
            })?
            .swap_remove(0)
            .tokens;
            let mut line = json!({"prompt_ids": prompt, "new_ids": new});
            if !stop.is_empty() {
                line["stop_ids"] = json!(stop);
            }
            lines += &format!("{line}\n");
            let first = new.iter().zip(&want).position(|(a, b)| a != b);
            let equal = first.is_none() && new.len() == want.len();
            if self.dtype == DType::Bf16 {
                // Rounding decides near ties, so a difference says nothing by itself.
                if !equal {
                    self.report
                        .note(format!("generation {i}: bf16 differs from float64 at new token {}", first.unwrap_or(0)));
                }
            } else {
                let differing = if equal { 0.0 } else { 1.0 };
                self.report.compare("generation (sequences differing)", format!("case {i}"), differing, 0.5);
            }
        }
        write_text(&self.out.join("generation.jsonl"), &lines)
    }

    /// Base and adapter on the batch, the adapter's AdamW steps, the merged weights.
    fn lora(&mut self, name: &str, rows: &Rows) -> Result<()> {
        let case = self.case;
        let json = &case.json["lora"][name];
        let adapter = Adapter::open(&case.dir.join(format!("adapter_{name}")))?;
        let adapted = Adapted::new(self.model, &adapter)?;
        let none = Arrays::default();
        let golden = case.beside(&format!("lora_{name}.safetensors")).unwrap_or(&none);
        let batches = if json.get("adamw").is_some() { steps(&case.json["adamw"]["batches"])? } else { Vec::new() };
        let tokens = rows.batch.tokens.len().max(largest_batch(&batches));
        let mut l = self.load(&adapted, Some(&adapter), tokens)?;
        let vocab = l.model.config.vocab_size;
        let pass = self.pass(&mut l, rows)?;
        let label = format!("lora.{name}");
        let mut dump = Dump::default();
        let (r, t) = rows.shape;
        dump.f32("logits", &[r, t, vocab], &pass.logits);
        dump.f32("token_loss", &[r, t], &pass.token_loss);
        self.part(&format!("lora_{name}"));
        self.compare_outputs(&label, "", golden, json, &pass, vocab);
        let grads: Vec<(String, HostTensor)> =
            pass.grads.into_iter().map(|(at, g)| (format!("{PEFT}{at}"), g)).collect();
        for (n, g) in &grads {
            dump.f32(format!("grad.{n}"), &[g.rows, g.cols], &g.data);
        }
        self.compare_gradients(&format!("{label} gradients"), "grad.", golden, &grads);
        self.merged(name, &adapter, golden, rows)?;
        if !batches.is_empty() {
            let before = weights_of(self.dev, &l.model.params)?;
            let dir = self.out.join(&label);
            self.part(&format!("lora_{name}_adamw"));
            self.train(&format!("{label} AdamW"), &json["adamw"], &batches, &mut l, &dir)?;
            let source = DeviceSource::new(self.dev, &l.model.config, &l.model.params);
            save_adapter(&dir.join("final"), &adapter.config, &l.model.config, false, |at| source.get(at))?;
            for (at, start) in before.iter().filter(|(at, _)| at.kind() == Kind::LowRank) {
                let (name, recorded_as) = (at.to_string(), format!("final.{PEFT}{at}"));
                let after = source.get(*at)?;
                dump.f32(recorded_as.clone(), &[after.rows, after.cols], &after.data);
                let what = format!("{label} AdamW updates");
                self.compare_update(&what, (golden, &recorded_as), &Value::Null, &name, start, &after);
            }
        }
        dump.write(&self.out.join(format!("{label}.safetensors")))
    }

    /// The merged weights, and the logits of the merged model as it is saved in bf16.
    fn merged(&mut self, name: &str, adapter: &Adapter, golden: &Arrays, rows: &Rows) -> Result<()> {
        let merged = Merged::new(self.model, adapter)?;
        if let Some(want) = self.case.beside(&format!("merged_{name}_linears.safetensors")) {
            for (at, _) in Weights::of(merged.config()).places() {
                let Some(w) = want.get(&at.to_string()) else { continue };
                let ours = merged.load(at)?;
                let error = relative(ours.data.iter().map(|&x| f64::from(x)), w.data.iter().copied());
                self.report.compare(&format!("lora.{name} merged weights"), at.to_string(), error, 1e-6);
            }
        }
        let Some(want) = golden.get("merged_bf16_weights.logits") else { return Ok(()) };
        let dir = self.out.join(format!("lora.{name}/merged"));
        save_model(&dir, &merged, SaveOptions { dtype: SaveDType::Bf16, ..SaveOptions::default() })?;
        let files = ModelFiles::open(&dir)?;
        let mut l = self.load(&files, None, rows.batch.tokens.len())?;
        l.acts.load(self.dev, &rows.batch)?;
        let vocab = l.model.config.vocab_size;
        let logits = rows.spread(&model::logits(self.dev, &l.model, &mut l.acts)?, vocab);
        let step = stride(
            self.case.json["lora"][name]["logit_columns"].as_str(),
            vocab,
            want.shape.last().copied().unwrap_or(0),
        );
        let error = relative(columns(&logits, vocab, step), want.data.iter().copied());
        // A sum in f64 beside one of two bf16 numbers rounds to the other now and then: one such weight moves the logits by 1e-5.
        let allowed = self.allowed.logits.max(2e-4);
        self.report.compare(&format!("lora.{name} logits of the merge in bf16"), "", error, allowed);
        Ok(())
    }
}

pub(super) fn norm(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

fn matrix_shape(a: &Array) -> Result<(usize, usize)> {
    match a.shape.as_slice() {
        &[r, c] => Ok((r, c)),
        &[c] => Ok((1, c)),
        other => Err(Error::new(format!("input_ids: expected (rows, length), found shape {other:?}"))),
    }
}

/// Norms and biases have one dimension in files.
fn file_shape(at: Place, t: &HostTensor) -> Vec<usize> {
    if at.is_vector() { vec![t.cols] } else { vec![t.rows, t.cols] }
}

fn dump_rows(dump: &mut Dump, part: &str, rows: &Rows, pass: &Pass, vocab: usize) {
    let (r, t) = rows.shape;
    dump.i64(format!("{part}.input_ids"), &[r, t], &rows.ids);
    dump.i64(format!("{part}.labels"), &[r, t], &rows.labels);
    dump.f32(format!("{part}.logits"), &[r, t, vocab], &pass.logits);
    dump.f32(format!("{part}.token_loss"), &[r, t], &pass.token_loss);
    dump.f32(format!("{part}.logsumexp"), &[r, t], &pass.logsumexp);
}

fn logsumexp(row: &[f32]) -> f32 {
    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&x| f64::from(x - top).exp()).sum();
    (f64::from(top) + sum.ln()) as f32
}

pub(super) fn write_text(path: &Path, text: &str) -> Result<()> {
    write_atomic(path, |out| Ok(out.write_all(text.as_bytes())?))
}
