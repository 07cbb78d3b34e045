//! Micro-batches are copied to the device in a stream of their own while others are computed. The emulator works on what is queued as
//! late, as early and as mixed as its rules allow: an event that is missing gives words of another micro-batch under some of its seeds.

use std::process::Command;

use ringtune::backend::Backend;
use ringtune::batch::{BatchIndex, MicroBatch};
use ringtune::tensor::{DType, Device};

use crate::close::{assert_same, tensor, values};
use crate::skip::device;

/// Micro-batches, so many that the slots are used again and again.
const MANY: usize = 24;

/// Micro-batch `k`: other tokens and another length than those before it, some rows without a target.
fn batch(k: usize) -> MicroBatch {
    let n = 300 - 11 * (k % 7);
    let tokens: Vec<i32> = (0..n).map(|i| ((i * 7 + k * 131) % 1000) as i32).collect();
    let targets = (0..n).map(|i| if i % 3 == k % 3 { ringtune::batch::IGNORE } else { tokens[(i + 1) % n] }).collect();
    let doc_start = (0..n).map(|i| (i / 50 * 50) as i32).collect();
    MicroBatch { n_valid: n - n.div_ceil(3), tokens, targets, doc_start, samples: Vec::new() }
}

/// What [`an_upload_overtakes_nothing`] starts; on a GPU it runs as it is.
#[test]
fn each_micro_batch_is_read_as_it_was_loaded() {
    let Some(dev) = device() else { return };
    let cols = 8;
    let table: Vec<f32> = (0..1000 * cols).map(|i| i as f32).collect();
    let on_device = tensor(&dev, 1000, cols, DType::F32, &table);
    let mut loaded = dev.new_batch(300).unwrap();
    let mut index = BatchIndex::default();
    let alloc = || dev.alloc(300, cols, DType::F32).unwrap();
    let (mut rows, mut picked): (Vec<_>, Vec<_>) = (0..MANY).map(|_| (alloc(), alloc())).unzip();
    for k in 0..MANY {
        let host = batch(k);
        let view = index.view(&host);
        let (n, targets) = (view.tokens.len(), view.rows.len());
        dev.load_batch(&mut loaded, view).unwrap();
        rows[k].set_rows(n);
        dev.embedding_forward(&mut rows[k], &on_device, &loaded.tokens).unwrap();
        picked[k].set_rows(targets);
        dev.gather_rows(&mut picked[k], &rows[k], &loaded.rows).unwrap();
    }
    for k in 0..MANY {
        let host = batch(k);
        let row = |i: usize| &table[host.tokens[i] as usize * cols..][..cols];
        let all: Vec<f32> = (0..host.tokens.len()).flat_map(row).copied().collect();
        assert_same(&format!("tokens of micro-batch {k}"), &values(&dev, &rows[k]), &all);
        let with_target = (0..host.tokens.len()).filter(|&i| host.targets[i] >= 0);
        let all: Vec<f32> = with_target.flat_map(row).copied().collect();
        assert_same(&format!("rows with a target of micro-batch {k}"), &values(&dev, &picked[k]), &all);
    }
}

#[test]
fn an_upload_overtakes_nothing() {
    if !device().is_some_and(|dev| dev.properties().emulated) {
        return;
    }
    for seed in 0..12 {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "uploads::each_micro_batch_is_read_as_it_was_loaded", "--nocapture"]);
        let output = child.env("VGPU_SEED", seed.to_string()).output().unwrap();
        assert!(output.status.success(), "seed {seed}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
