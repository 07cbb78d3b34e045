//! Races are found with both accesses named, and correct kernels raise no alarm.

use vgpu::{Checks, Config, Error, Fault, FaultKind, Memory, Module};

/// Runs a kernel of races.cu on buffers of words; those given as `None` start unwritten (`n` words).
fn run(
    kernel: &str,
    shape: (u32, u32),
    buffers: &[Option<&[u32]>],
    races: bool,
    seed: Option<u64>,
) -> Result<Vec<Vec<u32>>, Fault> {
    let mut m = Memory::new();
    let module = Module::load(include_str!("cuda/races.ptx"), &mut m).unwrap();
    let n = |b: &Option<&[u32]>| b.map_or(4096, <[u32]>::len);
    let at: Vec<u64> = buffers.iter().map(|b| m.alloc(n(b) * 4).unwrap()).collect();
    for (b, a) in buffers.iter().zip(&at) {
        if let Some(words) = b {
            m.write(*a, &words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>()).unwrap();
        }
    }
    let config = Config {
        grid: [shape.0, 1, 1],
        block: [shape.1, 1, 1],
        budget: 10_000_000,
        checks: Checks { races },
        seed,
        ..Config::default()
    };
    let args: Vec<[u8; 8]> = at.iter().map(|a| a.to_le_bytes()).collect();
    let args: Vec<&[u8]> = args.iter().map(|a| a.as_slice()).collect();
    match module.launch(kernel, &config, &args, &m) {
        Ok(_) => {}
        Err(Error::Fault(f)) => return Err(*f),
        Err(e) => panic!("{kernel}: {e}"),
    }
    let read = |(b, a): (&Option<&[u32]>, &u64)| {
        let mut bytes = vec![0; n(b) * 4];
        m.read(*a, &mut bytes).unwrap();
        bytes.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect()
    };
    Ok(buffers.iter().zip(&at).map(read).collect())
}

fn race(kernel: &str, shape: (u32, u32), buffers: &[Option<&[u32]>]) -> Fault {
    for seed in [None, Some(1), Some(2)] {
        let f = run(kernel, shape, buffers, true, seed).expect_err(kernel);
        assert_eq!(f.kind, FaultKind::Race, "{kernel}, seed {seed:?}: {}", f.message);
    }
    run(kernel, shape, buffers, true, None).expect_err(kernel)
}

#[test]
fn a_missing_barrier_is_found_and_both_sides_are_named() {
    // Without a seed warp 0 runs first; what it reads is unwritten, which is found without race detection too.
    let f = run("racy_shared", (1, 64), &[None], true, None).unwrap_err();
    assert_eq!(f.kind, FaultKind::Uninitialised);
    let f = race("racy_rounds", (1, 256), &[None]);
    assert!(f.message.contains("nothing orders it after the write by thread"), "{}", f.message);
    // A load of this round, and the store of the next one by a faster warp, as lines of races.cu.
    assert_eq!(f.source_line, Some(19), "{f:?}");
    assert!(f.message.contains("(CUDA line 17)"), "{}", f.message);
    assert!(f.text.starts_with("ld.shared"), "{}", f.text);
    // Without race detection the order of the emulator hides it.
    assert!(run("racy_rounds", (1, 256), &[None], false, None).is_ok());
}

#[test]
fn blocks_that_touch_one_word_are_found() {
    let f = race("racy_blocks", (2, 64), &[None]);
    assert!(f.message.contains("Global memory") && f.message.contains("of block"), "{}", f.message);
    let f = race("racy_sum", (2, 32), &[Some(&[0])]);
    assert!(f.message.contains("CUDA line 31"), "{}", f.message);
    race("racy_flag", (2, 1), &[Some(&[0, 0]), Some(&[0])]);
}

#[test]
fn a_consumer_that_frees_its_buffer_too_early_is_found() {
    race("racy_pipe", (1, 64), &[None]);
}

#[test]
fn a_copy_read_by_other_warps_needs_a_barrier_after_its_wait() {
    let x: Vec<u32> = (0..64).collect();
    let f = (1..200).find_map(|seed| {
        let f = run("racy_copy", (1, 64), &[Some(&x), None], true, Some(seed)).unwrap_err();
        assert!(matches!(f.kind, FaultKind::Race | FaultKind::Uninitialised), "{f:?}");
        // In other orders the data comes after the read, or the read value is used before.
        (f.kind == FaultKind::Race && f.message.contains("cp.async")).then_some(f)
    });
    f.expect("an order in which the data is there");
    let out = run("clean_copy", (1, 64), &[Some(&x), None], true, None).unwrap();
    assert_eq!(out[1][..64], (0..64).map(|t| t ^ 32).collect::<Vec<_>>());
}

#[test]
fn correct_kernels_raise_no_alarm() {
    for seed in [None, Some(1), Some(2), Some(3)] {
        let go = |kernel: &str, shape, buffers: &[Option<&[u32]>]| {
            run(kernel, shape, buffers, true, seed)
                .unwrap_or_else(|f| panic!("{kernel}, seed {seed:?}: {}: {}", f.text, f.message))
        };
        go("clean_rounds", (1, 256), &[None]);
        let out = go("clean_bytes", (3, 256), &[None]);
        let byte = |i: usize| (out[0][i / 4] >> (8 * (i % 4))) as u8;
        assert!((0..768).all(|i| {
            let t = i / 3;
            byte(i) == ((t % 32) * 8 + t / 32) as u8
        }));
        let out = go("clean_last_block", (5, 64), &[None, Some(&[0]), None]);
        assert_eq!(out[2][0], 5 * (0..64).sum::<u32>());
        let out = go("clean_flag", (2, 1), &[Some(&[0, 0]), Some(&[0])]);
        assert_eq!(out[0][0], 7);
        let out = go("clean_pipe", (1, 64), &[None]);
        assert_eq!(out[0][5], (0..8).map(|i| i * 100 + 5).sum::<u32>());
    }
}

#[test]
fn the_environment_chooses_checks() {
    if std::env::var_os("VGPU_CHECK").is_none() {
        assert_eq!(Checks::from_env().unwrap(), Checks::default());
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_check_from_the_environment", "--nocapture"])
        .env("VGPU_CHECK", "races")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout).into_owned();
    assert!(text.contains("found Some(Race)"), "{text}");
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_check_from_the_environment", "--nocapture"])
        .env("VGPU_CHECK", "rases")
        .output()
        .unwrap();
    assert!(!child.status.success() && String::from_utf8_lossy(&child.stderr).contains("there is no check rases"));
}

/// The child of the test above; by itself it shows that the check is off.
#[test]
fn a_check_from_the_environment() {
    let kind = run("racy_rounds", (1, 256), &[None], false, None).err().map(|f| f.kind);
    println!("found {kind:?}");
    assert_eq!(kind.is_some(), std::env::var_os("VGPU_CHECK").is_some());
}
