//! Micro-batches on a device, from vectors.

use ringtune::backend::Backend;
use ringtune::batch::{Batch, BatchIndex, IGNORE, MicroBatch};

/// A micro-batch on a device.
pub fn loaded<B: Backend>(dev: &B, tokens: &[i32], targets: &[i32], doc_start: &[i32]) -> Batch<B> {
    let (tokens, targets, doc_start) = (tokens.to_vec(), targets.to_vec(), doc_start.to_vec());
    let mut batch = dev.new_batch(tokens.len()).unwrap();
    let host = MicroBatch { tokens, targets, doc_start, ..Default::default() };
    dev.load_batch(&mut batch, BatchIndex::default().view(&host)).unwrap();
    batch
}

/// A micro-batch of which only the documents matter.
pub fn documents<B: Backend>(dev: &B, doc_start: &[i32]) -> Batch<B> {
    let n = doc_start.len();
    loaded(dev, &vec![0; n], &vec![IGNORE; n], doc_start)
}
