//! Every kernel in every configuration, held to what ptxas says of it, without a GPU: no register is spilled, shared memory is within
//! the architecture's limit, parameters are those of the table, and the emulator reads its PTX.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use ringtune::backend::MatMul;
use ringtune::cuda::compile::{Target, Value, compile, label};
use ringtune::cuda::kernels::{Kernel, Param};
use ringtune::cuda::matmul_sm90::{Cluster, Columns};
use ringtune::cuda::tiles::Tile;
use ringtune::cuda::{self, attention_tiles, cast, matmul, matmul_sm90, project, project_sm90};
use ringtune::tensor::DType;

use crate::products::OPS;
use crate::skip::nvrtc;

/// What ptxas reports of one entry.
#[derive(Clone, Debug, Default, PartialEq)]
struct Report {
    registers: usize,
    /// Bytes of spill stores and loads.
    spills: usize,
    stack: usize,
    /// Static shared memory in bytes.
    shared: usize,
}

/// The number before a word.
fn before(line: &str, words: &str) -> Option<usize> {
    line.split(words).next().filter(|head| head.len() < line.len())?.trim_end().rsplit([' ', ',']).next()?.parse().ok()
}

fn reports(log: &str) -> BTreeMap<String, Report> {
    let mut all = BTreeMap::new();
    let mut entry = String::new();
    for line in log.lines() {
        if let Some(name) = line.split("Compiling entry function '").nth(1) {
            entry = name.split('\'').next().unwrap().to_string();
            all.insert(entry.clone(), Report::default());
            continue;
        }
        let Some(report) = all.get_mut(&entry) else { continue };
        if let Some(n) = before(line, " bytes stack frame") {
            report.stack = n;
        }
        if let (Some(stores), Some(loads)) = (before(line, " bytes spill stores"), before(line, " bytes spill loads")) {
            report.spills = stores + loads;
        }
        if let Some(n) = before(line, " registers") {
            report.registers = n;
        }
        if let Some(n) = before(line, " bytes smem") {
            report.shared = n;
        }
    }
    all
}

#[test]
fn a_report_of_ptxas_is_read() {
    let log = "ptxas info    : 4 bytes gmem, 8 bytes cmem[4]\nptxas info    : Compiling entry function 'f' for 'sm_80'\n\
        ptxas info    : Function properties for f\nptxas         .     24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads\n\
        ptxas info    : Used 255 registers, used 1 barriers, 32 bytes smem, 408 bytes cmem[0]\n";
    let expected = Report { registers: 255, spills: 36, stack: 24, shared: 32 };
    assert_eq!(reports(log)["f"], expected);
}

/// Kinds of the parameters of an entry in PTX, pointers told from integers by nothing but their width.
fn ptx_params(ptx: &str, entry: &str) -> Vec<&'static str> {
    let head = ptx.split(&format!(".entry {entry}(")).nth(1).unwrap_or_else(|| panic!("no entry {entry}"));
    let list = head.split(')').next().unwrap();
    let kinds = list.lines().filter_map(|l| l.trim().strip_prefix(".param "));
    kinds
        .map(|l| match l.split_whitespace().next().unwrap() {
            ".u64" | ".b64" => "64",
            ".u32" | ".b32" => "32",
            ".f32" => "f32",
            ".align" => "map",
            other => panic!("{entry}: parameter {other}"),
        })
        .collect()
}

fn table_params(kernel: &Kernel) -> Vec<&'static str> {
    let kind = |p: &Param| match p {
        Param::In | Param::Out | Param::U64 => "64",
        Param::U32 => "32",
        Param::F32 => "f32",
        Param::Map => "map",
    };
    kernel.params.iter().map(kind).collect()
}

