//! A contiguous row-major matrix on one device, and [`Device`], the memory it rests on. Vectors are `(1, n)`.

use crate::bail;
use crate::error::Result;
use crate::mapped::FilePart;
use crate::measure::{MemoryUse, Nature, Tally};
use crate::words::words;
use rayon::prelude::*;
use std::time::Instant;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    #[default]
    F32,
    /// bfloat16: binary32 with a 7-bit fraction.
    Bf16,
    /// Token ids, positions and targets.
    I32,
}
// As the setting of the storage type says them.
words!(DType { F32 = "no", Bf16 = "bf16" } but I32);

impl DType {
    /// Size of one element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 => 2,
        }
    }
}

/// Writes the values of a matrix from an element on.
pub type Fill<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// A device's memory: what a [`Tensor`] rests on.
pub trait Device: Sized {
    /// The device's memory behind a tensor.
    type Buf;

    /// What the device works out of a micro-batch on the host, kept beside it; `()` where there is nothing.
    type Plan: Default;

    /// One line for tables and logs: device, features, threads.
    fn describe(&self) -> String;

    /// What decides the last bits of its results: a run that goes on elsewhere is warned.
    fn arithmetic(&self) -> String {
        self.describe()
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>>;

    /// As [`Device::alloc`], for at most so many rows: later ones may never be used.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn alloc_rows(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        self.alloc(rows, cols, dtype)
    }

    /// A tensor (rows, cols) of f32 or bf16 whose elements stand in a file, aligned: they are read there as long as nobody writes to the
    /// tensor. Whether the file is as it was is asked where figures or values are. `None` where the device has memory of its own.
    fn adopt(&self, _part: FilePart, _rows: usize, _cols: usize, _dtype: DType) -> Option<Tensor<Self>> {
        None
    }

    /// Tensors of zeros that are used together: one after the other, each in a room of so many elements, where the device puts them into
    /// one piece of memory. Here each has its own, without more room than it needs.
    ///
    /// # Errors
    /// If the device has not enough memory.
    fn alloc_together(&self, shapes: &[(usize, usize)], rooms: &[usize], dtype: DType) -> Result<Vec<Tensor<Self>>> {
        let _ = rooms;
        shapes.iter().map(|&(rows, cols)| self.alloc(rows, cols, dtype)).collect()
    }

    /// Memory of its own that is free, in bytes; `None` where it works in that of the machine.
    fn free_memory(&self) -> Option<u64> {
        None
    }

    /// Largest number of floating-point operations per second for operands of this type, where it is known.
    fn peak_flops(&self, _dtype: DType) -> Option<f64> {
        None
    }

    /// The same, reached by a loop of this device in registers now: measured, where it has one.
    fn measured_peak(&self, _dtype: DType) -> Option<f64> {
        None
    }

    /// What it is, as far as a measurement depends on it.
    fn nature(&self) -> Nature {
        Nature::default()
    }

    /// What it was asked to do since it was opened; `None` where nobody counts.
    fn tally(&self) -> Option<Tally> {
        None
    }

    /// Memory in use, where it is known: of the process for a device that works in that of the machine.
    fn memory_use(&self) -> Option<MemoryUse> {
        None
    }

    /// From now on [`Device::memory_use`] gives the peak from here. False where the peak cannot be forgotten.
    fn forget_peak(&self) -> bool {
        false
    }

    /// Seconds that the device takes for what `work` queues, from an idle start, by its own clock where it has one.
    ///
    /// # Errors
    /// That of `work`, or if the device fails.
    fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.synchronize()?;
        let start = Instant::now();
        work()?;
        self.synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Copies host values into an f32 or bf16 tensor (rounded to nearest even for bf16). `src.len() == dst.len()`.
    ///
    /// # Errors
    /// If the device refuses the copy.
    fn upload(&self, dst: &mut Tensor<Self>, src: &[f32]) -> Result<()>;

    /// Copies host values over the elements from `first` on; the others stay.
    ///
    /// # Errors
    /// If the device refuses the copy.
    fn upload_at(&self, dst: &mut Tensor<Self>, first: usize, src: &[f32]) -> Result<()> {
        let mut all = vec![0.0; dst.len()];
        self.download(&mut all, dst)?;
        all[first..first + src.len()].copy_from_slice(src);
        self.upload(dst, &all)
    }

    /// Copies the elements from `first` on, as many as `dst` has, to the host, as [`Device::download`].
    ///
    /// # Errors
    /// If the device refuses the copy.
    fn download_at(&self, dst: &mut [f32], src: &Tensor<Self>, first: usize) -> Result<()> {
        let mut all = vec![0.0; src.len()];
        self.download(&mut all, src)?;
        dst.copy_from_slice(&all[first..first + dst.len()]);
        Ok(())
    }

