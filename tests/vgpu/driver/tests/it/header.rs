//! Finds cuda.h and reads the prototypes in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A file below a folder, by its name; folders are searched to a depth.
pub fn below(folder: &Path, name: &str, depth: usize) -> Option<PathBuf> {
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        if entry.file_name().to_str() == Some(name) {
            return Some(path);
        }
        if path.is_dir() {
            folders.push(path);
        }
    }
    folders.sort();
    folders.iter().filter(|_| depth > 0).find_map(|f| below(f, name, depth - 1))
}

/// Folders that may hold parts of CUDA: what the environment names, and the cache that the bootstrap fills.
pub fn cuda_folders() -> Vec<PathBuf> {
    let named = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os).map(PathBuf::from);
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache")));
    named.chain(cache.map(|c| c.join("ringtune"))).collect()
}

/// Path of cuda.h, or a visible line that says why the test is skipped.
pub fn skip_without_header() -> Option<PathBuf> {
    let found = cuda_folders().iter().find_map(|f| below(f, "cuda.h", 6));
    if found.is_none() {
        skip("no cuda.h (CUDA_HOME, or the cache that scripts/bootstrap.sh fills)");
    }
    found
}

/// Says that a test is skipped; where nothing may be skipped this fails.
pub fn skip(why: &str) {
    eprintln!("skipped: {why}");
    assert!(std::env::var_os("RINGTUNE_NO_SKIP").is_none(), "nothing may be skipped here: {why}");
    // From these lines `make test` counts what was skipped.
    if let Some(path) = std::env::var_os("RINGTUNE_SKIP_LOG") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        let _ = std::io::Write::write_all(&mut file.unwrap(), format!("skipped: driver: {why}\n").as_bytes());
    }
}

/// Bytes of a parameter by the text of its type.
fn size(parameter: &str) -> usize {
    if parameter.contains('*') || parameter.contains('[') {
        return 8;
    }
    let kind = parameter.trim().trim_start_matches("const ");
    let words: Vec<&str> = kind.split_whitespace().collect();
    let first = words[0];
    match first {
        "unsigned" if words[1] == "char" => 1,
        "unsigned" if words[1] == "short" => 2,
        "unsigned" if words[1] == "long" => 8,
        "unsigned" | "int" | "float" | "cuuint32_t" | "CUdevice" => 4,
        "size_t" | "cuuint64_t" | "CUdeviceptr" | "CUdeviceptr_v2" => 8,
        "CUmemLocation" => 8,
        // Callbacks and handles are pointers; what else begins with CU and is passed by value is an enumeration.
        "CUhostFn" | "CUstreamCallback" | "CUoccupancyB2DSize" => 8,
        "CUcontext" | "CUstream" | "CUevent" | "CUmodule" | "CUfunction" | "CUgraph" | "CUgraphExec"
        | "CUmemoryPool" | "CUlibrary" | "CUkernel" | "CUexternalMemory" => 8,
        _ if first.starts_with("CU") => 4,
        other => panic!("unknown type {other} in `{parameter}`"),
    }
}

/// Sizes of the arguments of every function in cuda.h that this library could have, by the name that is linked.
pub fn prototypes(header: &Path) -> BTreeMap<String, Vec<usize>> {
    let text = std::fs::read_to_string(header).unwrap();
    // `#define cuMemAlloc cuMemAlloc_v2`: the prototype of the plain name is that of the other.
    let renamed: BTreeMap<&str, &str> = text
        .lines()
        .filter_map(|l| l.trim().strip_prefix("#define ")?.trim().split_once(char::is_whitespace))
        .filter(|(a, _)| a.starts_with("cu"))
        .map(|(a, b)| {
            let b = b.trim();
            let inner = b.strip_prefix("__CUDA_API_PTDS(").or(b.strip_prefix("__CUDA_API_PTSZ("));
            (a, inner.map_or(b, |s| s.trim_end_matches(')')))
        })
        .filter(|(_, b)| b.starts_with("cu"))
        .collect();
    // Old forms of functions stand in the part for the driver's own build, where names are not renamed.
    let (current, old) = text.split_at(text.rfind("#if defined(__CUDA_API_VERSION_INTERNAL)\n").unwrap_or(text.len()));
    let mut all = BTreeMap::new();
    for (part, rename) in [(current, true), (old, false)] {
        for after in part.split("CUresult CUDAAPI ").skip(1) {
            let (Some(open), Some(close)) = (after.find('('), after.find(");")) else {
                continue;
            };
            let name = after[..open].trim();
            let linked = if rename { renamed.get(name).copied().unwrap_or(name) } else { name };
            let parameters = after[open + 1..close].split(',').map(str::trim).filter(|p| !p.is_empty() && *p != "void");
            let relevant = !after[..close].contains("CUarray") && !after[..close].contains("CUtex");
            let known = |p: &str| std::panic::catch_unwind(|| size(p)).ok();
            if let Some(sizes) = parameters.map(known).collect::<Option<Vec<usize>>>()
                && relevant
            {
                all.entry(linked.to_owned()).or_insert(sizes);
            }
        }
    }
    all
}
