//! The arithmetic of `wgmma.mma_async`: one warp's 16 rows of A times all of B, onto its accumulator registers.
//!
//! Columns of a block of eight are kept in the order 0 2 4 6 1 3 5 7: so the values that four neighbouring lanes hold in
//! one register, and those in the next, are the two halves of a vector, and no accumulator moves between lanes.

use super::descriptor::Major;
use super::fp8;
use crate::exec::code::Build;
use crate::exec::float::{BF16, F16, Mode};
use crate::exec::rounding::{self, Products, Unit};
use crate::exec::{LANES, Regs};

/// Columns of a block in the order they are kept.
pub const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// Element type of A or B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Element {
    F16,
    Bf16,
    Tf32,
    E4m3,
    E5m2,
    S8,
    U8,
}

impl Element {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Element::F16 | Element::Bf16 => 2,
            Element::Tf32 => 4,
            _ => 1,
        }
    }

    /// Elements along K of one instruction: 32 bytes.
    pub fn k(self) -> usize {
        32 / self.size()
    }

    /// The value of an element's bits.
    #[inline(always)]
    fn value(self, bits: u32) -> f32 {
        match self {
            Element::F16 => F16.unpack(bits as u16),
            Element::Bf16 => BF16.unpack(bits as u16),
            // The lower 13 bits of a tf32 register do not count.
            Element::Tf32 => f32::from_bits(bits & !0x1fff),
            Element::E4m3 => fp8::e4m3(bits as u8),
            Element::E5m2 => fp8::e5m2(bits as u8),
            Element::S8 => f32::from(bits as u8 as i8),
            Element::U8 => f32::from(bits as u8),
        }
    }
}

/// Accumulators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// f32, one to a register.
    F32,
    /// f16, two to a register.
    F16,
    /// s32, wrapping or saturating.
    S32 {
        /// Clamp instead of wrapping.
        saturate: bool,
    },
}

/// Sixteen rows of A; row, inner index.
pub type TileA = [[f32; 32]; 16];
/// Eight columns of B in [`ORDER`]; inner index, column.
pub type PanelB = [[f32; 8]; 32];

/// A from four registers of each lane: rows g and g + 8 of the first and of the second half of K.
pub fn tile_of_registers(r: &Regs, rows: &[u16; 4], element: Element, out: &mut TileA) {
    let per = 4 / element.size();
    for (i, row) in rows.iter().enumerate() {
        for (lane, x) in r.w[*row as usize].iter().enumerate() {
            let line = &mut out[lane / 4 + 8 * (i & 1)];
            let first = element.k() / 2 * (i >> 1) + lane % 4 * per;
            for e in 0..per {
                line[first + e] = element.value(x >> (8 * element.size() * e));
            }
        }
    }
}

/// Eight rows of A from their sixteen pieces (as `Operand::block` orders them); `group` 0 are rows 0 to 7.
pub fn tile_of_pieces(
    out: &mut TileA,
    major: Major,
    group: usize,
    element: Element,
    pieces: &[u128; 16],
    build: Build,
) {
    #[cfg(target_arch = "x86_64")]
    if build == Build::V3 && element.size() == 2 {
        // SAFETY: a program is only decoded for V3 when the processor supports it (`Module::load_for`).
        return unsafe { fast::tile16(out, major, group, element, pieces) };
    }
    let _ = build;
    let (n, bits) = (16 / element.size(), 8 * element.size());
    for (i, bytes) in pieces.iter().enumerate() {
        for e in 0..n {
            let v = element.value((bytes >> (bits * e)) as u32);
            match major {
                Major::K => out[8 * group + i / 2][i % 2 * n + e] = v,
                Major::Mn => out[8 * group + e][i] = v,
            }
        }
    }
}

