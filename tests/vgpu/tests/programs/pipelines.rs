//! Pipelines that load ahead of the end of their input: what they load there is dropped, and no mistake.

use vgpu::{Checks, Config, Error, FaultKind, Memory, Module};

use crate::device::{Device, SEEDS, close, noise, noise_halves, shape, value};

/// Sums over `tiles` of rows in memory of which nothing behind the last tile was written.
fn sums(kernel: &str, row: usize, tiles: usize, seed: Option<u64>) {
    let mut d = Device::new(include_str!("../cuda/pipelines.ptx"));
    let x = noise(tiles * row, 3);
    let dx = d.alloc((tiles + 3) * row * 4);
    d.memory.write(dx, &x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    let dy = d.alloc(32 * 4);
    let shape = Config { checks: Checks::default(), ..shape([1, 1, 1], 32, 0, seed) };
    d.launch(kernel, shape, &[&dx, &dy, &(tiles as i32)]);
    let want: Vec<f64> = (0..32).map(|i| (0..tiles).map(|t| f64::from(x[t * row + i])).sum()).collect();
    close(&format!("{kernel} {tiles}"), &d.read(dy, 32), &want, |_| 1e-5);
}

#[test]
fn pipelines_may_load_ahead_of_the_end() {
    for tiles in [1, 2, 3, 7] {
        for seed in SEEDS {
            sums("ahead_in_registers", 32, tiles, seed);
            sums("ahead_by_copies", 128, tiles, seed);
            products(tiles, seed);
        }
    }
}

/// `ahead_of_products`: fragments of a stage that was never filled are loaded and dropped.
fn products(tiles: usize, seed: Option<u64>) {
    let mut d = Device::new(include_str!("../cuda/pipelines.ptx"));
    let (a, b) = (noise_halves(tiles * 256, 1), noise_halves(tiles * 128, 2));
    let (da, db, dd) = (d.halves(&a), d.halves(&b), d.alloc(128 * 4));
    d.launch("ahead_of_products", shape([1, 1, 1], 32, 0, seed), &[&da, &db, &dd, &(tiles as i32)]);
    let want: Vec<f64> = (0..128)
        .map(|i| {
            let of = |t: usize, k: usize| value(a[t * 256 + i / 8 * 16 + k]) * value(b[t * 128 + k * 8 + i % 8]);
            (0..tiles).flat_map(|t| (0..16).map(move |k| (t, k))).map(|(t, k)| of(t, k)).sum()
        })
        .collect();
    close(&format!("ahead_of_products {tiles}"), &d.read(dd, 128), &want, |_| 1e-5 * tiles as f64);
}

#[test]
fn one_tile_too_many_is_found() {
    let mut memory = Memory::new();
    let module = Module::load(include_str!("../cuda/pipelines.ptx"), &mut memory).unwrap();
    let (x, y) = (memory.alloc(5 * 128 * 4).unwrap(), memory.alloc(32 * 4).unwrap());
    memory.fill(x, 0, 128 * 4).unwrap();
    // Rows of 32 words and of 128: four are written, and one.
    for (kernel, written) in [("ahead_in_registers", 4), ("ahead_by_copies", 1)] {
        for tiles in [written, written + 1] {
            let args = [&x.to_le_bytes()[..], &y.to_le_bytes(), &i32::to_le_bytes(tiles)];
            match module.launch(kernel, &Config { block: [32, 1, 1], ..Config::default() }, &args, &memory) {
                Ok(_) => assert_eq!(tiles, written, "{kernel}"),
                Err(Error::Fault(f)) => {
                    assert_eq!((f.kind, tiles), (FaultKind::Uninitialised, written + 1), "{f:?}");
                    assert!(f.message.starts_with("the value of a store to global memory was never written"), "{f:?}");
                }
                Err(e) => panic!("{kernel}: {e}"),
            }
        }
    }
}
