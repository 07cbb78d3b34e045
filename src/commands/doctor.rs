//! `ringtune doctor`: what this machine has, what will be used of it, and how to get what is missing.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command as Process;

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::{Map, Value, json};

use super::device::{self, OnDevice};
use crate::backend::Backend;
use crate::cpu::Level;
use crate::dirs;
use crate::error::{Error, Result};
use crate::machine;
use crate::say::Out;

/// The command's flags.
pub fn command() -> Command {
    Command::new("doctor")
        .about("Say what this machine has, what will be used of it, and how to get what is missing")
        .after_help(
            "A GPU is proven by compiling a small kernel, running it and comparing its result. The exit code is 0 whatever is \
             missing, and 1 where --require names it.",
        )
        .arg(
            Arg::new("require")
                .long("require")
                .value_name("NAME")
                .num_args(1..)
                .value_parser(["cuda", "nccl", "mpi"])
                .help("Exit with 1 unless these work"),
        )
        .arg(
            Arg::new("json")
                .long("json")
                .action(ArgAction::SetTrue)
                .help("Print one JSON object"),
        )
}

/// One line of the report.
struct Row {
    /// First column, and key of the JSON object.
    name: &'static str,
    /// Whether it works; `None` for what is merely told.
    works: Option<bool>,
    /// Second column.
    text: String,
    /// What to do where it does not work.
    hint: String,
    /// The JSON value.
    value: Value,
}

impl Row {
    fn told(name: &'static str, text: impl Into<String>, value: Value) -> Self {
        Self { name, works: None, text: text.into(), hint: String::new(), value }
    }

    fn works(name: &'static str, text: impl Into<String>, value: Value) -> Self {
        Self { works: Some(true), ..Self::told(name, text, value) }
    }

    fn missing(name: &'static str, text: impl Into<String>, hint: impl Into<String>) -> Self {
        let (text, hint) = (text.into(), hint.into());
        Self { name, works: Some(false), value: json!({ "error": text }), text, hint }
    }
}

/// Runs the command.
///
/// # Errors
/// If what `--require` names does not work, or stdout cannot be written.
pub fn run(m: &ArgMatches) -> Result<()> {
    let rows = rows();
    let required: Vec<&str> = m.get_many::<String>("require").into_iter().flatten().map(String::as_str).collect();
    let mut out = Out::new();
    if m.get_flag("json") {
        writeln!(out, "{:#}", as_json(&rows))?;
    } else {
        print(&mut out, &rows)?;
    }
    out.flush()?;
    let failed: Vec<String> = required.iter().flat_map(|name| unmet(name, &rows)).collect();
    match failed.is_empty() {
        true => Ok(()),
        false => Err(Error::new(format!("doctor: {}", failed.join("; ")))),
    }
}

/// Why a requirement is not met.
fn unmet(required: &str, rows: &[Row]) -> Vec<String> {
    let parts: &[&str] = match required {
        "cuda" => &["cuda", "driver", "nvrtc", "gpu"],
        other => &[other],
    };
    let of = |part: &&str| {
        let mut found = rows.iter().filter(|r| r.name == *part).peekable();
        if found.peek().is_none() {
            return vec![format!("{required} is required: no {part}")];
        }
        let broken = found.filter(|r| r.works == Some(false));
        broken.map(|r| format!("{required} is required: {}: {}", r.name, r.text)).collect()
    };
    parts.iter().flat_map(of).collect()
}

fn print(out: &mut Out, rows: &[Row]) -> Result<()> {
    for row in rows {
        let mark = match row.works {
            None => ' ',
            Some(true) => '+',
            Some(false) => '-',
        };
        writeln!(out, "{mark} {:<10} {}", row.name, row.text)?;
        if !row.hint.is_empty() {
            writeln!(out, "  {:<10} > {}", "", row.hint)?;
        }
    }
    Ok(())
}

/// An object with a key for each row; rows of the same name (GPUs) in a list.
fn as_json(rows: &[Row]) -> Value {
    let mut object = Map::new();
    let mut missing = Vec::new();
    let mut gpus = Vec::new();
    for row in rows {
        let mut value = row.value.clone();
        if let (Some(works), Some(map)) = (row.works, value.as_object_mut()) {
            map.insert("works".into(), works.into());
        }
        if !row.hint.is_empty() {
            missing.push(json!({ "name": row.name, "what": row.text, "how": row.hint }));
        }
        match row.name {
            "gpu" => gpus.push(value),
            name => {
                object.insert(name.into(), value);
            }
        }
    }
    object.insert("gpu".into(), gpus.into());
    object.insert("missing".into(), missing.into());
    object.into()
}

