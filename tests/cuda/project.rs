//! Projections of groups on the device, fused where its kernels take them, against f64 and the CPU's, which are composed.

use ringtune::cpu::Cpu;
use ringtune::cuda::matmul_sm90::CC;
use ringtune::cuda::tiles::Tile;
use ringtune::tensor::DType;

use crate::close::assert_same;
use crate::projections::{Case, Group, Updates};
use crate::reference::Reference;
use crate::skip::{device, sums};

const NAME: &str = "cuda";

const BASE: Case = Case {
    group: Group::One { residual: false },
    tokens: 1,
    width: 8,
    outs: [8; 3],
    bias: false,
    updates: None,
    dtype: DType::Bf16,
};

/// One of each kind, for the search for races and the comparison of orders.
pub const SMALL: [Case; 6] = [
    Case { tokens: 70, width: 72, outs: [40, 0, 0], bias: true, group: Group::One { residual: true }, ..BASE },
    Case { tokens: 70, width: 72, outs: [128, 64, 64], group: Group::Qkv { dim: Some(64) }, ..BASE },
    Case { tokens: 70, width: 72, outs: [40, 40, 0], group: Group::GateUp, ..BASE },
    Case { tokens: 70, width: 72, outs: [64, 32, 32], group: Group::Qkv { dim: Some(32) }, updates: DROPPED, ..BASE },
    Case { tokens: 70, width: 72, outs: [40, 40, 0], group: Group::GateUp, updates: DROPPED, ..BASE },
    // Sums of several blocks.
    Case { tokens: 530, width: 16, outs: [520, 0, 0], updates: DROPPED, ..BASE },
];

const UPDATES: Updates = Updates { rank: 16, dropout: 0.0, which: [true; 3], apart: 0.0 };
const DROPPED: Option<Updates> = Some(Updates { dropout: 0.2, ..UPDATES });

fn check(cases: &[Case]) {
    let Some(dev) = device() else { return };
    let cpu = Cpu::new(Some(2)).unwrap();
    for case in cases {
        case.follows_the_formula(&dev, &cpu, &Reference, NAME, sums(&dev));
    }
}

/// One token, rows that fill no tile, steps of k that are not whole tiles; then what is composed: f32, and widths of odd numbers.
#[test]
fn a_projection_adds_bias_and_residual_before_its_one_rounding() {
    let one = |residual| Group::One { residual };
    check(&[
        BASE,
        Case { tokens: 70, width: 72, outs: [136, 0, 0], group: one(true), ..BASE },
        Case { tokens: 5, width: 200, outs: [40, 0, 0], bias: true, ..BASE },
        Case { tokens: 130, width: 64, outs: [264, 0, 0], bias: true, group: one(true), ..BASE },
        Case { tokens: 9, width: 33, outs: [17, 0, 0], bias: true, group: one(true), ..BASE },
        Case { tokens: 9, width: 16, outs: [24, 0, 0], bias: true, group: one(true), dtype: DType::F32, ..BASE },
    ]);
}

/// Grouped queries, heads that fill a tile in whole numbers and others, no rotation where norms stand between; biases are rotated too.
#[test]
fn queries_and_keys_are_rotated_before_they_are_rounded() {
    let qkv = |dim| Group::Qkv { dim };
    check(&[
        Case { tokens: 70, width: 72, outs: [128, 64, 64], group: qkv(Some(64)), bias: true, ..BASE },
        Case { tokens: 1, width: 64, outs: [256, 128, 128], group: qkv(Some(128)), ..BASE },
        Case { tokens: 5, width: 136, outs: [240, 80, 80], group: qkv(Some(80)), bias: true, ..BASE },
        Case { tokens: 33, width: 40, outs: [96, 32, 32], group: qkv(Some(32)), ..BASE },
        Case { tokens: 66, width: 128, outs: [128, 64, 64], group: qkv(None), ..BASE },
        // Halves of 4 elements are rotated by an operation of their own.
        Case { tokens: 9, width: 16, outs: [24, 8, 8], group: qkv(Some(8)), bias: true, ..BASE },
        Case { tokens: 9, width: 16, outs: [24, 8, 8], group: qkv(Some(8)), dtype: DType::F32, ..BASE },
    ]);
}

