//! What is rare enough to run without hurry: `printf` and `assert`, `stmatrix`, `movmatrix`, products of bytes and doubles.

use super::alu::Op;
use super::decode::{Decoded, Decoder};
use super::launch::Cta;
use super::mem::{Address, LaneFault, Space, lanes};
use super::opcode::{need, space, unknown};
use super::printf::{self, Argument};
use super::{Act, Class, File, Inst, LANES, NONE, Regs};
use crate::error::FaultKind;
use crate::ptx::{Operand, Ty};

/// Longest text that is read from device memory.
const MAX_TEXT: usize = 1 << 12;

/// An instruction that runs through [`Rare::run`].
pub enum Rare {
    /// `vprintf`: where its result goes, and its two arguments, as the parameters of the call hold them.
    Print([Address; 3]),
    /// `__assertfail`: message, file, line, function, size of a character.
    Assert([Address; 5]),
    /// `stmatrix`: rows of 8x8 halves to shared memory.
    StoreMatrix {
        /// Row addresses.
        at: Address,
        /// One register per matrix.
        rows: Vec<u16>,
        /// Transposed.
        trans: bool,
    },
    /// `movmatrix`: an 8x8 matrix of halves transposed.
    Transpose {
        /// Destination row.
        d: u16,
        /// Source row.
        a: u16,
    },
    /// `mma.sync` on bytes.
    Bytes {
        /// Rows of A and D, and inner size.
        shape: (usize, usize),
        /// Whether A and B are signed.
        signed: (bool, bool),
        /// Clamp instead of wrapping around.
        saturate: bool,
        /// Registers of D, A, B and C.
        rows: [Vec<u16>; 4],
    },
    /// `mma.sync` m8n8k4 on doubles; registers of D, A, B and C.
    Doubles([Vec<u16>; 4]),
}

fn load(cta: &Cta<'_>, warp: usize, lane: usize, at: Space, a: u64, bytes: u64) -> Result<u64, LaneFault> {
    let (space, region, offset) = cta.lane_region(warp, lane, at, a, bytes)?;
    if !region.is_written(offset, bytes as u32) {
        return Err(cta.unwritten(lane, space, a, bytes));
    }
    Ok(match bytes {
        1 => region.load::<1>(offset),
        4 => region.load::<4>(offset),
        _ => region.load::<8>(offset),
    })
}

/// Zero-terminated text at a generic address.
fn text(cta: &Cta<'_>, warp: usize, lane: usize, a: u64) -> Result<Vec<u8>, LaneFault> {
    let mut out = Vec::new();
    while out.len() < MAX_TEXT {
        match load(cta, warp, lane, Space::Generic, a + out.len() as u64, 1)? {
            0 => return Ok(out),
            c => out.push(c as u8),
        }
    }
    Ok(out)
}

impl Rare {
    /// Executes it for the lanes of `active`.
    pub fn run(&self, r: &mut Regs, cta: &mut Cta<'_>, warp: usize, active: u32) -> Result<(), LaneFault> {
        let lane = active.trailing_zeros() as usize & 31;
        if !matches!(self, Rare::Print(_) | Rare::Assert(_)) && active != u32::MAX {
            let m = format!("a matrix instruction with lanes {active:#010x} only");
            return Err((lane, FaultKind::BadMask, m));
        }
        match self {
            Rare::Print(at) => {
                for lane in lanes(active) {
                    print(cta, r, warp, lane, at)?;
                }
            }
            Rare::Assert(at) => {
                let value = |n: usize, bytes| load(cta, warp, lane, at[n].space, at[n].lanes(r)[lane], bytes);
                let read = |n: usize| -> Result<String, LaneFault> {
                    let a = value(n, 8)?;
                    Ok(String::from_utf8_lossy(&text(cta, warp, lane, a)?).into_owned())
                };
                let m = format!("{}:{}: {}: assertion `{}` failed", read(1)?, value(2, 4)?, read(3)?, read(0)?);
                return Err((lane, FaultKind::Assert, m));
            }
            Rare::StoreMatrix { at, rows, trans } => {
                let at_lanes = at.lanes(r);
                if cta.program.asynchronous {
                    let mask = super::region::ones(8 * rows.len() as u32) as u32;
                    cta.watch(warp, at.space, &at_lanes, 16, mask)?;
                }
                for (n, row) in rows.iter().enumerate() {
                    let tile = tile(&r.w[*row as usize], *trans);
                    for (i, line) in tile.iter().enumerate() {
                        let lane = 8 * n + i;
                        let (_, region, offset) = cta.lane_region(warp, lane, at.space, at_lanes[lane], 16)?;
                        for (k, x) in line.iter().enumerate() {
                            region.store::<2>(offset + 2 * k as u64, u64::from(*x));
                        }
                        for k in 0..8 {
                            let from = if *trans { 4 * k + i / 2 } else { 4 * i + k / 2 };
                            if let Some(o) = r.marks.origin((File::W, *row), from) {
                                cta.leave(warp, lane, at.space, (at_lanes[lane] + 2 * k as u64, 2), o)?;
                            }
                        }
                    }
                }
            }
            Rare::Transpose { d, a } => {
                r.w[*d as usize] = fragment(&tile(&r.w[*a as usize], true));
                if r.marks.any() {
                    let from: [_; LANES] = std::array::from_fn(|l| {
                        let (row, col) = (l / 4, 2 * (l % 4));
                        (0..2).find_map(|e| r.marks.origin((File::W, *a), 4 * (col + e) + row / 2))
                    });
                    let marked = (0..LANES).fold(0, |m, l| m | u32::from(from[l].is_some()) << l);
                    r.marks.put((File::W, *d), u32::MAX, marked, &from);
                }
            }
            Rare::Bytes { shape, signed, saturate, rows } => {
                bytes(r, *shape, *signed, *saturate, rows);
                cta.counters.tensor_flops += 2 * (shape.0 * 8 * shape.1) as u64;
            }
            Rare::Doubles(rows) => {
                doubles(r, rows);
                cta.counters.tensor_flops += 2 * 8 * 8 * 4;
            }
        }
        Ok(())
    }
}

