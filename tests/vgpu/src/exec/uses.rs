//! Which rows each instruction of a kernel reads and writes, and which of them anybody still reads where a stretch begins.

use super::File;
use super::decode::{file_of, operands_of};
use super::marks::Place;
use crate::ptx::{Function, Ty};

/// Places of the ones of a word.
fn ones_of(mut bits: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let at = (bits != 0).then(|| bits.trailing_zeros());
        bits &= bits.wrapping_sub(1);
        at
    })
}

/// The rows of one instruction, without its guard.
pub struct Rows {
    /// Rows read.
    pub uses: Box<[Place]>,
    /// Rows written.
    pub defs: Box<[Place]>,
    /// Whether it is a shuffle.
    pub shuffles: bool,
}

/// The rows of all instructions.
pub struct Registers {
    /// By position.
    pub at: Vec<Rows>,
    /// Positions at which stretches begin, in order.
    starts: Vec<u32>,
    /// For each of them one bit per row, file after file.
    live: Vec<u64>,
    /// Rows of each file.
    rows: [usize; 3],
}

impl Registers {
    /// Reads the rows off the operands. `row_of` gives the row of each register, `live` the registers whose value is read from each
    /// position on, `carry` the row of the carry bits, `ends` the end of the stretch of each position.
    pub(super) fn new(
        f: &Function,
        row_of: &[usize],
        rows: [usize; 3],
        carry: Option<u16>,
        live: &[Vec<u64>],
        ends: &[u32],
    ) -> Registers {
        let place = |r: &u32| {
            let ty = f.regs[*r as usize];
            (ty != Ty::B128).then(|| (file_of(ty), row_of[*r as usize] as u16))
        };
        let carried = carry.map(|row| (File::P, row));
        let at = f.body.iter().map(|i| {
            let (defs, uses) = operands_of(i);
            let mut defs: Vec<Place> = defs.iter().filter_map(place).collect();
            let mut uses: Vec<Place> = uses.iter().filter_map(place).collect();
            let mut parts = i.opcode.split('.');
            let base = parts.next().unwrap_or("");
            if matches!(base, "addc" | "subc" | "madc") {
                uses.extend(carried);
            }
            if parts.any(|m| m == "cc") {
                defs.extend(carried);
            }
            Rows { uses: uses.into(), defs: defs.into(), shuffles: base == "shfl" }
        });
        let mut registers = Registers { at: at.collect(), starts: Vec::new(), live: Vec::new(), rows };
        let words = registers.words();
        for n in 0..f.body.len() {
            if n > 0 && ends[n - 1] == ends[n] {
                continue;
            }
            registers.starts.push(n as u32);
            let first = registers.live.len();
            registers.live.resize(first + words, 0);
            let alive = live[n].iter().enumerate().flat_map(|(w, bits)| ones_of(*bits).map(move |b| w as u32 * 64 + b));
            for p in alive.filter_map(|r| place(&r)).chain(carried) {
                let bit = registers.bit(p);
                registers.live[first + bit / 64] |= 1 << (bit % 64);
            }
        }
        registers
    }

    fn words(&self) -> usize {
        self.rows.iter().sum::<usize>().div_ceil(64)
    }

    fn bit(&self, (file, row): Place) -> usize {
        self.rows[..file as usize].iter().sum::<usize>() + row as usize
    }

    /// If a stretch begins at a position: whether the value of a row is read from there on.
    pub fn live(&self, pc: usize) -> Option<impl Fn(Place) -> bool + '_> {
        let n = self.starts.binary_search(&(pc as u32)).ok()?;
        let words = &self.live[n * self.words()..][..self.words()];
        Some(move |p| {
            let bit = self.bit(p);
            words.get(bit / 64).is_some_and(|w| w >> (bit % 64) & 1 == 1)
        })
    }
}
