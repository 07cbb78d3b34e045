//! Accesses of a whole warp at once that need no message: the fast path of [`super::access`].

use super::mem::{Access, lanes};
use super::region::{Region, ones};
use super::site::Shape;
use super::{File, LANES, NONE, Regs, put_raw, raw};

const _: () = assert!(cfg!(target_endian = "little"), "memory and registers share the byte order of PTX");

/// Up to 1024 bytes as elements of any size.
#[repr(align(32))]
struct Buffer<const WORDS: usize>([u64; WORDS]);

impl<const WORDS: usize> Buffer<WORDS> {
    #[inline(always)]
    fn get<const N: usize>(&self, i: usize) -> u64 {
        assert!(i < WORDS * 8 / N);
        // SAFETY: the assertion keeps the element inside the words; any bits are a valid integer.
        unsafe {
            let p = self.0.as_ptr();
            match N {
                1 => u64::from(*p.cast::<u8>().add(i)),
                2 => u64::from(*p.cast::<u16>().add(i)),
                4 => u64::from(*p.cast::<u32>().add(i)),
                _ => *p.add(i),
            }
        }
    }

    #[inline(always)]
    fn set<const N: usize>(&mut self, i: usize, x: u64) {
        assert!(i < WORDS * 8 / N);
        // SAFETY: as in `get`.
        unsafe {
            let p = self.0.as_mut_ptr();
            match N {
                1 => *p.cast::<u8>().add(i) = x as u8,
                2 => *p.cast::<u16>().add(i) = x as u16,
                4 => *p.cast::<u32>().add(i) = x as u32,
                _ => *p.add(i) = x,
            }
        }
    }
}

#[inline(always)]
fn extended<const N: usize>(x: u64, signed: bool) -> u64 {
    match (N, signed) {
        (1, true) => x as u8 as i8 as i64 as u64,
        (2, true) => x as u16 as i16 as i64 as u64,
        (4, true) => x as u32 as i32 as i64 as u64,
        _ => x,
    }
}

/// Picks the code for the element size and the number of elements.
macro_rules! sized {
    ($op:expr, $f:ident($($arg:expr),*)) => {
        match ($op.ty.size(), $op.regs.len()) {
            (1, 1) => $f::<1, 1, 4>($($arg),*),
            (2, 1) => $f::<2, 1, 8>($($arg),*),
            (4, 1) => $f::<4, 1, 16>($($arg),*),
            (8, 1) => $f::<8, 1, 32>($($arg),*),
            (2, 2) => $f::<2, 2, 16>($($arg),*),
            (4, 2) => $f::<4, 2, 32>($($arg),*),
            (8, 2) => $f::<8, 2, 64>($($arg),*),
            (2, 4) => $f::<2, 4, 32>($($arg),*),
            (4, 4) => $f::<4, 4, 64>($($arg),*),
            (8, 4) => $f::<8, 4, 128>($($arg),*),
            (4, 8) => $f::<4, 8, 128>($($arg),*),
            (1, 2) => $f::<1, 2, 8>($($arg),*),
            (1, 4) => $f::<1, 4, 16>($($arg),*),
            _ => return Default::default(),
        }
    };
}

/// Loads for all lanes when every byte is written; else does nothing and returns false. The whole access is in range.
#[inline(always)]
pub(super) fn load_fast(
    r: &mut Regs,
    op: &Access,
    region: &Region,
    shape: Shape,
    at: &[u64; LANES],
    mask: u32,
) -> bool {
    sized!(op, load_shape(r, op, region, shape, at, mask))
}

