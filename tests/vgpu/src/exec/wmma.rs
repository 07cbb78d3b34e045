//! `wmma`: matrices that a warp loads, multiplies and stores as fragments.
//!
//! Source: PTX ISA 8.8, "Matrix multiply-accumulate operation using wmma instructions".
//!
//! The ISA text gives the number of registers of a fragment and leaves open which element is where. Here a lane holds a run of
//! `rows * columns / 32` elements, lane after lane, packed into its registers from the lowest bits up:
//!
//! - A and B run in the order of memory: along rows for `.row`, along columns for `.col`. A product that names another layout
//!   than the load did so gives wrong sums, as it may on a device.
//! - C and D run along rows whatever the layout in memory, so that a sum may be loaded in one and stored in the other.
//! - Fragments of halves have 16 elements although some shapes need fewer: the run is repeated.
//!
//! Arithmetic on the registers of a fragment so reaches each element, and fragments of one type fit each other.
//!
//! Every access goes through the loads and stores of `access`, at most 16 bytes a lane at a time; nothing here is skipped of what
//! those check.

use super::code::Build;
use super::float::{BF16, F16, Format, Mode, canon};
use super::launch::Cta;
use super::mem::{Access, Address, LOCAL, LaneFault, Space};
use super::rounding::{self, Products, Unit};
use super::{File, Inst, LANES, Regs};
use crate::error::FaultKind;
use crate::ptx::Ty;

/// Elements of C and D in a lane: all shapes have 256.
const SUMS: usize = 8;
/// Bytes that a lane moves at once.
const PIECE: u64 = 16;

/// One of the instructions.
pub enum Wmma {
    /// `wmma.load` and `wmma.store`.
    Move(Move),
    /// `wmma.mma`.
    Product(Product),
}

/// A matrix between memory and its fragments.
pub struct Move {
    /// Whether to memory.
    pub store: bool,
    /// Where the matrix starts, the same in all lanes.
    pub at: Address,
    /// Row of the distance between lines in elements; without it the lines follow each other.
    pub stride: Option<u16>,
    /// Rows and columns.
    pub shape: (usize, usize),
    /// Bytes of an element.
    pub size: usize,
    /// Whether rows lie in one piece in memory, or columns.
    pub by_row: bool,
    /// Whether it is C or D.
    pub sums: bool,
    /// Registers.
    pub regs: Vec<u16>,
    /// Rows for addresses and for a half.
    pub scratch: (u16, u16),
}

/// What A and B hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Halves.
    F16,
    /// bfloat16.
    Bf16,
    /// 32-bit registers of which 19 bits count.
    Tf32,
    /// Signed bytes.
    S8,
    /// Unsigned bytes.
    U8,
}

impl Element {
    /// Bytes.
    pub fn size(self) -> usize {
        match self {
            Element::S8 | Element::U8 => 1,
            Element::F16 | Element::Bf16 => 2,
            Element::Tf32 => 4,
        }
    }

    fn float(self, bits: u32) -> f32 {
        let half = |f: Format| f.unpack(bits as u16);
        match self {
            Element::F16 => half(F16),
            Element::Bf16 => half(BF16),
            _ => f32::from_bits(bits & !0x1fff),
        }
    }

    fn whole(self, bits: u32) -> i32 {
        match self {
            Element::S8 => i32::from(bits as u8 as i8),
            _ => i32::from(bits as u8),
        }
    }
}

/// `D = A B + C`.
pub struct Product {
    /// Rows and columns of D, and inner size.
    pub shape: (usize, usize, usize),
    /// Elements of A and B.
    pub element: Element,
    /// Whether A runs along rows, and whether B does.
    pub by_row: (bool, bool),
    /// Whether D holds halves, and whether C does.
    pub halves: (bool, bool),
    /// Clamp whole sums instead of wrapping around.
    pub saturate: bool,
    /// Registers of D, A, B and C.
    pub regs: [Vec<u16>; 4],
}

