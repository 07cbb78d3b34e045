//! Merging adapters, and weights on their way between files and a device.

use std::path::{Path, PathBuf};

use half::bf16;
use ringtune::cpu::Cpu;
use ringtune::hf::merge::{Adapted, Merged};
use ringtune::hf::peft::{self, Adapter};
use ringtune::hf::safetensors::{ModelFiles, TensorFile};
use ringtune::hf::save::{SaveOptions, save_model};
use ringtune::hf::{HostTensor, SaveDType, TensorSource, device};
use ringtune::model::weights::{Kind, Part, Place, Product, Weights};
use ringtune::tensor::{DType, Device};

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn model(name: &str) -> ModelFiles {
    ModelFiles::open(&data().join("model").join(name)).unwrap()
}

fn golden_adapter(name: &str) -> PathBuf {
    data().join("golden").join(name).join("adapter_all")
}

/// The tensor of an adapter by its name in the model.
fn tensor(adapter: &Adapter, at: Place) -> ringtune::error::Result<HostTensor> {
    TensorFile::open(&adapter.dir().join(peft::WEIGHTS))?.load(&format!("base_model.model.{at}"))
}

/// Largest difference relative to the norm of the expected tensor.
fn relative(found: &HostTensor, expected: &HostTensor) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let error: f64 = found.data.iter().zip(&expected.data).map(|(a, b)| square(a - b)).sum();
    (error / expected.data.iter().map(|&x| square(x)).sum::<f64>()).sqrt()
}

#[test]
fn merging_gives_the_recorded_weights() {
    let base = model("tiny-llama-tied");
    let adapter = Adapter::open(&golden_adapter("tiny-llama-tied")).unwrap();
    let merged = Merged::new(&base, &adapter).unwrap();
    let expected = TensorFile::open(&data().join("golden/tiny-llama-tied/merged_all_linears.safetensors")).unwrap();
    assert_eq!(expected.names().count(), 14);
    let weights = Weights::of(base.config());
    let products = weights.places().into_iter().map(|(at, _)| at).filter(|at| at.kind() == Kind::Matrix);
    assert_eq!(products.clone().count(), 14);
    for at in products {
        let (want, got) = (expected.load(&at.to_string()).unwrap(), merged.load(at).unwrap());
        assert!(relative(&got, &want) < 1e-6, "{at}: {}", relative(&got, &want));
        assert!(relative(&base.load(at).unwrap(), &want) > 1e-3, "{at}: the update is not small");
    }
    // The merged model in bf16: each value is within half a unit in the last place, the one rounding, of the f32 one.
    let dir = tempfile::tempdir().unwrap();
    save_model(dir.path(), &merged, SaveOptions::default()).unwrap();
    let (ours, theirs) = (ModelFiles::open(dir.path()).unwrap(), model("tiny-llama-tied-merged-all"));
    assert_eq!((ours.dtype(), theirs.dtype()), (SaveDType::Bf16, SaveDType::Bf16));
    let mut different = 0;
    for (at, _) in weights.places() {
        let exact = merged.load(at).unwrap();
        let (a, b) = (ours.load(at).unwrap(), theirs.load(at).unwrap());
        for ((x, a), b) in exact.data.iter().zip(&a.data).zip(&b.data) {
            assert_eq!(bf16::from_f32(*x).to_f32(), *a, "{at}");
            assert!((b - x).abs() <= x.abs() * (1.0 / 256.0 + 1e-6) + 1e-6, "{at}: {b} for {x}");
            different += usize::from(a != b);
        }
    }
    // Sums in another order differ in the last bit of f32, which now and then tips a rounding.
    assert!(different < 10, "{different} of {} values differ", base.bytes() / 4);
}

