//! Memory behind a tensor: zeros at first, aligned for every vector width, seen as slices of its element type.

use std::any::Any;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;

use super::Cpu;
use super::elem::{Stored, View};
use super::pages::{self, First, Pages, Piece};
use crate::error::{Error, Result, in_words};
use crate::heap;
use crate::mapped::FilePart;
use crate::tensor::{DType, Tensor};

/// What may stand in the place of a buffer's bytes, as long as nothing is written.
pub trait Stead: Any + Send + Sync {
    /// The bytes, to the bit.
    fn rows(&self) -> &CpuBuf;

    /// The same, taken.
    fn into_rows(self: Box<Self>) -> CpuBuf;

    /// The bytes stand beside it and are going to be written: whether it stays, and follows what they become.
    fn outlives_writing(&mut self) -> bool;
}

/// Where bytes stand.
enum Bytes {
    /// In memory of the buffer's own.
    Own(Piece),
    /// In a file, as long as they are only read.
    File(Arc<FilePart>),
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Own(piece) => piece,
            Self::File(part) => part,
        }
    }
}

/// A buffer of zero bytes at first. Pages that were never written take no memory.
pub struct CpuBuf {
    /// `None` where the bytes are in `stead` alone.
    map: Option<Bytes>,
    /// Nobody has written since the system gave the bytes: they are zero, and take no memory as long as they are only read.
    untouched: bool,
    /// What products read instead, as long as nothing is written.
    stead: Option<Box<dyn Stead>>,
    /// So many bytes from the start are zero, whatever stands there: whoever reads or adds to them writes the zeros first, and whoever
    /// writes all of them need not.
    zeros: AtomicUsize,
}

/// Bytes from which on zeros are written when they are needed.
const LATER: usize = 64 << 10;

/// Bytes from which on a large page counts little beside what is used of them.
const PART: usize = 8 << 20;

impl CpuBuf {
    /// `bytes` zero bytes.
    ///
    /// # Errors
    /// If the system has not enough address space.
    pub fn zeros(bytes: usize) -> Result<Self> {
        Self::zeros_in(bytes, Pages::Large)
    }

    /// `bytes` zero bytes, of which the last ones may never be used.
    ///
    /// # Errors
    /// As [`CpuBuf::zeros`].
    pub fn zeros_in_part(bytes: usize) -> Result<Self> {
        Self::zeros_in(bytes, if bytes < PART { Pages::Small } else { Pages::Large })
    }

    fn zeros_in(bytes: usize, pages: Pages) -> Result<Self> {
        let mut buf = Self::any_in(bytes, pages)?;
        if !buf.untouched && !buf.zero_later(bytes) {
            buf.bytes_mut().fill(0);
        }
        Ok(buf)
    }

    /// `bytes` bytes, whatever they are.
    ///
    /// # Errors
    /// If the system has not enough address space.
    pub fn any(bytes: usize) -> Result<Self> {
        Self::any_in(bytes, Pages::Large)
    }

    fn any_in(bytes: usize, pages: Pages) -> Result<Self> {
        let piece = Piece::new(bytes, pages)
            .map_err(|e| Error::memory(format!("cpu: cannot allocate {bytes} bytes: {}", in_words(&e))))?;
        let untouched = piece.is_fresh();
        Ok(Self { map: Some(Bytes::Own(piece)), untouched, stead: None, zeros: AtomicUsize::new(0) })
    }

    /// The bytes of a part of a file, until they are written to.
    pub fn of_file(part: Arc<FilePart>) -> Self {
        Self { map: Some(Bytes::File(part)), untouched: false, stead: None, zeros: AtomicUsize::new(0) }
    }

    /// The part of a file that the bytes stand in.
    pub fn file(&self) -> Option<&FilePart> {
        match &self.map {
            Some(Bytes::File(part)) => Some(part),
            _ => None,
        }
    }

    /// Number of bytes, where they stand in memory of its own.
    fn len(&self) -> usize {
        match &self.map {
            Some(Bytes::Own(piece)) => piece.len(),
            _ => 0,
        }
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        match (&self.map, &self.stead) {
            (Some(map), _) => {
                self.settle(map);
                map
            }
            (None, Some(stead)) => stead.rows().bytes(),
            (None, None) => unreachable!("the bytes stand somewhere"),
        }
    }