/// Compiles one of `every` configurations of an architecture for it, checks it, and writes a row of the table of kernels/README.md for it
/// into the folder of test files.
fn check_arch(cc: u32, shared_limit: usize, every: usize) {
    let Some(nvrtc) = nvrtc() else { return };
    if !nvrtc.archs().contains(&cc) {
        crate::skip::skipped(&format!("NVRTC {:?} does not compile for {cc}", nvrtc.version()));
        return;
    }
    let target = Target::Cubin(cc);
    let mut wrong = Vec::new();
    let mut rows = BTreeMap::new();
    // Entries of one module are compiled together.
    let mut logs: BTreeMap<String, BTreeMap<String, Report>> = BTreeMap::new();
    for (kernel, dynamic) in cuda::configurations(cc).into_iter().step_by(every) {
        let name = label(&kernel.source, &kernel.defines);
        let all = logs.entry(name.clone()).or_insert_with(|| {
            let compiled = compile(nvrtc, &kernel.source, &kernel.defines, target).unwrap();
            let ptx = String::from_utf8_lossy(&compiled.ptx).into_owned();
            assert_eq!(ptx_params(&ptx, kernel.entry), table_params(&kernel), "{name}: {} in the table", kernel.entry);
            // "wgmma serialised", "setmaxnreg ignored" and the like: what the code says does not happen.
            wrong.extend(compiled.log.lines().filter(|l| l.contains("(C75")).map(|l| format!("{name}: {l}")));
            reports(&compiled.log)
        });
        let Some(report) = all.get(kernel.entry) else { panic!("{name}: ptxas reports nothing of {}", kernel.entry) };
        let shared = report.shared + dynamic;
        if report.spills > 0 || report.stack > 0 || shared > shared_limit {
            wrong.push(format!("{name} {}: {report:?}, {shared} bytes of shared memory", kernel.entry));
        }
        // 64 K registers a multiprocessor, given to warps in units of 256.
        let warps = kernel.threads.div_ceil(32);
        if (report.registers * 32).next_multiple_of(256) * warps > 65_536 {
            wrong.push(format!("{name}: {} registers for {} threads", report.registers, kernel.threads));
        }
        rows.insert(format!("{} {name}", kernel.entry), (report.clone(), shared));
    }
    assert!(rows.len() > 100 / every, "only {} configurations", rows.len());
    assert!(wrong.is_empty(), "{target}:\n{}", wrong.join("\n"));
    if every == 1 && nvrtc.version() == (12, 9) && crate::readme::COLUMNS.contains(&target.to_string().as_str()) {
        let mut of_entry: BTreeMap<String, [Vec<usize>; 2]> = BTreeMap::new();
        for (name, (r, shared)) in &rows {
            let [all_registers, all_shared] = of_entry.entry(name.split(' ').next().unwrap().into()).or_default();
            all_registers.push(r.registers);
            all_shared.push(*shared);
        }
        let cells = of_entry.into_iter().map(|(entry, [r, s])| (entry, crate::readme::cell(&r, &s)));
        crate::readme::hold_figures(&target.to_string(), &cells.collect());
    }
    let mut table = String::new();
    for (name, (r, shared)) in rows {
        let _ = writeln!(table, "| {target} | {name} | {} | {shared} | {} |", r.registers, r.spills);
    }
    std::fs::write(crate::skip::scratch().join(format!("kernels_{target}.md")), table).unwrap();
}

#[test]
fn no_configuration_spills_on_sm_80() {
    check_arch(80, 163 * 1024, 1);
}

#[test]
fn no_configuration_spills_on_sm_90a() {
    check_arch(90, 227 * 1024, 1);
}

#[test]
fn no_configuration_spills_on_sm_120() {
    check_arch(120, 99 * 1024, 1);
}

/// The first line at which a warp reads shared memory that it wrote, or writes where it read, with no barrier of the warp or the block
/// between, in the order of the text. The emulator runs the lanes of a warp together, so it does not find this; staged sums cross lanes.
fn unsynced(ptx: &str) -> Option<String> {
    let mut last = None;
    for line in ptx.lines().map(str::trim) {
        let kind = ["st.shared", "ld.shared"].into_iter().find(|kind| line.starts_with(kind));
        if line.starts_with("bar.warp.sync") || line.starts_with("bar.sync") {
            last = None;
        } else if kind.is_some() && last.is_some_and(|last| last != kind) {
            return Some(line.to_string());
        } else if kind.is_some() {
            last = Some(kind);
        }
    }
    None
}

#[test]
fn a_missing_barrier_between_lanes_is_found() {
    let (store, barrier, load) =
        ("\tst.shared.v2.f32 [%rd1], {%f1, %f2};\n", "\tbar.warp.sync -1;\n", "ld.shared.f32 %f1, [%rd1];\n");
    assert_eq!(unsynced(&[store, store, barrier, load, load, barrier, store].concat()), None);
    assert_eq!(unsynced(&[store, load].concat()).as_deref(), Some(load.trim()));
    assert_eq!(unsynced(&[store, barrier, load, store].concat()).as_deref(), Some(store.trim()));
}

/// The same on Hopper, of every product of 256 columns and of those that are masked.
#[test]
fn the_loop_of_a_warpgroup_is_tight() {
    let Some(nvrtc) = nvrtc() else { return };
    let wide = (Columns::N256, Cluster::Two);
    let mut kernels: Vec<Kernel> = OPS.into_iter().map(|op| matmul_sm90::kernel(wide.0, op, wide.1)).collect();
    kernels.push(matmul_sm90::kernel(wide.0, MatMul::TN, Cluster::One));
    kernels.extend([
        project_sm90::kernel(wide, false, 0),
        project_sm90::kernel(wide, false, 128),
        project_sm90::kernel(wide, true, 0),
    ]);
    kernels.extend([
        project_sm90::dx_kernel(wide, 0),
        project_sm90::dx_kernel((Columns::N128, Cluster::Two), 2),
        project_sm90::dw_kernel(wide),
    ]);
    for kernel in kernels {
        let name = label(&kernel.source, &kernel.defines);
        let compiled = compile(nvrtc, &kernel.source, &kernel.defines, Target::Cubin(90)).unwrap();
        let each = crate::sass::warpgroup_loop(&compiled.cubin, kernel.entry) as f64 / 4.0;
        println!("{name}: {each} instructions for each of the tensor cores");
        assert_eq!(unsynced(&String::from_utf8_lossy(&compiled.ptx)), None, "{name}");
        assert!(each <= 13.5 || nvrtc.version() != (12, 9), "{name}: {each}");
    }
}