#[test]
fn an_update_that_overflows_is_refused() {
    let base = model("qwen3-tied");
    let adapter = Adapter::open(&golden_adapter("qwen3-tied")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let huge = |at: Place| {
        let mut t = tensor(&adapter, at)?;
        if let Place::Layer(1, Part::LoraA(Product::Up) | Part::LoraB(Product::Up)) = at {
            t.data.fill(1e30);
        }
        Ok(t)
    };
    peft::save_adapter(out.path(), &adapter.config, base.config(), false, huge).unwrap();
    let adapter = Adapter::open(out.path()).unwrap();
    let target = tempfile::tempdir().unwrap();
    let merged = Merged::new(&base, &adapter).unwrap();
    let e = save_model(target.path(), &merged, SaveOptions::default()).unwrap_err().to_string();
    assert!(e.contains("merged model.layers.1.mlp.up_proj.weight: value at row 0, column 0 is inf"), "{e}");
    assert!(!target.path().join("model.safetensors").exists());
}

#[test]
fn a_device_loads_base_and_adapter() {
    let dev = Cpu::new(Some(1)).unwrap();
    for (name, dtype) in [("qwen2-untied", DType::F32), ("qwen2-untied", DType::Bf16), ("tiny-llama-tied", DType::Bf16)]
    {
        let base = model(name);
        let adapter = Adapter::open(&golden_adapter(name)).unwrap();
        let adapted = Adapted::new(&base, &adapter).unwrap();
        let mut params = device::load_params(&dev, &adapted, dtype).unwrap();
        device::load_adapter(&dev, &mut params, &adapter).unwrap();
        let round = |x: f32| {
            if dtype == DType::Bf16 { bf16::from_f32(x).to_f32() } else { x }
        };
        for (at, t) in params.places() {
            let got = device::download(&dev, t).unwrap();
            let low_rank = at.kind() == Kind::LowRank;
            let want = if low_rank { tensor(&adapter, at).unwrap() } else { base.load(at).unwrap() };
            let want: Vec<f32> = want.data.into_iter().map(|x| if low_rank { x } else { round(x) }).collect();
            assert_eq!((t.dtype(), got.data), (if low_rank { DType::F32 } else { dtype }, want), "{at}");
        }
        // And back: what is on the device is saved as an adapter and as a model.
        let dir = tempfile::tempdir().unwrap();
        let source = device::DeviceSource::new(&dev, base.config(), &params);
        peft::save_adapter(dir.path(), &adapter.config, base.config(), false, |at| source.get(at)).unwrap();
        let key = Place::Layer(1, Part::LoraB(Product::Down));
        assert!(tensor(&Adapter::open(dir.path()).unwrap(), key).unwrap() == tensor(&adapter, key).unwrap());
        save_model(dir.path(), &source, SaveOptions::default()).unwrap();
        assert_eq!(ModelFiles::open(dir.path()).unwrap().config(), base.config());
        assert!(source.get(Place::Layer(9, Part::Matrix(Product::Up))).is_err());
    }
}

#[test]
fn masters_are_saved_instead_of_rounded_weights() {
    let dev = Cpu::new(Some(1)).unwrap();
    let base = model("tiny-llama-tied");
    let params = device::load_params(&dev, &base, DType::Bf16).unwrap();
    let exact = base.load(Place::Embed).unwrap();
    let rows = HostTensor { rows: 2, cols: 64, data: exact.data[4000 * 64..4002 * 64].to_vec() };
    let norm = base.load(Place::FinalNorm).unwrap();
    let masters = [
        (Place::Embed, device::upload(&dev, &rows, DType::F32).unwrap()),
        (Place::FinalNorm, device::upload(&dev, &norm, DType::F32).unwrap()),
    ];
    let source = device::DeviceSource::new(&dev, base.config(), &params)
        .with_masters(4000, |at| masters.iter().find(|(place, _)| *place == at).map(|(_, t)| t));
    let embed = source.get(Place::Embed).unwrap();
    let rounded = |x: f32| bf16::from_f32(x).to_f32();
    for (i, (&a, &x)) in embed.data.iter().zip(&exact.data).enumerate() {
        let trained = (4000 * 64..4002 * 64).contains(&i);
        assert_eq!(a, if trained { x } else { rounded(x) }, "value {i}");
    }
    assert_eq!(source.get(Place::FinalNorm).unwrap(), norm);
}

#[test]
fn uploads_come_back_as_they_were() {
    let dev = Cpu::new(Some(1)).unwrap();
    let host = HostTensor { rows: 2, cols: 3, data: vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0] };
    let t = device::upload(&dev, &host, DType::Bf16).unwrap();
    assert_eq!(device::download(&dev, &t).unwrap(), host);
    dev.synchronize().unwrap();
}
