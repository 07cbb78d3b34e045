//! Norms on the device, held to what the CPU's are, in every mix of types.

use ringtune::tensor::DType;

use crate::norms::{self, SHAPES, Types};
use crate::skip::device;

#[test]
fn forward_and_backward_follow_the_formula() {
    let Some(dev) = device() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        norms::follow_the_formula(&dev, "cuda", Types::all(dtype), &SHAPES);
        // Groups of a whole block, by eights and one by one.
        norms::follow_the_formula(
            &dev,
            "cuda",
            Types::all(dtype),
            &[(37, 1032, 1032), (3, 1033, 1033), (18, 256, 128)],
        );
    }
}

#[test]
fn every_mix_of_types_follows_the_formula() {
    let Some(dev) = device() else { return };
    for t in Types::mixes() {
        norms::follow_the_formula(&dev, "cuda", t, &[(7, 33, 33), (40, 48, 16)]);
    }
}

#[test]
fn bits_do_not_depend_on_the_rows_around() {
    let Some(dev) = device() else { return };
    for c in [40, 136, 1032] {
        norms::bits_do_not_depend_on_the_rows_around(&dev, "cuda", c);
    }
}