impl Wmma {
    /// Executes it for a whole warp; this processor supports the program's build.
    pub fn run(&self, r: &mut Regs, cta: &mut Cta<'_>, warp: usize, i: &Inst) -> Result<(), LaneFault> {
        match self {
            Wmma::Move(m) => m.run(r, cta, warp, i),
            Wmma::Product(p) => {
                p.run(r, cta.program.build, cta.shape.products);
                let (m, n, k) = p.shape;
                cta.counters.tensor_flops += 2 * (m * n * k) as u64;
                Ok(())
            }
        }
    }
}

impl Move {
    /// Elements of a lane.
    fn run_length(&self) -> usize {
        self.shape.0 * self.shape.1 / LANES
    }

    /// Elements of a row or column that lies in one piece in memory.
    fn line(&self) -> usize {
        if self.by_row { self.shape.1 } else { self.shape.0 }
    }

    /// Start of the matrix and bytes from line to line, if they are what the ISA text asks for.
    ///
    /// It wants every line aligned to the bytes of a fragment, the CUDA programming guide only to 16; the guide is what programs
    /// follow.
    fn place(&self, r: &Regs) -> Result<(u64, u64), LaneFault> {
        let at = self.at.lanes(r);
        let strides = self.stride.map_or([self.line() as u32; LANES], |row| r.w[row as usize]);
        if let Some(l) = (0..LANES).find(|l| at[*l] != at[0] || strides[*l] != strides[0]) {
            let m = format!(
                "lane {l} has address {:#x} and stride {}, lane 0 has {:#x} and {}: they have to be the same",
                at[l], strides[l], at[0], strides[0]
            );
            return Err((l, FaultKind::BadMask, m));
        }
        let (start, stride) = (at[0], u64::from(strides[0]) * self.size as u64);
        if self.at.space == Space::Generic && (LOCAL >> 44..=3).contains(&(start >> 44)) {
            let m = format!("the matrix at {start:#x} is neither in global nor in shared memory");
            return Err((0, FaultKind::OutOfBounds, m));
        }
        let bytes = self.regs.len() as u64 * 4;
        if !start.is_multiple_of(bytes) {
            let m = format!("a matrix at {start:#x}, which is not a multiple of the {bytes} bytes of a fragment");
            return Err((0, FaultKind::Misaligned, m));
        }
        let piece = bytes.min(PIECE);
        if !stride.is_multiple_of(piece) {
            let m = format!("a stride of {} elements, {stride} bytes, is not a multiple of {piece}", strides[0]);
            return Err((0, FaultKind::Misaligned, m));
        }
        if self.store && (strides[0] as usize) < self.line() {
            let m = format!("a stride of {} elements for lines of {}: they overlap", strides[0], self.line());
            return Err((0, FaultKind::OutOfBounds, m));
        }
        Ok((start, stride))
    }

    fn run(&self, r: &mut Regs, cta: &mut Cta<'_>, warp: usize, i: &Inst) -> Result<(), LaneFault> {
        let (start, stride) = self.place(r)?;
        if self.sums && !self.by_row {
            return self.across(r, cta, warp, i, (start, stride));
        }
        let (n, line) = (self.run_length(), self.line());
        let bytes = (n * self.size) as u64;
        let piece = bytes.min(PIECE);
        let words = (bytes / 4) as usize;
        let of_piece = (piece / 4) as usize;
        for (p, regs) in self.regs[..words].chunks(of_piece).enumerate() {
            // No run crosses the end of a line.
            let at = std::array::from_fn(|l| {
                let (of, within) = (l * n / line, l * n % line);
                start.wrapping_add(of as u64 * stride).wrapping_add((within * self.size) as u64 + p as u64 * piece)
            });
            self.access(r, cta, warp, i, at, (Ty::B32, regs))?;
        }
        if !self.store {
            for (k, to) in self.regs.iter().enumerate().skip(words) {
                r.w[*to as usize] = r.w[self.regs[k % words] as usize];
                r.marks.join((File::W, *to), (File::W, self.regs[k % words]));
            }
        }
        Ok(())
    }