/// Fills a panel from its pieces: K-major `pieces[2 * column + half]`, MN-major `pieces[k]`.
#[inline(always)]
fn panel_body(out: &mut PanelB, pieces: &[u128; 16], major: Major, element: Element) {
    let (n, bits) = (16 / element.size(), 8 * element.size());
    match major {
        Major::K => {
            for (at, column) in ORDER.into_iter().enumerate() {
                for half in 0..2 {
                    for e in 0..n {
                        out[half * n + e][at] = element.value((pieces[2 * column + half] >> (bits * e)) as u32);
                    }
                }
            }
        }
        Major::Mn => {
            for (line, p) in out.iter_mut().zip(pieces) {
                *line = ORDER.map(|c| element.value((p >> (bits * c)) as u32));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod fast {
    use super::{Element, Major, PanelB, TileA};
    use std::arch::x86_64::*;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn vector(x: u128) -> __m128i {
        _mm_set_epi64x((x >> 64) as i64, x as i64)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn widen(x: __m128i, element: Element) -> [f32; 8] {
        let v = if element == Element::F16 {
            _mm256_cvtph_ps(x)
        } else {
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)))
        };
        // SAFETY: both are 32 bytes of plain floats.
        unsafe { std::mem::transmute::<__m256, [f32; 8]>(v) }
    }

    /// `tile_of_pieces` for 16-bit elements.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn tile16(out: &mut TileA, major: Major, group: usize, element: Element, pieces: &[u128; 16]) {
        for (i, p) in pieces.iter().enumerate() {
            let v = widen(vector(*p), element);
            match major {
                Major::K => out[8 * group + i / 2][i % 2 * 8..][..8].copy_from_slice(&v),
                Major::Mn => v.iter().enumerate().for_each(|(e, x)| out[8 * group + e][i] = *x),
            }
        }
    }

    /// `panel_body` for 16-bit elements.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn panel16(out: &mut PanelB, pieces: &[u128; 16], major: Major, element: Element) {
        if major == Major::Mn {
            let order = _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
            for (line, p) in out.iter_mut().zip(pieces) {
                *line = widen(_mm_shuffle_epi8(vector(*p), order), element);
            }
            return;
        }
        for half in 0..2 {
            let row = |column: usize| vector(pieces[2 * column + half]);
            // An 8x8 transposition of 16-bit elements, rows taken in `ORDER`.
            let pairs = |a: usize, b: usize| {
                let (x, y) = (row(a), row(b));
                (_mm_unpacklo_epi16(x, y), _mm_unpackhi_epi16(x, y))
            };
            let ((a0, a1), (b0, b1)) = (pairs(0, 2), pairs(4, 6));
            let ((c0, c1), (d0, d1)) = (pairs(1, 3), pairs(5, 7));
            for (q, (a, b, c, d)) in [(a0, b0, c0, d0), (a1, b1, c1, d1)].into_iter().enumerate() {
                let (e0, e1) = (_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b));
                let (f0, f1) = (_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d));
                let k = 8 * half + 4 * q;
                out[k] = widen(_mm_unpacklo_epi64(e0, f0), element);
                out[k + 1] = widen(_mm_unpackhi_epi64(e0, f0), element);
                out[k + 2] = widen(_mm_unpacklo_epi64(e1, f1), element);
                out[k + 3] = widen(_mm_unpackhi_epi64(e1, f1), element);
            }
        }
    }
}

/// What the arithmetic needs to know of an instruction.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// Type of A.
    pub a: Element,
    /// Type of B.
    pub b: Element,
    /// Accumulators.
    pub sum: Sum,
    /// Whether D is added, rather than replaced.
    pub add: bool,
    /// Whether the product changes sign.
    pub negate: bool,
    /// What tensor cores add at once, when they round.
    pub unit: Option<Unit>,
}

impl Form {
    /// The unit of a launch for factors and sums of these types.
    pub fn unit_of(products: Products, a: Element, sum: Sum) -> Option<Unit> {
        match a {
            _ if sum != Sum::F32 => None,
            Element::F16 => products.unit(2, -14),
            Element::Bf16 => products.unit(2, -126),
            Element::Tf32 => products.unit(4, -126),
            _ => None,
        }
    }
}

