//! Matrix instructions: `mma.sync` on row.col fragments and `ldmatrix`.

use super::code::Build;
use super::float::{BF16, F16, Format, Mode, canon};
use super::rounding::{self, Products, Unit};
use super::{LANES, Lane, Regs};

/// Element type of A and B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Half.
    F16,
    /// bfloat16.
    Bf16,
    /// 32-bit registers of which 19 bits count.
    Tf32,
}

/// The A of the last bf16 product as f32: per register the first elements of its words, and the second ones.
#[repr(align(32))]
pub struct Widened(pub [[[f32; LANES]; 2]; 4]);

/// A matrix multiply: rows of the fragments, `m16n8k{k}`.
pub struct Mma {
    /// Element type.
    pub element: Element,
    /// Inner size: 4, 8 or 16.
    pub k: usize,
    /// Whether C and D are packed halves.
    pub half: bool,
    /// D rows.
    pub d: Vec<u16>,
    /// A rows.
    pub a: Vec<u16>,
    /// B rows.
    pub b: Vec<u16>,
    /// C rows.
    pub c: Vec<u16>,
}

/// `ldmatrix`: destination rows and where the row addresses are.
pub struct Matrix {
    /// One row per 8x8 matrix.
    pub d: Vec<u16>,
    /// Transposed.
    pub trans: bool,
    /// Address operand.
    pub at: super::mem::Address,
}

type Tiles = ([[f32; 16]; 16], [[f32; 8]; 16]);

impl Mma {
    #[inline(always)]
    fn format(&self) -> Format {
        if self.element == Element::F16 { F16 } else { BF16 }
    }

    #[inline(always)]
    fn gather(&self, r: &Regs) -> Tiles {
        let (mut a, mut b) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
        let f = self.format();
        for (i, row) in self.a.iter().enumerate() {
            let v = r.w[*row as usize];
            for (lane, x) in v.into_iter().enumerate() {
                let (g, t) = (lane >> 2, lane & 3);
                let line = &mut a[g + 8 * (i & 1)];
                if self.element == Element::Tf32 {
                    line[t + 4 * (i >> 1)] = f32::from_bits(x & !0x1fff);
                } else {
                    let col = 2 * t + 8 * (i >> 1);
                    line[col] = f.unpack(x as u16);
                    line[col + 1] = f.unpack((x >> 16) as u16);
                }
            }
        }
        for (i, row) in self.b.iter().enumerate() {
            let v = r.w[*row as usize];
            for (lane, x) in v.into_iter().enumerate() {
                let (g, t) = (lane >> 2, lane & 3);
                if self.element == Element::Tf32 {
                    b[t + 4 * i][g] = f32::from_bits(x & !0x1fff);
                } else {
                    b[2 * t + 8 * i][g] = f.unpack(x as u16);
                    b[2 * t + 8 * i + 1][g] = f.unpack((x >> 16) as u16);
                }
            }
        }
        (a, b)
    }

    /// Executes it for the whole warp; this processor supports `build`. `reuse` says that `widened` is this A;
    /// the result says whether it can be from now on.
    #[inline(always)]
    pub fn run(&self, r: &mut Regs, build: Build, widened: &mut Widened, reuse: bool) -> bool {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller's program was decoded for a processor with AVX2, FMA and F16C.
        if build == Build::V3 && unsafe { super::mma_v3::product(self, r, widened, reuse) } {
            return true;
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (build, widened, reuse);
        self.run_body(r);
        false
    }

    /// What the tensor cores of a launch add at once, when they round.
    #[inline(always)]
    pub fn unit(&self, products: Products) -> Option<Unit> {
        if products == Products::Exact || self.half {
            return None;
        }
        let (bytes, lowest) = match self.element {
            Element::F16 => (2, -14),
            Element::Bf16 => (2, -126),
            Element::Tf32 => (4, -126),
        };
        products.unit(bytes, lowest)
    }

    /// [`Mma::run`] as tensor cores round.
    #[inline(never)]
    pub fn run_rounded(&self, r: &mut Regs, build: Build, unit: Unit) -> bool {
        self.run_with(r, |acc, a, b| {
            rounding::multiply(acc, a.as_flattened(), 16, &b[..self.k], unit, build);
        });
        false
    }

    #[inline(never)]
    fn run_body(&self, r: &mut Regs) {
        self.run_with(r, |acc, a, b| multiply_body(acc, a, b, self.k));
    }

    #[inline(always)]
    fn run_with(&self, r: &mut Regs, multiply: impl Fn(&mut [[f32; 8]; 16], &[[f32; 16]; 16], &[[f32; 8]; 16])) {
        let (a, b) = self.gather(r);
        let mut acc = [[0f32; 8]; 16];
        for (i, row) in self.c.iter().enumerate() {
            for (lane, x) in r.w[*row as usize].into_iter().enumerate() {
                let (g, t) = (lane >> 2, lane & 3);
                if self.half {
                    acc[g + 8 * i][2 * t] = F16.unpack(x as u16);
                    acc[g + 8 * i][2 * t + 1] = F16.unpack((x >> 16) as u16);
                } else {
                    acc[g + 8 * (i >> 1)][2 * t + (i & 1)] = f32::from_bits(x);
                }
            }
        }
        multiply(&mut acc, &a, &b);
        for (i, row) in self.d.iter().enumerate() {
            let v: [u32; LANES] = std::array::from_fn(|lane| {
                let (g, t) = (lane >> 2, lane & 3);
                if self.half {
                    let h = |c: usize| u32::from(F16.pack(f64::from(acc[g + 8 * i][c]), Mode::Rn));
                    h(2 * t) | h(2 * t + 1) << 16
                } else {
                    canon(acc[g + 8 * (i >> 1)][2 * t + (i & 1)]).to_bits()
                }
            });
            u32::put(r, *row, v, u32::MAX);
        }
    }
}

#[inline(always)]
fn multiply_body(acc: &mut [[f32; 8]; 16], a: &[[f32; 16]; 16], b: &[[f32; 8]; 16], k: usize) {
    for (row, a) in acc.iter_mut().zip(a) {
        for (x, b) in a.iter().zip(b).take(k) {
            for (y, b) in row.iter_mut().zip(b) {
                *y = x.mul_add(*b, *y);
            }
        }
    }
}
