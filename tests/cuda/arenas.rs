//! What is trained lies in one piece of memory of each kind, with the same offsets: weights, masters, gradients.

use ringtune::comm::bucket::BLOCK;
use ringtune::hf::safetensors::ModelFiles;
use ringtune::model::trained;
use ringtune::settings::TrainSettings;
use ringtune::tensor::DType;
use ringtune::train::setup;

use crate::skip::device;

#[test]
fn weights_masters_and_gradients_have_the_same_offsets_in_a_piece_each() {
    let Some(dev) = device() else { return };
    for (model, lora) in [("tiny-llama-untied", false), ("tiny-llama-tied", true)] {
        let base = ModelFiles::open(&crate::skip::root().join("tests/data/model").join(model)).unwrap();
        let mut s = TrainSettings { dtype: DType::Bf16, ..TrainSettings::default() };
        s.lora = s.lora.filter(|_| lora);
        let mut work = setup::workload(&dev, &base, &s, None, 128).unwrap();
        let optimizer = &work.optimizer;
        let all = trained(&mut work.model.params, &work.grads);
        assert!(all.len() > 8, "{model}");
        let mut offset = 0;
        let begin = |at| {
            let master = optimizer.master(at).unwrap();
            master.buf.address()
        };
        let (first, weight, grad) = (begin(all[0].0), all[0].1.buf.address(), all[0].2.buf.address());
        for (at, w, g) in &all {
            assert_eq!(g.buf.address() - grad, 4 * offset, "{model}: gradient of {at}");
            assert_eq!(w.buf.address() - weight, 2 * offset, "{model}: {at}");
            assert_eq!(begin(*at) - first, 4 * offset, "{model}: master of {at}");
            offset += g.len().next_multiple_of(BLOCK) as u64;
        }
    }
}
