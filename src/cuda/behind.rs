//! What a device was given to do and nobody has waited for yet. The driver tells of a kernel that fails at some later call, which is not the
//! kernel's own: its error names those that it may have been.

use std::fmt;
use std::sync::Mutex;

use super::locked;

/// Kernels that were launched since the last wait.
pub(super) struct Behind {
    /// Each once, in the order of their first launches.
    kernels: Mutex<Vec<&'static str>>,
    /// Whether each launch is waited for.
    waits: bool,
}

/// The variable of the driver and of PyTorch: 1, and each launch is waited for.
const BLOCKING: &str = "CUDA_LAUNCH_BLOCKING";

impl Default for Behind {
    /// None yet; the environment says whether each is waited for.
    fn default() -> Self {
        Self { kernels: Mutex::default(), waits: std::env::var(BLOCKING).is_ok_and(|v| v == "1") }
    }
}

impl Behind {
    /// A kernel was launched.
    pub fn launched(&self, entry: &'static str) {
        let mut kernels = locked(&self.kernels);
        if !kernels.contains(&entry) {
            kernels.push(entry);
        }
    }

    /// All of them have run.
    pub fn clear(&self) {
        locked(&self.kernels).clear();
    }

    /// Whether each launch is waited for, so that an error is that of its own kernel.
    pub fn waits(&self) -> bool {
        self.waits
    }
}

/// What stands behind the name of a call that failed: nothing, or the kernels before it.
impl fmt::Display for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kernels = locked(&self.kernels);
        if kernels.is_empty() || self.waits {
            return Ok(());
        }
        write!(f, " behind {} ({BLOCKING}=1 names the one that fails)", kernels.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_named_once_until_they_are_waited_for() {
        let behind = Behind { kernels: Mutex::default(), waits: false };
        assert_eq!(behind.to_string(), "");
        ["matmul", "adamw", "matmul"].into_iter().for_each(|k| behind.launched(k));
        assert_eq!(behind.to_string(), " behind matmul, adamw (CUDA_LAUNCH_BLOCKING=1 names the one that fails)");
        behind.clear();
        assert_eq!(behind.to_string(), "");
    }
}
