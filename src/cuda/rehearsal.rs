//! The launches of a run that is gone through without computing, written down: `prepare` makes their kernels ready.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::kernels::{Kernel, Key};
use super::locked;

/// Whether a run is gone through, and the kernels that it launches, each with the most shared memory that it asks for.
#[derive(Default)]
pub(super) struct Rehearsal {
    on: AtomicBool,
    kernels: Mutex<HashMap<Key, (Kernel, usize)>>,
}

impl Rehearsal {
    /// Whether nothing is computed now.
    pub fn is_on(&self) -> bool {
        self.on.load(Relaxed)
    }

    /// Begins one, or ends it.
    pub fn switch(&self, on: bool) {
        self.on.store(on, Relaxed);
    }

    /// The kernels so far, which are forgotten.
    pub fn take(&self) -> Vec<(Kernel, usize)> {
        locked(&self.kernels).drain().map(|(_, kernel)| kernel).collect()
    }

    /// Writes a launch down. `false`: this is no rehearsal, and it has to be made.
    pub fn note(&self, kernel: &Kernel, shared: usize) -> bool {
        if self.is_on() {
            let mut kernels = locked(&self.kernels);
            let (_, most) = kernels.entry(kernel.key()).or_insert((*kernel, shared));
            *most = (*most).max(shared);
        }
        self.is_on()
    }
}
