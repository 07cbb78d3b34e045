//! The recorded steps of AdamW, with the product's optimiser and schedule.

use std::path::Path;

use ringtune::backend::Backend;
use ringtune::comm::Solo;
use ringtune::error::{Error, Result};
use ringtune::hf::device::{DeviceSource, download};
use ringtune::hf::save::{SaveOptions, save_model};
use ringtune::hf::{SaveDType, TensorSource};
use ringtune::model;
use ringtune::model::Params;
use ringtune::model::weights::{Kind, Place};
use ringtune::optim::schedule::{Schedule, ScheduleSettings, Shape, Warmup};
use ringtune::optim::{AdamWSettings, Optimizer, Verdict};
use ringtune::tensor::HostTensor;
use serde_json::{Value, json};

use super::case::{Arrays, Rows, steps};
use super::run::{Loaded, Run, write_text};

impl<B: Backend> Run<'_, B> {
    /// AdamW on all weights.
    pub(super) fn full_steps(&mut self) -> Result<()> {
        let case = self.case;
        let json = &case.json["adamw"];
        let batches = steps(&json["batches"])?;
        let mut l = self.load(self.model, None, largest_batch(&batches))?;
        let before = weights_of(self.dev, &l.model.params)?;
        let dir = self.out.join("adamw");
        self.part("adamw");
        let optimizer = self.train("AdamW", json, &batches, &mut l, &dir)?;
        let source =
            DeviceSource::new(self.dev, &l.model.config, &l.model.params).with_masters(0, |at| optimizer.master(at));
        let options = SaveOptions { dtype: SaveDType::F32, ..SaveOptions::default() };
        save_model(&dir.join("final"), &source, options)?;
        let none = Arrays::default();
        let finals = case.beside("adamw_final.safetensors").unwrap_or(&none);
        for (at, start) in &before {
            let name = at.to_string();
            let norms = &json["update_norms"];
            self.compare_update("AdamW updates", (finals, &name), norms, &name, start, &source.get(*at)?);
        }
        let decays = json["decay"].as_object();
        for (name, want) in decays.into_iter().flatten() {
            let ours = before.iter().find(|(at, _)| at.to_string() == *name).map(|(at, _)| at.decays());
            self.report.equal("weight decay", name.as_str(), u64::from(ours != want.as_bool()), 0);
        }
        Ok(())
    }

    /// Runs the recorded steps with the product's optimiser and schedule; writes `metrics.jsonl`.
    pub(super) fn train(
        &mut self,
        label: &str,
        json: &Value,
        batches: &[Vec<Rows>],
        l: &mut Loaded<B>,
        dir: &Path,
    ) -> Result<Optimizer<B>> {
        let hp = &json["hyperparameters"];
        let number = |v: &Value, name: &str| {
            v.as_f64().ok_or_else(|| Error::new(format!("{label}: hyperparameters have no {name}")))
        };
        let settings = AdamWSettings {
            beta1: number(&hp["betas"][0], "betas")?,
            beta2: number(&hp["betas"][1], "betas")?,
            eps: number(&hp["eps"], "eps")?,
            weight_decay: number(&hp["weight_decay"], "weight_decay")?,
            max_grad_norm: hp["clip"].as_f64().filter(|&c| c > 0.0),
            ..AdamWSettings::default()
        };
        let schedule = ScheduleSettings {
            shape: Shape::Cosine,
            warmup: Warmup::Steps(hp["warmup"].as_u64().unwrap_or(0)),
            warmup_from_zero: true,
            ..ScheduleSettings::default()
        };
        let schedule = Schedule::new(schedule, number(&hp["lr"], "lr")?, batches.len() as u64);
        let mut optimizer = Optimizer::new(self.dev, settings, &mut l.model.params, &l.grads)?;
        let model = self.model;
        let lora = l.model.params.places().iter().any(|(at, _)| at.kind() == Kind::LowRank);
        if !lora {
            optimizer.set_masters(self.dev, |at| model.load(at).map(|t| Some(t.data)))?;
        }
        for key in ["lr", "loss", "grad_norm_before_clip"] {
            if let Some(all) = json[key].as_array() {
                self.report.equal(&format!("{label} steps"), key, all.len() as u64, batches.len() as u64);
            }
        }
        let mut lines = String::new();
        for (s, micro) in batches.iter().enumerate() {
            let lr = schedule.lr(s as u64);
            let n: usize = micro.iter().map(|r| r.batch.n_valid).sum();
            model::zero_grads(self.dev, &mut l.grads)?;
            let mut nll = 0.0;
            for rows in micro {
                l.acts.load(self.dev, &rows.batch)?;
                model::forward(self.dev, &l.model, &mut l.acts)?;
                let scale = (1.0 / n.max(1) as f64) as f32;
                model::backward(self.dev, &l.model, &mut l.grads, &mut l.acts, scale, &mut |_, _| Ok(()))?;
                nll += l.acts.losses(self.dev)?.iter().map(|&x| f64::from(x)).sum::<f64>();
            }
            let loss = nll / n.max(1) as f64;
            let norm = match optimizer.step(self.dev, &Solo, &mut l.model.params, &l.grads, lr)? {
                Verdict::Updated { grad_norm, .. } | Verdict::NonFinite { grad_norm, .. } => grad_norm,
            };
            lines += &format!("{}\n", json!({"step": s, "loss": loss, "lr": lr, "grad_norm": norm}));
            let at = format!("step {s}");
            let a = self.allowed;
            if let Some(want) = json["lr"][s].as_f64() {
                self.report.compare(&format!("{label} learning rates"), at.as_str(), (lr - want).abs(), 1e-12);
            }
            if let Some(want) = json["loss"][s].as_f64() {
                self.report.compare(&format!("{label} losses"), at.as_str(), (loss - want).abs(), a.step_loss);
            }
            if let Some(want) = json["grad_norm_before_clip"][s].as_f64() {
                self.report.compare(
                    &format!("{label} gradient norms"),
                    at.as_str(),
                    (norm / want - 1.0).abs(),
                    a.step_norm,
                );
            }
        }
        ringtune::files::create_dir_all(dir)?;
        write_text(&dir.join("metrics.jsonl"), &lines)?;
        Ok(optimizer)
    }
}

pub(super) fn largest_batch(batches: &[Vec<Rows>]) -> usize {
    batches.iter().flatten().map(|r| r.batch.tokens.len()).max().unwrap_or(0)
}

pub(super) fn weights_of<B: Backend>(dev: &B, params: &Params<B>) -> Result<Vec<(Place, HostTensor)>> {
    params.places().into_iter().map(|(at, t)| Ok((at, download(dev, t)?))).collect()
}