    /// What products read instead is forgotten, or follows what is going to be written; given where the bytes are there alone.
    fn forget_stead(&mut self) -> Option<Box<dyn Stead>> {
        let stays = self.map.is_some() && self.stead.as_mut().is_some_and(|stead| stead.outlives_writing());
        if stays { None } else { self.stead.take() }
    }

    /// All bytes, to be written; what stood in their place is forgotten.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let stead = self.forget_stead();
        match (&self.map, stead) {
            (Some(Bytes::File(part)), _) => {
                let mut own = Self::any(part.len()).unwrap_or_else(|_| heap::end(part.len()));
                own.bytes_mut().copy_from_slice(part);
                self.map = own.map;
            }
            (None, Some(stead)) => self.map = stead.into_rows().map,
            _ => {}
        }
        self.untouched = false;
        let zeros = std::mem::take(self.zeros.get_mut());
        let Some(Bytes::Own(own)) = &mut self.map else { unreachable!("the bytes stand in memory of their own") };
        own[..zeros].fill(0);
        own
    }

    /// Writes the zeros that are due.
    fn settle(&self, map: &Bytes) {
        static ONE: Mutex<()> = Mutex::new(());
        if self.zeros.load(Ordering::Acquire) == 0 {
            return;
        }
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let zeros = self.zeros.load(Ordering::Acquire);
        // SAFETY: these are bytes of its own, for zeros are due in no other, and as many. Nobody has a reference into it: they were none when the zeros became due, under `&mut self`, and
        // every way to one goes through here or ends that state; other threads wait for the lock.
        unsafe { std::ptr::write_bytes(map.as_ptr().cast_mut(), 0, zeros) };
        self.zeros.store(0, Ordering::Release);
    }

    /// Makes the first `bytes` bytes zero once they are needed; false where they are so few that they are better written now.
    pub fn zero_later(&mut self, bytes: usize) -> bool {
        let later = self.untouched || (bytes >= LATER && bytes <= self.len());
        if later {
            self.forget_stead();
        }
        if later && !self.untouched {
            let due = self.zeros.get_mut();
            *due = bytes.max(*due);
        }
        later
    }

    /// Whether the first `bytes` bytes are zeros that are not written yet, and no others have to be. They never will be: the caller
    /// writes all of them.
    pub fn overwrites_zeros(&mut self, bytes: usize) -> bool {
        let due = self.zeros.get_mut();
        let all = bytes > 0 && (self.untouched || *due == bytes);
        if all {
            (*due, self.untouched) = (0, false);
        }
        all
    }

    /// What products read instead of the bytes.
    pub fn stead(&self) -> Option<&dyn Stead> {
        self.stead.as_deref()
    }

    /// Keeps another form of what stands here; without `with_bytes` in its place.
    pub fn keep(&mut self, stead: Box<dyn Stead>, with_bytes: bool) {
        self.stead = Some(stead);
        if !with_bytes {
            (self.map, self.untouched) = (None, false);
        }
    }

    /// The first `len` elements.
    pub fn elems<T: bytemuck::Pod>(&self, len: usize) -> &[T] {
        // Pages are aligned for every type.
        bytemuck::cast_slice(&self.bytes()[..len * size_of::<T>()])
    }

    /// The first `len` elements, to be written.
    pub fn elems_mut<T: bytemuck::Pod>(&mut self, len: usize) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.bytes_mut()[..len * size_of::<T>()])
    }
}

/// Has the system give what tensors that are going to be written take of its memory, on all threads at once.
pub fn touch(dev: &Cpu, tensors: &mut [Tensor<Cpu>]) {
    let firsts: Vec<First> = pages::firsts(tensors.iter_mut().filter_map(|t| match &mut t.buf.map {
        Some(Bytes::Own(piece)) => Some(piece),
        _ => None,
    }));
    // SAFETY: the tensors are borrowed, and each byte belongs to one task.
    dev.pool.run(firsts.len(), &|i| unsafe { firsts[i].touch() });
}

/// A buffer that grows.
#[derive(Default)]
pub struct Grow(Option<CpuBuf>);

impl Grow {
    /// `len` elements, their values whatever they were.
    pub fn elems<T: bytemuck::Pod>(&mut self, len: usize) -> &mut [T] {
        let bytes = len * size_of::<T>();
        if self.0.as_ref().is_none_or(|b| b.len() < bytes) {
            self.0 = None;
            self.0 = Some(CpuBuf::any(bytes).unwrap_or_else(|_| heap::end(bytes)));
        }
        self.0.as_mut().expect("just grown").elems_mut(len)
    }
}

