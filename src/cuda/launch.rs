//! One launch: arguments held to the kernel's list, then the only call that runs code on the device.

use std::sync::Arc;

use cudarc::driver::{CudaStream, LaunchConfig, PushKernelArg};

use super::device::{Counts, Cuda};
use super::error::DriverResult;
use super::kernels::{Kernel, Param};
use super::memory::CudaBuf;
use super::tensor_map::TensorMap;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Parameters that a kernel has at most.
const MOST: usize = 40;

/// Largest count that a kernel takes in 32 bits: it may round it up to whole tiles, strips or rounds of a block, of which none is longer
/// than what is left.
pub const MOST_COUNTED: usize = u32::MAX as usize - (1 << 16);

/// A launch being put together. It borrows its tensors until it is queued, so that a destination is never also a source.
pub struct Launch<'a> {
    dev: &'a Cuda,
    kernel: &'a Kernel,
    blocks: usize,
    shared: usize,
    /// Kind and bits of each argument; the low bytes of narrow ones, the number of a map.
    args: [(Param, u64); MOST],
    len: usize,
    maps: &'a [TensorMap],
    stream: &'a Arc<CudaStream>,
    /// A count that the kernel cannot take.
    beyond: Option<usize>,
}

impl<'a> Launch<'a> {
    /// A launch of `blocks` blocks in one dimension, with `shared` bytes of dynamic shared memory.
    pub fn new(dev: &'a Cuda, kernel: &'a Kernel, blocks: usize, shared: usize) -> Self {
        let args = [(Param::U32, 0); MOST];
        Self { dev, kernel, blocks, shared, args, len: 0, maps: &[], stream: dev.stream(), beyond: None }
    }

    fn push(mut self, param: Param, bits: u64) -> Self {
        self.args[self.len] = (param, bits);
        self.len += 1;
        self
    }

    /// The address of a tensor; those of numbers are read in 16-byte pieces.
    fn address(&self, t: &Tensor<Cuda>) -> u64 {
        let address = t.buf.address();
        assert!(
            t.dtype() == DType::I32 || address.is_multiple_of(CudaBuf::ALIGNMENT),
            "{}: alignment",
            self.kernel.entry
        );
        address
    }

    /// A tensor that the kernel writes, or reads and writes.
    pub fn write(self, t: &'a mut Tensor<Cuda>) -> Self {
        let address = self.address(t);
        self.push(Param::Out, address)
    }

    /// A tensor that the kernel writes from this element on.
    pub fn write_from(self, t: &'a mut Tensor<Cuda>, element: usize) -> Self {
        let address = self.address(t) + (element * t.dtype().bytes()) as u64;
        self.push(Param::Out, address)
    }

    /// A destination that this launch does not use.
    pub fn no_write(self) -> Self {
        self.push(Param::Out, 0)
    }

    /// A destination that may be left out.
    pub fn write_if(self, t: Option<&'a mut Tensor<Cuda>>) -> Self {
        match t {
            Some(t) => self.write(t),
            None => self.no_write(),
        }
    }

    /// A tensor that the kernel reads.
    pub fn read(self, t: &'a Tensor<Cuda>) -> Self {
        self.read_from(t, 0)
    }

    /// A tensor that the kernel reads from this element on.
    pub fn read_from(self, t: &'a Tensor<Cuda>, element: usize) -> Self {
        let address = self.address(t) + (element * t.dtype().bytes()) as u64;
        self.push(Param::In, address)
    }

    /// A source that may be left out.
    pub fn read_if(self, t: Option<&'a Tensor<Cuda>>) -> Self {
        match t {
            Some(t) => self.read(t),
            None => self.push(Param::In, 0),
        }
    }

    /// A count or index; `run` refuses one beyond [`MOST_COUNTED`].
    pub fn u32(self, x: usize) -> Self {
        let beyond = if x > MOST_COUNTED { Some(x) } else { self.beyond };
        Self { beyond, ..self }.push(Param::U32, x as u64)
    }