/// `d += a * panel` for one block of eight columns; `rows` are the registers of the block.
#[inline(always)]
fn block_body(r: &mut Regs, rows: &[u16], a: &TileA, panel: &PanelB, k: usize, form: &Form, build: Build) {
    let mut acc = [[0f32; 8]; 16];
    let integer = matches!(form.sum, Sum::S32 { .. });
    if form.add && !integer {
        load(r, rows, &mut acc, form.sum);
    }
    if let Some(unit) = form.unit {
        rounding::multiply(&mut acc, a.as_flattened(), 32, &panel[..k], unit, build);
        return store(r, rows, &acc, form.sum);
    }
    for half in 0..2 {
        let (first, last) = (8 * half, 8 * half + 8);
        let mut part: [[f32; 8]; 8] = std::array::from_fn(|i| acc[first + i]);
        for (i, b) in panel.iter().enumerate().take(k) {
            for (row, a) in part.iter_mut().zip(&a[first..last]) {
                let x = a[i];
                for (y, b) in row.iter_mut().zip(b) {
                    *y = x.mul_add(*b, *y);
                }
            }
        }
        acc[first..last].copy_from_slice(&part);
    }
    if let Sum::S32 { saturate } = form.sum {
        integers(r, rows, &acc, form.add, saturate);
    } else {
        store(r, rows, &acc, form.sum);
    }
}

#[inline(always)]
fn load(r: &Regs, rows: &[u16], acc: &mut [[f32; 8]; 16], sum: Sum) {
    if sum == Sum::F16 {
        for (i, row) in rows.iter().enumerate() {
            for (lane, x) in r.w[*row as usize].iter().enumerate() {
                let line = &mut acc[lane / 4 + 8 * i];
                (line[lane % 4], line[lane % 4 + 4]) = (F16.unpack(*x as u16), F16.unpack((x >> 16) as u16));
            }
        }
        return;
    }
    for (i, row) in rows.iter().enumerate() {
        let v = &r.w[*row as usize];
        for g in 0..8 {
            for t in 0..4 {
                acc[g + 8 * (i >> 1)][t + 4 * (i & 1)] = f32::from_bits(v[4 * g + t]);
            }
        }
    }
}

#[inline(always)]
fn store(r: &mut Regs, rows: &[u16], acc: &[[f32; 8]; 16], sum: Sum) {
    if sum == Sum::F16 {
        for (i, row) in rows.iter().enumerate() {
            let half = |x: f32| u32::from(F16.pack(f64::from(x), Mode::Rn));
            r.w[*row as usize] = std::array::from_fn(|lane| {
                let line = &acc[lane / 4 + 8 * i];
                half(line[lane % 4]) | half(line[lane % 4 + 4]) << 16
            });
        }
        return;
    }
    for (i, row) in rows.iter().enumerate() {
        let v = &mut r.w[*row as usize];
        for g in 0..8 {
            for t in 0..4 {
                v[4 * g + t] = acc[g + 8 * (i >> 1)][t + 4 * (i & 1)].to_bits();
            }
        }
    }
}

fn integers(r: &mut Regs, rows: &[u16], acc: &[[f32; 8]; 16], add: bool, saturate: bool) {
    for (i, row) in rows.iter().enumerate() {
        let v = &mut r.w[*row as usize];
        for (lane, x) in v.iter_mut().enumerate().take(LANES) {
            // 32 products of bytes are below 2^24, so the sum in f32 is exact.
            let dot = acc[lane / 4 + 8 * (i >> 1)][lane % 4 + 4 * (i & 1)] as i32;
            let old = if add { *x as i32 } else { 0 };
            *x = if saturate { old.saturating_add(dot) } else { old.wrapping_add(dot) } as u32;
        }
    }
}

/// Multiplies block by block. `pieces(j, out)` gives the sixteen pieces of B's columns `8 j ..`; `d` are all accumulators.
pub fn multiply(
    r: &mut Regs,
    d: &[u16],
    a: &mut TileA,
    form: &Form,
    major: Major,
    build: Build,
    mut pieces: impl FnMut(usize, &mut [u128; 16]),
) {
    if form.negate {
        a.iter_mut().flatten().for_each(|x| *x = -*x);
    }
    let per = if form.sum == Sum::F16 { 2 } else { 4 };
    let mut panel = [[0.0; 8]; 32];
    for (j, rows) in d.chunks(per).enumerate() {
        let mut bytes = [0; 16];
        pieces(j, &mut bytes);
        block(r, rows, a, &mut panel, &bytes, form, major, build);
    }
}

