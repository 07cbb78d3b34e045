//! Planted mistakes (tests/cuda/planted.cu, compiled by NVRTC 12.9.86 with line information): each is found, with its kind, kernel,
//! line of the CUDA source and thread. The counters see slow accesses that are no mistakes.

use vgpu::{Checks, Config, Counters, Error, Fault, FaultKind, Memory, Module};

const SOURCE: &str = include_str!("cuda/planted.cu");

/// The line of the source that the kernel's mark stands on.
fn marked(kernel: &str) -> u32 {
    let mark = format!("// <- {kernel}");
    let mut lines = SOURCE.lines().zip(1..).filter(|(l, _)| l.ends_with(&mark));
    let (_, line) = lines.next().unwrap_or_else(|| panic!("no line is marked {mark}"));
    assert!(lines.next().is_none(), "{mark} stands twice");
    line
}

/// Memory with the module of the mistakes.
struct Bench {
    memory: Memory,
    module: Module,
}

impl Bench {
    fn new() -> Bench {
        let mut memory = Memory::new();
        let module = Module::load(include_str!("cuda/planted.ptx"), &mut memory).unwrap();
        Bench { memory, module }
    }

    /// `n` floats, all 1.
    fn ones(&mut self, n: usize) -> u64 {
        let at = self.fresh(n);
        self.memory.write(at, &1f32.to_le_bytes().repeat(n)).unwrap();
        at
    }

    /// `n` floats that nobody has written.
    fn fresh(&mut self, n: usize) -> u64 {
        self.memory.alloc(n * 4).unwrap()
    }

    fn run(&self, kernel: &str, shape: Config, args: &[Vec<u8>]) -> Result<Counters, Error> {
        let slices: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
        self.module.launch(kernel, &shape, &slices, &self.memory)
    }

    /// Runs the kernel, which must fault at its mark.
    #[track_caller]
    fn fault(&self, kernel: &str, shape: Config, args: &[Vec<u8>]) -> Fault {
        let f = match self.run(kernel, shape, args) {
            Err(Error::Fault(f)) => *f,
            other => panic!("{kernel}: {other:?}"),
        };
        assert_eq!((f.kernel.as_str(), f.source_line), (kernel, Some(marked(kernel))), "{f:?}");
        f
    }
}

fn threads(n: u32) -> Config {
    Config { block: [n, 1, 1], budget: 1_000_000, threads: 1, seed: None, ..Config::default() }
}

fn p(x: u64) -> Vec<u8> {
    x.to_le_bytes().to_vec()
}

fn i(x: i32) -> Vec<u8> {
    x.to_le_bytes().to_vec()
}

#[test]
fn one_element_past_the_end() {
    let mut b = Bench::new();
    let x = b.ones(40);
    let f = b.fault("past_the_end", threads(64), &[p(x), i(40)]);
    assert_eq!((f.kind, f.thread), (FaultKind::OutOfBounds, 40));
    assert!(f.text.starts_with("st.global"), "{}", f.text);

    let (x, y) = (b.ones(40), b.fresh(40));
    let grid = Config { grid: [2, 1, 1], ..threads(32) };
    let f = b.fault("read_past_the_end", grid, &[p(x), p(y), i(40)]);
    assert_eq!((f.kind, f.block, f.thread), (FaultKind::OutOfBounds, [1, 0, 0], 8));

    let f = b.fault("before_the_start", threads(32), &[p(x)]);
    assert_eq!((f.kind, f.thread), (FaultKind::OutOfBounds, 0));

    let shared = Config { dynamic_shared: 64 * 4, ..threads(64) };
    let y = b.fresh(64);
    let f = b.fault("past_shared", shared, &[p(y)]);
    assert_eq!((f.kind, f.thread), (FaultKind::OutOfBounds, 63));
}

#[test]
fn misaligned_vector_load() {
    let mut b = Bench::new();
    let (x, y) = (b.ones(260), b.fresh(256));
    let f = b.fault("misaligned", threads(64), &[p(x), p(y)]);
    assert_eq!((f.kind, f.thread), (FaultKind::Misaligned, 0));
}

