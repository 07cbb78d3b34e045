//! Kernels of a training step against f64 references: product, attention, norm, cross-entropy, AdamW, rope, embedding.

#[path = "../benches/suite/mod.rs"]
mod suite;

use suite::Case;
use vgpu::Build;

fn check(case: Case) {
    case.run();
    case.check().unwrap_or_else(|e| panic!("{e}"));
}

/// Sizes that divide and sizes that do not, in both builds.
fn both(make: impl Fn(Build) -> Case) {
    check(make(Build::Portable));
    check(make(Build::detect()));
}

#[test]
fn gemm_matches_f64() {
    both(|b| suite::gemm(b, 128, 128, 64));
    both(|b| suite::gemm(b, 100, 72, 40));
    both(|b| suite::gemm(b, 1, 2, 8));
    both(|b| suite::gemm(b, 130, 258, 200));
}

#[test]
fn flash_attention_matches_f64() {
    both(|b| suite::flash(b, 64, 1, 1));
    both(|b| suite::flash(b, 150, 4, 2));
    both(|b| suite::flash(b, 33, 2, 2));
}

#[test]
fn rmsnorm_matches_f64() {
    both(|b| suite::rmsnorm(b, 7, 512, 128));
    both(|b| suite::rmsnorm(b, 3, 66, 256));
}

#[test]
fn cross_entropy_matches_f64() {
    both(|b| suite::cross_entropy(b, 14, 512));
    both(|b| suite::cross_entropy(b, 8, 331));
}

#[test]
fn adamw_matches_f64() {
    both(|b| suite::adamw(b, 4096));
    both(|b| suite::adamw(b, 1236));
}

#[test]
fn rope_matches_f64() {
    both(|b| suite::rope(b, 16, 2, 64));
    both(|b| suite::rope(b, 5, 3, 80));
}

#[test]
fn embedding_matches_exactly() {
    both(|b| suite::embedding(b, 40, 512));
    both(|b| suite::embedding(b, 3, 72));
}

#[test]
fn loops_match() {
    both(|b| suite::fma_loop(b, 2, 50));
    both(|b| suite::mma_loop(b, 10));
}

#[test]
fn launches_of_one_kernel_share_registers_safely() {
    // The same kernel again and again, with more and fewer host threads and other shapes in between.
    let mut case = suite::rmsnorm(Build::detect(), 40, 66, 256);
    for threads in [1, 3, 2, 1] {
        case.config.threads = threads;
        check_again(&case);
    }
    case.config.block = [64, 1, 1];
    check_again(&case);
    case.config.block = [512, 1, 1];
    check_again(&case);
}

fn check_again(case: &Case) {
    case.run();
    case.check().unwrap_or_else(|e| panic!("{e}"));
}
