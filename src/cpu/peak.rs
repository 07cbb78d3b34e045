//! What the arithmetic units reach without memory: independent multiply-adds in registers, the ceiling of every product of a level.
//!
//! The loops are written as instructions: a compiler would be free to keep sums in memory. Each thread gives its best of many short
//! bursts while the others run, so that a burst that was interrupted does not count.

use std::time::{Duration, Instant};

use super::level::Level;

/// Time of one measurement.
const TIME: Duration = Duration::from_millis(40);

/// Rounds of a burst: a fraction of a millisecond.
const ROUNDS: usize = 4096;

/// Multiply-adds in registers.
struct Loop {
    /// Runs so many rounds.
    run: unsafe fn(usize),
    /// Floating-point operations of a round.
    flop: f64,
}

/// Floating-point operations per second of `threads` threads on the units that products of this level use, of f32 or of bf16.
///
/// # Safety
/// The level's instructions are carried out here.
pub unsafe fn measure(level: Level, threads: usize, bf16: bool) -> f64 {
    let l = of(level, bf16);
    let best = || {
        let (begin, mut least) = (Instant::now(), f64::INFINITY);
        while least.is_infinite() || begin.elapsed() < TIME {
            let start = Instant::now();
            // SAFETY: the caller's promise.
            unsafe { (l.run)(ROUNDS) };
            least = least.min(start.elapsed().as_secs_f64());
        }
        l.flop * ROUNDS as f64 / least
    };
    std::thread::scope(|s| {
        let all: Vec<_> = (0..threads).map(|_| s.spawn(best)).collect();
        all.into_iter().map(|t| t.join().expect("a loop in registers does not fail")).sum()
    })
}

#[cfg(target_arch = "x86_64")]
fn of(level: Level, bf16: bool) -> Loop {
    match level {
        Level::Amx if bf16 => Loop { run: x86::tiles, flop: 4.0 * 2.0 * 16.0 * 16.0 * 32.0 },
        Level::Avx512Bf16 if bf16 => Loop { run: x86::dot_products, flop: 24.0 * 64.0 },
        Level::Avx512 | Level::Avx512Bf16 | Level::Amx => Loop { run: x86::wide, flop: 24.0 * 32.0 },
        Level::Avx2 => Loop { run: x86::half_wide, flop: 12.0 * 16.0 },
        Level::Portable | Level::Neon | Level::NeonBf16 => Loop { run: x86::two_operations, flop: 12.0 * 8.0 },
    }
}