    /// 32 bits that count nothing.
    pub fn word(self, x: u32) -> Self {
        self.push(Param::U32, u64::from(x))
    }

    /// Yes as 1, no as 0.
    pub fn flag(self, on: bool) -> Self {
        self.push(Param::U32, u64::from(on))
    }

    /// A large count or stride.
    pub fn u64(self, x: usize) -> Self {
        self.push(Param::U64, x as u64)
    }

    /// A factor.
    pub fn f32(self, x: f32) -> Self {
        self.push(Param::F32, u64::from(x.to_bits()))
    }

    /// The matrices that tensor copies take boxes of.
    pub fn maps(self, maps: &'a [TensorMap]) -> Self {
        let this = Self { maps, ..self };
        (0..maps.len()).fold(this, |this, at| this.push(Param::Map, at as u64))
    }

    /// On another stream than the one that computes: whoever holds the tensors keeps them until that stream is past this launch.
    pub fn on(self, stream: &'a Arc<CudaStream>) -> Self {
        Self { stream, ..self }
    }

    /// Queues it on its stream, that of the device where no other was named; in a rehearsal it is written down instead. Without blocks there is nothing to do.
    ///
    /// # Errors
    /// If a count or the number of blocks is larger than a launch takes, the kernel does not compile or load, or the driver refuses the
    /// launch.
    ///
    /// # Panics
    /// If the arguments differ from the kernel's list.
    pub fn run(self) -> Result<()> {
        let Kernel { entry, params, threads, .. } = *self.kernel;
        let args = &self.args[..self.len];
        assert!(args.iter().map(|(given, _)| given).eq(params), "{entry}: parameters of the launch: {args:?}");
        if self.blocks == 0 {
            return Ok(());
        }
        if let Some(count) = self.beyond {
            return Err(too_large(entry, &format!("{count} rows, columns or elements"), MOST_COUNTED));
        }
        let most = i32::MAX as usize;
        let fits = u32::try_from(self.blocks).ok().filter(|_| self.blocks <= most);
        let blocks = fits.ok_or_else(|| too_large(entry, &format!("{} blocks", self.blocks), most))?;
        if self.dev.rehearsal.note(self.kernel, self.shared) {
            return Ok(());
        }
        Counts::add(&self.dev.counts.launches);
        let function = self.dev.modules().function(self.kernel, self.shared)?;
        let mut builder = self.stream.launch_builder(&function);
        for (param, bits) in args {
            match param {
                Param::Map => builder.arg(&self.maps[*bits as usize]),
                _ => builder.arg(bits),
            };
        }
        let config = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (threads as u32, 1, 1),
            shared_mem_bytes: self.shared as u32,
        };
        // SAFETY: the arguments have the kinds and order of the kernel's list (asserted above), which a test compares with the
        // compiled entry. Buffers hold what the caller of `Launch` checked: shapes and types of its tensors. Buffers are freed in
        // stream order, after this launch, or kept by who named another stream.
        let launched = unsafe { builder.launch(config) };
        launched.doing(|| {
            format!(
                "launching {entry} with {blocks} blocks of {threads} threads and {} bytes of shared memory{}",
                self.shared, self.dev.behind
            )
        })?;
        self.dev.behind.launched(entry);
        if self.dev.behind.waits() {
            self.stream.synchronize().doing(|| format!("running {entry} with {blocks} blocks of {threads} threads"))?;
        }
        Ok(())
    }
}

/// That a launch is larger than a kernel can count, and what makes it smaller.
pub(super) fn too_large(what: &str, found: &str, most: usize) -> Error {
    Error::new(format!(
        "cuda: {what}: {found} in one launch, at most {most} are possible: use a smaller micro-batch (--per-device-train-batch-size) or shorter \
         rows (--max-seq-len)"
    ))
}
