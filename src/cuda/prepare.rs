//! Before a run starts it is gone through once without computing: what it launches is written down, then compiled and loaded together, and
//! its scratch grows to what it will be. See [`crate::backend::Backend::prepare`].

use super::device::Cuda;
use super::kernels::Kernel;
use super::rehearsal::Rehearsal;
use crate::error::Result;

/// Ends a rehearsal, also where it fails.
struct Ends<'a>(&'a Rehearsal);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.switch(false);
    }
}

/// [`crate::backend::Backend::prepare`].
pub(super) fn prepare(dev: &Cuda, work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let rehearsal = &dev.rehearsal;
    {
        let _ends = Ends(rehearsal);
        rehearsal.switch(true);
        work()?;
    }
    let mut kernels: Vec<(Kernel, usize)> = rehearsal.take();
    kernels.sort_unstable_by_key(|(kernel, _)| (kernel.source.name, kernel.entry));
    dev.modules().load_all(&kernels)
}
