//! Our side of a case against the recorded one.

use serde_json::Value;

use super::case::Arrays;
use super::report::{columns, largest, recorded, relative, stride};
use super::run::{Pass, Run, norm};
use ringtune::backend::Backend;
use ringtune::tensor::HostTensor;

impl<B: Backend> Run<'_, B> {
    /// Logits, logsumexp, token losses and the loss of a batch; names in the file begin with `prefix`.
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
        if let (Some(want), Some(allowed)) = (all.get(&format!("{prefix}token_loss")), a.token_loss) {
            let (error, at) = largest(&pass.token_loss, &want.data);
            self.report.compare(&format!("{label} token losses"), format!("token {at}"), error, allowed);
        }
        if let Some(want) = json["loss"].as_f64() {
            self.report.compare(&format!("{label} loss"), "", (pass.loss - want).abs(), a.loss);
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

    pub(super) fn compare_norms(&mut self, what: &str, json: &Value, grads: &[(impl ToString, HostTensor)]) {
        for (name, g) in grads {
            let name = name.to_string();
            if let Some(want) = json["grad_norms"][name.as_str()].as_f64() {
                let error = (norm(&g.data) / want - 1.0).abs();
                self.report.compare(what, name.as_str(), error, self.allowed.gradient);
            }
        }
    }

    pub(super) fn compare_update(
        &mut self,
        what: &str,
        all: &Arrays,
        key: &str,
        name: &str,
        start: &HostTensor,
        end: &HostTensor,
    ) {
        let Some(allowed) = self.allowed.update_of(name) else {
            return;
        };
        let (Some((after, want)), Some((before, _))) =
            (recorded(all, key, &end.data, end.cols), recorded(all, key, &start.data, start.cols))
        else {
            return;
        };
        let ours = after.iter().zip(&before).map(|(a, b)| a - b);
        let error = relative(ours, want.data.iter().zip(&before).map(|(w, b)| w - b));
        self.report.compare(what, name, error, allowed);
    }
}
