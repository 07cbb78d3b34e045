//! From a kernel's source to what a device loads: headers put in place, NVRTC, and a cache on disk that ranks may share.
//!
//! A cached file is named by the hash of everything that decides its bytes (source with headers, defines, architecture, options,
//! NVRTC's version) and holds a hash of its own bytes: one that was damaged is noticed and made again. It is written under another
//! name and renamed, so that ranks which start together see whole files; the last of them wins, with the same bytes.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::nvrtc::{Compiled, Nvrtc};
use crate::error::{Context, Error, Result};
use crate::files::{create_dir_all, parent, write_bytes};

mod prebuilt;

pub use prebuilt::Prebuilt;

/// A source file of `kernels/`, as it stands in the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// Path in the repository.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// The source at a path in the repository.
macro_rules! source {
    ($path:literal) => {
        $crate::cuda::compile::Source { name: $path, text: include_str!(concat!("../../", $path)) }
    };
}
pub(crate) use source;

/// What `#include` finds.
const HEADERS: &[Source] = &[
    source!("kernels/common/elements.cuh"),
    source!("kernels/common/group.cuh"),
    source!("kernels/common/heads.cuh"),
    source!("kernels/common/hopper.cuh"),
    source!("kernels/common/mask.cuh"),
    source!("kernels/common/philox.cuh"),
    source!("kernels/common/product.cuh"),
    source!("kernels/common/ptx.cuh"),
    source!("kernels/common/reduce.cuh"),
    source!("kernels/common/tile.cuh"),
    source!("kernels/common/types.cuh"),
    source!("kernels/common/warpgroup.cuh"),
];

/// The value of a define.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Value {
    /// None: a mere flag.
    Flag,
    /// A word of C++.
    Word(&'static str),
    /// A number.
    Number(usize),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag => Ok(()),
            Self::Word(word) => f.write_str(word),
            Self::Number(n) => write!(f, "{n}"),
        }
    }
}

/// A define: name and value.
pub type Define = (&'static str, Value);

/// The defines of a compilation: a list that is copied, compared and hashed without memory of its own, because every launch names
/// its kernel by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Defines {
    list: [Define; Self::MOST],
    len: usize,
}

impl Defines {
    /// As many as a kernel has.
    const MOST: usize = 10;

    /// These.
    ///
    /// # Panics
    /// If there are too many.
    pub fn new(defines: &[Define]) -> Self {
        let mut list = [("", Value::Flag); Self::MOST];
        list[..defines.len()].copy_from_slice(defines);
        Self { list, len: defines.len() }
    }
}

impl std::ops::Deref for Defines {
    type Target = [Define];

    fn deref(&self) -> &[Define] {
        &self.list[..self.len]
    }
}

/// `NAME=value`, or `NAME` of a flag.
fn word((name, value): &Define) -> String {
    match value {
        Value::Flag => (*name).into(),
        value => format!("{name}={value}"),
    }
}

/// What the image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Machine code for `sm_` of this compute capability (major · 10 + minor).
    Cubin(u32),
    /// PTX for `compute_` of this one, which the driver compiles for this and any later device.
    Ptx(u32),
    /// PTX with the instructions that this one alone has, `compute_90a` for Hopper: the emulator takes no machine code.
    OwnPtx(u32),
}

impl Target {
    /// The best target for a device of capability `cc` among what NVRTC compiles for: machine code where it knows the device, PTX of
    /// the newest older one elsewhere.
    ///
    /// # Errors
    /// If NVRTC knows nothing that runs on it, or the device is older than the kernels need.
    pub fn for_device(cc: u32, nvrtc: &Nvrtc) -> Result<Self> {
        if cc < 80 {
            return Err(Error::new(format!(
                "cuda: the device has compute capability {}.{}, the kernels need 8.0 or newer (Ampere)",
                cc / 10,
                cc % 10
            )));
        }
        if nvrtc.archs().contains(&cc) {
            return Ok(Self::Cubin(cc));
        }
        match nvrtc.archs().iter().copied().filter(|&a| a < cc).max().filter(|&a| a >= 80) {
            Some(older) => Ok(Self::Ptx(older)),
            None => Err(Error::new(format!(
                "cuda: {}: NVRTC {}.{} compiles for nothing that runs on compute capability {}.{}; name a newer one with RINGTUNE_NVRTC",
                nvrtc.path().display(),
                nvrtc.version().0,
                nvrtc.version().1,
                cc / 10,
                cc % 10
            ))),
        }
    }