    /// C and D by columns: the elements of a lane lie a stride apart.
    fn across(
        &self,
        r: &mut Regs,
        cta: &mut Cta<'_>,
        warp: usize,
        i: &Inst,
        (start, stride): (u64, u64),
    ) -> Result<(), LaneFault> {
        let half = self.scratch.1;
        for e in 0..SUMS {
            let at = std::array::from_fn(|l| {
                let (row, col) = ((l * SUMS + e) / self.shape.1, (l * SUMS + e) % self.shape.1);
                start.wrapping_add(col as u64 * stride).wrapping_add((row * self.size) as u64)
            });
            if self.size == 4 {
                self.access(r, cta, warp, i, at, (Ty::B32, &self.regs[e..=e]))?;
                continue;
            }
            let (word, shift) = (self.regs[e / 2] as usize, 16 * (e % 2));
            if self.store {
                r.w[half as usize] = r.w[word].map(|x| x >> shift & 0xffff);
                r.marks.join((File::W, half), (File::W, self.regs[e / 2]));
            }
            self.access(r, cta, warp, i, at, (Ty::B16, &[half]))?;
            if !self.store {
                r.marks.join((File::W, self.regs[e / 2]), (File::W, half));
                for l in 0..LANES {
                    let x = r.w[half as usize][l] << shift;
                    let kept = if shift == 0 { 0 } else { r.w[word][l] };
                    r.w[word][l] = kept | x;
                }
            }
            r.marks.clear((File::W, half), u32::MAX);
        }
        Ok(())
    }

    fn access(
        &self,
        r: &mut Regs,
        cta: &mut Cta<'_>,
        warp: usize,
        i: &Inst,
        at: [u64; LANES],
        (ty, regs): (Ty, &[u16]),
    ) -> Result<(), LaneFault> {
        let row = self.scratch.0;
        r.q[row as usize] = at;
        let op = Access {
            at: Address { file: File::Q, row, offset: 0, space: self.at.space },
            ty,
            regs: regs.iter().map(|row| (File::W, *row)).collect(),
        };
        if self.store { cta.run_store(r, warp, i, &op, u32::MAX) } else { cta.run_load(r, warp, i, &op, u32::MAX) }
    }
}

/// The elements of a fragment in rows of `cols`, by rows or columns as its run goes.
#[inline(always)]
fn gather<T>(
    r: &Regs,
    regs: &[u16],
    (rows, cols): (usize, usize),
    size: usize,
    by_row: bool,
    out: &mut [T],
    value: impl Fn(u32) -> T,
) {
    let (n, per) = (rows * cols / LANES, 4 / size);
    for j in 0..n {
        let (word, shift) = (&r.w[regs[j / per] as usize], 8 * size * (j % per));
        for (l, x) in word.iter().enumerate() {
            let e = l * n + j;
            let to = if by_row { e } else { e % rows * cols + e / rows };
            out[to] = value(x >> shift);
        }
    }
}