fn rows() -> Vec<Row> {
    let mut rows = vec![processor(), memory()];
    rows.extend(cuda::rows());
    rows.push(mpi());
    rows.push(cache());
    rows.push(used());
    rows
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    macro_rules! present {
        ($($name:tt)+) => { [$(($name, is_x86_feature_detected!($name))),+] };
    }
    let all = present!("avx2" "fma" "avx512f" "avx512bw" "avx512dq" "avx512vl" "avx512bf16" "avx512vnni");
    let tiles = Level::has_tiles().then_some("amx-bf16");
    all.into_iter().filter(|f| f.1).map(|f| f.0).chain(tiles).collect()
}

#[cfg(target_arch = "aarch64")]
fn features() -> Vec<&'static str> {
    macro_rules! present {
        ($($name:tt)+) => { [$(($name, std::arch::is_aarch64_feature_detected!($name))),+] };
    }
    let all = present!("neon" "fp16" "dotprod" "bf16" "i8mm" "sve" "sve2");
    all.into_iter().filter(|f| f.1).map(|f| f.0).collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> Vec<&'static str> {
    Vec::new()
}

fn processor() -> Row {
    let model = machine::processor().unwrap_or_else(|| std::env::consts::ARCH.into());
    let threads = machine::threads().max(1);
    let level = match Level::detect() {
        Ok(level) => level.name().to_string(),
        Err(e) => return Row::missing("processor", e.to_string(), "unset RINGTUNE_CPU"),
    };
    let (features, note) = (features(), Level::note());
    let why = note.map_or(String::new(), |note| format!("; {note}"));
    Row::works(
        "processor",
        format!("{model}, {threads} threads, level {level} ({}){why}", features.join(" ")),
        json!({ "model": model, "threads": threads, "level": level, "features": features, "note": note }),
    )
}

fn memory() -> Row {
    match (machine::total_memory(), machine::unused_memory()) {
        (Some(total), Some(free)) => Row::told(
            "memory",
            format!("{}, {} available", gib(total), gib(free)),
            json!({ "bytes": total, "available_bytes": free }),
        ),
        _ => Row::told("memory", "unknown: the system has no /proc/meminfo", json!({})),
    }
}

/// The file of a program in `PATH`.
fn in_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|d| d.join(program)).find(|p| p.is_file())
}

/// The mpirun of this machine, and the MPI that was built in.
fn mpi() -> Row {
    const HINT: &str = "needed for several machines only; apt-get install openmpi-bin";
    let built = crate::comm::mpi::library();
    let said = built.as_ref().map_or_else(
        || "this program was built without MPI: ranks of mpirun use sockets".into(),
        |name| format!("this program was built with {name}"),
    );
    let Some(path) = in_path("mpirun") else {
        return Row::missing("mpi", format!("mpirun was not found in PATH; {said}"), HINT);
    };
    let version = Process::new(&path).arg("--version").output();
    let first = version.ok().and_then(|o| Some(String::from_utf8_lossy(&o.stdout).lines().next()?.trim().to_string()));
    match first.filter(|l| !l.is_empty()) {
        Some(line) => Row::works(
            "mpi",
            format!("{}, {line}; {said}", path.display()),
            json!({ "path": path.display().to_string(), "version": line, "built_in": built }),
        ),
        None => Row::missing("mpi", format!("{}: it gives no version", path.display()), HINT),
    }
}

fn cache() -> Row {
    let dir = dirs::cache();
    let show = dir.display().to_string();
    let kernels = std::fs::read_dir(dir.join("kernels")).into_iter().flatten().flatten();
    let images = kernels.filter(|e| e.path().extension().is_some_and(|x| x == "image")).count();
    let value = json!({ "path": show, "kernels": images });
    if !dir.exists() {
        return Row::told("cache", format!("{show}, made when it is needed"), value);
    }
    match crate::files::check_writable(&dir) {
        Ok(()) => Row::works("cache", format!("{show}, {images} compiled kernels"), value),
        Err(e) => Row::missing(
            "cache",
            format!("{show}: cannot be written: {e}"),
            "set RINGTUNE_CACHE to a folder that can; until then everything cached is made again at each start",
        ),
    }
}

/// What a training runs on that is not told.
fn used() -> Row {
    let (mut description, mut no_gpu) = (String::new(), None);
    match device::run("auto", None, Describe { description: &mut description, no_gpu: &mut no_gpu }) {
        Ok(()) => {
            let name = description.split([',', ':']).next().unwrap_or_default();
            let why = no_gpu.as_ref().map_or(String::new(), |why| format!("; no GPU: {why}"));
            let value = json!({ "device": name, "description": description, "no_gpu": no_gpu });
            Row::told("used", format!("{description}{why}"), value)
        }
        Err(e) => Row::missing("used", e.to_string(), ""),
    }
}

/// A job that asks a device what it is.
struct Describe<'a> {
    description: &'a mut String,
    no_gpu: &'a mut Option<String>,
}