#[inline(always)]
fn load_shape<const N: usize, const R: usize, const WORDS: usize>(
    r: &mut Regs,
    op: &Access,
    region: &Region,
    shape: Shape,
    at: &[u64; LANES],
    mask: u32,
) -> bool {
    let signed = op.ty.signed();
    let head = at[mask.trailing_zeros() as usize & 31].wrapping_sub(region.start);
    match shape {
        Shape::Row if head.is_multiple_of(8) => {
            if !region.all_written(head, (LANES * N * R) as u64) {
                return false;
            }
            let mut buffer = Buffer([0; WORDS]);
            region.read(head, &mut buffer.0);
            for (e, (file, row)) in op.regs.iter().enumerate().take(R) {
                // One loop per case: without the choice inside they become vector code.
                if *row == NONE {
                    continue;
                } else if *file == File::Q {
                    let out = &mut r.q[*row as usize];
                    for l in 0..LANES {
                        out[l] = extended::<N>(buffer.get::<N>(l * R + e), signed);
                    }
                } else if signed {
                    let out = &mut r.w[*row as usize];
                    for l in 0..LANES {
                        out[l] = extended::<N>(buffer.get::<N>(l * R + e), true) as u32;
                    }
                } else {
                    let out = &mut r.w[*row as usize];
                    for l in 0..LANES {
                        out[l] = buffer.get::<N>(l * R + e) as u32;
                    }
                }
            }
        }
        Shape::Same => {
            if !region.is_written(head, (N * R) as u32) {
                return false;
            }
            for (e, (file, row)) in op.regs.iter().enumerate().take(R) {
                let x = extended::<N>(region.load::<N>(head + (e * N) as u64), signed);
                if *row != NONE {
                    put_raw(r, *file, *row, [x; LANES], mask);
                }
            }
        }
        _ => {
            let (mut missing, mut offsets) = (0, [0; LANES]);
            for l in 0..LANES {
                offsets[l] = if mask >> l & 1 == 1 { at[l].wrapping_sub(region.start) } else { head };
                // SAFETY: the caller checked that the access of every lane of the mask lies in the region.
                missing |= unsafe { region.missing_unchecked(offsets[l], (N * R) as u32) };
            }
            if missing != 0 {
                return false;
            }
            for (e, (file, row)) in op.regs.iter().enumerate().take(R) {
                let mut values = [0; LANES];
                for l in 0..LANES {
                    // SAFETY: as above; the site found every lane's address aligned to the whole access.
                    values[l] = unsafe { region.load_unchecked::<N>(offsets[l] + (e * N) as u64) };
                }
                if signed {
                    values.iter_mut().for_each(|x| *x = extended::<N>(*x, true));
                }
                if *row != NONE {
                    put_raw(r, *file, *row, values, mask);
                }
            }
        }
    }
    true
}

/// Stores for all lanes; the whole access is in range of a region that may be written.
#[inline(always)]
pub(super) fn store_fast(r: &Regs, op: &Access, region: &Region, shape: Shape, at: &[u64; LANES], mask: u32) -> bool {
    sized!(op, store_shape(r, op, region, shape, at, mask))
}

#[inline(always)]
fn store_shape<const N: usize, const R: usize, const WORDS: usize>(
    r: &Regs,
    op: &Access,
    region: &Region,
    shape: Shape,
    at: &[u64; LANES],
    mask: u32,
) -> bool {
    let head = at[0].wrapping_sub(region.start);
    if shape == Shape::Row && head.is_multiple_of(8) {
        let mut buffer = Buffer([0; WORDS]);
        for (e, (file, row)) in op.regs.iter().enumerate().take(R) {
            if *file == File::Q {
                let row = &r.q[*row as usize];
                for l in 0..LANES {
                    buffer.set::<N>(l * R + e, row[l]);
                }
            } else {
                let row = &r.w[*row as usize];
                for l in 0..LANES {
                    buffer.set::<N>(l * R + e, u64::from(row[l]));
                }
            }
        }
        region.write(head, &buffer.0);
        region.mark_all(head, (LANES * N * R) as u64);
        return true;
    }
    for (e, (file, row)) in op.regs.iter().enumerate().take(R) {
        let row = raw(r, *file, *row);
        for l in lanes(mask) {
            let offset = at[l].wrapping_sub(region.start) + (e * N) as u64;
            // SAFETY: the caller checked that the access of every lane of the mask lies in the region, aligned.
            unsafe { region.put_unchecked::<N>(offset, row[l]) };
        }
    }
    mark_lanes(region, at, (N * R) as u32, mask);
    true
}

/// Says that the bytes of the lanes are written; neighbours often share a word of the bitmap.
#[inline(always)]
fn mark_lanes(region: &Region, at: &[u64; LANES], bytes: u32, mask: u32) {
    let (mut word, mut bits) = (usize::MAX, 0);
    for l in lanes(mask) {
        let offset = at[l].wrapping_sub(region.start);
        let w = (offset / 64) as usize;
        if w != word {
            if bits != 0 {
                region.set_bits(word, bits);
            }
            (word, bits) = (w, 0);
        }
        bits |= ones(bytes) << (offset & 63);
    }
    region.set_bits(word, bits);
}