#[test]
fn gate_and_up_meet_before_they_are_rounded() {
    let case = Case { group: Group::GateUp, ..BASE };
    check(&[
        Case { tokens: 70, width: 72, outs: [136, 136, 0], ..case },
        Case { tokens: 1, width: 64, outs: [24, 24, 0], bias: true, ..case },
        Case { tokens: 9, width: 16, outs: [24, 24, 0], dtype: DType::F32, ..case },
    ]);
}

/// Every rank that a block takes whole, in parts and filled up, one that is composed; with and without dropout; some of a group alone;
/// more rows than a strip and more columns than a chunk.
#[test]
fn low_rank_updates_are_part_of_the_sums() {
    let (one, qkv) = (Group::One { residual: true }, |dim| Group::Qkv { dim });
    let updates = |rank, dropout, which| Some(Updates { rank, dropout, which, apart: 0.0 });
    let all = [true; 3];
    check(&[
        Case { updates: updates(8, 0.0, all), ..BASE },
        // What the kernels take alone and not together: k and v of a width that is no multiple of 8, updates of other factors.
        Case { tokens: 70, width: 72, outs: [16, 4, 4], group: qkv(Some(4)), updates: updates(16, 0.1, all), ..BASE },
        Case { outs: [64, 32, 32], group: qkv(None), updates: Some(Updates { apart: 0.5, ..UPDATES }), ..BASE },
        Case { tokens: 70, width: 72, outs: [136, 0, 0], group: one, updates: updates(16, 0.0, all), ..BASE },
        Case {
            tokens: 530,
            width: 72,
            outs: [40, 0, 0],
            group: one,
            bias: true,
            updates: updates(24, 0.1, all),
            ..BASE
        },
        Case { tokens: 33, width: 136, outs: [552, 0, 0], group: one, updates: updates(64, 0.3, all), ..BASE },
        Case { tokens: 9, width: 40, outs: [24, 0, 0], updates: updates(88, 0.1, all), ..BASE },
        Case { tokens: 70, width: 136, outs: [72, 0, 0], updates: updates(200, 0.2, all), ..BASE },
        Case {
            tokens: 140,
            width: 200,
            outs: [64, 32, 32],
            group: qkv(Some(32)),
            updates: updates(128, 0.1, [true, false, true]),
            ..BASE
        },
        Case { tokens: 5, width: 40, outs: [24, 0, 0], updates: updates(264, 0.1, all), ..BASE },
        // More than all buffers of Hopper's kernels hold.
        Case { tokens: 5, width: 40, outs: [24, 0, 0], updates: updates(520, 0.1, all), ..BASE },
        Case { tokens: 9, width: 40, outs: [24, 0, 0], updates: updates(4, 0.1, all), ..BASE },
        Case {
            tokens: 70,
            width: 72,
            outs: [128, 64, 64],
            group: qkv(Some(64)),
            updates: updates(8, 0.1, all),
            ..BASE
        },
        Case { tokens: 1, width: 64, outs: [64, 32, 32], group: qkv(None), updates: updates(16, 0.5, all), ..BASE },
        Case {
            tokens: 40,
            width: 200,
            outs: [96, 32, 32],
            group: qkv(Some(32)),
            updates: updates(32, 0.2, [false, true, true]),
            ..BASE
        },
        Case {
            tokens: 40,
            width: 72,
            outs: [64, 64, 64],
            group: qkv(Some(64)),
            updates: updates(16, 0.2, [true, false, true]),
            ..BASE
        },
        Case {
            tokens: 70,
            width: 72,
            outs: [136, 136, 0],
            group: Group::GateUp,
            updates: updates(16, 0.1, all),
            ..BASE
        },
        Case { tokens: 5, width: 40, outs: [72, 72, 0], group: Group::GateUp, updates: updates(72, 0.1, all), ..BASE },
        Case {
            tokens: 5,
            width: 40,
            outs: [72, 72, 0],
            group: Group::GateUp,
            updates: updates(16, 0.1, [false, true, false]),
            ..BASE
        },
        Case { tokens: 9, width: 16, outs: [24, 0, 0], updates: updates(4, 0.1, all), dtype: DType::F32, ..BASE },
    ]);
}

