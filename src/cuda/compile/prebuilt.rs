//! Kernels compiled on another machine: a folder with an image of each, and a manifest.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Compiler, Define, Defines, Source, Target, key, read_checked, write_checked};
use crate::cuda::nvrtc::Nvrtc;
use crate::error::{Context, Error, Result};
use crate::files::{create_dir_all, write_json};

/// Kernels compiled elsewhere, by `ringtune kernels`: a folder with an image of every configuration and a manifest.
#[derive(Clone, Debug)]
pub struct Prebuilt {
    dir: PathBuf,
    target: Target,
    version: (i32, i32),
}

/// Its manifest.
const PREBUILT: &str = "kernels.json";

impl Prebuilt {
    /// The folder that `RINGTUNE_KERNELS` names, if it names one.
    ///
    /// # Errors
    /// If it is not such a folder.
    pub fn named() -> Result<Option<Self>> {
        let named = std::env::var_os("RINGTUNE_KERNELS").filter(|d| !d.is_empty());
        named.map(|dir| Self::open(Path::new(&dir))).transpose()
    }

    fn open(dir: &Path) -> Result<Self> {
        let path = dir.join(PREBUILT);
        let place = || format!("RINGTUNE_KERNELS={}", dir.display());
        let text = fs::read_to_string(&path).context(|| format!("{}: {PREBUILT}", place()))?;
        let all: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| Error::new(format!("{}: {PREBUILT}: {e}", place())))?;
        let version = |i: usize| all["nvrtc"][i].as_i64().and_then(|n| i32::try_from(n).ok());
        let target = all["target"].as_str().and_then(|t| t.parse().ok());
        match (target, version(0), version(1)) {
            (Some(target), Some(major), Some(minor)) => {
                Ok(Self { dir: dir.to_path_buf(), target, version: (major, minor) })
            }
            _ => Err(Error::new(format!(
                "{}: {PREBUILT}: expected target and nvrtc as `ringtune kernels` writes them; make the folder again",
                place()
            ))),
        }
    }

    /// What it was compiled for.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Refuses a device that its kernels do not run on.
    ///
    /// # Errors
    /// If the device is another, or one that is emulated, which takes no machine code.
    pub fn expect_device(&self, cc: u32, emulated: bool) -> Result<()> {
        let runs = match self.target {
            Target::Cubin(for_cc) => !emulated && for_cc == cc,
            Target::OwnPtx(for_cc) => for_cc == cc,
            Target::Ptx(for_cc) => for_cc <= cc,
        };
        match runs {
            true => Ok(()),
            false => Err(Error::new(format!(
                "RINGTUNE_KERNELS={}: made for {}, this device is {}sm_{cc}; make them with `ringtune kernels --arch {}`",
                self.dir.display(),
                self.target,
                if emulated { "an emulated " } else { "" },
                if emulated { Target::Ptx(80) } else { Target::Cubin(cc) },
            ))),
        }
    }

    /// Compiles every configuration into `dir`. Returns how many images there are.
    ///
    /// # Errors
    /// If a source does not compile or a file cannot be written.
    pub fn make(dir: &Path, nvrtc: &'static Nvrtc, target: Target, all: &[(Source, Defines)]) -> Result<usize> {
        create_dir_all(dir)?;
        let compiler = Compiler { nvrtc: Some(nvrtc), target, prebuilt: None, cache: None, dump: None };
        let images: Result<BTreeSet<PathBuf>> = all
            .par_iter()
            .map(|(source, defines)| {
                let file = dir.join(format!("{}.image", key(source, defines, target, nvrtc.version())?));
                write_checked(&file, &compiler.image(source, defines)?)?;
                Ok(file)
            })
            .collect();
        let images = images?;
        let (major, minor) = nvrtc.version();
        let manifest = serde_json::json!({
            "ringtune": env!("CARGO_PKG_VERSION"), "target": target.to_string(), "nvrtc": [major, minor], "images": images.len(),
        });
        write_json(&dir.join(PREBUILT), &manifest)?;
        Ok(images.len())
    }

    pub(super) fn image(&self, source: &Source, defines: &[Define]) -> Result<Option<Vec<u8>>> {
        let file = self.dir.join(format!("{}.image", key(source, defines, self.target, self.version)?));
        Ok(read_checked(&file))
    }
}
