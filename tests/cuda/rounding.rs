//! Products, projections and attention where the emulator adds as tensor cores do, in processes of their own: what is cut off is not what is
//! rounded. kernels/README.md has the contract.

use std::process::Command;

use crate::skip::device;

/// What is held in every mode: products of every tile and mix of types, fused projections, attention forward and backward, the head.
const HELD: [&str; 7] = [
    "matmul::every_tile_is_as_close_as_plain_arithmetic",
    "matmul::as_close_as_plain_arithmetic",
    "project::queries_and_keys_are_rotated_before_they_are_rounded",
    "project::gate_and_up_meet_before_they_are_rounded",
    "project::low_rank_updates_are_part_of_the_sums",
    "operations::attention_on_tensor_cores_follows_the_formula",
    "operations::loss_and_gradients_follow_the_formula",
];

/// Runs tests of this program in a child whose device rounds so and has this capability.
fn in_a_child(mode: &str, cc: &str, tests: &[&str]) {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(tests).arg("--exact").env("VGPU_MMA", mode).env("VGPU_CC", cc);
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "VGPU_MMA={mode} VGPU_CC={cc}: {text}");
    assert!(text.contains(&format!("{} passed", tests.len())), "{text}");
}

fn emulated() -> bool {
    device().is_some_and(|dev| dev.properties().emulated)
}

#[test]
fn sums_that_are_cut_off_as_on_ampere() {
    if emulated() {
        in_a_child("ampere", "8.0", &HELD);
    }
}

#[test]
fn sums_that_are_cut_off_as_on_hopper() {
    if emulated() {
        in_a_child("hopper", "8.0", &HELD[1..]);
        // Its own kernels.
        let own = ["hopper::every_tile_is_as_close_as_plain_arithmetic"];
        in_a_child("hopper", "9.0", &[&HELD[2..5], &own].concat());
    }
}