/// The elements of a tensor of a known type.
pub fn elems<E: Stored>(t: &Tensor<Cpu>) -> &[E] {
    assert_eq!(t.dtype(), E::DTYPE, "element type of a {} x {} tensor", t.rows(), t.cols());
    t.buf.elems(t.len())
}

/// The elements of a tensor of a known type, to be written.
pub fn elems_mut<E: Stored>(t: &mut Tensor<Cpu>) -> &mut [E] {
    assert_eq!(t.dtype(), E::DTYPE, "element type of a {} x {} tensor", t.rows(), t.cols());
    let len = t.len();
    t.buf.elems_mut(len)
}

/// The elements of an f32 or bf16 tensor, to be written.
pub enum ViewMut<'a> {
    /// f32 elements.
    F32(&'a mut [f32]),
    /// bf16 elements.
    Bf16(&'a mut [bf16]),
}

/// The elements of an f32 or bf16 tensor.
pub fn view(t: &Tensor<Cpu>) -> View<'_> {
    match t.dtype() {
        DType::F32 => View::F32(elems(t)),
        DType::Bf16 => View::Bf16(elems(t)),
        DType::I32 => panic!("a {} x {} tensor of integers where numbers are expected", t.rows(), t.cols()),
    }
}

/// The elements of an f32 or bf16 tensor, to be written.
pub fn view_mut(t: &mut Tensor<Cpu>) -> ViewMut<'_> {
    match t.dtype() {
        DType::F32 => ViewMut::F32(elems_mut(t)),
        DType::Bf16 => ViewMut::Bf16(elems_mut(t)),
        DType::I32 => panic!("a {} x {} tensor of integers where numbers are expected", t.rows(), t.cols()),
    }
}