#[test]
fn use_after_free() {
    let mut b = Bench::new();
    let (x, y) = (b.ones(64), b.fresh(64));
    b.memory.free(x).unwrap();
    // At the load, which stands before the line that is marked for values that nobody wrote.
    match b.run("unwritten", threads(64), &[p(x), p(y)]) {
        Err(Error::Fault(f)) => {
            let line = Some(marked("unwritten") - 1);
            assert_eq!((f.kind, f.thread, f.source_line), (FaultKind::UseAfterFree, 0, line));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn reads_of_what_was_never_written() {
    let mut b = Bench::new();
    let (x, y) = (b.fresh(64), b.fresh(64));
    // All but element 37 of the second warp.
    for e in (0..64).filter(|e| *e != 37) {
        b.memory.write(x + 4 * e, &[0; 4]).unwrap();
    }
    let f = b.fault("unwritten", threads(64), &[p(x), p(y)]);
    assert_eq!((f.kind, f.thread), (FaultKind::Uninitialised, 37));
    let load = format!("(CUDA line {})", marked("unwritten") - 1);
    assert!(f.text.starts_with("st.global") && f.message.ends_with(&load), "{f:?}");
    let f = b.fault("unwritten_shared", threads(32), &[p(y)]);
    assert_eq!((f.kind, f.thread), (FaultKind::Uninitialised, 31));
    let f = b.fault("unwritten_local", threads(32), &[p(y), i(3)]);
    assert_eq!((f.kind, f.thread), (FaultKind::Uninitialised, 0));
}

#[test]
fn copies_without_their_wait() {
    let mut b = Bench::new();
    let (x, y) = (b.ones(64), b.fresh(64));
    for kernel in ["no_wait", "wait_for_the_wrong_group"] {
        let f = b.fault(kernel, threads(32), &[p(x), p(y)]);
        assert_eq!((f.kind, f.thread), (FaultKind::Uninitialised, 0));
    }
}

#[test]
fn barriers_that_not_all_reach() {
    let mut b = Bench::new();
    let y = b.ones(64);
    let f = b.fault("divergent", threads(32), &[p(y)]);
    assert_eq!(f.kind, FaultKind::DivergentBarrier);
    let f = b.fault("wrong_mask", threads(32), &[p(y)]);
    assert_eq!(f.kind, FaultKind::BadMask);
}

#[test]
fn endless_loops() {
    let mut b = Bench::new();
    let x = b.memory.alloc(4).unwrap();
    b.memory.write(x, &[0; 4]).unwrap();
    let f = b.fault("forever", threads(32), &[p(x)]);
    assert_eq!(f.kind, FaultKind::Watchdog);
    // A warp that spins for one that waits at a barrier.
    let y = b.ones(64);
    match b.run("lonely_barrier", threads(64), &[p(y)]) {
        Err(Error::Fault(f)) => assert!([FaultKind::Watchdog, FaultKind::Deadlock].contains(&f.kind), "{f:?}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn traps_name_their_thread() {
    let mut b = Bench::new();
    let y = b.fresh(64);
    let f = b.fault("trapped", threads(64), &[p(y), i(45)]);
    assert_eq!((f.kind, f.thread), (FaultKind::Trap, 45));
}

#[test]
fn counters_see_bank_conflicts() {
    let mut b = Bench::new();
    let y = b.fresh(32);
    // A store and a load, each of which meets one bank with all 32 lanes.
    let c = b.run("columns", threads(32), &[p(y)]).unwrap();
    assert_eq!((c.shared_wavefronts, c.bank_conflicts), (64, 62));
    let c = b.run("padded_columns", threads(32), &[p(y)]).unwrap();
    assert_eq!((c.shared_wavefronts, c.bank_conflicts), (2, 0));
}

#[test]
fn counters_see_accesses_that_do_not_coalesce() {
    let mut b = Bench::new();
    let (x, y) = (b.ones(32 * 32), b.fresh(32));
    for (stride, sectors) in [(0, 1), (1, 4), (2, 8), (8, 32), (32, 32)] {
        let c = b.run("strided", threads(32), &[p(x), p(y), i(stride)]).unwrap();
        // The store takes 4.
        assert_eq!((c.global_requests, c.global_sectors), (2, sectors + 4), "stride {stride}");
    }
}

#[test]
fn a_missing_barrier_is_a_race() {
    for seed in [None, Some(1), Some(2), Some(3)] {
        let mut b = Bench::new();
        let (x, y) = (b.ones(64), b.fresh(64));
        let shape = || Config { checks: Checks { races: true }, seed, ..threads(64) };
        let f = match b.run("missing_sync", shape(), &[p(x), p(y)]) {
            Err(Error::Fault(f)) => *f,
            other => panic!("{other:?}"),
        };
        // Which of the two accesses comes second depends on the order of the warps.
        let load = marked("missing_sync");
        assert_eq!((f.kind, f.kernel.as_str()), (FaultKind::Race, "missing_sync"), "{f:?}");
        assert!([load - 1, load].map(Some).contains(&f.source_line), "{f:?}");
        b.run("with_sync", shape(), &[p(x), p(y)]).unwrap();
    }
}
