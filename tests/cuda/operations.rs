//! Every operation but products and norms on the device, held to what the CPU's are; then all of them at once where races are looked
//! for, and under several orders of blocks, warps and streams.

use std::process::Command;

use ringtune::backend::{Backend, MatMul, Write};
use ringtune::cuda::Cuda;
use ringtune::tensor::{DType, Device};

use crate::attention::{self, Case, NAMES};
use crate::close::{normal, rounded, tensor, values};
use crate::head::{self, How};
use crate::reference::Reference;
use crate::skip::device;
use crate::{elementwise, norms, odd, optimiser, rows};

const NAME: &str = "cuda";

#[test]
fn copies_casts_and_sums_round_once() {
    let Some(dev) = device() else { return };
    // Whole vectors, and more rows than one strip of a sum over columns.
    let shapes = [&elementwise::SHAPES[..], &[(3, 2056), (1030, 16)]].concat();
    elementwise::copies_casts_and_sums_round_once(&dev, NAME, &shapes);
}

#[test]
fn rope_turns_pairs_and_turns_them_back() {
    let Some(dev) = device() else { return };
    elementwise::rope_turns_pairs_and_turns_them_back(&dev, NAME);
}

#[test]
fn swiglu_and_its_gradient() {
    let Some(dev) = device() else { return };
    elementwise::swiglu_and_its_gradient(&dev, NAME, &[(1, 1), (7, 33), (5, 1000)]);
}

#[test]
fn dropout_draws_what_its_definition_says() {
    let Some(dev) = device() else { return };
    elementwise::dropout_draws_what_its_definition_says(&dev, NAME, &[(1, 3), (40, 1000), (3, 33), (1, 2051)]);
}

#[test]
fn gather_scatter_and_embedding_gradient() {
    let Some(dev) = device() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        for c in [33, 40, 2] {
            rows::gather_scatter_and_embedding_gradient(&dev, NAME, dtype, c);
        }
    }
    rows::gather_scatter_and_embedding_gradient(&dev, NAME, DType::Bf16, 300);
    rows::the_embedding_gradient_is_summed_in_order(&dev, NAME);
}

#[test]
fn attention_follows_the_formula() {
    let Some(dev) = device() else { return };
    for (i, shape) in attention::SHAPES.into_iter().enumerate() {
        attention::follows_the_formula(&dev, NAME, shape, i % 2 == 1, [1.0; 2]);
    }
    // Every layout of heads, a width that is no multiple of 8, and scores of some hundreds.
    let shapes: [attention::Shape<'_>; 4] = [
        (&[35, 7], (2, 1, 64), Some(20)),
        (&[5, 34], (2, 2, 96), None),
        (&[9, 1], (1, 1, 256), None),
        (&[40], (2, 1, 18), None),
    ];
    for shape in shapes {
        attention::follows_the_formula(&dev, NAME, shape, true, [1.0; 2]);
    }
    // The rounding of lse, which grows with it, is what algorithm 2 pays in f32.
    attention::follows_the_formula(&dev, NAME, (&[33, 7], (2, 1, 16), None), false, [3.0, 100.0]);
}

#[test]
fn a_document_is_the_same_bits_alone_and_packed() {
    let Some(dev) = device() else { return };
    attention::a_document_is_the_same_bits_alone_and_packed(&dev, NAME, &[37, 70, 1, 20], None);
    attention::a_document_is_the_same_bits_alone_and_packed(&dev, NAME, &[5, 70, 1, 2], Some(33));
}

