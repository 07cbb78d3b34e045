//! Products of bf16 on AMX tiles: blocks of C from packed panels.
//!
//! A tile register holds 16 rows of 64 bytes. `tdpbf16ps` adds to 16 x 16 sums the products of 16 rows of A, 32 steps of k each,
//! and 16 pairs of k by 16 columns of B. Four tiles hold 32 x 32 of C, two of A and two of B: four products on four loads.
//! Sums are f32; within 32 steps the even and the odd ones run apart and are then added; denormals count as zero.
//!
//! The panels of A hold whole tiles (`Unit::RowTile`), those of B are read 16 columns at a time from rows of 32 (`Unit::PairTile`).

use std::arch::asm;

use super::{Tile, store_sums};
use crate::cpu::buffer::Grow;
use crate::cpu::elementwise::piece;

/// Rows and columns of a block of C.
pub const SIDE: usize = 32;

/// Units of k in a tile: 16 pairs.
pub const UNITS: usize = 16;

/// Tiles of k after which the sums of a column of blocks pass through memory: so much of a panel of B (32 KiB) stays in the L1 cache
/// while all panels of A go by. Sums are f32 there and in the tiles, so that the cut changes no bit.
const DEPTH: usize = 16;

/// Panels of A at most in a block: their sums take 64 KiB.
pub const MOST_PANELS: usize = 16;

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight tiles of full size: short ones would want a configuration each, and to change it forgets the sums.
static FULL: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Tiles that are configured for this thread until it is dropped: a thread that leaves them behind pays at each switch.
pub struct Configured(());