#[allow(clippy::too_many_arguments)]
fn block(
    r: &mut Regs,
    rows: &[u16],
    a: &TileA,
    panel: &mut PanelB,
    bytes: &[u128; 16],
    form: &Form,
    major: Major,
    build: Build,
) {
    #[cfg(target_arch = "x86_64")]
    if build == Build::V3 {
        // SAFETY: a program is only decoded for V3 when the processor supports it (`Module::load_for`).
        return unsafe { block_fast(r, rows, a, panel, bytes, form, major) };
    }
    panel_body(panel, bytes, major, form.b);
    block_body(r, rows, a, panel, form.b.k(), form, build);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn block_fast(
    r: &mut Regs,
    rows: &[u16],
    a: &TileA,
    panel: &mut PanelB,
    bytes: &[u128; 16],
    form: &Form,
    major: Major,
) {
    if form.b.size() == 2 {
        fast::panel16(panel, bytes, major, form.b);
    } else {
        panel_body(panel, bytes, major, form.b);
    }
    block_body(r, rows, a, panel, form.b.k(), form, Build::V3);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: &mut u64) -> u64 {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        *seed >> 20
    }

    /// The fragment layouts of the ISA text, one element at a time: D (row, column) of accumulator register i of a lane.
    fn position(lane: usize, i: usize) -> (usize, usize) {
        (lane / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2)
    }

    #[test]
    fn products_match_f64_in_both_builds_and_majors() {
        let mut seed = 7;
        for element in [Element::Bf16, Element::F16] {
            for major in [Major::K, Major::Mn] {
                for build in [Build::Portable, Build::V3] {
                    if !build.supported() {
                        continue;
                    }
                    let mut r = Regs::default();
                    r.w.resize(4 + 12, [0; LANES]);
                    let bits = |s: &mut u64| {
                        let x = (noise(s) % 2000) as f32 / 500.0 - 2.0;
                        if element == Element::Bf16 {
                            x.to_bits() >> 16
                        } else {
                            u32::from(F16.pack(f64::from(x), Mode::Rn))
                        }
                    };
                    let (mut a, mut b) = ([[0u32; 16]; 16], [[0u32; 24]; 16]);
                    a.iter_mut().flatten().for_each(|x| *x = bits(&mut seed));
                    b.iter_mut().flatten().for_each(|x| *x = bits(&mut seed));
                    for lane in 0..LANES {
                        let (g, t) = (lane / 4, 2 * (lane % 4));
                        for i in 0..4 {
                            let (row, k) = (g + 8 * (i % 2), t + 8 * (i / 2));
                            r.w[i][lane] = a[row][k] | a[row][k + 1] << 16;
                        }
                        for i in 0..12 {
                            r.w[4 + i][lane] = ((lane * 12 + i) as f32).to_bits();
                        }
                    }
                    let before: Vec<_> = r.w[4..].to_vec();
                    let mut tile = [[0.0; 32]; 16];
                    tile_of_registers(&r, &[0, 1, 2, 3], element, &mut tile);
                    let d: Vec<u16> = (4..16).collect();
                    let form = Form { a: element, b: element, sum: Sum::F32, add: true, negate: true, unit: None };
                    let fetch = |j: usize, out: &mut [u128; 16]| {
                        for p in 0..16 {
                            out[p] = (0..8).fold(0u128, |v, e| {
                                let x = match major {
                                    Major::K => b[p % 2 * 8 + e][8 * j + p / 2],
                                    Major::Mn => b[p][8 * j + e],
                                };
                                v | u128::from(x) << (16 * e)
                            });
                        }
                    };
                    multiply(&mut r, &d, &mut tile, &form, major, build, fetch);
                    let v = |x: u32| f64::from(element.value(x));
                    for (i, before) in before.iter().enumerate() {
                        for (lane, before) in before.iter().enumerate() {
                            let (row, column) = position(lane, i);
                            let dot: f64 = (0..16).map(|k| v(a[row][k]) * v(b[k][column])).sum();
                            let want = f64::from(f32::from_bits(*before)) - dot;
                            let got = f64::from(f32::from_bits(r.w[4 + i][lane]));
                            assert!((got - want).abs() < 1e-3, "{element:?} {major:?} {build:?} lane {lane} d{i}");
                        }
                    }
                }
            }
        }
    }
}
