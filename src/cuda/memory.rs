//! Memory of the device: buffers, copies to and from the host, scratch.

use std::sync::{Arc, MutexGuard};

use cudarc::driver::{CudaSlice, DevicePtr, result};
use half::bf16;

use super::device::{Counts, Cuda, Room};
use super::error::{DriverResult, driver};
use super::locked;
use super::pinned::Pinned;
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Tensor};

/// A piece of the device's memory. It goes back, in the order of the stream, with the last who holds it.
#[derive(Clone)]
pub(super) struct Memory {
    held: Arc<CudaSlice<u8>>,
    address: u64,
}

impl Memory {
    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }
}

/// Device memory behind a tensor: a piece, or a part of one that no other tensor has.
pub struct CudaBuf {
    /// Held for as long as the buffer is.
    _memory: Memory,
    address: u64,
    bytes: usize,
    /// Where what lies behind it in the piece begins: between them is nobody's.
    next: u64,
}

impl CudaBuf {
    /// What every buffer's address is a multiple of; `cuMemAllocAsync` gives 256.
    pub const ALIGNMENT: u64 = 16;

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Where what lies behind it in its piece begins: between them is nobody's.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// `bytes` bytes of a piece from byte `at` on. Whoever cuts a piece into parts sees to it that they do not meet.
    pub(super) fn part(memory: &Memory, at: usize, bytes: usize) -> Self {
        assert!(at + bytes <= memory.held.len(), "bytes {at}..{} of a piece of {}", at + bytes, memory.held.len());
        let address = memory.address + at as u64;
        Self { _memory: memory.clone(), address, bytes, next: address + bytes as u64 }
    }

    /// Where `bytes` bytes from byte `at` on begin.
    fn range(&self, at: usize, bytes: usize) -> u64 {
        assert!(at + bytes <= self.bytes, "bytes {at}..{} of a buffer of {}", at + bytes, self.bytes);
        self.address + at as u64
    }
}

/// Values converted at once on their way to or from the device: bounds the memory of a copy.
const COPY_ELEMENTS: usize = 1 << 22;

/// Bytes of a download that lands in page-locked memory: logits of 32 sequences with 128k classes. The driver has buffers of its own for more.
const LANDING: usize = 16 << 20;

/// A scratch tensor while an operation is being queued.
pub(super) struct RoomGuard<'a>(MutexGuard<'a, Option<Tensor<Cuda>>>);

impl RoomGuard<'_> {
    /// The tensor itself.
    pub fn tensor(&mut self) -> &mut Tensor<Cuda> {
        self.0.as_mut().expect("allocated when the guard was made")
    }
}