/// Architectures beside those: a fifth of the configurations each; with `RINGTUNE_FULL=1` all of them.
#[test]
fn no_configuration_of_a_sample_spills_elsewhere() {
    let every = if std::env::var("RINGTUNE_FULL").is_ok_and(|v| v == "1") { 1 } else { 5 };
    for (cc, kib) in [(86, 99), (89, 99), (100, 227)] {
        check_arch(cc, kib * 1024, every);
    }
}

/// Instructions beside those of the tensor cores are addresses and waits: a loop that has more of them than it needs was compiled badly.
/// Bounds of the tiles with the least to spare, 64 x 64 a warp; smaller warps have more loads for each product.
#[test]
fn the_loop_of_a_product_is_tight() {
    let Some(nvrtc) = nvrtc() else { return };
    let mut kernels = Vec::new();
    for tile in [Tile::Wide, Tile::Square] {
        kernels.extend(OPS.map(|op| matmul::kernel(tile, op, DType::Bf16, DType::Bf16, true)));
        kernels.extend([project::kernel(tile, false), project::kernel(tile, true), project::dx_kernel(tile)]);
        kernels.push(project::dw_kernel(tile));
    }
    for kernel in kernels {
        let name = label(&kernel.source, &kernel.defines);
        let compiled = compile(nvrtc, &kernel.source, &kernel.defines, Target::Cubin(80)).unwrap();
        let (all, tensor) = crate::sass::product_loop(&compiled.cubin, kernel.entry, false);
        println!("{name}: {all} instructions, {tensor} of the tensor cores, {:.2}", all as f64 / tensor as f64);
        // Other compilers than this one place registers otherwise.
        if nvrtc.version() == (12, 9) {
            let most = if name.contains("BLOCK_N=256") { 1.75 } else { 1.80 };
            assert!(tensor == 128 && all as f64 <= most * tensor as f64, "{name}: {all} instructions for {tensor}");
        }
    }
}

/// The same of attention, over blocks that all rows of a tile see in full. A softmax of its own beside each pair of products takes most of
/// the rest of forward.
#[test]
fn the_loops_of_attention_are_tight() {
    let Some(nvrtc) = nvrtc() else { return };
    // Width of a head; instructions for each of the tensor cores: forward, dq, dkdv.
    for (dim, most) in [(64, [4.70, 3.55, 3.45]), (128, [3.50, 2.70, 2.65])] {
        for cc in [80, 90] {
            let (forward, [_, dq, dkdv]) =
                (attention_tiles::forward_kernel(dim, cc), attention_tiles::backward_kernels(dim));
            // Both passes of backward are of one module.
            let [once, twice] = [&forward, &dq]
                .map(|(kernel, _)| compile(nvrtc, &kernel.source, &kernel.defines, Target::Cubin(cc)).unwrap().cubin);
            for (((kernel, _), cubin), most) in [(forward, &once), (dq, &twice), (dkdv, &twice)].into_iter().zip(most) {
                let (all, tensor) = crate::sass::product_loop(cubin, kernel.entry, cc == 90);
                let (each, name) = (all as f64 / tensor as f64, format!("sm_{cc} {}, {dim}", kernel.entry));
                println!("{name}: {all} instructions, {tensor} of the tensor cores, {each:.2}");
                assert!(each <= most || nvrtc.version() != (12, 9), "{name}: {each:.2}");
            }
        }
    }
}

/// What the emulator runs: PTX for compute_80. It refuses at loading what it does not know.
#[test]
fn the_emulator_reads_every_configuration() {
    let Some(nvrtc) = nvrtc() else { return };
    let mut read = std::collections::BTreeSet::new();
    for cc in [80, 120] {
        for (kernel, _) in cuda::configurations(cc) {
            let name = label(&kernel.source, &kernel.defines);
            // Most are the same for every architecture.
            if !read.insert((name.clone(), kernel.entry)) {
                continue;
            }
            let compiled = compile(nvrtc, &kernel.source, &kernel.defines, Target::Ptx(80)).unwrap();
            let text = String::from_utf8(compiled.ptx).unwrap();
            let mut memory = vgpu::Memory::new();
            let module = vgpu::Module::load(&text, &mut memory).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(module.kernel(kernel.entry).is_ok(), "{name}: {}", kernel.entry);
        }
    }
}

/// A mistake in a kernel is shown with its file, its line and the defines, as NVRTC words it.
#[test]
fn a_source_that_does_not_compile_is_shown_where_it_stands() {
    let Some(nvrtc) = nvrtc() else { return };
    let defines = [("DST_T", Value::Word("no_such_type")), ("SRC_T", Value::Word("bf16"))];
    let e = compile(nvrtc, &cast::SOURCE, &defines, Target::Ptx(80)).err().unwrap().to_string();
    assert!(e.starts_with("kernels/cast.cu [DST_T=no_such_type SRC_T=bf16] for compute_80: NVRTC:\n"), "{e}");
    assert!(e.contains("kernels/cast.cu(13)") && e.contains("no_such_type") && !e.contains("\\n"), "{e}");
}
