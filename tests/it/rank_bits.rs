//! Only the product of ranks and accumulation matters: every split of a step's micro-batches over ranks gives the same files.

use ringtune::checkpoint::manifest;

use crate::mpirun;
use crate::ringrun_program::{Training, processes, succeed};
use crate::runs::{metrics, rows, same_file};

const STEPS: u64 = 7;
/// Micro-batches of a step, ranks, and whether each holds a part of the optimiser's state.
type Split = (usize, usize, bool);
/// 1 x 4 = 2 x 2 = 4 x 1, and 1 x 6 = 3 x 2 = 6 x 1.
const SPLITS: [Split; 6] = [(4, 2, false), (4, 4, false), (4, 2, true), (6, 3, false), (6, 6, false), (6, 3, true)];
const UNDER_MPIRUN: [Split; 2] = [(4, 4, false), (4, 2, true)];

/// What is trained: a model, the words of it, and the file with the weights.
struct Case {
    model: &'static str,
    flags: &'static [&'static str],
    weights: &'static str,
}

/// All weights, rows by themselves.
const TIED: Case =
    Case { model: crate::runs::MODEL, flags: &["--no_lora", "--no_packing"], weights: "model.safetensors" };
/// All weights and a head of its own, packed: rows have targets in some turns alone.
const UNTIED: Case =
    Case { model: "tests/data/model/tiny-llama-untied", flags: &["--no_lora"], weights: "model.safetensors" };
/// Low-rank updates with dropout, packed.
const LORA: Case = Case {
    model: crate::runs::MODEL,
    flags: &["--lora_dropout", "0.1", "--lora_r", "4"],
    weights: "adapter_model.safetensors",
};

/// Losses, evaluations, weights and moments of every split are those of one rank; an epoch ends on the way, with a step that is not full.
fn alike(case: &Case, micro_batch: usize, splits: &[Split], under_mpirun: bool) {
    let dir = tempfile::tempdir().unwrap();
    rows(dir.path(), 25);
    for micro_batches in [4, 6] {
        let splits: Vec<&Split> = splits.iter().filter(|split| split.0 == micro_batches).collect();
        let t = |zero: &'static str| {
            let flags = [case.flags, &["--zero", zero]].concat();
            Training { micro_batches, micro_batch, flags, model: case.model, ..Training::new(dir.path(), STEPS) }
        };
        let one = dir.path().join(format!("one-{micro_batches}"));
        if !splits.is_empty() {
            succeed(t("0").alone(&format!("one-{micro_batches}")));
            let lines = metrics(&one);
            assert!(lines.iter().any(|line| line["eval_loss"].is_number()), "it evaluates");
            let ended = |line: &serde_json::Value| line["epoch"].as_f64().is_some_and(|epoch| epoch >= 1.0);
            assert!(lines.iter().any(ended), "an epoch ends: {lines:?}");
        }
        for &&(_, ranks, zero) in &splits {
            let (t, name) = (t(if zero { "1" } else { "0" }), format!("{micro_batches}-{ranks}-{zero}"));
            succeed(if under_mpirun { mpirun::mpirun(&t, &name, ranks) } else { t.ranks(&name, ranks, &[]) });
            let out = dir.path().join(&name);
            same_file(&one.join(case.weights), &out.join(case.weights));
            assert_eq!(metrics(&one), metrics(&out), "{name}");
            let [ours, theirs] = [&out, &one].map(|run| manifest::path_of(run, STEPS));
            same_file(&ours.join(case.weights), &theirs.join(case.weights));
            if !zero {
                same_file(&ours.join("optimizer.safetensors"), &theirs.join("optimizer.safetensors"));
            }
        }
    }
    assert_eq!(processes(&dir.path().display().to_string()), []);
}

#[test]
fn a_tied_model_in_micro_batches_of_one_row_is_split_in_any_way() {
    alike(&TIED, 1, &SPLITS, false);
}

#[test]
fn a_tied_model_in_micro_batches_of_two_rows_is_split_in_any_way() {
    alike(&TIED, 2, &SPLITS, false);
}

#[test]
fn a_model_with_a_head_in_micro_batches_of_one_row_is_split_in_any_way() {
    alike(&UNTIED, 1, &SPLITS, false);
}

#[test]
fn a_model_with_a_head_in_micro_batches_of_two_rows_is_split_in_any_way() {
    alike(&UNTIED, 2, &SPLITS, false);
}

#[test]
fn updates_with_dropout_in_micro_batches_of_one_row_are_split_in_any_way() {
    alike(&LORA, 1, &SPLITS, false);
}

#[test]
fn updates_with_dropout_in_micro_batches_of_two_rows_are_split_in_any_way() {
    alike(&LORA, 2, &SPLITS, false);
}

#[test]
fn mpirun_splits_as_ringrun_does() {
    if !mpirun::is_there() {
        return;
    }
    for (case, micro_batch) in [(&TIED, 1), (&UNTIED, 2), (&LORA, 1), (&LORA, 2)] {
        alike(case, micro_batch, &UNDER_MPIRUN, true);
    }
}