#[cfg(target_arch = "aarch64")]
fn of(level: Level, bf16: bool) -> Loop {
    match level {
        Level::NeonBf16 if bf16 => Loop { run: aarch64::matrix_products, flop: 24.0 * 32.0 },
        Level::Neon | Level::NeonBf16 => Loop { run: aarch64::multiply_adds, flop: 24.0 * 8.0 },
        _ => Loop { run: aarch64::two_operations, flop: 24.0 * 4.0 },
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn of(_: Level, _: bool) -> Loop {
    /// # Safety
    /// None is needed.
    unsafe fn plain(rounds: usize) {
        let mut acc = [1.0f32; 64];
        for _ in 0..std::hint::black_box(rounds) {
            acc.iter_mut().for_each(|x| *x = x.mul_add(0.999, 1e-3));
        }
        std::hint::black_box(acc);
    }
    Loop { run: plain, flop: 128.0 }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;

    /// A loop of the instruction on each of the registers, from zeros: their values do not change how long it takes.
    macro_rules! registers {
        ($rounds:expr, $zero:literal, $step:literal, $($register:tt)+) => {
            // SAFETY: only the registers named are written, and the processor has the instructions.
            unsafe {
                asm!(
                    $(concat!($zero, " ", $register, ", ", $register, ", ", $register),)+
                    "2:",
                    $(concat!($step, " ", $register, ", ", $register, ", ", $register),)+
                    "dec {n}",
                    "jnz 2b",
                    n = inout(reg) $rounds => _,
                    $(out($register) _,)+
                    options(nomem, nostack)
                )
            }
        };
    }

    /// # Safety
    /// The processor has AVX-512, and `rounds` is not zero.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn wide(rounds: usize) {
        registers!(rounds, "vpxord", "vfmadd231ps",
            "zmm0" "zmm1" "zmm2" "zmm3" "zmm4" "zmm5" "zmm6" "zmm7" "zmm8" "zmm9" "zmm10" "zmm11"
            "zmm12" "zmm13" "zmm14" "zmm15" "zmm16" "zmm17" "zmm18" "zmm19" "zmm20" "zmm21" "zmm22" "zmm23");
    }

    /// # Safety
    /// The processor has AVX-512 with bf16, and `rounds` is not zero.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn dot_products(rounds: usize) {
        registers!(rounds, "vpxord", "vdpbf16ps",
            "zmm0" "zmm1" "zmm2" "zmm3" "zmm4" "zmm5" "zmm6" "zmm7" "zmm8" "zmm9" "zmm10" "zmm11"
            "zmm12" "zmm13" "zmm14" "zmm15" "zmm16" "zmm17" "zmm18" "zmm19" "zmm20" "zmm21" "zmm22" "zmm23");
    }

    /// # Safety
    /// The processor has AVX2 and fused multiply-add, and `rounds` is not zero.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn half_wide(rounds: usize) {
        registers!(rounds, "vxorps", "vfmadd231ps",
            "ymm0" "ymm1" "ymm2" "ymm3" "ymm4" "ymm5" "ymm6" "ymm7" "ymm8" "ymm9" "ymm10" "ymm11");
    }

    /// A product and a sum of four lanes each, as the portable kernel has them.
    ///
    /// # Safety
    /// `rounds` is not zero.
    pub unsafe fn two_operations(rounds: usize) {
        // SAFETY: only the registers named are written.
        unsafe {
            asm!(
                "xorps xmm0, xmm0", "xorps xmm1, xmm1", "xorps xmm2, xmm2", "xorps xmm3, xmm3",
                "xorps xmm4, xmm4", "xorps xmm5, xmm5", "xorps xmm6, xmm6", "xorps xmm7, xmm7",
                "xorps xmm8, xmm8", "xorps xmm9, xmm9", "xorps xmm10, xmm10", "xorps xmm11, xmm11",
                "2:",
                "mulps xmm0, xmm0", "addps xmm1, xmm1", "mulps xmm2, xmm2", "addps xmm3, xmm3",
                "mulps xmm4, xmm4", "addps xmm5, xmm5", "mulps xmm6, xmm6", "addps xmm7, xmm7",
                "mulps xmm8, xmm8", "addps xmm9, xmm9", "mulps xmm10, xmm10", "addps xmm11, xmm11",
                "mulps xmm0, xmm0", "addps xmm1, xmm1", "mulps xmm2, xmm2", "addps xmm3, xmm3",
                "mulps xmm4, xmm4", "addps xmm5, xmm5", "mulps xmm6, xmm6", "addps xmm7, xmm7",
                "mulps xmm8, xmm8", "addps xmm9, xmm9", "mulps xmm10, xmm10", "addps xmm11, xmm11",
                "dec {n}",
                "jnz 2b",
                n = inout(reg) rounds => _,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                options(nomem, nostack)
            );
        }
    }

    /// # Safety
    /// The processor has AMX tiles for bf16, the system grants them, and `rounds` is not zero.
    pub unsafe fn tiles(rounds: usize) {
        // SAFETY: the caller's promise; the guard configures the tiles that are named.
        unsafe {
            let _tiles = crate::cpu::kernels::amx::Configured::new();
            asm!(
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {n}",
                "jnz 2b",
                n = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nomem, nostack)
            );
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod aarch64 {
    use std::arch::asm;

    /// A loop of instructions on 24 registers, from zeros; `even` and `odd` are those of registers of even and odd number, which read `from`.
    macro_rules! registers {
        ($rounds:expr, $even:literal, $odd:literal, $from:literal, $of:literal, $($first:literal $second:literal)+) => {
            // SAFETY: only the registers named are written, and the processor has the instructions.
            unsafe {
                asm!(
                    $(concat!("movi v", $first, ".4s, #0"), concat!("movi v", $second, ".4s, #0"),)+
                    "movi v30.4s, #0",
                    "movi v31.4s, #0",
                    "2:",
                    $(
                        concat!($even, " v", $first, $of, ", v30", $from, ", v31", $from),
                        concat!($odd, " v", $second, $of, ", v30", $from, ", v31", $from),
                    )+
                    "subs {n}, {n}, #1",
                    "b.ne 2b",
                    n = inout(reg) $rounds => _,
                    out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
                    out("v8") _, out("v9") _, out("v10") _, out("v11") _, out("v12") _, out("v13") _, out("v14") _,
                    out("v15") _, out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _,
                    out("v22") _, out("v23") _, out("v30") _, out("v31") _,
                    options(nomem, nostack)
                )
            }
        };
        ($rounds:expr, $even:literal, $odd:literal, $from:literal, $of:literal) => {
            registers!($rounds, $even, $odd, $from, $of,
                "0" "1" "2" "3" "4" "5" "6" "7" "8" "9" "10" "11" "12" "13" "14" "15" "16" "17" "18" "19" "20" "21" "22" "23")
        };
    }

    /// # Safety
    /// `rounds` is not zero.
    pub unsafe fn multiply_adds(rounds: usize) {
        registers!(rounds, "fmla", "fmla", ".4s", ".4s");
    }

    /// # Safety
    /// The processor has bf16, and `rounds` is not zero.
    #[target_feature(enable = "neon,bf16")]
    pub unsafe fn matrix_products(rounds: usize) {
        registers!(rounds, "bfmmla", "bfmmla", ".8h", ".4s");
    }

    /// A product and a sum of four lanes each, as the portable kernel has them. No register waits for itself.
    ///
    /// # Safety
    /// `rounds` is not zero.
    pub unsafe fn two_operations(rounds: usize) {
        registers!(rounds, "fmul", "fadd", ".4s", ".4s");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::testing::{Support, levels};

    /// Wider units are faster, and none is so by more than the width allows: a loop that is cut short or runs in memory would show.
    #[test]
    fn peaks_grow_with_the_width_of_the_units() {
        let native: Vec<Level> = levels().into_iter().filter(|&l| Support::of(l) == Support::Native).collect();
        // SAFETY: the levels are supported.
        let peak = |l, bf16| unsafe { measure(l, 1, bf16) };
        for two in native.windows(2) {
            let (narrow, wide) = (peak(two[0], true), peak(two[1], true));
            assert!(wide > 0.7 * narrow && wide < 20.0 * narrow, "{two:?}: {narrow:.3e} {wide:.3e}");
        }
        let of = |l: &Level| (peak(*l, false), peak(*l, true));
        for (l, (f32_peak, bf16_peak)) in native.iter().map(|l| (l, of(l))) {
            // One core: between 1 and 10,000 GFLOP/s.
            assert!(
                (1e9..1e13).contains(&f32_peak) && bf16_peak > 0.5 * f32_peak,
                "{l:?}: {f32_peak:.3e} {bf16_peak:.3e}"
            );
        }
    }
}
