//! Times kernels on one host thread: `cargo bench -p vgpu [-- FILTER]`. Each result is checked before it is timed.

mod suite;

use vgpu::{Build, Counters};

/// CPU time of this thread in seconds.
fn cpu_time() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid place for the result, which the call fills in.
    let rc = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    assert_eq!(rc, 0, "no clock of this thread's CPU time");
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

/// Median and least CPU time of launches until half a second has passed, at least five.
fn times(case: &suite::Case) -> (f64, f64, Counters) {
    let (mut list, start, mut counters) = (Vec::new(), cpu_time(), Counters::default());
    while list.len() < 5 || cpu_time() - start < 0.5 {
        case.prepare();
        let before = cpu_time();
        counters = case.launch();
        list.push(cpu_time() - before);
    }
    list.sort_by(f64::total_cmp);
    (list[list.len() / 2], list[0], counters)
}

/// Makes a case when its name is asked for.
type Maker = Box<dyn Fn() -> suite::Case>;

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let b = Build::detect();
    println!("build {b:?}, one host thread, CPU time of the thread, median (least)");
    println!(
        "{:32} {:>10} {:>10} {:>12} {:>12} {:>9} {:>9}",
        "kernel", "ms", "(least)", "M warp-inst/s", "G lane-inst/s", "GFLOP/s", "sect/req"
    );
    let makers: Vec<(&str, Maker)> = vec![
        ("gemm 512", Box::new(move || suite::gemm(b, 512, 512, 512))),
        ("gemm ragged", Box::new(move || suite::gemm(b, 100, 72, 40))),
        ("flash", Box::new(move || suite::flash(b, 600, 4, 2))),
        ("rmsnorm", Box::new(move || suite::rmsnorm(b, 1024, 512, 128))),
        ("cross-entropy", Box::new(move || suite::cross_entropy(b, 512, 512))),
        ("adamw", Box::new(move || suite::adamw(b, 100_000))),
        ("rope", Box::new(move || suite::rope(b, 64, 4, 64))),
        ("embedding", Box::new(move || suite::embedding(b, 512, 512))),
        ("fma loop", Box::new(move || suite::fma_loop(b, 4, 1000))),
        ("mma alone", Box::new(move || suite::mma_loop(b, 1000))),
    ];
    for (name, make) in makers {
        if !name.contains(&filter) {
            continue;
        }
        let case = make();
        case.run();
        case.check().unwrap_or_else(|e| panic!("{e}"));
        let (median, least, c) = times(&case);
        let warps = c.instructions.iter().sum::<u64>() as f64;
        println!(
            "{:32} {:10.3} {:10.3} {:12.1} {:12.2} {:9.1} {:9.2}",
            case.name,
            median * 1e3,
            least * 1e3,
            warps / median * 1e-6,
            c.lanes as f64 / median * 1e-9,
            c.tensor_flops as f64 / median * 1e-9,
            c.sectors_per_request()
        );
    }
}