/// The 8x8 halves of a fragment: lane `4 g + t` holds row `g`, columns `2 t` and `2 t + 1`.
fn tile(w: &[u32; LANES], trans: bool) -> [[u16; 8]; 8] {
    let mut out = [[0; 8]; 8];
    for (lane, x) in w.iter().enumerate() {
        for half in 0..2 {
            let (row, col) = (lane / 4, 2 * (lane % 4) + half);
            let (row, col) = if trans { (col, row) } else { (row, col) };
            out[row][col] = (x >> (16 * half)) as u16;
        }
    }
    out
}

fn fragment(t: &[[u16; 8]; 8]) -> [u32; LANES] {
    std::array::from_fn(|lane| {
        let (row, col) = (lane / 4, 2 * (lane % 4));
        u32::from(t[row][col]) | u32::from(t[row][col + 1]) << 16
    })
}

/// Byte products. A: lane `4 g + t`, register `i`: rows `g + 8 (i & 1)`, columns `4 t + 16 (i >> 1)` on (m16), or row `g`
/// (m8); B: rows `4 t + 16 i` on, column `g`; C and D: row `g + 8 (i >> 1)`, columns `2 t + (i & 1)`.
fn bytes(r: &mut Regs, (m, k): (usize, usize), signed: (bool, bool), saturate: bool, [d, a, b, c]: &[Vec<u16>; 4]) {
    let value = |x: u32, n: usize, signed: bool| {
        let byte = (x >> (8 * n)) as u8;
        i64::from(if signed { i16::from(byte as i8) } else { i16::from(byte) })
    };
    let mut left = vec![[0i64; 32]; m];
    let mut right = [[0i64; 8]; 32];
    for lane in 0..LANES {
        let (g, t) = (lane / 4, lane % 4);
        for n in 0..4 {
            for (i, row) in a.iter().enumerate() {
                let (line, col) = if m == 16 { (g + 8 * (i & 1), 16 * (i >> 1)) } else { (g, 16 * i) };
                left[line][4 * t + n + col] = value(r.w[*row as usize][lane], n, signed.0);
            }
            for (i, row) in b.iter().enumerate() {
                right[4 * t + n + 16 * i][g] = value(r.w[*row as usize][lane], n, signed.1);
            }
        }
    }
    let sums: Vec<[u32; LANES]> = (0..c.len())
        .map(|i| {
            std::array::from_fn(|lane| {
                let (row, col) = (lane / 4 + 8 * (i >> 1), 2 * (lane % 4) + (i & 1));
                let start = i64::from(r.w[c[i] as usize][lane] as i32);
                let sum = start + (0..k).map(|j| left[row][j] * right[j][col]).sum::<i64>();
                let sum = if saturate { sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) } else { sum };
                sum as u32
            })
        })
        .collect();
    for (row, v) in d.iter().zip(sums) {
        r.w[*row as usize] = v;
    }
}

/// Double products. A: row `g`, column `t`; B: row `t`, column `g`; C and D: row `g`, columns `2 t` and `2 t + 1`.
fn doubles(r: &mut Regs, [d, a, b, c]: &[Vec<u16>; 4]) {
    let at = |row: u16, lane: usize| f64::from_bits(r.q[row as usize][lane]);
    let sums: [[u64; LANES]; 2] = std::array::from_fn(|i| {
        std::array::from_fn(|lane| {
            let (row, col) = (lane / 4, 2 * (lane % 4) + i);
            let sum = (0..4).fold(at(c[i], lane), |s, k| at(a[0], 4 * row + k).mul_add(at(b[0], 4 * col + k), s));
            sum.to_bits()
        })
    });
    for (row, v) in d.iter().zip(sums) {
        r.q[*row as usize] = v;
    }
}

