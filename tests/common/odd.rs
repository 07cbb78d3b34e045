//! What is not finite: an element that is NaN or infinite reaches what the formula takes it to, where it stays visible, and nothing else
//! changes by a bit. Sums over tiles, strips and padding are where it goes astray: 0 · NaN is NaN.

use ringtune::backend::{Backend, Dropout, Rope, Rotate, Swiglu, Write};
use ringtune::batch::IGNORE;
use ringtune::tensor::{DType, Tensor};

use super::batches::loaded;
use super::close::{normal, tensor, tensor_i32, values};
use super::head::{self, How};
use super::norms::{self, Types};
use super::projections::{Case, Group, Updates, inputs};

/// What is put in the place of a number.
pub const ODD: [f32; 3] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];

/// Results by name.
pub type Named = (String, Vec<f32>);

/// Results of a device and of the formula in f64, without and with something that is not finite. What the formula leaves alone has the same
/// bits on the device, and what it gives no number for is none there.
pub fn reaches_what_it_should(what: &str, [clean, exact_clean]: &[Vec<Named>; 2], [ours, exact]: &[Vec<Named>; 2]) {
    let mut reached = 0;
    for (i, (name, exact)) in exact.iter().enumerate() {
        let (ours, clean, exact_clean) = (&ours[i].1, &clean[i].1, &exact_clean[i].1);
        assert_eq!((ours.len(), clean.len()), (exact.len(), exact.len()), "{what}: {name}");
        for at in 0..exact.len() {
            if exact[at].to_bits() == exact_clean[at].to_bits() {
                let (x, clean) = (ours[at], clean[at]);
                assert!(x.to_bits() == clean.to_bits(), "{what}: {name}[{at}] is {x}, without it {clean}");
            } else if !exact[at].is_finite() {
                reached += 1;
                assert!(!ours[at].is_finite(), "{what}: {name}[{at}] is {}, in f64 {}", ours[at], exact[at]);
            }
        }
    }
    assert!(reached > 0, "{what} reaches nothing");
}

/// The same of an operation on both devices, with each of `odds` in each of `places`: which input, and where in it. `ours` and `exact` get
/// one of them, or none.
fn each<P: Copy + std::fmt::Debug>(
    what: &str,
    places: &[P],
    odds: &[f32],
    ours: impl Fn(Option<(P, f32)>) -> Vec<Named>,
    exact: impl Fn(Option<(P, f32)>) -> Vec<Named>,
) {
    let clean = [ours(None), exact(None)];
    for (&place, &odd) in places.iter().flat_map(|place| odds.iter().map(move |odd| (place, odd))) {
        let with = Some((place, odd));
        reaches_what_it_should(&format!("{what}, {odd} in {place:?}"), &clean, &[ours(with), exact(with)]);
    }
}

/// Copies of inputs with one element put in.
fn with<const N: usize>(inputs: &[Vec<f32>; N], odd: Option<((usize, usize), f32)>) -> [Vec<f32>; N] {
    let mut inputs = inputs.clone();
    if let Some(((which, at), odd)) = odd {
        inputs[which][at] = odd;
    }
    inputs
}

/// Norms of rows and of heads: x, w or dout.
fn in_norms<B: Backend, R: Backend>(dev: &B, exact: &R, name: &str) {
    for (dtype, (n, c, d)) in [(DType::Bf16, (70, 96, 32)), (DType::F32, (5, 264, 264)), (DType::Bf16, (9, 33, 33))] {
        let inputs = [normal(1, n * c), normal(2, d), normal(3, n * c)];
        // The first, a middle and the last row; a weight is in every row.
        let places = [(0, 0), (0, n / 2 * c + 5), (0, n * c - 1), (2, n / 2 * c + c - 1), (1, 2)];
        for (write, before) in [(Write::Set, 0.0), (Write::Add, 0.75)] {
            fn run<D: Backend>(
                dev: &D,
                dtype: DType,
                shape: (usize, usize),
                inputs: &[Vec<f32>; 3],
                (write, before): (Write, f32),
            ) -> Vec<Named> {
                let results = norms::run(dev, Types::all(dtype), shape, inputs, write, before);
                ["out", "dx", "dw"].map(String::from).into_iter().zip(results).collect()
            }
            let how = (write, before);
            each(
                &format!("{name} norm {dtype:?} {n}x{c}/{d} {write:?}"),
                &places,
                &ODD,
                |odd| run(dev, dtype, (n, c), &with(&inputs, odd), how),
                |odd| run(exact, dtype, (n, c), &with(&inputs, odd), how),
            );
        }
    }
}