impl Product {
    fn run(&self, r: &mut Regs, build: Build, products: Products) {
        if let Some(unit) = self.unit(products) {
            return self.rounded(r, build, unit);
        }
        #[cfg(target_arch = "x86_64")]
        if build == Build::V3 {
            // SAFETY: a module is only loaded for a build that this processor supports (`Module::load_for`).
            return unsafe { self.run_v3(r) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = build;
        self.run_body(r);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt,f16c,movbe")]
    fn run_v3(&self, r: &mut Regs) {
        self.run_body(r);
    }

    #[inline(always)]
    fn run_body(&self, r: &mut Regs) {
        if matches!(self.element, Element::S8 | Element::U8) {
            self.wholes(r);
        } else {
            self.floats(r);
        }
    }

    /// What the tensor cores of a launch add at once, when they round.
    fn unit(&self, products: Products) -> Option<Unit> {
        match self.element {
            _ if self.halves.0 => None,
            Element::F16 => products.unit(2, -14),
            Element::Bf16 => products.unit(2, -126),
            Element::Tf32 => products.unit(4, -126),
            Element::S8 | Element::U8 => None,
        }
    }

    #[inline(never)]
    fn rounded(&self, r: &mut Regs, build: Build, unit: Unit) {
        let (_, n, k) = self.shape;
        self.floats_with(r, |acc, a, b| {
            let mut panel = [[0.0; 8]; 16];
            for first in (0..n).step_by(8) {
                for (line, b) in panel.iter_mut().zip(b.chunks_exact(n)) {
                    line.copy_from_slice(&b[first..first + 8]);
                }
                let mut sums: Vec<[f32; 8]> =
                    acc.chunks_exact(n).map(|row| std::array::from_fn(|c| row[first + c])).collect();
                rounding::multiply(&mut sums, a, k, &panel[..k], unit, build);
                for (row, sums) in acc.chunks_exact_mut(n).zip(&sums) {
                    row[first..first + 8].copy_from_slice(sums);
                }
            }
        });
    }

    #[inline(always)]
    fn floats(&self, r: &mut Regs) {
        let (_, n, k) = self.shape;
        self.floats_with(r, |acc, a, b| {
            for (row, sums) in acc.chunks_exact_mut(n).enumerate() {
                for (x, b) in a[row * k..][..k].iter().zip(b.chunks_exact(n)) {
                    for (y, b) in sums.iter_mut().zip(b) {
                        *y = x.mul_add(*b, *y);
                    }
                }
            }
        });
    }

    #[inline(always)]
    fn floats_with(&self, r: &mut Regs, multiply: impl Fn(&mut [f32; SUMS * LANES], &[f32], &[f32])) {
        let ((m, n, k), size) = (self.shape, self.element.size());
        let [d, ra, rb, rc] = &self.regs;
        let (mut a, mut b, mut acc) = ([0f32; 512], [0f32; 512], [0f32; SUMS * LANES]);
        let value = |x| self.element.float(x);
        gather(r, ra, (m, k), size, self.by_row.0, &mut a, value);
        gather(r, rb, (k, n), size, self.by_row.1, &mut b, value);
        if self.halves.1 {
            gather(r, rc, (m, n), 2, true, &mut acc, |x| F16.unpack(x as u16));
        } else {
            gather(r, rc, (m, n), 4, true, &mut acc, f32::from_bits);
        }
        multiply(&mut acc, &a[..m * k], &b[..k * n]);
        for (e, row) in d.iter().enumerate() {
            r.w[*row as usize] = std::array::from_fn(|l| {
                if self.halves.0 {
                    let h = |i: usize| u32::from(F16.pack(f64::from(acc[l * SUMS + i]), Mode::Rn));
                    h(2 * e) | h(2 * e + 1) << 16
                } else {
                    canon(acc[l * SUMS + e]).to_bits()
                }
            });
        }
    }

    #[inline(always)]
    fn wholes(&self, r: &mut Regs) {
        let (m, n, k) = self.shape;
        let [d, ra, rb, rc] = &self.regs;
        let (mut a, mut b, mut acc) = ([0i32; 512], [0i32; 512], [0i64; SUMS * LANES]);
        let value = |x| self.element.whole(x);
        gather(r, ra, (m, k), 1, self.by_row.0, &mut a, value);
        gather(r, rb, (k, n), 1, self.by_row.1, &mut b, value);
        gather(r, rc, (m, n), 4, true, &mut acc, |x| i64::from(x as i32));
        for (row, sums) in acc.chunks_exact_mut(n).enumerate() {
            for (x, b) in a[row * k..][..k].iter().zip(b.chunks_exact(n)) {
                for (y, b) in sums.iter_mut().zip(b) {
                    *y += i64::from(x * b);
                }
            }
        }
        if self.saturate {
            for y in &mut acc {
                *y = (*y).clamp(i64::from(i32::MIN), i64::from(i32::MAX));
            }
        }
        for (e, row) in d.iter().enumerate() {
            r.w[*row as usize] = std::array::from_fn(|l| acc[l * SUMS + e] as u32);
        }
    }
}