impl Cuda {
    /// A scratch tensor of this shape and type, its values whatever they were.
    pub(super) fn room(&self, which: Room, rows: usize, cols: usize, dtype: DType) -> Result<RoomGuard<'_>> {
        let mut guard = locked(&self.rooms[which as usize]);
        match guard.as_mut().filter(|t| t.capacity() >= rows * cols && t.dtype() == dtype) {
            Some(t) => t.set_shape(rows, cols),
            None => {
                // What is too small goes back before more is asked for.
                *guard = None;
                *guard = Some(self.alloc(rows, cols, dtype)?);
            }
        }
        Ok(RoomGuard(guard))
    }

    /// A tensor of zeros.
    pub(super) fn allocate(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        let bytes = rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(dtype.bytes()))
            .ok_or_else(|| Error::new(format!("cuda: a tensor of {rows} x {cols} is larger than any memory")))?;
        let memory = self.take_for(bytes, || format!("{rows} x {cols} of {dtype:?}"))?;
        Ok(Tensor::from_buf(CudaBuf::part(&memory, 0, bytes), rows, cols, dtype))
    }

    /// Tensors of zeros in one piece of memory, one after the other, each in a room of so many elements.
    pub(super) fn allocate_together(
        &self,
        shapes: &[(usize, usize)],
        rooms: &[usize],
        dtype: DType,
    ) -> Result<Vec<Tensor<Self>>> {
        assert_eq!(shapes.len(), rooms.len(), "a room for each tensor");
        let bytes = rooms.iter().sum::<usize>() * dtype.bytes();
        let memory = self.take_for(bytes, || format!("{} tensors of {dtype:?}", shapes.len()))?;
        let mut at = 0;
        let tensors = shapes.iter().zip(rooms).map(|(&(rows, cols), room)| {
            assert!(rows * cols <= *room, "{rows} x {cols} in a room of {room} elements");
            let mut buf = CudaBuf::part(&memory, at, rows * cols * dtype.bytes());
            at += room * dtype.bytes();
            buf.next = memory.address + at as u64;
            Tensor::from_buf(buf, rows, cols, dtype)
        });
        Ok(tensors.collect())
    }

    /// A piece of memory of zeros.
    pub(super) fn take(&self, bytes: usize) -> Result<Memory> {
        self.take_for(bytes, || "micro-batches".into())
    }

    fn take_for(&self, bytes: usize, what: impl Fn() -> String) -> Result<Memory> {
        // A tensor without elements still has an address.
        let allocated = self.stream().alloc_zeros::<u8>(bytes.max(CudaBuf::ALIGNMENT as usize));
        let held = allocated.map_err(|e| {
            let (free, total) = self.memory().unwrap_or((0, self.properties().memory));
            let mib = |n: usize| n as f64 / f64::from(1 << 20);
            driver(
                &format!(
                    "allocating {:.1} MiB for {} ({:.0} MiB free of {:.0} MiB)",
                    mib(bytes),
                    what(),
                    mib(free),
                    mib(total)
                ),
                e,
            )
        })?;
        let address = held.device_ptr(self.stream()).0;
        Ok(Memory { held: Arc::new(held), address })
    }

    /// Copies values to the device, rounded where it holds bf16.
    pub(super) fn upload_values(&self, dst: &mut Tensor<Self>, src: &[f32]) -> Result<()> {
        assert_eq!(dst.len(), src.len(), "upload: number of elements");
        self.upload_values_at(dst, 0, src)
    }

    /// Copies values over the elements from `first` on.
    pub(super) fn upload_values_at(&self, dst: &mut Tensor<Self>, first: usize, src: &[f32]) -> Result<()> {
        assert!(first + src.len() <= dst.len(), "upload: number of elements");
        match dst.dtype() {
            DType::F32 => self.upload_bytes(dst, first * 4, bytemuck::cast_slice(src)),
            DType::Bf16 => {
                for (i, part) in src.chunks(COPY_ELEMENTS).enumerate() {
                    let rounded: Vec<bf16> = part.iter().map(|&x| bf16::from_f32(x)).collect();
                    self.upload_bytes(dst, (first + i * COPY_ELEMENTS) * 2, bytemuck::cast_slice(&rounded))?;
                }
                Ok(())
            }
            DType::I32 => panic!("upload: integers where numbers are expected"),
        }
    }

    /// Copies integers to the device.
    pub(super) fn upload_integers(&self, dst: &mut Tensor<Self>, src: &[i32]) -> Result<()> {
        assert_eq!(dst.dtype(), DType::I32, "upload_i32: element type");
        assert_eq!(dst.len(), src.len(), "upload_i32: number of elements");
        self.upload_bytes(dst, 0, bytemuck::cast_slice(src))
    }

    /// Copies values to the host, widened.
    pub(super) fn download_values(&self, dst: &mut [f32], src: &Tensor<Self>) -> Result<()> {
        assert_eq!(dst.len(), src.len(), "download: number of elements");
        self.download_values_at(dst, src, 0)
    }

    /// Copies the elements from `first` on to the host, widened.
    pub(super) fn download_values_at(&self, dst: &mut [f32], src: &Tensor<Self>, first: usize) -> Result<()> {
        assert!(first + dst.len() <= src.len(), "download: number of elements");
        match src.dtype() {
            DType::F32 => self.download_bytes(bytemuck::cast_slice_mut(dst), src, first * 4),
            DType::Bf16 => {
                let mut part = vec![bf16::ZERO; COPY_ELEMENTS.min(dst.len())];
                for (i, dst) in dst.chunks_mut(COPY_ELEMENTS).enumerate() {
                    let part = &mut part[..dst.len()];
                    self.download_bytes(bytemuck::cast_slice_mut(part), src, (first + i * COPY_ELEMENTS) * 2)?;
                    dst.iter_mut().zip(part.iter()).for_each(|(d, s)| *d = s.to_f32());
                }
                Ok(())
            }
            DType::I32 => panic!("download: integers where numbers are expected"),
        }
    }

    /// The first `n` words of 64 bits of a tensor of integers, and waits for them.
    pub(super) fn download_words(&self, src: &Tensor<Self>, n: usize) -> Result<Vec<u64>> {
        assert!(src.dtype() == DType::I32 && 2 * n <= src.len(), "download: {n} words of {:?}", src.shape());
        let mut words = vec![0; n];
        self.download_bytes(bytemuck::cast_slice_mut(&mut words), src, 0)?;
        Ok(words)
    }

    /// Fills the logical part of a tensor with zeros.
    pub(super) fn zero(&self, dst: &mut Tensor<Self>) -> Result<()> {
        let bytes = dst.len() * dst.dtype().bytes();
        if bytes == 0 || self.rehearsal.is_on() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: the range lies in the buffer, which is borrowed mutably and freed in the stream's order.
        let set = unsafe { result::memset_d8_async(dst.buf.range(0, bytes), 0, bytes, self.stream().cu_stream()) };
        set.doing(|| "filling with zeros".into())
    }

    /// Fills tensors with zeros: neighbours in a piece of memory at once, with what lies between them.
    pub(super) fn zero_all(&self, all: &mut [&mut Tensor<Self>]) -> Result<()> {
        // Where a span begins and ends, and where a neighbour of its last tensor would begin.
        let mut spans: Vec<(u64, u64, u64)> = Vec::new();
        for t in all.iter().filter(|t| !t.is_empty()) {
            let (begin, bytes) = (t.buf.address, t.len() * t.dtype().bytes());
            let (end, next) = (begin + bytes as u64, if bytes == t.buf.bytes { t.buf.next } else { 0 });
            match spans.last_mut().filter(|(.., neighbour)| *neighbour == begin) {
                Some(span) => (span.1, span.2) = (end, next),
                None => spans.push((begin, end, next)),
            }
        }
        if self.rehearsal.is_on() {
            return Ok(());
        }
        self.bind()?;
        for (begin, end, _) in spans {
            // SAFETY: a span holds buffers that are borrowed mutably here, and what is between two of them in their piece, which is
            // nobody's. Pieces are freed in the stream's order.
            let set = unsafe { result::memset_d8_async(begin, 0, (end - begin) as usize, self.stream().cu_stream()) };
            set.doing(|| "filling with zeros".into())?;
        }
        Ok(())
    }

    /// Copies a tensor to another of the same shape and type.
    pub(super) fn copy_bytes(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>) -> Result<()> {
        if self.rehearsal.is_on() {
            return Ok(());
        }
        let bytes = src.len() * src.dtype().bytes();
        let (to, from) = (dst.buf.range(0, bytes), src.buf.range(0, bytes));
        self.bind()?;
        // SAFETY: as in `zero`; tensors do not share elements.
        let copied = unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream().cu_stream()) };
        copied.doing(|| "copying on the device".into())
    }

    /// Waits until everything queued has run.
    pub(super) fn wait(&self) -> Result<()> {
        if self.rehearsal.is_on() {
            return Ok(());
        }
        Counts::add(&self.counts.waits);
        self.stream().synchronize().doing(|| format!("waiting for the device{}", self.behind))?;
        self.behind.clear();
        Ok(())
    }

    /// Copies bytes into a tensor from byte `at` on. They may be reused when this returns: the driver has taken them from memory
    /// that is not page-locked.
    fn upload_bytes(&self, dst: &mut Tensor<Self>, at: usize, src: &[u8]) -> Result<()> {
        if src.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: as in `zero`; the driver takes the bytes before it returns, because they are pageable.
        let copied = unsafe { result::memcpy_htod_async(dst.buf.range(at, src.len()), src, self.stream().cu_stream()) };
        copied.doing(|| format!("copying {} bytes to the device", src.len()))
    }

    /// Copies bytes of a tensor from byte `at` on, and waits for them; in a rehearsal there are none. What is not too large lands in
    /// page-locked memory, which a rehearsal makes large enough.
    fn download_bytes(&self, dst: &mut [u8], src: &Tensor<Self>, at: usize) -> Result<()> {
        let bytes = dst.len();
        if bytes == 0 {
            return self.wait();
        }
        let mut landing = (bytes <= LANDING).then(|| locked(&self.landing));
        if let Some(landing) = landing.as_mut().filter(|l| l.as_ref().is_none_or(|l| l.len() < bytes)) {
            // What is too small goes back before more is asked for.
            **landing = None;
            **landing = Some(Pinned::new(self.context(), bytes.next_power_of_two())?);
        }
        if self.rehearsal.is_on() {
            return self.wait();
        }
        self.bind()?;
        let from = src.buf.range(at, bytes);
        let copy = |to: &mut [u8]| {
            // SAFETY: as in `zero`; the bytes are borrowed until the wait behind it.
            let copied = unsafe { result::memcpy_dtoh_async(to, from, self.stream().cu_stream()) };
            copied.doing(|| format!("copying {bytes} bytes from the device"))?;
            self.wait()
        };
        match landing.as_mut().and_then(|l| l.as_mut()) {
            Some(landing) => {
                let landed = &mut landing.values()[..bytes];
                copy(landed)?;
                dst.copy_from_slice(landed);
                Ok(())
            }
            None => copy(dst),
        }
    }
}