impl Configured {
    /// # Safety
    /// The processor has tiles and the system grants them.
    pub unsafe fn new() -> Self {
        // SAFETY: 64 bytes of a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const FULL, options(nostack, readonly)) };
        Self(())
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: only where `new` configured them.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// A block of sums over `$depth` tiles of k, from zero or, where `$more`, from what stands in `$sum`: rows of 128 bytes. The lists are
/// the instructions for sums, loads and products of the halves that exist.
macro_rules! sums {
    ($depth:expr, $a:expr, $b:expr, $sum:expr, $more:expr, zero $zero:tt load $load:tt step $step:tt store $store:tt) => {{
        if $more {
            sums!(@asm $load $depth, $a, $b, $sum, $step, $store)
        } else {
            sums!(@asm $zero $depth, $a, $b, $sum, $step, $store)
        }
    }};
    (@asm [$($begin:literal)*] $depth:expr, $a:expr, $b:expr, $sum:expr, [$($step:literal)*], [$($store:literal)*]) => {
        asm!(
            $($begin,)*
            "2:",
            $($step,)*
            "add {a}, 2048",
            "add {b}, 2048",
            "dec {n}",
            "jnz 2b",
            $($store,)*
            a = inout(reg) $a => _,
            b = inout(reg) $b => _,
            n = inout(reg) $depth => _,
            c = in(reg) $sum,
            narrow = in(reg) 64usize,
            wide = in(reg) 128usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

/// `sum = or += A · B` over `depth` tiles of k for the halves of the block that exist.
///
/// # Safety
/// `a` and `b` point to `depth` pairs of tiles (2 KiB each), `sum` to 32 x 32 sums; tiles are configured; `depth > 0`.
unsafe fn multiply(depth: usize, a: *const u32, b: *const u32, sum: *mut f32, more: bool, high: bool, wide: bool) {
    // SAFETY: the caller's promise. The instructions read A and B and write the sums and the tiles named.
    unsafe {
        match (high, wide) {
            (true, true) => sums!(depth, a, b, sum, more,
            zero ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"]
            load [
                "tileloadd tmm0, [{c} + {wide}*1]" "tileloadd tmm1, [{c} + {wide}*1 + 64]"
                "tileloadd tmm2, [{c} + {wide}*1 + 2048]" "tileloadd tmm3, [{c} + {wide}*1 + 2112]"
            ]
            step [
                "tileloadd tmm4, [{a} + {narrow}*1]"
                "tileloadd tmm6, [{b} + {wide}*1]"
                "tdpbf16ps tmm0, tmm4, tmm6"
                "tileloadd tmm7, [{b} + {wide}*1 + 64]"
                "tdpbf16ps tmm1, tmm4, tmm7"
                "tileloadd tmm5, [{a} + {narrow}*1 + 1024]"
                "tdpbf16ps tmm2, tmm5, tmm6"
                "tdpbf16ps tmm3, tmm5, tmm7"
            ]
            store [
                "tilestored [{c} + {wide}*1], tmm0" "tilestored [{c} + {wide}*1 + 64], tmm1"
                "tilestored [{c} + {wide}*1 + 2048], tmm2" "tilestored [{c} + {wide}*1 + 2112], tmm3"
            ]),
            (true, false) => sums!(depth, a, b, sum, more,
                zero ["tilezero tmm0" "tilezero tmm2"]
                load ["tileloadd tmm0, [{c} + {wide}*1]" "tileloadd tmm2, [{c} + {wide}*1 + 2048]"]
                step [
                    "tileloadd tmm4, [{a} + {narrow}*1]"
                    "tileloadd tmm6, [{b} + {wide}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm5, [{a} + {narrow}*1 + 1024]"
                    "tdpbf16ps tmm2, tmm5, tmm6"
                ]
                store ["tilestored [{c} + {wide}*1], tmm0" "tilestored [{c} + {wide}*1 + 2048], tmm2"]),
            (false, true) => sums!(depth, a, b, sum, more,
                zero ["tilezero tmm0" "tilezero tmm1"]
                load ["tileloadd tmm0, [{c} + {wide}*1]" "tileloadd tmm1, [{c} + {wide}*1 + 64]"]
                step [
                    "tileloadd tmm4, [{a} + {narrow}*1]"
                    "tileloadd tmm6, [{b} + {wide}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                    "tileloadd tmm7, [{b} + {wide}*1 + 64]"
                    "tdpbf16ps tmm1, tmm4, tmm7"
                ]
                store ["tilestored [{c} + {wide}*1], tmm0" "tilestored [{c} + {wide}*1 + 64], tmm1"]),
            (false, false) => sums!(depth, a, b, sum, more,
                zero ["tilezero tmm0"]
                load ["tileloadd tmm0, [{c} + {wide}*1]"]
                step [
                    "tileloadd tmm4, [{a} + {narrow}*1]"
                    "tileloadd tmm6, [{b} + {wide}*1]"
                    "tdpbf16ps tmm0, tmm4, tmm6"
                ]
                store ["tilestored [{c} + {wide}*1], tmm0"]),
        }
    }
}

thread_local! {
    /// Sums of the block that a thread computes.
    static SUMS: std::cell::RefCell<Grow> = std::cell::RefCell::new(Grow::default());
}

/// `tile = or += alpha · A · B` from panels of `units` units, at most [`MOST_PANELS`] of A, on this thread.
///
/// A finished block of sums leaves its buffer while the next one is multiplied: tiles and vectors work side by side.
///
/// # Safety
/// `a` and `b` hold the panels that the tile's rows and columns need, the tile's elements may be read and written, and the processor
/// has tiles, which the system grants.
pub unsafe fn block(a: &[u32], b: &[u32], units: usize, tile: Tile) {
    let (panels, depth) = (tile.rows.div_ceil(SIDE), units / UNITS);
    assert!(units.is_multiple_of(UNITS) && panels <= MOST_PANELS, "{units} units, {panels} panels");
    // SAFETY: the caller's promise.
    let _tiles = unsafe { Configured::new() };
    SUMS.with_borrow_mut(|sums| {
        let sums = sums.elems::<f32>(panels * SIDE * SIDE);
        // The block of sums that waits to be stored.
        let mut waiting: Option<(usize, Tile)> = None;
        for j in 0..tile.cols.div_ceil(SIDE) {
            let b = piece(b, j, SIDE * units);
            let starts = (0..depth.max(1)).step_by(DEPTH);
            for (first, last) in starts.map(|first| (first, first + DEPTH >= depth)) {
                let deep = DEPTH.min(depth - first);
                for i in 0..panels {
                    let a = &piece(a, i, SIDE * units)[first * UNITS * SIDE..];
                    let sum = &mut sums[i * SIDE * SIDE..(i + 1) * SIDE * SIDE];
                    // SAFETY: block (i, j) lies inside the tile.
                    let part = unsafe { tile.part(i * SIDE, j * SIDE, SIDE, SIDE) };
                    if waiting.is_some_and(|(at, _)| at == i) {
                        store_waiting(&mut waiting, sum);
                    }
                    if deep == 0 {
                        sum.fill(0.0);
                    } else {
                        if last {
                            part.ask();
                        }
                        let (a, b) = (a.as_ptr(), b[first * UNITS * SIDE..].as_ptr());
                        // SAFETY: both panels have `deep` more tiles from here, and the buffer 32 x 32 sums.
                        unsafe {
                            multiply(deep, a, b, sum.as_mut_ptr(), first > 0, part.rows > UNITS, part.cols > UNITS);
                        }
                    }
                    if last {
                        if let Some((at, _)) = waiting {
                            store_waiting(&mut waiting, &sums[at * SIDE * SIDE..(at + 1) * SIDE * SIDE]);
                        }
                        waiting = Some((i, part));
                    }
                }
            }
        }
        if let Some((at, _)) = waiting {
            store_waiting(&mut waiting, &sums[at * SIDE * SIDE..(at + 1) * SIDE * SIDE]);
        }
    });
}

/// Stores the block of sums that waits.
fn store_waiting(waiting: &mut Option<(usize, Tile)>, sum: &[f32]) {
    if let Some((_, tile)) = waiting.take() {
        // SAFETY: `block` was promised the tile, and that the processor has its level.
        unsafe { store_sums(sum, SIDE, tile) };
    }
}