/// Every width that tensor cores take, groups of 1, 2, 4 and 8 heads, documents of one token and of several tiles, windows narrower and
/// wider than a tile, and scores of some hundreds.
#[test]
fn attention_on_tensor_cores_follows_the_formula() {
    let Some(dev) = device() else { return };
    // Documents of whole tiles and a row among them.
    let shapes: [(attention::Shape<'_>, f32); 7] = [
        ((&[1, 7, 33, 130], (8, 1, 32), None), 1.0),
        ((&[129, 7], (2, 2, 64), Some(5)), 1.0),
        ((&[200, 33], (2, 1, 64), Some(100)), 1.0),
        ((&[65, 130], (4, 2, 80), Some(70)), 1.0),
        ((&[130, 1], (4, 1, 96), Some(2)), 1.0),
        ((&[7, 270], (2, 2, 128), Some(129)), 1.0),
        ((&[33, 70], (2, 1, 64), None), 100.0),
    ];
    for (i, (shape, factor)) in shapes.into_iter().enumerate() {
        attention::follows_the_formula_in(DType::Bf16, &dev, NAME, shape, i % 2 == 1, factor);
    }
    // One token alone: the output is its value, and nothing it is scored by matters.
    let case = Case::new((&[1], (2, 1, 64), None), DType::Bf16, false);
    let inputs = case.inputs(7).map(|x| x.iter().map(|&x| rounded(DType::Bf16, x.into()) as f32).collect::<Vec<_>>());
    let [out, _, dq, dk, dv] = case.run(&dev, &inputs);
    let [_, _, v, dout] = &inputs;
    assert_eq!(out, [&v[..], v].concat());
    let both: Vec<f32> = (0..64).map(|d| rounded(DType::Bf16, (dout[d] + dout[64 + d]).into()) as f32).collect();
    assert_eq!(dv, both);
    assert!(dq.iter().chain(&dk).all(|x| x.abs() < 1e-5), "{dq:?} {dk:?}");
}

#[test]
fn attention_on_tensor_cores_gives_a_document_the_same_bits_alone_and_packed() {
    let Some(dev) = device() else { return };
    for (lengths, heads, window) in [
        ([37, 150, 1, 20], (2, 1, 64), None),
        ([5, 70, 140, 2], (2, 2, 80), Some(33)),
        ([1, 130, 7, 3], (2, 1, 128), None),
    ] {
        attention::a_document_is_the_same_bits_alone_and_packed_in(DType::Bf16, &dev, NAME, &lengths, heads, window);
    }
}

/// A token in the middle of a block, some of whose queries and keys may not see it; with windows, on both sides; the first and the last of a
/// document, of a block and of a tile.
#[test]
fn what_is_not_finite_reaches_who_sees_it_alone() {
    let Some(dev) = device() else { return };
    let full = std::env::var("RINGTUNE_FULL").is_ok_and(|v| v == "1");
    let shapes: [(attention::Shape<'_>, &[usize]); 5] = [
        ((&[130, 70], (2, 1, 64), None), &[100, 130, 199, 0, 63, 64, 127, 128, 129, 193]),
        ((&[3, 270], (2, 2, 128), Some(33)), &[140, 3, 2, 67, 130, 131, 272]),
        ((&[200], (2, 1, 80), Some(100)), &[5, 199, 64]),
        // Seen by some queries of a tile, and by all of its first ones.
        ((&[200], (1, 1, 64), Some(129)), &[20, 199, 64]),
        ((&[20, 41], (4, 2, 16), Some(9)), &[30, 20, 19]),
    ];
    for (shape, tokens) in shapes {
        let tokens = if full { tokens } else { &tokens[..1] };
        attention::what_is_not_finite_reaches_who_sees_it_alone(&dev, NAME, DType::Bf16, shape, tokens);
    }
    let shape = (&[20, 41][..], (4, 2, 16), None);
    attention::what_is_not_finite_reaches_who_sees_it_alone(&dev, NAME, DType::F32, shape, &[30]);
}

#[test]
fn what_is_not_finite_stays_in_its_place() {
    let Some(dev) = device() else { return };
    odd::what_is_not_finite_stays_in_its_place(&dev, &Reference, NAME);
}

#[test]
fn decoding_a_token_is_the_last_row_of_forward() {
    let Some(dev) = device() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        // Fewer keys than warps, some, and several rounds of all warps.
        for (lens, heads, window) in
            [([1, 20, 33], (4, 2, 16), None), ([1, 150, 260], (2, 1, 24), None), ([3, 140, 64], (2, 2, 10), Some(40))]
        {
            attention::decoding_a_token_is_the_last_row_of_forward(&dev, NAME, dtype, lens, heads, window);
        }
    }
}

/// One key, a part of a cache and its borders, several; groups of one, three, seven and more than a tile of query heads; windows that begin
/// within a part and leave whole ones out.
#[test]
fn decoding_follows_the_formula() {
    let Some(dev) = device() else { return };
    let shapes: [attention::Shape<'_>; 6] = [
        (&[1, 127, 128, 129, 300], (3, 1, 64), None),
        (&[1, 2, 5], (2, 2, 128), None),
        (&[257, 31], (20, 1, 32), None),
        (&[400, 130, 20], (14, 2, 80), Some(140)),
        (&[385, 64], (4, 2, 96), Some(129)),
        (&[40, 300], (4, 2, 10), Some(50)),
    ];
    for shape in shapes {
        attention::decoding_follows_the_formula(&dev, NAME, DType::Bf16, shape);
    }
    attention::decoding_follows_the_formula(&dev, NAME, DType::F32, shapes[4]);
    for (dtype, shape) in [(DType::Bf16, shapes[0]), (DType::Bf16, shapes[3]), (DType::F32, shapes[5])] {
        let long = shape.0.iter().copied().max().unwrap();
        attention::infinite_values_are_what_sums_make_of_them(&dev, NAME, dtype, (&[long], shape.1, shape.2));
    }
}

#[test]
fn loss_and_gradients_follow_the_formula() {
    let Some(dev) = device() else { return };
    for factor in [1.0, 30.0] {
        head::loss_and_gradients_follow_the_formula(&dev, NAME, &head::SHAPES, factor);
    }
    // Aligned rows of logits, and more classes than threads.
    head::loss_and_gradients_follow_the_formula(&dev, NAME, &[(20, 64, 16), (5, 600, 24)], 1.0);
}

#[test]
fn ties_go_to_the_lowest_class_and_nan_stays_visible() {
    let Some(dev) = device() else { return };
    head::ties_go_to_the_lowest_class_and_nan_stays_visible(&dev, NAME);
}

#[test]
fn the_head_gives_a_row_the_same_bits_in_every_chunk() {
    let Some(dev) = device() else { return };
    // The rows of a second chunk among them.
    let most = ringtune::cuda::cross_entropy::chunk_rows(9);
    head::bits_do_not_depend_on_the_rows_around(&dev, NAME, most + most / 2, 9);
    let (x, w) = (normal(1, 4 * 8), normal(2, 5 * 8));
    let none = [ringtune::batch::IGNORE; 4];
    let how = How { n_classes: 5, scale: 1.0, first_row: 0 };
    let [loss, correct, dx, dw] = head::run(&dev, DType::F32, &x, &w, &none, how, 5);
    assert_eq!((loss, correct, dx, dw), (vec![0.0; 4], vec![0.0; 4], vec![0.0; 32], vec![0.5; 40]));
}

#[test]
fn adamw_updates_the_rows_it_is_given() {
    let Some(dev) = device() else { return };
    // The last has more than one block to a tensor.
    optimiser::adamw_updates_the_rows_it_is_given(&dev, NAME, &[(1, 1, 0), (5, 33, 2), (70, 129, 0), (9, 2051, 1)]);
}

#[test]
fn figures_and_what_is_not_finite() {
    let Some(dev) = device() else { return };
    optimiser::figures_are_sums_in_f64(&dev, NAME);
    optimiser::nothing_is_updated_where_the_figures_are_not_finite(&dev, NAME);
}

/// A bit pattern of everything that small shapes give.
fn digest(dev: &Cuda) -> u64 {
    let mut all: Vec<f32> = Vec::new();
    elementwise::copies_casts_and_sums_round_once(dev, NAME, &[(7, 33)]);
    elementwise::swiglu_and_its_gradient(dev, NAME, &[(7, 33)]);
    elementwise::dropout_draws_what_its_definition_says(dev, NAME, &[(7, 33)]);
    rows::gather_scatter_and_embedding_gradient(dev, NAME, DType::Bf16, 8);
    attention::decoding_a_token_is_the_last_row_of_forward(dev, NAME, DType::Bf16, [1, 20, 140], (2, 1, 8), Some(100));
    all.extend(attention::Caches::new((&[1, 300], (3, 1, 32), Some(200)), DType::Bf16).run(dev, &[0, 1], 301).concat());
    optimiser::adamw_updates_the_rows_it_is_given(dev, NAME, &[(5, 33, 2)]);
    let tiles: [attention::Shape<'_>; 2] = [(&[1, 140, 7], (2, 1, 32), None), (&[70, 9], (1, 1, 80), Some(20))];
    for shape in tiles {
        let case = Case::new(shape, DType::Bf16, true);
        all.extend(case.run(dev, &case.inputs(3)).concat());
    }
    for case in crate::project::SMALL {
        all.extend(case.run(dev).into_iter().flat_map(|(_, _, values)| values));
    }
    for dtype in [DType::F32, DType::Bf16] {
        let case = Case::new((&[1, 7, 33], (4, 2, 16), Some(20)), dtype, true);
        assert_eq!(NAMES.len(), 5);
        all.extend(case.run(dev, &case.inputs(3)).concat());
        let how = How { n_classes: 50, scale: 0.25, first_row: 0 };
        let targets: Vec<i32> = (0..7).map(|i| if i == 2 { ringtune::batch::IGNORE } else { i * 5 }).collect();
        all.extend(head::run(dev, dtype, &normal(1, 7 * 24), &normal(2, 50 * 24), &targets, how, 50).concat());
        let inputs = [normal(7, 5 * 40), normal(8, 40), normal(9, 5 * 40)];
        all.extend(norms::run(dev, norms::Types::all(dtype), (5, 40), &inputs, Write::Set, 0.0).concat());
        let (a, b) = (tensor(dev, 70, 40, dtype, &normal(4, 2800)), tensor(dev, 33, 40, dtype, &normal(5, 1320)));
        let mut c = dev.alloc(70, 33, dtype).unwrap();
        dev.matmul(&mut c, &a, &b, MatMul::NT, 1.0, Write::Set).unwrap();
        all.extend(values(dev, &c));
    }
    all.iter().fold(0xcbf2_9ce4_8422_2325, |h, x| (h ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3))
}

/// What [`races_and_orders`] starts: prints the digest.
#[test]
fn small_shapes_of_everything() {
    let Some(dev) = device() else { return };
    println!("digest {:016x}", digest(&dev));
}

/// No block races with another, no warp with another of its block, and neither their order nor the architecture's tiles change a bit. A
/// real GPU has one order, so there is nothing to ask it.
#[test]
fn races_and_orders() {
    let Some(dev) = device() else { return };
    if !dev.properties().emulated {
        return;
    }
    let run = |seed: &str, checks: &str, cc: &str| {
        let mut test = Command::new(std::env::current_exe().unwrap());
        test.args(["--exact", "operations::small_shapes_of_everything", "--nocapture"]);
        test.env("VGPU_SEED", seed).env("VGPU_CHECK", checks).env("VGPU_CC", cc);
        let output = test.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "seed {seed}: {text}\n{}", String::from_utf8_lossy(&output.stderr));
        let line = text.lines().find_map(|l| l.split("digest ").nth(1)).expect("a line with the digest");
        line[..16].to_string()
    };
    let first = run("0", "races", "8.0");
    for seed in ["1", "2", "3"] {
        assert_eq!(run(seed, "", "8.0"), first, "seed {seed}");
    }
    // Other tiles and warps of products and attention.
    assert_eq!(run("0", "races", "8.9"), first, "another architecture");
}
