//! Packing of operands into panels, the form that the micro-kernels read front to back.
//!
//! A panel holds up to W rows of the operand's major axis (rows of C for A, columns of C for B) and all steps of k: unit
//! `u` of row `r` stands at `u·W + r`. A unit is four bytes: one f32, or two neighbouring k of bf16 with the even one in
//! the low half (what `vdpbf16ps` multiplies). Missing rows and the missing half of an odd k are zero.
//!
//! Panels for AMX tiles have whole tiles of 16 units: zero beyond k. A's hold 16 units of row after row. Those for `bfmmla` hold two units of
//! row after row.

#[cfg(target_arch = "x86_64")]
pub mod avx512;
mod quads;

use half::bf16;

use super::elem::{Elem, View, round_bits};
use super::level::{Level, multiversion};

/// What a unit of a panel holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// One f32.
    Single,
    /// One f32 whose value is rounded to bf16: products with bf16 on processors without bf16 instructions.
    Rounded,
    /// Two bf16.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "no other processor multiplies pairs alone"))]
    Pair,
    /// Two bf16, in tiles of 16 units: B of an AMX tile.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "no other processor has the tiles"))]
    PairTile,
    /// Two bf16, in tiles of 16 units, of each row side by side: unit `u` of row `r` stands at `(u / 16 · W + r) · 16 + u % 16`. A
    /// of an AMX tile.
    RowTile,
    /// Four bf16, two units, of each row side by side: unit `u` of row `r` stands at `(u / 2 · W + r) · 2 + u % 2`. What `bfmmla` multiplies.
    #[cfg_attr(not(target_arch = "aarch64"), allow(dead_code, reason = "no other processor has the instruction"))]
    Quad,
}

/// Units of k in a tile.
const TILE: usize = 16;

impl Unit {
    /// Number of units for `k` steps.
    pub fn count(self, k: usize) -> usize {
        match self {
            Unit::Single | Unit::Rounded => k,
            Unit::Pair => k.div_ceil(2),
            Unit::PairTile | Unit::RowTile => k.div_ceil(2).next_multiple_of(TILE),
            Unit::Quad => k.div_ceil(4) * 2,
        }
    }

    /// Units of a row that stand side by side in a panel.
    pub fn side_by_side(self) -> usize {
        match self {
            Unit::Single | Unit::Rounded | Unit::Pair | Unit::PairTile => 1,
            Unit::RowTile => TILE,
            Unit::Quad => 2,
        }
    }

    /// Where unit `u` of row `r` stands in a panel of `width` rows.
    pub fn place(self, u: usize, width: usize, r: usize) -> usize {
        let side_by_side = self.side_by_side();
        (u / side_by_side * width + r) * side_by_side + u % side_by_side
    }

    /// Whether a unit holds two steps of k.
    pub fn is_pair(self) -> bool {
        matches!(self, Unit::Pair | Unit::PairTile | Unit::RowTile | Unit::Quad)
    }
}

/// A matrix seen along the axis that is packed; one of the two strides is 1.
#[derive(Clone, Copy)]
pub struct Operand<'a> {
    pub data: View<'a>,
    /// Distance between neighbours of the major axis.
    pub major_stride: usize,
    /// Distance between neighbours along k.
    pub k_stride: usize,
}

/// How two source elements become a unit; the second one exists for pairs only.
trait ToUnit<S: Elem> {
    const STEPS: usize;
    fn unit(even: S, odd: S) -> u32;
}

struct Exact;
struct Round;
struct Pairs;

impl<S: Elem> ToUnit<S> for Exact {
    const STEPS: usize = 1;
    #[inline(always)]
    fn unit(even: S, _: S) -> u32 {
        even.get().to_bits()
    }
}

impl<S: Elem> ToUnit<S> for Round {
    const STEPS: usize = 1;
    #[inline(always)]
    fn unit(even: S, _: S) -> u32 {
        u32::from(round_bits(even.get())) << 16
    }
}

impl ToUnit<f32> for Pairs {
    const STEPS: usize = 2;
    #[inline(always)]
    fn unit(even: f32, odd: f32) -> u32 {
        u32::from(round_bits(even)) | u32::from(round_bits(odd)) << 16
    }
}

impl ToUnit<bf16> for Pairs {
    const STEPS: usize = 2;
    #[inline(always)]
    fn unit(even: bf16, odd: bf16) -> u32 {
        u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16
    }
}

trait Source: Elem + Default {}
impl Source for f32 {}
impl Source for bf16 {}

multiversion! {
    /// One panel of `width` rows of which `have` exist, from `src` that starts at its first element.
    fn panel_k_contiguous[S: Source, T: ToUnit<S>](dst: &mut [u32], width: usize, have: usize, src: &[S], stride: usize, k: usize) {
        let units = k.div_ceil(T::STEPS);
        if have < width {
            dst[..units * width].fill(0);
        }
        for r in 0..have {
            let row = &src[r * stride..r * stride + k];
            let steps = row.chunks_exact(T::STEPS);
            let rest = steps.remainder();
            let mut slots = dst[r..].iter_mut().step_by(width);
            for (x, slot) in steps.zip(&mut slots) {
                *slot = T::unit(x[0], x[T::STEPS - 1]);
            }
            if let (Some(&x), Some(slot)) = (rest.first(), slots.next()) {
                *slot = T::unit(x, S::default());
            }
        }
    }
}

