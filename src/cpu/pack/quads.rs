//! Panels of [`Unit::Quad`](super::Unit::Quad): four steps of k of a row side by side, zero beyond k.

use super::{Pairs, Source, ToUnit};
use crate::cpu::elem::View;
use crate::cpu::level::{Level, multiversion};

/// Two units.
type Quad = [u32; 2];

#[inline(always)]
fn quad<S: Source>([a, b, c, d]: [S; 4]) -> Quad
where
    Pairs: ToUnit<S>,
{
    [Pairs::unit(a, b), Pairs::unit(c, d)]
}

/// Elements that are rounded to bf16 as they are packed.
trait Packs: Source {
    fn quad(steps: [Self; 4]) -> Quad;
}

impl Packs for f32 {
    #[inline(always)]
    fn quad(steps: [Self; 4]) -> Quad {
        quad(steps)
    }
}

impl Packs for half::bf16 {
    #[inline(always)]
    fn quad(steps: [Self; 4]) -> Quad {
        quad(steps)
    }
}

/// As many steps as there are, and zeros.
#[inline(always)]
fn filled_up<S: Source>(steps: impl Iterator<Item = S>) -> [S; 4] {
    let mut all = [S::default(); 4];
    all.iter_mut().zip(steps).for_each(|(to, from)| *to = from);
    all
}

multiversion! {
    /// Neighbours along k are contiguous, rows `stride` apart.
    fn along_k[S: Packs](dst: &mut [Quad], width: usize, have: usize, src: &[S], stride: usize, k: usize) {
        if have < width {
            dst.fill([0; 2]);
        }
        for r in 0..have.min(dst.len()) {
            let (quads, rest) = src[r * stride..r * stride + k].as_chunks::<4>();
            let mut slots = dst[r..].iter_mut().step_by(width);
            for (x, slot) in quads.iter().zip(&mut slots) {
                *slot = S::quad(*x);
            }
            if let Some(slot) = slots.next() {
                *slot = S::quad(filled_up(rest.iter().copied()));
            }
        }
    }
}

multiversion! {
    /// Neighbours of the major axis are contiguous, steps of k `stride` apart.
    fn along_rows[S: Packs](dst: &mut [Quad], width: usize, have: usize, src: &[S], stride: usize, k: usize) {
        for (q, dst) in dst.chunks_exact_mut(width).enumerate() {
            let (dst, missing) = dst.split_at_mut(have);
            let step = |i: usize| &src[(4 * q + i) * stride..][..have];
            if 4 * q + 4 <= k {
                let (a, b, c, d) = (step(0), step(1), step(2), step(3));
                for ((((slot, &a), &b), &c), &d) in dst.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                    *slot = S::quad([a, b, c, d]);
                }
            } else {
                for (r, slot) in dst.iter_mut().enumerate() {
                    *slot = S::quad(filled_up((0..k - 4 * q).map(|i| step(i)[r])));
                }
            }
            missing.fill([0; 2]);
        }
    }
}

/// One panel of `width` rows of which `have` exist, from `src` that starts at its first element; see [`super::pack_panel`].
pub fn panel(
    level: Level,
    dst: &mut [u32],
    width: usize,
    src: View<'_>,
    have: usize,
    strides: (usize, usize),
    k: usize,
) {
    match src {
        View::F32(x) => of(level, dst, width, x, have, strides, k),
        View::Bf16(x) => of(level, dst, width, x, have, strides, k),
    }
}

fn of<S: Packs>(
    level: Level,
    dst: &mut [u32],
    width: usize,
    src: &[S],
    have: usize,
    (major_stride, k_stride): (usize, usize),
    k: usize,
) {
    let (dst, _) = dst[..k.div_ceil(4) * width * 2].as_chunks_mut::<2>();
    if k_stride == 1 {
        along_k(level, dst, width, have, src, major_stride, k);
    } else {
        assert_eq!(major_stride, 1, "an operand is contiguous along one axis");
        along_rows(level, dst, width, have, src, k_stride, k);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Operand, Unit, pack_panel};
    use super::*;
    use crate::cpu::testing::{levels, normal};

    /// They hold what panels of pairs hold, elsewhere, and zeros.
    #[test]
    fn a_quad_is_two_pairs_of_a_row() {
        let x = normal(9, 40 * 40);
        let y: Vec<half::bf16> = x.iter().map(|&x| half::bf16::from_f32(x)).collect();
        for (level, data) in levels().into_iter().flat_map(|l| [(l, View::F32(&x)), (l, View::Bf16(&y))]) {
            for (strides, width, have, k) in (0..10).flat_map(|k| {
                [(6, 6), (16, 3), (16, 16)]
                    .into_iter()
                    .flat_map(move |(width, have)| [((40, 1), width, have, k + 20), ((1, 40), width, have, k)])
            }) {
                let src = Operand { data, major_stride: strides.0, k_stride: strides.1 };
                let [mut pairs, mut quads] = [Unit::Pair, Unit::Quad].map(|unit| {
                    let mut panel = vec![7u32; unit.count(k) * width];
                    pack_panel(level, &mut panel, unit, width, src, 1, have, 2, k);
                    panel
                });
                let have_pairs = Unit::Pair.count(k);
                for (u, r) in (0..Unit::Quad.count(k)).flat_map(|u| (0..width).map(move |r| (u, r))) {
                    let found = std::mem::replace(&mut quads[Unit::Quad.place(u, width, r)], 9);
                    let expected = if u < have_pairs { std::mem::take(&mut pairs[u * width + r]) } else { 0 };
                    assert_eq!(found, expected, "{level:?} {strides:?} {width} {have} {k}: unit {u} of row {r}");
                }
                assert!(quads.iter().all(|&x| x == 9), "every place is one unit's");
            }
        }
    }
}