    /// As [`Device::upload`] of values that `fill` writes, those from an element on: each is asked for once, by any thread, and no copy of
    /// all of them is needed where the device works in the memory of the machine.
    ///
    /// # Errors
    /// If the device refuses the copy.
    fn upload_by(&self, dst: &mut Tensor<Self>, fill: &Fill<'_>) -> Result<()> {
        const CHUNK: usize = 1 << 16;
        let mut all = vec![0.0; dst.len()];
        all.par_chunks_mut(CHUNK).enumerate().for_each(|(i, part)| fill(i * CHUNK, part));
        self.upload(dst, &all)
    }

    /// Copies host integers into an i32 tensor.
    ///
    /// # Errors
    /// If the device refuses the copy.
    fn upload_i32(&self, dst: &mut Tensor<Self>, src: &[i32]) -> Result<()>;

    /// Copies an f32 or bf16 tensor to the host, widened exactly. Waits for the device.
    ///
    /// # Errors
    /// If the device refuses the copy.
    fn download(&self, dst: &mut [f32], src: &Tensor<Self>) -> Result<()>;

    /// Waits until everything queued has run.
    ///
    /// # Errors
    /// If an earlier operation failed.
    fn synchronize(&self) -> Result<()>;

    /// `dst = 0`.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn fill_zero(&self, dst: &mut Tensor<Self>) -> Result<()>;

    /// `dst = 0` for all of them.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn fill_zeros(&self, all: &mut [&mut Tensor<Self>]) -> Result<()> {
        all.iter_mut().try_for_each(|dst| self.fill_zero(dst))
    }

    /// `dst = src`, converting between f32 and bf16 where the dtypes differ. Same shape.
    ///
    /// # Errors
    /// If the device refuses the launch.
    fn copy(&self, dst: &mut Tensor<Self>, src: &Tensor<Self>) -> Result<()>;
}

/// A matrix of `rows` x `cols` elements; each tensor owns its buffer, so the borrow checker proves that a destination is
/// never also a source.
///
/// The buffer is allocated once, at start-up. [`Tensor::set_rows`] and [`Tensor::set_shape`] change the logical shape within
/// its capacity, because micro-batches differ in their number of tokens and scratch is shared between layers.
pub struct Tensor<B: Device> {
    /// The device's buffer, of at least `capacity` elements.
    pub buf: B::Buf,
    rows: usize,
    cols: usize,
    capacity: usize,
    dtype: DType,
}

impl<B: Device> Tensor<B> {
    /// Wraps a buffer; for backends only, which guarantee that `buf` holds `rows * cols` elements of `dtype`.
    pub fn from_buf(buf: B::Buf, rows: usize, cols: usize, dtype: DType) -> Self {
        Self { buf, rows, cols, capacity: rows * cols, dtype }
    }

    /// Logical height.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Width.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// `(rows, cols)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Number of logical elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether the tensor has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Elements the buffer was allocated for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Sets the logical height; the width stays.
    ///
    /// # Panics
    /// If the shape exceeds the capacity.
    pub fn set_rows(&mut self, rows: usize) {
        self.set_shape(rows, self.cols);
    }

    /// Sets the logical shape; the elements stay where they are in memory.
    ///
    /// # Panics
    /// If the shape exceeds the capacity.
    pub fn set_shape(&mut self, rows: usize, cols: usize) {
        assert!(rows * cols <= self.capacity, "set_shape: {rows} x {cols} in a tensor of {} elements", self.capacity);
        (self.rows, self.cols) = (rows, cols);
    }
}

/// A matrix in host memory, row-major f32; vectors are `(1, n)`.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Height.
    pub rows: usize,
    /// Width.
    pub cols: usize,
    /// `rows * cols` values.
    pub data: Vec<f32>,
}

impl HostTensor {
    /// A tensor of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// Row `i`, to write to.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// Refuses infinities and NaN; `what` names the tensor in the message.
    ///
    /// # Errors
    /// If a value is not finite: the message has the tensor, the row and column of the first one, and how many there are.
    pub fn check_finite(&self, what: &str) -> Result<()> {
        if self.data.iter().all(|x| x.is_finite()) {
            return Ok(());
        }
        let first = self.data.iter().position(|x| !x.is_finite()).expect("one is not finite");
        let count = self.data.iter().filter(|x| !x.is_finite()).count();
        let (row, col) = (first / self.cols, first % self.cols);
        bail!(
            "{what}: value at row {row}, column {col} is {}; {count} of {} are not finite",
            self.data[first],
            self.data.len()
        )
    }
}
