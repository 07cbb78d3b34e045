//! Growing the vocabulary: new rows, padding rows, ties.

use std::path::{Path, PathBuf};

use ringtune::hf::resize::{NewToken, Resize, Resized};
use ringtune::hf::safetensors::ModelFiles;
use ringtune::hf::save::{SaveOptions, save_model};
use ringtune::hf::{SaveDType, TensorSource};
use ringtune::model::weights::Place;

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/model").join(name)
}

#[test]
fn new_tokens_start_from_their_models_and_ties_stay() {
    for name in ["tiny-llama-tied", "tiny-llama-untied"] {
        let base = ModelFiles::open(&model(name)).unwrap();
        let tokens = vec![NewToken { id: 4096, like: 2 }, NewToken { id: 4097, like: 3 }];
        let how = Resize { tokens, pad_to: Some(4160), seed: 7 };
        let grown = Resized::new(&base, how.clone()).unwrap();
        assert_eq!((grown.config().vocab_size, grown.config().n_classes), (4160, 4098));
        assert_eq!(grown.first_new_row(), Some(4096));
        let dir = tempfile::tempdir().unwrap();
        save_model(dir.path(), &grown, SaveOptions { dtype: SaveDType::F32, max_shard_bytes: u64::MAX }).unwrap();
        let back = ModelFiles::open(dir.path()).unwrap();
        assert_eq!(back.config(), grown.config());
        assert_eq!(back.config().tied, name == "tiny-llama-tied");
        for tensor in [Place::Embed, Place::Head].into_iter().filter(|&t| t == Place::Embed || !base.config().tied) {
            let (old, new) = (base.load(tensor).unwrap(), back.load(tensor).unwrap());
            assert_eq!(&new.data[..old.data.len()], &old.data[..], "old rows stay as they are");
            for (row, like) in [(4096, 2), (4097, 3)] {
                let norm = |v: &[f32]| v.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
                let diff: Vec<f32> = new.row(row).iter().zip(old.row(like)).map(|(a, b)| a - b).collect();
                let share = norm(&diff) / norm(old.row(like));
                assert!((0.005..0.02).contains(&share), "{tensor} row {row}: {share}");
            }
            assert!(new.data[4098 * new.cols..].iter().all(|&x| x == 0.0), "padding rows are zero");
        }
        let again = Resized::new(&base, how).unwrap().load(Place::Embed).unwrap();
        assert!(again == back.load(Place::Embed).unwrap(), "the noise depends on the seed alone");
        let other = Resize { tokens: vec![NewToken { id: 4096, like: 2 }], pad_to: None, seed: 8 };
        assert_ne!(Resized::new(&base, other).unwrap().load(Place::Embed).unwrap().row(4096), again.row(4096));
    }
}

#[test]
fn impossible_vocabularies_are_refused() {
    let base = ModelFiles::open(&model("qwen3-tied")).unwrap();
    let refuse = |tokens: Vec<NewToken>, pad_to| Resized::new(&base, Resize { tokens, pad_to, seed: 0 }).err().unwrap();
    let e = refuse(vec![], Some(700));
    assert!(e.to_string().contains("--pad-vocab-to 700: the vocabulary already has 720 tokens"));
    assert_eq!(e.exit_code(), 2);
    assert!(refuse(vec![NewToken { id: 720, like: 720 }], None).to_string().contains("starts from token 720"));
    assert!(refuse(vec![NewToken { id: 722, like: 3 }], None).to_string().contains("without a gap"));
    let pair = vec![NewToken { id: 720, like: 3 }, NewToken { id: 720, like: 2 }];
    assert!(refuse(pair, None).to_string().contains("without a gap"));
}