multiversion! {
    /// As above where neighbours of the major axis are contiguous and `stride` lies between steps of k.
    fn panel_major_contiguous[S: Source, T: ToUnit<S>](dst: &mut [u32], width: usize, have: usize, src: &[S], stride: usize, k: usize) {
        for (u, dst) in dst.chunks_exact_mut(width).take(k.div_ceil(T::STEPS)).enumerate() {
            let even = &src[u * T::STEPS * stride..][..have];
            let (dst, missing) = dst.split_at_mut(have);
            let odd_k = u * T::STEPS + T::STEPS - 1;
            if odd_k < k {
                let odd = &src[odd_k * stride..][..have];
                for ((d, &e), &o) in dst.iter_mut().zip(even).zip(odd) {
                    *d = T::unit(e, o);
                }
            } else {
                for (d, &e) in dst.iter_mut().zip(even) {
                    *d = T::unit(e, S::default());
                }
            }
            missing.fill(0);
        }
    }
}

fn panel<S: Source, T: ToUnit<S>>(
    level: Level,
    dst: &mut [u32],
    width: usize,
    have: usize,
    src: &[S],
    strides: (usize, usize),
    k: usize,
) {
    let (major_stride, k_stride) = strides;
    if k_stride == 1 {
        panel_k_contiguous::<S, T>(level, dst, width, have, src, major_stride, k);
    } else {
        assert_eq!(major_stride, 1, "an operand is contiguous along one axis");
        panel_major_contiguous::<S, T>(level, dst, width, have, src, k_stride, k);
    }
}

/// Packs rows `first .. first + have` of the major axis and steps `k0 .. k0 + k` into one panel of `width`.
#[allow(clippy::too_many_arguments)]
pub fn pack_panel(
    level: Level,
    dst: &mut [u32],
    unit: Unit,
    width: usize,
    src: Operand<'_>,
    first: usize,
    have: usize,
    k0: usize,
    k: usize,
) {
    let at = first * src.major_stride + k0 * src.k_stride;
    let strides = (src.major_stride, src.k_stride);
    #[cfg(target_arch = "x86_64")]
    if avx512::panel(level, dst, unit, width, src.data.from(at), have, strides, k) {
        return;
    }
    if unit == Unit::Quad {
        return quads::panel(level, dst, width, src.data.from(at), have, strides, k);
    }
    match (src.data, unit) {
        (View::F32(x), Unit::Single) => panel::<f32, Exact>(level, dst, width, have, &x[at..], strides, k),
        (View::F32(x), Unit::Rounded) => panel::<f32, Round>(level, dst, width, have, &x[at..], strides, k),
        (View::F32(x), _) => panel::<f32, Pairs>(level, dst, width, have, &x[at..], strides, k),
        (View::Bf16(x), Unit::Single | Unit::Rounded) => {
            panel::<bf16, Exact>(level, dst, width, have, &x[at..], strides, k)
        }
        (View::Bf16(x), _) => panel::<bf16, Pairs>(level, dst, width, have, &x[at..], strides, k),
    }
    if matches!(unit, Unit::PairTile | Unit::RowTile) {
        dst[k.div_ceil(2) * width..unit.count(k) * width].fill(0);
    }
    if unit == Unit::RowTile {
        for tile in dst.chunks_exact_mut(TILE * width) {
            let pairs = tile.to_vec();
            for (i, unit) in tile.iter_mut().enumerate() {
                *unit = pairs[i % TILE * width + i / TILE];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{levels, normal};

    /// Every level gives the same units, from every source, in both directions, at ragged edges too.
    #[test]
    fn levels_pack_the_same_units() {
        let x = normal(9, 70 * 70);
        let y: Vec<bf16> = x.iter().map(|&x| bf16::from_f32(x)).collect();
        for level in levels() {
            for data in [View::F32(&x), View::Bf16(&y)] {
                for unit in [Unit::Single, Unit::Rounded, Unit::Pair, Unit::PairTile, Unit::RowTile] {
                    for strides in [(70, 1), (1, 70)] {
                        for (width, have, first, k0, k) in [
                            (14, 14, 0, 0, 64),
                            (32, 32, 5, 3, 37),
                            (14, 3, 40, 2, 1),
                            (32, 17, 7, 0, 33),
                            (32, 9, 0, 1, 2),
                            (32, 32, 1, 0, 69),
                        ] {
                            let src = Operand { data, major_stride: strides.0, k_stride: strides.1 };
                            let n = unit.count(k) * width;
                            let (mut expected, mut found) = (vec![7u32; n], vec![9u32; n]);
                            pack_panel(Level::Portable, &mut expected, unit, width, src, first, have, k0, k);
                            pack_panel(level, &mut found, unit, width, src, first, have, k0, k);
                            assert_eq!(found, expected, "{level:?} {unit:?} {strides:?} {width} {have} {k}");
                        }
                    }
                }
            }
        }
    }
}