/// Rotation, SwiGLU and its gradient, the gradient of the embedding.
fn in_rows<B: Backend, R: Backend>(dev: &B, exact: &R, name: &str, dtype: DType, (n, c): (usize, usize)) {
    fn run<D: Backend>(dev: &D, dtype: DType, (n, c): (usize, usize), inputs: &[Vec<f32>; 3]) -> Vec<Named> {
        let make = |x: &[f32]| tensor(dev, n, c, dtype, x);
        let mut results: Vec<Named> = Vec::new();
        let mut push = |what: &str, t: &Tensor<D>| results.push((what.to_string(), values(dev, t)));
        let [mut gate, mut up, mut dact] = inputs.each_ref().map(|x| make(x));
        let mut out = dev.alloc(n, c, dtype).unwrap();
        dev.swiglu_forward(&mut out, Swiglu { gate: &gate, up: &up }).unwrap();
        push("act", &out);
        dev.swiglu_backward(&mut gate, &mut up, &mut dact).unwrap();
        [("dgate", &gate), ("dup", &up), ("act again", &dact)].into_iter().for_each(|(what, t)| push(what, t));

        let d = c / 2;
        let angles = normal(9, 8 * d / 2);
        let row = |p: usize, f: fn(f32) -> f32| angles[p * d / 2..(p + 1) * d / 2].iter().map(move |&a| f(a));
        let table: Vec<f32> = (0..8).flat_map(|p| row(p, f32::cos).chain(row(p, f32::sin))).collect();
        let (table, positions) =
            (tensor(dev, 8, d, DType::F32, &table), (0..n as i32).map(|i| i % 8).collect::<Vec<_>>());
        let by = Rope { table: &table, positions: &tensor_i32(dev, &positions) };
        for direction in [Rotate::Forward, Rotate::Inverse] {
            let mut x = make(&inputs[0]);
            dev.rope(&mut x, by, direction).unwrap();
            push("rotated", &x);
        }

        // Runs of equal tokens of one to many rows, on sums that began before.
        let tokens: Vec<i32> = (0..n as i32).map(|i| i % 7 * (i % 3)).collect();
        let batch = loaded(dev, &tokens, &vec![IGNORE; n], &vec![0; n]);
        let mut dw = tensor(dev, 13, c, DType::F32, &normal(10, 13 * c));
        dev.embedding_backward(&mut dw, &make(&inputs[2]), &batch, 0).unwrap();
        push("dw of the embedding", &dw);
        results
    }
    let inputs = [normal(5, n * c), normal(6, n * c), normal(7, n * c)];
    let places = [(0, 0), (0, n / 2 * c + 1), (1, n * c - 1), (2, n / 2 * c + c - 1), (2, 0)];
    each(
        &format!("{name} {dtype:?} {n}x{c}"),
        &places,
        &ODD,
        |odd| run(dev, dtype, (n, c), &with(&inputs, odd)),
        |odd| run(exact, dtype, (n, c), &with(&inputs, odd)),
    );
}

/// The head: a supervised row of x, a class of w. What has no target and what pads the vocabulary reaches nothing at all.
fn in_the_head<B: Backend, R: Backend>(dev: &B, exact: &R, name: &str) {
    fn run<D: Backend>(dev: &D, dtype: DType, inputs: &[Vec<f32>; 2], targets: &[i32], classes: usize) -> Vec<Named> {
        let how = How { n_classes: classes, scale: 0.25, first_row: 2 };
        // The gradient covers five rows of padding.
        let results = head::run(dev, dtype, &inputs[0], &inputs[1], targets, how, classes + 3);
        ["loss", "correct", "dx", "dw"].map(String::from).into_iter().zip(results).collect()
    }
    // A row with NaN has no right answer; the reference does not look.
    let without_counts = |mut results: Vec<Named>| {
        results.retain(|(result, _)| result != "correct");
        results
    };
    for dtype in [DType::Bf16, DType::F32] {
        let (n, c, classes) = (70, 40, 131);
        let targets: Vec<i32> = (0..n).map(|i| if i % 3 == 1 { IGNORE } else { i as i32 }).collect();
        let inputs = [normal(1, n * c), normal(2, (classes + 5) * c)];
        let what = format!("{name} head {dtype:?}");
        let ours = |inputs: &[Vec<f32>; 2]| run(dev, dtype, inputs, &targets, classes);
        let run = |places: &[(usize, usize)], odds: &[f32]| {
            each(
                &what,
                places,
                odds,
                |odd| without_counts(ours(&with(&inputs, odd))),
                |odd| without_counts(run(exact, dtype, &with(&inputs, odd), &targets, classes)),
            );
        };
        run(&[(0, 0), (0, 33 * c + 7), (0, n * c - 1)], &ODD);
        // An infinite weight changes every softmax a little, where its class no longer counts.
        run(&[(1, 0), (1, classes * c - 1)], &[f32::NAN]);
        let clean = ours(&inputs);
        for (place, odd) in
            [(0, 34 * c), (1, classes * c), (1, (classes + 5) * c - 1)].map(|p| ODD.map(|odd| (p, odd))).concat()
        {
            for ((result, ours), (_, clean)) in ours(&with(&inputs, Some((place, odd)))).iter().zip(&clean) {
                let same = ours.iter().zip(clean).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{what}: {odd} in {place:?} reaches {result}");
            }
        }
    }
}

