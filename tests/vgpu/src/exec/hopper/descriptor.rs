//! Shared-memory matrix descriptors of `wgmma`: where each 16-byte piece of an operand lies.
//!
//! Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout": canonical layouts, strides and descriptor
//! format. Fields hold byte counts divided by 16:
//!
//! | bits | field |
//! |---|---|
//! | 0-13 | start address |
//! | 16-29 | leading dimension byte offset |
//! | 32-45 | stride dimension byte offset |
//! | 49-51 | base offset |
//! | 62-63 | 0 no swizzle, 1 128 bytes, 2 64 bytes, 3 32 bytes |

use crate::tensor_map::Swizzle;

/// A decoded descriptor; offsets in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// First byte.
    pub start: u64,
    /// Leading dimension byte offset.
    pub leading: u64,
    /// Stride dimension byte offset.
    pub stride: u64,
    /// Row of the swizzle pattern at which the matrix begins.
    pub base: u64,
    /// Swizzle.
    pub swizzle: Swizzle,
}

/// Which dimension of an operand is contiguous in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Major {
    /// The inner dimension of the product.
    K,
    /// Rows of A, columns of B.
    Mn,
}

impl Descriptor {
    /// From the 64 bits of a register.
    ///
    /// # Errors
    /// Bits are set that the format leaves unused.
    pub fn decode(bits: u64) -> Result<Descriptor, String> {
        const UNUSED: u64 = 0b11 << 14 | 0b11 << 30 | 0b111 << 46 | 0x3ff << 52;
        if bits & UNUSED != 0 {
            return Err(format!("matrix descriptor {bits:#018x} has bits set that its format leaves unused"));
        }
        let field = |at: u32| (bits >> at & 0x3fff) << 4;
        Ok(Descriptor {
            start: field(0),
            leading: field(16),
            stride: field(32),
            base: bits >> 49 & 7,
            swizzle: [Swizzle::None, Swizzle::B128, Swizzle::B64, Swizzle::B32][(bits >> 62) as usize],
        })
    }

    /// Address of a 16-byte piece. K-major: row `mn` and piece `piece` of its 32 bytes. MN-major: the eight elements
    /// `8 * mn ..` at inner index `piece`.
    #[inline(always)]
    pub fn piece(&self, major: Major, mn: usize, piece: usize) -> u64 {
        let (mn, piece, span) = (mn as u64, piece as u64, self.swizzle.span() as u64);
        let offset = match (major, self.swizzle) {
            // Core matrices of 8 rows by 16 bytes: neighbours along K `leading` apart, along M or N `stride` apart.
            (Major::K, Swizzle::None) => mn % 8 * 16 + mn / 8 * self.stride + piece * self.leading,
            // Rows as wide as the swizzle, 8 of them to a pattern; `leading` is not used.
            (Major::K, _) => mn % 8 * span + mn / 8 * self.stride + piece * 16,
            (Major::Mn, Swizzle::None) => mn * self.stride + piece % 8 * 16 + piece / 8 * self.leading,
            (Major::Mn, _) => {
                let wide = span / 16;
                mn % wide * 16 + mn / wide * self.leading + piece % 8 * span + piece / 8 * self.stride
            }
        };
        // Addresses have the 18 bits that a start address can name.
        self.swizzle.place((self.start + offset) & 0x3_ffff, self.base)
    }
}

/// One operand of an instruction in shared memory: `rows` of M or N by 32 bytes of K.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Where.
    pub at: Descriptor,
    /// Contiguous dimension.
    pub major: Major,
    /// First row of M or N.
    pub first: usize,
    /// Rows of M or N.
    pub rows: usize,
}

impl Operand {
    /// Addresses of the sixteen pieces of eight rows: for K-major (row, piece 0..2), for MN-major (k 0..16).
    #[inline(always)]
    pub fn block(&self, group: usize) -> [u64; 16] {
        let d = &self.at;
        let (span, group) = (d.swizzle.span() as u64, (self.first / 8 + group) as u64);
        let (base, line, next, far) = match (self.major, d.swizzle) {
            (Major::K, Swizzle::None) => (d.start + group * d.stride, 16, d.leading, 0),
            (Major::K, _) => (d.start + group * d.stride, span, 16, 0),
            (Major::Mn, Swizzle::None) => (d.start + group * d.stride, 16, 0, d.leading),
            (Major::Mn, _) => {
                let wide = span / 16;
                (d.start + group % wide * 16 + group / wide * d.leading, span, 0, d.stride)
            }
        };
        let mut out = [0; 16];
        for (i, a) in out.iter_mut().enumerate() {
            let i = i as u64;
            let offset = match self.major {
                Major::K => i / 2 * line + i % 2 * next,
                Major::Mn => i % 8 * line + i / 8 * far,
            };
            *a = d.swizzle.place((base + offset) & 0x3_ffff, d.base);
        }
        out
    }