    /// Its compute capability, major · 10 + minor.
    pub fn capability(self) -> u32 {
        match self {
            Self::Cubin(cc) | Self::Ptx(cc) | Self::OwnPtx(cc) => cc,
        }
    }

    /// PTX of the same capability, with the instructions that this one alone has where there are any.
    pub fn ptx(self) -> Self {
        let cc = self.capability();
        if own(cc).is_empty() { Self::Ptx(cc) } else { Self::OwnPtx(cc) }
    }
}

/// NVRTC's word for it. Hopper's own instructions exist in `sm_90a` alone.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cubin(cc) => write!(f, "sm_{cc}{}", own(*cc)),
            Self::Ptx(cc) => write!(f, "compute_{cc}"),
            Self::OwnPtx(cc) => write!(f, "compute_{cc}{}", own(*cc)),
        }
    }
}

/// What names the architecture with instructions of its own.
fn own(cc: u32) -> &'static str {
    if cc == 90 { "a" } else { "" }
}

/// As NVRTC spells it: `sm_90a`, `sm_80`, `compute_80`, `compute_90a`.
impl std::str::FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, number) = text.split_once('_').unwrap_or((text, ""));
        let digits = number.trim_end_matches('a');
        let cc = digits.parse().ok().filter(|cc| (80..=200).contains(cc) && number.len() <= digits.len() + 1);
        match (kind, cc) {
            // Without the letter nothing of Hopper's would be in it.
            ("sm", Some(cc)) => Ok(Self::Cubin(cc)),
            ("compute", Some(cc)) if number.ends_with('a') => Ok(Self::OwnPtx(cc)),
            ("compute", Some(cc)) => Ok(Self::Ptx(cc)),
            _ => Err(Error::usage(format!(
                "--arch {text}: expected sm_NN or compute_NN of 80 or newer, such as sm_80, sm_90a or compute_80"
            ))),
        }
    }
}

/// The text that NVRTC gets: each `#include "…"` replaced by the header, once, with `#line` so that messages name the real place.
///
/// # Errors
/// If a header is not among those of the program.
pub fn inlined(source: &Source) -> Result<String> {
    let mut text = String::new();
    inline_into(&mut text, source, &mut BTreeSet::new())?;
    Ok(text)
}

fn inline_into(out: &mut String, source: &Source, seen: &mut BTreeSet<&'static str>) -> Result<()> {
    use fmt::Write;
    seen.insert(source.name);
    let _ = writeln!(out, "#line 1 \"{}\"", source.name);
    for (i, line) in source.text.lines().enumerate() {
        let Some(name) = line.strip_prefix("#include \"").and_then(|l| l.strip_suffix('"')) else {
            // Each header is put in once, and `#pragma once` means nothing inside one file.
            out.push_str(if line.trim() == "#pragma once" { "" } else { line });
            out.push('\n');
            continue;
        };
        // A header is named from kernels/ or from beside its includer.
        let header = HEADERS
            .iter()
            .find(|h| h.name.rsplit('/').next() == name.rsplit('/').next())
            .ok_or_else(|| Error::new(format!("{}: line {}: there is no header {name}", source.name, i + 1)))?;
        if !seen.contains(header.name) {
            inline_into(out, header, seen)?;
        }
        let _ = writeln!(out, "#line {} \"{}\"", i + 2, source.name);
    }
    Ok(())
}

/// `kernels/matmul.cu [ALIGNED=1 …]`: how messages name a compilation.
pub fn label(source: &Source, defines: &[Define]) -> String {
    let words: Vec<String> = defines.iter().map(word).collect();
    format!("{} [{}]", source.name, words.join(" "))
}

fn options(target: Target, defines: &[Define]) -> Vec<String> {
    let mut options = vec![
        format!("--gpu-architecture={target}"),
        "--std=c++17".into(),
        // Lines for profilers, sanitizers and the emulator; the code is the same.
        "--generate-line-info".into(),
    ];
    if let Target::Cubin(_) = target {
        // Registers, spills and shared memory in the log.
        options.push("--ptxas-options=-v".into());
    }
    options.extend(defines.iter().map(|d| format!("--define-macro={}", word(d))));
    options
}

/// Compiles without looking into the cache.
///
/// # Errors
/// NVRTC's log as it is, under the name of the file and its defines.
pub fn compile(nvrtc: &Nvrtc, source: &Source, defines: &[Define], target: Target) -> Result<Compiled> {
    nvrtc
        .compile(source.name, &inlined(source)?, &options(target, defines))
        .map_err(|log| Error::new(format!("{} for {target}: NVRTC:\n{log}", label(source, defines))))
}

