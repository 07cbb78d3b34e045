//! Memory behind a tensor: zero pages from the system, aligned for every vector width, seen as slices of its element type.

use half::bf16;
use memmap2::MmapMut;

use super::Cpu;
use super::elem::{Stored, View};
use super::kept::Forms;
use crate::error::{Context, Result};
use crate::tensor::{DType, Tensor};

/// A buffer of zero bytes at first. Pages that were never written take no memory.
pub struct CpuBuf {
    /// At least one page, so that even a tensor without elements has an aligned start. `None` where the bytes stand in `forms` alone.
    map: Option<MmapMut>,
    /// What products read instead, as long as nothing is written.
    forms: Option<Box<Forms>>,
}

impl CpuBuf {
    /// `bytes` zero bytes.
    ///
    /// # Errors
    /// If the system has not enough address space.
    pub fn zeros(bytes: usize) -> Result<Self> {
        let map = MmapMut::map_anon(bytes.max(1)).context(|| format!("cpu: cannot allocate {bytes} bytes"))?;
        // Large pages spare the walks of the page table; a kernel that has none says no, and nothing is lost.
        #[cfg(target_os = "linux")]
        if bytes >= 8 << 20 {
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Self { map: Some(map), forms: None })
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        match (&self.map, &self.forms) {
            (Some(map), _) => map,
            (None, Some(forms)) => forms.rows().bytes(),
            (None, None) => unreachable!("the bytes stand somewhere"),
        }
    }

    /// All bytes, to be written; forms of what stood there are forgotten.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let forms = self.forms.take();
        if let (None, Some(forms)) = (&self.map, forms) {
            self.map = forms.into_rows().map;
        }
        self.map.as_mut().expect("the bytes stand somewhere")
    }

    /// What products read instead of the bytes.
    pub fn forms(&self) -> Option<&Forms> {
        self.forms.as_deref()
    }

    /// Keeps forms of what stands here; without `with_bytes` in its place.
    pub fn keep(&mut self, forms: Forms, with_bytes: bool) {
        self.forms = Some(Box::new(forms));
        if !with_bytes {
            self.map = None;
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

/// A buffer that grows.
#[derive(Default)]
pub struct Grow(Option<CpuBuf>);

impl Grow {
    /// `len` elements, their values whatever they were.
    pub fn elems<T: bytemuck::Pod>(&mut self, len: usize) -> &mut [T] {
        let bytes = len * size_of::<T>();
        if self.0.as_ref().is_none_or(|b| b.bytes().len() < bytes) {
            self.0 = None;
            self.0 = Some(CpuBuf::zeros(bytes).expect("the system grants scratch memory"));
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

    #[test]
    fn buffers_start_at_zero_and_are_aligned() {
        let mut b = CpuBuf::zeros(1000).unwrap();
        assert!(b.bytes().iter().all(|&x| x == 0) && (b.bytes().as_ptr() as usize).is_multiple_of(64));
        b.elems_mut::<f32>(250)[249] = 1.0;
        assert_eq!(b.elems::<f32>(250)[249], 1.0);
        assert!(CpuBuf::zeros(0).unwrap().elems::<f32>(0).is_empty());
    }

    #[test]
    fn absurd_sizes_are_errors() {
        let e = CpuBuf::zeros(usize::MAX / 2).err().expect("no machine has this much");
        assert!(e.to_string().starts_with("cpu: cannot allocate"), "{e}");
    }
}