    /// A range that holds the operand, with up to 127 bytes more on each side; `None` when addresses wrap around.
    pub fn bounds(&self) -> Option<(u64, u64)> {
        let d = &self.at;
        let (groups, first) = ((self.rows / 8) as u64, (self.first / 8) as u64);
        let span = d.swizzle.span() as u64;
        let along = |first: u64, n: u64| (first * d.stride, (first + n - 1) * d.stride);
        let (low, high) = match (self.major, d.swizzle) {
            (Major::K, Swizzle::None) => {
                let (l, h) = along(first, groups);
                (l, h + 7 * 16 + d.leading)
            }
            (Major::K, _) => {
                let (l, h) = along(first, groups);
                (l, h + 7 * span + 16)
            }
            (Major::Mn, Swizzle::None) => {
                let (l, h) = along(first, groups);
                (l, h + 7 * 16 + d.leading)
            }
            (Major::Mn, _) => {
                let wide = span / 16;
                let last = first + groups - 1;
                (first / wide * d.leading, last / wide * d.leading + 7 * span + d.stride + (wide - 1) * 16)
            }
        };
        // The swizzle moves pieces within a line of 128 bytes.
        let (low, high) = ((d.start + low) & !127, (d.start + high + 16).next_multiple_of(128));
        (high <= 0x4_0000).then_some((low, high))
    }

    /// Addresses of all pieces: for K-major (row, piece 0..2), for MN-major (group of 8 rows, k 0..16).
    pub fn pieces(&self) -> impl Iterator<Item = u64> + '_ {
        let (first, n, per) = match self.major {
            Major::K => (self.first, self.rows, 2),
            Major::Mn => (self.first / 8, self.rows / 8, 16),
        };
        (0..n).flat_map(move |i| (0..per).map(move |p| self.at.piece(self.major, first + i, p)))
    }

    /// Whether a byte range touches the operand.
    pub fn overlaps(&self, start: u64, end: u64) -> bool {
        self.pieces().any(|a| a < end && start < a + 16)
    }

    /// Lowest address and end of the operand.
    pub fn range(&self) -> (u64, u64) {
        self.pieces().fold((u64::MAX, 0), |(lo, hi), a| (lo.min(a), hi.max(a + 16)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_decoded() {
        let bits = 0x1234 | 0x3fff << 16 | 64 << 32 | 5 << 49 | 2u64 << 62;
        let d = Descriptor::decode(bits).unwrap();
        let want = Descriptor { start: 0x12340, leading: 0x3fff0, stride: 1024, base: 5, swizzle: Swizzle::B64 };
        assert_eq!(d, want);
        for bit in [14, 15, 30, 31, 46, 47, 48, 52, 61] {
            assert!(Descriptor::decode(bits | 1 << bit).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn blocks_and_bounds_agree_with_pieces() {
        for mode in 0..4 {
            for major in [Major::K, Major::Mn] {
                for (first, rows) in [(0, 256), (48, 16), (16, 16)] {
                    let at = Descriptor::decode(0x47 | 0x28 << 16 | 0x140 << 32 | 3 << 49 | mode << 62).unwrap();
                    let o = Operand { at, major, first, rows };
                    let all: Vec<u64> = (0..rows / 8).flat_map(|j| o.block(j)).collect();
                    assert_eq!(all, o.pieces().collect::<Vec<_>>(), "{o:?}");
                    let ((low, high), (least, most)) = (o.bounds().unwrap(), o.range());
                    assert!(low <= least && least - low < 256 && most <= high && high - most < 256, "{o:?}");
                }
            }
        }
    }

    /// The canonical layouts as nested shapes and strides in 16-byte pieces, the table of the ISA text written out:
    /// K-major `((8, m), 2)`, MN-major `((w, m), (8, k))` with w pieces to a swizzle row.
    #[test]
    fn pieces_follow_the_canonical_layouts() {
        let spans = [(0u64, 1u64, Swizzle::None), (3, 2, Swizzle::B32), (2, 4, Swizzle::B64), (1, 8, Swizzle::B128)];
        for (mode, w, swizzle) in spans {
            let (lbo, sbo) = (0x30, 0x140);
            let d = Descriptor::decode(0x40 | lbo << 16 | sbo << 32 | mode << 62).unwrap();
            let xor = |piece: u64| match swizzle {
                Swizzle::None => piece,
                Swizzle::B32 => piece ^ (piece >> 3 & 1),
                Swizzle::B64 => piece ^ (piece >> 3 & 3),
                Swizzle::B128 => piece ^ (piece >> 3 & 7),
            };
            for mn in 0..64u64 {
                for p in 0..2 {
                    let step = if mode == 0 { lbo } else { 1 };
                    let want = xor(0x40 + mn % 8 * w + mn / 8 * sbo + p * step);
                    assert_eq!(d.piece(Major::K, mn as usize, p as usize), want * 16, "{swizzle:?} {mn} {p}");
                }
            }
            for group in 0..16u64 {
                for k in 0..16 {
                    let (along_m, along_k) = if mode == 0 { (sbo, lbo) } else { (lbo, sbo) };
                    let want = xor(0x40 + group % w + group / w * along_m + k % 8 * w + k / 8 * along_k);
                    assert_eq!(d.piece(Major::Mn, group as usize, k as usize), want * 16, "{swizzle:?} {group} {k}");
                }
            }
        }
    }
}