impl OnDevice for Describe<'_> {
    fn without_gpu(&mut self, why: String) {
        *self.no_gpu = Some(why);
    }

    fn run<B: Backend>(self, dev: &B) -> Result<()> {
        *self.description = dev.describe();
        Ok(())
    }
}

#[cfg(not(feature = "cuda"))]
mod cuda {
    use super::Row;

    pub fn rows() -> Vec<Row> {
        let hint = "build with the feature `cuda`, which is on by default";
        vec![Row::missing("cuda", "this program was built without it", hint)]
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use serde_json::json;

    use super::{Row, gib};
    use crate::cuda::compile::Prebuilt;
    use crate::cuda::nccl::{HOW_TO_GET, Nccl};
    use crate::cuda::nvrtc::{self, Nvrtc};
    use crate::cuda::{self, Cuda, Properties, device_library};
    use crate::error::{Error, Result};

    pub fn rows() -> Vec<Row> {
        let mut rows = vec![Row::told("cuda", "built in", json!({ "built": true })), driver(), compiler()];
        if device_library::require().is_ok() {
            rows.extend(gpus());
        }
        rows.push(collectives());
        rows
    }

    fn driver() -> Row {
        match device_library::require() {
            Ok(path) => {
                let version = device_library::version().map(|v| format!("{}.{}", v.0, v.1));
                let words = version.as_deref().map_or("version unknown".into(), |v| format!("CUDA {v}"));
                let value = json!({ "path": path.display().to_string(), "cuda": version });
                Row::works("driver", format!("{}, {words}", path.display()), value)
            }
            Err(e) => Row::missing("driver", without_hint(&e, device_library::HOW_TO_GET), device_library::HOW_TO_GET),
        }
    }

    fn compiler() -> Row {
        match Nvrtc::get() {
            Ok(n) => {
                let version = format!("{}.{}", n.version().0, n.version().1);
                Row::works(
                    "nvrtc",
                    format!("{}, {version}, from {}", n.path().display(), n.origin()),
                    json!({ "path": n.path().display().to_string(), "version": version, "origin": n.origin() }),
                )
            }
            // Kernels that were compiled elsewhere do without it.
            Err(e) => match Prebuilt::named() {
                Ok(Some(kernels)) => Row::works(
                    "nvrtc",
                    format!("none; kernels for {} are taken from RINGTUNE_KERNELS", kernels.target()),
                    json!({ "path": null, "prebuilt": kernels.target().to_string() }),
                ),
                _ => Row::missing("nvrtc", without_hint(&e, nvrtc::HOW_TO_GET), nvrtc::HOW_TO_GET),
            },
        }
    }

    /// A message that ends with what to do, which has a line of its own here.
    fn without_hint(e: &Error, hint: &str) -> String {
        e.to_string().replace(&format!("; {hint}"), "")
    }

    fn gpus() -> Vec<Row> {
        const HINT: &str = "check `nvidia-smi` and CUDA_VISIBLE_DEVICES";
        match Cuda::count() {
            Ok(0) => vec![Row::missing("gpu", "the driver sees none", HINT)],
            Ok(n) => (0..n).map(gpu).collect(),
            Err(e) => vec![Row::missing("gpu", e.to_string(), HINT)],
        }
    }

    fn gpu(ordinal: usize) -> Row {
        let p = match cuda::properties(ordinal) {
            Ok(p) => p,
            Err(e) => return Row::missing("gpu", format!("{ordinal}: {e}"), ""),
        };
        let Properties { name, cc, memory, sm_count, .. } = &p;
        let what = format!("{ordinal}: {name}, sm_{cc}, {sm_count} multiprocessors, {}", gib(*memory as u64));
        let value = |proof: &str| {
            json!({ "ordinal": ordinal, "name": name, "cc": format!("{}.{}", cc / 10, cc % 10), "memory_bytes": memory,
                    "multiprocessors": sm_count, "emulated": p.emulated, "kernel": proof })
        };
        match prove(ordinal) {
            Ok(proof) => Row::works("gpu", format!("{what}; {proof}"), value(&proof)),
            Err(e) => Row {
                value: value(&e.to_string()),
                ..Row::missing("gpu", format!("{what}; {e}"), "the lines above say what the device needs")
            },
        }
    }

    /// Compiles a kernel, runs it and compares every element.
    fn prove(ordinal: usize) -> Result<String> {
        let dev = Cuda::new(ordinal)?;
        dev.prove()?;
        let (free, _) = dev.memory()?;
        Ok(format!("{} free; a kernel for {} gave the right results", gib(free as u64), dev.target()))
    }

    fn collectives() -> Row {
        match Nccl::get().and_then(|nccl| Ok((nccl.path().display().to_string(), nccl.version()?))) {
            Ok((path, version)) => {
                Row::works("nccl", format!("{path}, {version}"), json!({ "path": path, "version": version }))
            }
            Err(e) => Row::missing("nccl", e.to_string(), HOW_TO_GET),
        }
    }
}
