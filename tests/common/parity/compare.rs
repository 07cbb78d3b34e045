//! Our side of a case against the recorded one.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::case::Arrays;
use super::report::{columns, largest, recorded, relative, stride};
use super::run::{Pass, Run, norm};
use ringtune::backend::Backend;
use ringtune::tensor::HostTensor;

impl<B: Backend> Run<'_, B> {
    /// Logits, logsumexp, token losses, the loss and how many tokens it is the mean of; names in the file begin with `prefix`.
    pub(super) fn compare_outputs(
        &mut self,
        label: &str,
        prefix: &str,
        all: &Arrays,
        json: &Value,
        pass: &Pass,
        vocab: usize,
    ) {
        let a = self.allowed;
        if let Some(want) = all.get(&format!("{prefix}logits")) {
            let recorded = want.shape.last().copied().unwrap_or(0);
            let step = stride(json["logit_columns"].as_str(), vocab, recorded);
            let error = relative(columns(&pass.logits, vocab, step), want.data.iter().copied());
            self.report.compare(&format!("{label} logits"), "", error, a.logits);
        }
        if let Some(want) = all.get(&format!("{prefix}logsumexp")) {
            let (error, at) = largest(&pass.logsumexp, &want.data);
            self.report.compare(&format!("{label} logsumexp"), format!("token {at}"), error, a.logsumexp);
        }
        if let Some(want) = all.get(&format!("{prefix}token_loss")) {
            let (error, at) = largest(&pass.token_loss, &want.data);
            self.report.compare(&format!("{label} token losses"), format!("token {at}"), error, a.token_loss);
        }
        if let Some(want) = json["loss"].as_f64() {
            self.report.compare(&format!("{label} loss"), "", (pass.loss - want).abs(), a.loss);
        }
        if let Some(want) = json["supervised_tokens"].as_u64() {
            self.report.equal(&format!("{label} supervised tokens"), "", pass.supervised as u64, want);
        }
    }

    pub(super) fn compare_gradients(
        &mut self,
        what: &str,
        prefix: &str,
        all: &Arrays,
        grads: &[(impl ToString, HostTensor)],
    ) {
        for (name, g) in grads {
            let name = name.to_string();
            let key = format!("{prefix}{name}");
            if let Some((ours, want)) = recorded(all, &key, &g.data, g.cols) {
                let error = relative(ours, want.data.iter().copied());
                self.report.compare(what, name.as_str(), error, self.allowed.gradient);
            }
            if let Some(norms) = all.get(&format!("{key}.row_norms")) {
                let ours = g.data.chunks(g.cols).map(norm);
                let error = relative(ours, norms.data.iter().copied());
                self.report.compare(what, format!("{name} (norms of rows)"), error, self.allowed.gradient);
            }
        }
    }

    /// `grad_norms`, each name on both sides, and `grad_global_norm`.
    pub(super) fn compare_norms(&mut self, what: &str, json: &Value, grads: &[(impl ToString, HostTensor)]) {
        let Some(recorded) = json["grad_norms"].as_object() else { return };
        let ours: BTreeMap<String, f64> = grads.iter().map(|(name, g)| (name.to_string(), norm(&g.data))).collect();
        let names: BTreeSet<&String> = ours.keys().chain(recorded.keys()).collect();
        for name in names {
            let error = match (ours.get(name), recorded.get(name).and_then(Value::as_f64)) {
                (Some(ours), Some(want)) => (ours / want - 1.0).abs(),
                _ => f64::INFINITY,
            };
            self.report.compare(what, name.as_str(), error, self.allowed.gradient);
        }
        if let Some(want) = json["grad_global_norm"].as_f64() {
            let all = ours.values().map(|x| x * x).sum::<f64>().sqrt();
            self.report.compare(what, "all together", (all / want - 1.0).abs(), self.allowed.gradient);
        }
    }

    /// The update of a tensor over all steps: `after - before`, whole where it was recorded, and its norm.
    pub(super) fn compare_update(
        &mut self,
        what: &str,
        (all, key): (&Arrays, &str),
        norms: &Value,
        name: &str,
        start: &HostTensor,
        end: &HostTensor,
    ) {
        let allowed = self.allowed.update;
        if let (Some((after, want)), Some((before, _))) =
            (recorded(all, key, &end.data, end.cols), recorded(all, key, &start.data, start.cols))
        {
            let error = if after.len() == want.data.len() {
                let ours = after.iter().zip(&before).map(|(a, b)| a - b);
                relative(ours, want.data.iter().zip(&before).map(|(w, b)| w - b))
            } else {
                f64::INFINITY
            };
            self.report.compare(what, name, error, allowed);
        }
        if let Some(norms) = norms.as_object() {
            let ours: Vec<f32> = end.data.iter().zip(&start.data).map(|(a, b)| a - b).collect();
            let error =
                norms.get(name).and_then(Value::as_f64).map_or(f64::INFINITY, |w| (norm(&ours) / w - 1.0).abs());
            self.report.compare(what, format!("{name} (norm)"), error, allowed);
        }
    }
}