#[test]
fn rows_of_a_group_stand_alone() {
    let Some(dev) = device() else { return };
    let qkv = Case { tokens: 140, width: 72, outs: [128, 64, 64], group: Group::Qkv { dim: Some(64) }, ..BASE };
    qkv.rows_stand_alone(&dev, NAME);
    Case { outs: [136, 136, 0], group: Group::GateUp, ..qkv }.rows_stand_alone(&dev, NAME);
    Case { updates: DROPPED, ..qkv }.rows_stand_alone(&dev, NAME);
    Case { updates: DROPPED, tokens: 1100, width: 16, outs: [520, 0, 0], ..BASE }.rows_stand_alone(&dev, NAME);
}

/// On Hopper blocks copy the weights for each other: with an odd number of rows of tiles, of tokens and of weights, and several tiles for
/// a block.
#[test]
fn clusters_change_no_bits() {
    let Some(dev) = device() else { return };
    if dev.properties().cc != CC {
        return; // `hopper` runs it where the device poses as one
    }
    let qkv = Case { tokens: 300, width: 136, outs: [320, 64, 64], group: Group::Qkv { dim: Some(64) }, ..BASE };
    let alone = device().unwrap().without_clusters();
    for case in [
        Case { bias: true, ..qkv },
        Case { updates: DROPPED, ..qkv },
        Case { tokens: 70, updates: Some(Updates { rank: 72, ..UPDATES }), ..qkv },
        Case { tokens: 140, outs: [264, 264, 0], group: Group::GateUp, updates: DROPPED, ..qkv },
        Case { tokens: 1, width: 264, outs: [72, 0, 0], group: Group::One { residual: true }, bias: true, ..qkv },
    ] {
        for ((what, _, ours), (_, _, alone)) in case.run(&dev).iter().zip(&case.run(&alone)) {
            assert_same(&format!("{case:?} {what}"), ours, alone);
        }
    }
}

/// The tile is chosen by the shape, so a row would change with the rows beside it if the tile changed its bits.
#[test]
fn every_tile_gives_the_same_bits() {
    let Some(dev) = device() else { return };
    let limit = dev.properties().shared_limit;
    let qkv = Case { tokens: 140, width: 136, outs: [256, 128, 128], group: Group::Qkv { dim: Some(64) }, ..BASE };
    let cases = [
        Case { bias: true, ..qkv },
        Case { updates: DROPPED, ..qkv },
        Case { outs: [96, 96, 96], group: Group::Qkv { dim: Some(32) }, updates: DROPPED, ..qkv },
        Case { outs: [264, 264, 0], group: Group::GateUp, updates: DROPPED, ..qkv },
        Case { width: 264, outs: [72, 0, 0], group: Group::One { residual: true }, bias: true, ..qkv },
    ];
    let run = |tile| {
        let dev = device().unwrap().with_tile(tile);
        cases.map(|case| case.run(&dev))
    };
    let small = run(Tile::Small);
    for tile in Tile::ALL.into_iter().filter(|t| *t != Tile::Small && t.shared() <= limit) {
        for ((case, ours), small) in cases.iter().zip(run(tile)).zip(&small) {
            for ((what, _, ours), (_, _, small)) in ours.iter().zip(small) {
                assert_same(&format!("{tile:?} {case:?} {what}"), ours, small);
            }
        }
    }
}