fn print(cta: &Cta<'_>, r: &Regs, warp: usize, lane: usize, at: &[Address; 3]) -> Result<(), LaneFault> {
    let param = |n: usize| load(cta, warp, lane, at[n].space, at[n].lanes(r)[lane], 8);
    let (format, mut next) = (text(cta, warp, lane, param(1)?)?, param(2)?);
    // Arguments lie in a buffer as C promotes them: 4 or 8 bytes, aligned to their size.
    let out = printf::format(&format, |wanted| {
        let bytes = if wanted == Argument::Word { 4 } else { 8 };
        next = next.next_multiple_of(bytes);
        let x = load(cta, warp, lane, Space::Generic, next, bytes)?;
        next += bytes;
        if wanted == Argument::Text {
            return Ok((x, text(cta, warp, lane, x)?));
        }
        Ok((x, Vec::new()))
    })?;
    let out = out.map_err(|m| (lane, FaultKind::Trap, m))?;
    cta.output.print(&out.text);
    let (_, region, offset) = cta.lane_region(warp, lane, at[0].space, at[0].lanes(r)[lane], 4)?;
    region.store::<4>(offset, u64::from(out.arguments));
    Ok(())
}

impl Decoder<'_> {
    fn rare(op: Rare, class: Class) -> Inst {
        Self::blank(Act::Rare(Box::new(op)), class)
    }

    fn parameters<const N: usize>(&mut self, o: &[Operand]) -> Decoded<[Address; N]> {
        let list: Vec<Address> = o.iter().map(|o| self.address(o, Space::Local)).collect::<Decoded<_>>()?;
        list.try_into().map_err(|_| format!("expected {N} arguments"))
    }

    /// A call of a function that the runtime provides.
    pub(super) fn builtin(&mut self, name: &str, o: &[Operand]) -> Decoded<Inst> {
        Ok(match name {
            "vprintf" => Self::rare(Rare::Print(self.parameters(o)?), Class::Control),
            _ => Self::rare(Rare::Assert(self.parameters(o)?), Class::Control),
        })
    }

    pub(super) fn stmatrix(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 2)?;
        let n = match () {
            () if op.take("x1") => 1,
            () if op.take("x2") => 2,
            () if op.take("x4") => 4,
            () => return unknown(op),
        };
        let trans = op.take("trans");
        let at = space(op);
        op.mods.clear();
        let store = Rare::StoreMatrix { at: self.address(&o[0], at)?, rows: self.words(&o[1], n)?, trans };
        Ok(Self::rare(store, Class::Tensor))
    }

    pub(super) fn movmatrix(&mut self, op: &mut Op<'_>, o: &[Operand]) -> Decoded<Inst> {
        need(o, 2)?;
        op.mods.clear();
        let (d, a) = (self.dst(&o[0], Ty::B32)?, self.src(&o[1], Ty::B32)?);
        Ok(Self::rare(Rare::Transpose { d, a }, Class::Tensor))
    }

    /// `mma.sync` on bytes or doubles, once its types are taken.
    pub(super) fn mma_rare(&mut self, op: &mut Op<'_>, o: &[Operand], a: Ty, b: Ty) -> Decoded<Inst> {
        let shapes = [("m8n8k16", (8, 16)), ("m16n8k16", (16, 16)), ("m16n8k32", (16, 32)), ("m8n8k4", (8, 4))];
        let Some((_, (m, k))) = shapes.into_iter().find(|(n, _)| op.take(n)) else {
            return unknown(op);
        };
        let saturate = op.take("satfinite");
        op.mods.clear();
        if a == Ty::F64 {
            let mut list = |o: &Operand, n: usize| -> Decoded<Vec<u16>> {
                let list = self.list(o, Ty::F64)?;
                if list.len() != n || list.iter().any(|(f, row)| *f != File::Q || *row == NONE) {
                    return Err(format!("expected {n} 64-bit registers"));
                }
                Ok(list.into_iter().map(|(_, row)| row).collect())
            };
            let rows = [list(&o[0], 2)?, list(&o[1], 1)?, list(&o[2], 1)?, list(&o[3], 2)?];
            return Ok(Self::rare(Rare::Doubles(rows), Class::Tensor));
        }
        let (na, nb, nc) = (m * k / 128, k / 16, m / 4);
        let rows = [
            self.fragment(&o[0], nc, Ty::S32)?,
            self.words(&o[1], na)?,
            self.words(&o[2], nb)?,
            self.fragment(&o[3], nc, Ty::S32)?,
        ];
        let product = Rare::Bytes { shape: (m, k), signed: (a == Ty::S8, b == Ty::S8), saturate, rows };
        Ok(Self::rare(product, Class::Tensor))
    }
}