/// Compiles for one target and keeps what it made.
#[derive(Clone)]
pub struct Compiler {
    /// `None`: only what is prebuilt can be had.
    nvrtc: Option<&'static Nvrtc>,
    target: Target,
    prebuilt: Option<Prebuilt>,
    /// `None`: nothing is kept.
    cache: Option<PathBuf>,
    dump: Option<PathBuf>,
}

impl Compiler {
    /// A compiler for `target` with its cache in `cache/kernels`. PTX is also written into the folder that `RINGTUNE_DUMP_PTX` names.
    pub fn new(nvrtc: &'static Nvrtc, target: Target, cache: Option<&Path>) -> Self {
        Self {
            nvrtc: Some(nvrtc),
            target,
            prebuilt: None,
            cache: cache.map(|c| c.join("kernels")),
            dump: std::env::var_os("RINGTUNE_DUMP_PTX").filter(|d| !d.is_empty()).map(PathBuf::from),
        }
    }

    /// Takes kernels that are prebuilt; compiles what they lack where there is an NVRTC.
    pub fn prebuilt(prebuilt: Prebuilt, nvrtc: Option<&'static Nvrtc>, cache: Option<&Path>) -> Self {
        let cache = cache.map(|c| c.join("kernels"));
        Self { nvrtc, target: prebuilt.target(), prebuilt: Some(prebuilt), cache, dump: None }
    }

    /// What it compiles for.
    pub fn target(&self) -> Target {
        self.target
    }

    /// The same for another target.
    pub fn with_target(&self, target: Target) -> Self {
        Self { target, prebuilt: None, ..self.clone() }
    }

    /// The image of a source with its defines: machine code, or PTX text ending with a zero byte.
    ///
    /// # Errors
    /// If the source does not compile. A cache that cannot be written only costs time, and is passed over.
    pub fn image(&self, source: &Source, defines: &[Define]) -> Result<Vec<u8>> {
        if let Some(image) = self.cached(source, defines)? {
            return Ok(image);
        }
        let Some(nvrtc) = self.nvrtc else {
            return Err(Error::new(format!(
                "{}: not among the kernels of RINGTUNE_KERNELS, or damaged there, and there is no NVRTC to compile it; make them again with this \
                 build's `ringtune kernels --arch {}`",
                label(source, defines),
                self.target
            )));
        };
        let key = key(source, defines, self.target, nvrtc.version())?;
        let compiled = compile(nvrtc, source, defines, self.target)?;
        if let Some(dir) = &self.dump {
            let name = source.name.rsplit('/').next().unwrap_or(source.name);
            let path = dir.join(format!("{name}.{}.{}.ptx", self.target, &key[..12]));
            let header = format!("// {}\n", label(source, defines));
            fs::create_dir_all(dir)
                .and_then(|()| fs::write(&path, [header.as_bytes(), &compiled.ptx].concat()))
                .context(|| format!("RINGTUNE_DUMP_PTX: {}", path.display()))?;
        }
        let image = match self.target {
            Target::Cubin(_) => compiled.cubin,
            Target::Ptx(_) | Target::OwnPtx(_) => [compiled.ptx, vec![0]].concat(),
        };
        if let Some(dir) = &self.cache {
            // Without a cache the next start compiles again.
            let _ = write_checked(&dir.join(format!("{key}.image")), &image);
        }
        Ok(image)
    }

    /// The same image where it need not be compiled: among what is prebuilt, or in the cache.
    ///
    /// # Errors
    /// If a header is not among those of the program.
    pub fn cached(&self, source: &Source, defines: &[Define]) -> Result<Option<Vec<u8>>> {
        if let Some(prebuilt) = &self.prebuilt
            && let Some(image) = prebuilt.image(source, defines)?
        {
            return Ok(Some(image));
        }
        // A dump needs the text, which an image of machine code does not hold.
        let (Some(nvrtc), Some(dir), None) = (self.nvrtc, &self.cache, &self.dump) else { return Ok(None) };
        let key = key(source, defines, self.target, nvrtc.version())?;
        Ok(read_checked(&dir.join(format!("{key}.image"))))
    }

    /// Whether what it compiles is kept for the next start.
    pub fn keeps(&self) -> bool {
        self.cache.is_some()
    }
}