/// Every input of projections, some of them with updates and dropped elements.
fn in_projections<B: Backend, R: Backend>(dev: &B, exact: &R, name: &str) {
    let base = Case {
        group: Group::One { residual: true },
        tokens: 70,
        width: 72,
        outs: [136, 0, 0],
        bias: true,
        updates: None,
        dtype: DType::Bf16,
    };
    let updates = |rank, dropout| Some(Updates { rank, dropout, which: [true; 3], apart: 0.0 });
    for case in [
        base,
        Case { group: Group::Qkv { dim: Some(64) }, outs: [128, 64, 64], ..base },
        Case { group: Group::GateUp, outs: [72, 72, 0], bias: false, ..base },
        Case { group: Group::GateUp, outs: [72, 72, 0], bias: false, updates: updates(16, 0.2), ..base },
        Case { tokens: 530, width: 40, outs: [24, 0, 0], bias: false, updates: updates(24, 0.0), ..base },
        Case { tokens: 9, width: 33, outs: [17, 0, 0], ..base },
        Case { tokens: 9, width: 16, outs: [24, 0, 0], dtype: DType::F32, updates: updates(4, 0.1), ..base },
    ] {
        let middle = case.tokens / 2;
        // A dropped element may stay visible or not: one that every mask keeps.
        let kept = |row: usize| {
            let kept = |at: &usize| {
                let mask = |i| Dropout { key: Case::mask_key(i), p: case.updates.map_or(0.0, |u| u.dropout) };
                (0..3).all(|i| !mask(i).drops(*at as u64))
            };
            (row * case.width..(row + 1) * case.width).find(kept).expect("not all of a row is dropped")
        };
        let mut places = vec![
            (inputs::X, kept(0)),
            (inputs::X, kept(case.tokens - 1)),
            (inputs::DY, middle * case.outs[0] + 3),
            (inputs::DY, case.tokens * case.outs[0] - 1),
            (inputs::W, 5 * case.width + 7),
        ];
        if case.bias && case.updates.is_none() {
            places.push((inputs::BIAS, 3));
        }
        if case.group == (Group::One { residual: true }) {
            places.push((inputs::RESIDUAL, middle * case.outs[0] + 1));
        }
        // What a mask drops of the products of these may stay visible or not.
        if case.updates.is_some_and(|u| u.dropout == 0.0) {
            places.extend([(inputs::A, case.width + 2), (inputs::B, 3)]);
        }
        fn run<D: Backend>(dev: &D, case: &Case, odd: Option<((u64, usize), f32)>) -> Vec<Named> {
            let put = |which, at, x| odd.filter(|(place, _)| *place == (which, at)).map_or(x, |(_, odd)| odd);
            case.run_with(dev, put).into_iter().map(|(name, _, values)| (name, values)).collect()
        }
        let what = format!("{name} {case:?}");
        each(&what, &places, &ODD, |odd| run(dev, &case, odd), |odd| run(exact, &case, odd));
    }
}

/// Every operation but attention, which has its own.
pub fn what_is_not_finite_stays_in_its_place<B: Backend, R: Backend>(dev: &B, exact: &R, name: &str) {
    in_norms(dev, exact, name);
    in_rows(dev, exact, name, DType::F32, (9, 4));
    in_rows(dev, exact, name, DType::Bf16, (70, 80));
    in_the_head(dev, exact, name);
    in_projections(dev, exact, name);
}