/// Runs an expression with slices of the element types that the tensors have: `typed!(y = mut dst, x = src; body)` compiles
/// the body for f32 and bf16 of each.
macro_rules! typed {
    ($name:ident = mut $t:expr $(, $($rest:tt)+)?) => {
        match $crate::cpu::buffer::view_mut($t) {
            $crate::cpu::buffer::ViewMut::F32($name) => $crate::cpu::buffer::typed!(@rest $($($rest)+)?),
            $crate::cpu::buffer::ViewMut::Bf16($name) => $crate::cpu::buffer::typed!(@rest $($($rest)+)?),
        }
    };
    ($name:ident = $t:expr $(, $($rest:tt)+)?) => {
        match $crate::cpu::buffer::view($t) {
            $crate::cpu::elem::View::F32($name) => $crate::cpu::buffer::typed!(@rest $($($rest)+)?),
            $crate::cpu::elem::View::Bf16($name) => $crate::cpu::buffer::typed!(@rest $($($rest)+)?),
        }
    };
    (@rest => $body:expr) => { $body };
    (@rest $($rest:tt)+) => { $crate::cpu::buffer::typed!($($rest)+) };
}
pub(crate) use typed;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Keep};
    use crate::mapped::Mapped;
    use crate::tensor::Device;

    #[test]
    fn buffers_start_at_zero_and_are_aligned() {
        let mut b = CpuBuf::zeros(1000).unwrap();
        assert!(b.bytes().iter().all(|&x| x == 0) && (b.bytes().as_ptr() as usize).is_multiple_of(64));
        b.elems_mut::<f32>(250)[249] = 1.0;
        assert_eq!(b.elems::<f32>(250)[249], 1.0);
        assert!(CpuBuf::zeros(0).unwrap().elems::<f32>(0).is_empty());
    }

    #[test]
    fn zeros_that_are_due_are_read_added_to_or_never_written() {
        let n = 2 * LATER;
        let filled = || {
            let mut b = CpuBuf::zeros(n).unwrap();
            b.bytes_mut().fill(7);
            assert!(!b.zero_later(LATER - 1) && b.bytes()[0] == 7, "a few are written at once");
            assert!(b.zero_later(LATER));
            b
        };
        let half = |b: &[u8]| b[..LATER].iter().all(|&x| x == 0) && b[LATER..].iter().all(|&x| x == 7);
        assert!(half(filled().bytes()) && half(filled().bytes_mut()));
        let mut b = filled();
        assert!(!b.overwrites_zeros(n), "the others are not zero");
        assert!(b.overwrites_zeros(LATER) && !b.overwrites_zeros(LATER));
        assert!(b.bytes().iter().all(|&x| x == 7), "what the caller writes is not written twice");
        // Read by several threads at once, they are zero for all.
        let b = filled();
        std::thread::scope(|s| (0..4).for_each(|_| drop(s.spawn(|| assert!(half(b.bytes()))))));
    }

    #[test]
    fn what_nobody_wrote_is_zero_and_overwritten_once() {
        let mut b = CpuBuf::zeros(3 << 20).unwrap();
        assert!(b.bytes().iter().all(|&x| x == 0) && b.zero_later(100), "nothing is due");
        assert!(b.overwrites_zeros(100) && !b.overwrites_zeros(100));
        let mut b = CpuBuf::zeros(3 << 20).unwrap();
        b.bytes_mut()[7] = 1;
        assert!(!b.overwrites_zeros(3 << 20) && b.bytes()[7] == 1);
        // Of memory that somebody had, zeros are due.
        let mut before = [CpuBuf::any(3 << 20).unwrap(), CpuBuf::any(3 << 20).unwrap()];
        before.iter_mut().for_each(|b| b.bytes_mut().fill(9));
        drop(before);
        let again = CpuBuf::zeros(3 << 20).unwrap();
        assert!(again.bytes().iter().all(|&x| x == 0));
    }

    #[test]
    fn a_tensor_in_a_file_is_its_own_once_written_and_a_file_that_changes_is_an_error() {
        let (dev, dir) = (Cpu::new(Some(2)).unwrap(), tempfile::tempdir().unwrap());
        let path = dir.path().join("weights");
        let values: Vec<bf16> = (0..30_000).map(|i| bf16::from_f32(i as f32)).collect();
        let adopt = || {
            std::fs::write(&path, bytemuck::cast_slice::<bf16, u8>(&values)).unwrap();
            let file = Arc::new(Mapped::open(&path).unwrap());
            dev.adopt(FilePart::new(&file, 2000..60_000), 290, 100, DType::Bf16).unwrap()
        };
        let read = |t: &Tensor<Cpu>| {
            let mut found = vec![0.0; t.len()];
            dev.download(&mut found, t).map(|()| found).map_err(|e| e.to_string())
        };
        let change = |by: &dyn Fn(&std::fs::File)| by(&std::fs::OpenOptions::new().write(true).open(&path).unwrap());
        let expected: Vec<f32> = values[1000..].iter().map(|x| x.to_f32()).collect();
        let mut t = adopt();
        assert_eq!(read(&t).unwrap(), expected);
        let stats = dev.new_stats().unwrap();
        dev.figures(&stats).unwrap();
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(9);
        change(&|file| file.set_modified(later).unwrap());
        for said in [read(&t).unwrap_err(), dev.figures(&stats).unwrap_err().to_string()] {
            assert!(said.contains("was written to while it is in use"), "{said}");
        }
        // Written, it stands in memory and the file is nobody's concern.
        dev.upload_at(&mut t, 0, &[7.0]).unwrap();
        let found = read(&t).unwrap();
        assert_eq!((found[0], &found[1..]), (7.0, &expected[1..]));
        // Zeros that are written later are written to memory too.
        let mut t = adopt();
        dev.fill_zero(&mut t).unwrap();
        assert!(read(&t).unwrap().iter().all(|&x| x == 0.0));
        let t = adopt();
        change(&|file| file.set_len(4096).unwrap());
        let said = read(&t).unwrap_err();
        assert!(said.contains("was cut while it was read"), "{said}");
        drop(t);
        // What is kept for products was read before: the file may go then, and not while it is packed.
        for cut_before in [false, true] {
            let mut t = adopt();
            if cut_before {
                change(&|file| file.set_len(10).unwrap());
            }
            let kept = dev.keep_packed(&mut t, Keep::Frozen);
            if t.buf.stead().is_some() {
                change(&|file| file.set_len(10).unwrap());
                assert_eq!((kept.is_ok(), read(&t).unwrap()), (true, expected.clone()));
            } else if cut_before {
                assert!(kept.is_err() || read(&t).is_err());
            }
        }
    }

    #[test]
    fn absurd_sizes_are_errors() {
        let e = CpuBuf::zeros(usize::MAX / 2).err().expect("no machine has this much");
        assert!(e.to_string().starts_with("cpu: cannot allocate"), "{e}");
    }
}
