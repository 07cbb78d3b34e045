//! What the arithmetic units reach without memory: independent multiply-adds in registers, the ceiling of every product.

use std::hint::black_box;
use std::time::Instant;

/// Rounds of a measurement: some milliseconds.
const ROUNDS: usize = 1_000_000;

/// Floating-point operations per second of `threads` threads: of f32, and of bf16 pairs where there are such instructions.
pub fn measure(threads: usize) -> (f64, f64) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has the features.
        let f32_peak = best(threads, |n| unsafe { registers::f32_loop(n) }, 24.0 * 32.0);
        if is_x86_feature_detected!("avx512bf16") {
            // SAFETY: the processor has the features.
            return (f32_peak, best(threads, |n| unsafe { registers::bf16_loop(n) }, 24.0 * 64.0));
        }
        return (f32_peak, f32_peak);
    }
    let plain = |n| {
        let mut acc = [1.0f32; 64];
        for _ in 0..n {
            acc.iter_mut().for_each(|x| *x = *x * 0.999 + 1e-3);
        }
        acc.iter().sum()
    };
    let plain = best(threads, plain, 128.0);
    (plain, plain)
}

/// The best of three runs of a loop with so many operations a round.
fn best(threads: usize, run: fn(usize) -> f32, flop: f64) -> f64 {
    let run_all = |_| {
        let start = Instant::now();
        std::thread::scope(|s| {
            for _ in 0..threads {
                s.spawn(move || black_box(run(ROUNDS)));
            }
        });
        start.elapsed().as_secs_f64()
    };
    let least = (0..3).map(run_all).fold(f64::INFINITY, f64::min);
    threads as f64 * flop * ROUNDS as f64 / least
}

#[cfg(target_arch = "x86_64")]
mod registers {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_reduce_add_ps, _mm512_set1_epi32, _mm512_set1_ps,
    };
    use std::hint::black_box;

    #[target_feature(enable = "avx512f")]
    pub fn f32_loop(rounds: usize) -> f32 {
        let (x, y) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-3)));
        let mut acc = [_mm512_set1_ps(1.0); 24];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = _mm512_fmadd_ps(*v, x, y);
            }
        }
        acc.into_iter().map(|v| _mm512_reduce_add_ps(v)).sum()
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16_loop(rounds: usize) -> f32 {
        // SAFETY: only the type of a 64-byte vector changes.
        let x = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(black_box(0x3c00_3c00))) };
        let mut acc = [_mm512_set1_ps(1.0); 24];
        for _ in 0..rounds {
            for v in &mut acc {
                *v = _mm512_dpbf16_ps(*v, x, x);
            }
        }
        acc.into_iter().map(|v| _mm512_reduce_add_ps(v)).sum()
    }
}