/// The name of an image: everything that decides its bytes, and nothing of where it was compiled.
fn key(source: &Source, defines: &[Define], target: Target, (major, minor): (i32, i32)) -> Result<String> {
    let mut h = blake3::Hasher::new();
    let mut part = |bytes: &[u8]| {
        h.update(&(bytes.len() as u64).to_le_bytes());
        h.update(bytes);
    };
    part(inlined(source)?.as_bytes());
    options(target, defines).iter().for_each(|o| part(o.as_bytes()));
    part(format!("{major}.{minor}").as_bytes());
    Ok(h.finalize().to_hex()[..32].to_string())
}

/// First bytes of a cached image; what follows is the hash of the rest, then the rest.
const MAGIC: &[u8; 8] = b"rtkern01";

/// The image in a file; `None` where there is none or it is damaged.
fn read_checked(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(file).ok()?;
    let (hash, image) = bytes.strip_prefix(MAGIC)?.split_at_checked(32)?;
    (blake3::hash(image).as_bytes() == hash).then(|| image.to_vec())
}

fn write_checked(file: &Path, image: &[u8]) -> Result<()> {
    create_dir_all(&parent(file))?;
    write_bytes(file, &[MAGIC, blake3::hash(image).as_bytes().as_slice(), image].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::cast;
    use crate::cuda::matmul::SOURCE as MATMUL;

    #[test]
    fn headers_are_put_in_once_and_lines_keep_their_names() {
        let text = inlined(&MATMUL).unwrap();
        assert!(text.starts_with("#line 1 \"kernels/matmul.cu\"\n"));
        assert_eq!(text.matches("#line 1 \"kernels/common/ptx.cuh\"").count(), 1);
        assert!(!text.contains("#include") && !text.contains("#pragma once"));
        // The line after an include has the number it has in the file.
        let at = MATMUL.text.lines().position(|l| l.starts_with("using LoaderA")).unwrap();
        let before: Vec<&str> = text.lines().take_while(|l| !l.starts_with("using LoaderA")).collect();
        let marker = before.iter().rposition(|l| l.starts_with("#line")).unwrap();
        let n: usize = before[marker].split(' ').nth(1).unwrap().parse().unwrap();
        assert_eq!(n + before.len() - marker - 1, at + 1);
        let bad = Source { name: "kernels/x.cu", text: "\n#include \"common/none.cuh\"" };
        assert_eq!(inlined(&bad).unwrap_err().to_string(), "kernels/x.cu: line 2: there is no header common/none.cuh");
    }

    #[test]
    fn architectures_are_read_as_nvrtc_spells_them() {
        for (text, target) in [
            ("sm_80", Target::Cubin(80)),
            ("sm_90a", Target::Cubin(90)),
            ("compute_80", Target::Ptx(80)),
            ("compute_90a", Target::OwnPtx(90)),
            ("sm_120", Target::Cubin(120)),
        ] {
            assert_eq!(text.parse::<Target>().unwrap(), target);
            assert_eq!(target.to_string(), text);
        }
        for bad in ["sm_75", "sm_90aa", "80", "sm_", "compute_9x", "sm_a", ""] {
            assert_eq!(bad.parse::<Target>().unwrap_err().exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn a_damaged_image_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("sub/a.image");
        write_checked(&file, b"image").unwrap();
        assert_eq!(read_checked(&file).unwrap(), b"image");
        let good = fs::read(&file).unwrap();
        for cut in [0, 7, 39, good.len() - 1] {
            fs::write(&file, &good[..cut]).unwrap();
            assert_eq!(read_checked(&file), None, "{cut} bytes");
        }
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(&file, flipped).unwrap();
        assert_eq!(read_checked(&file), None);
        assert_eq!(fs::read_dir(dir.path().join("sub")).unwrap().count(), 1, "no temporary file stays");
    }

    #[test]
    fn targets_have_nvrtcs_names() {
        assert_eq!(Target::Cubin(90).to_string(), "sm_90a");
        assert_eq!(Target::Cubin(80).to_string(), "sm_80");
        assert_eq!(Target::Cubin(120).ptx().to_string(), "compute_120");
        assert_eq!(Target::Cubin(90).ptx().to_string(), "compute_90a");
        assert_eq!(
            label(&cast::SOURCE, &[("SRC_T", Value::Word("float")), ("FLAG", Value::Flag)]),
            "kernels/cast.cu [SRC_T=float FLAG]"
        );
    }
}
