//! Dataset weights and the split: exact counts, rotation through down-sampled sets, and no prompt on both sides.

use std::collections::HashMap;

use ringtune::data::mix::{Mix, SetSize, WeightUnit, mix_report};
use ringtune::data::split::split_sets;
use ringtune::rng::Stream;
use ringtune::words::Words;

fn sizes(samples: &[u64]) -> Vec<SetSize> {
    samples.iter().map(|&n| SetSize { samples: n, tokens: n * 10, supervised: n * 4 }).collect()
}

fn mix(samples: &[u64], weights: &[f64]) -> Mix {
    Mix::new(&sizes(samples), Some(weights), WeightUnit::Samples, None, 7).unwrap()
}

#[test]
fn counts_are_shared_out_by_largest_remainder() {
    let check = |samples: &[u64], weights: &[f64], expected: &[u64]| assert_eq!(mix(samples, weights).counts, expected);
    check(&[100, 100, 100], &[0.4, 0.4, 0.2], &[120, 120, 60]);
    check(&[100, 100, 100], &[4.0, 4.0, 2.0], &[120, 120, 60]);
    check(&[10, 10, 10], &[0.33, 0.33, 0.34], &[10, 10, 10]);
    check(&[7, 3], &[1.0, 1.0], &[5, 5]);
    check(&[5, 2], &[1.0, 1.0], &[4, 3]);
    check(&[4, 4, 2], &[1.0, 1.0, 1.0], &[4, 3, 3]);
    check(&[1, 1000], &[0.7, 0.3], &[701, 300]);
    check(&[15_011, 35_000, 52_002], &[0.4, 0.4, 0.2], &[40_805, 40_805, 20_403]);
    check(&[3, 3], &[1e300, 1e300], &[3, 3]);
    check(&[3, 3], &[1e-300, 1e-300], &[3, 3]);
    let natural = Mix::new(&sizes(&[5, 9]), None, WeightUnit::Samples, None, 7).unwrap();
    assert_eq!(natural.counts, [5, 9]);
    let fixed = Mix::new(&sizes(&[5, 9]), Some(&[3.0, 1.0]), WeightUnit::Samples, Some(100), 7).unwrap();
    assert_eq!(fixed.counts, [75, 25]);
}

#[test]
fn bad_weights_are_usage_errors() {
    let check = |weights: &[f64], expected: &str| {
        let e = Mix::new(&sizes(&[5, 5]), Some(weights), WeightUnit::Samples, None, 7).unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains(expected), "{e}");
    };
    check(&[1.0], "expected one for each of the 2 data sets, found 1");
    check(&[1.0, 1.0, 1.0], "found 3");
    check(&[1.0, -0.5], "dataset weight 2: expected a finite number above 0, found -0.5");
    check(&[0.0, 1.0], "dataset weight 1: expected a finite number above 0, found 0");
    check(&[f64::NAN, 1.0], "found NaN");
    check(&[1.0, f64::INFINITY], "found inf");
    assert_eq!(Mix::new(&sizes(&[5, 5]), None, WeightUnit::Samples, Some(0), 7).unwrap_err().exit_code(), 2);
    assert!(Mix::new(&sizes(&[5, 0]), None, WeightUnit::Samples, None, 7).is_err());
}

#[test]
fn up_sampling_takes_whole_copies_and_a_prefix_of_a_permutation() {
    let m = mix(&[10, 90], &[0.25, 0.75]);
    assert_eq!(m.counts, [25, 75]);
    let mut seen_prefixes = Vec::new();
    for epoch in 0..4 {
        let rows = m.rows(0, epoch);
        assert_eq!(rows.len(), 25);
        for row in 0..10 {
            let n = rows.iter().filter(|&&r| r == row).count();
            assert!((2..=3).contains(&n), "epoch {epoch} row {row}: {n}");
        }
        seen_prefixes.push(rows[20..].to_vec());
    }
    assert_ne!(seen_prefixes[0], seen_prefixes[1]);
}

#[test]
fn a_down_sampled_set_rotates_through_all_its_rows() {
    for (len, n) in [(100u64, 30u64), (10, 7), (7, 3), (13, 12), (5, 1)] {
        let other = 1000 - n;
        let weights = [n as f64 / 1000.0, other as f64 / 1000.0];
        let m = Mix::new(&sizes(&[len, other]), Some(&weights), WeightUnit::Samples, Some(1000), 3).unwrap();
        assert_eq!(m.counts[0], n);
        let mut times: HashMap<u32, u64> = HashMap::new();
        for epoch in 0..3 * len {
            let mut rows = m.rows(0, epoch);
            assert_eq!(rows, m.rows(0, epoch));
            rows.iter().for_each(|&r| *times.entry(r).or_default() += 1);
            rows.sort_unstable();
            rows.dedup();
            assert_eq!(rows.len() as u64, n, "a row twice in epoch {epoch}");
            // No row is seen a second time before every row is seen once, and so on.
            let (least, most) = (0..len as u32)
                .map(|r| times.get(&r).copied().unwrap_or(0))
                .fold((u64::MAX, 0), |(a, b), t| (a.min(t), b.max(t)));
            assert!(
                most - least <= 1 || (most - least == 2 && (epoch + 1) * n % len != 0),
                "epoch {epoch}: {least} to {most}"
            );
        }
        assert!((0..len as u32).all(|r| times[&r] == 3 * n), "{len} {n}");
    }
}

#[test]
fn weights_can_share_out_tokens() {
    // Set 0 has short rows, set 1 long ones; half the tokens each means ten times as many short rows.
    let s = [
        SetSize { samples: 1000, tokens: 10_000, supervised: 9000 },
        SetSize { samples: 1000, tokens: 100_000, supervised: 10_000 },
    ];
    let m = Mix::new(&s, Some(&[1.0, 1.0]), WeightUnit::Tokens, Some(1100), 1).unwrap();
    assert_eq!(m.counts, [1000, 100]);
    let m = Mix::new(&s, Some(&[1.0, 1.0]), WeightUnit::SupervisedTokens, Some(1900), 1).unwrap();
    assert_eq!(m.counts, [1000, 900]);
    let achieved = [
        SetSize { samples: 1000, tokens: 10_000, supervised: 9000 },
        SetSize { samples: 900, tokens: 90_000, supervised: 9000 },
    ];
    let report = mix_report(&m, &["a".into(), "b".into()], &s, &achieved);
    assert_eq!(report[0].requested, [1000.0 / 1900.0, 0.1, 0.5]);
    for (got, expected) in report[0].achieved.iter().zip([1000.0 / 1900.0, 0.1, 0.5]) {
        assert!((got - expected).abs() < 1e-12);
    }
    for (name, unit) in [
        ("samples", WeightUnit::Samples),
        ("tokens", WeightUnit::Tokens),
        ("supervised-tokens", WeightUnit::SupervisedTokens),
    ] {
        assert_eq!((WeightUnit::of_word(name), unit.word()), (Some(unit), name));
    }
}

#[test]
fn the_split_is_seeded_sized_and_never_parts_equal_prompts() {
    let stream = Stream::new(&[5]);
    // 300 rows over 200 prompts, and a second set that shares half of them.
    let a: Vec<u64> = (0..300).map(|i| stream.u64_at(i) % 200).collect();
    let b: Vec<u64> = (300..500).map(|i| stream.u64_at(i) % 400).collect();
    let sets = [a, b];
    let splits = split_sets(&sets, 0.1, 42).unwrap();
    assert_eq!(splits, split_sets(&sets, 0.1, 42).unwrap());
    assert_ne!(splits, split_sets(&sets, 0.1, 43).unwrap());
    let mut side: HashMap<u64, bool> = HashMap::new();
    for (split, hashes) in splits.iter().zip(&sets) {
        assert_eq!(split.train.len() + split.val.len(), hashes.len());
        for (rows, held) in [(&split.train, false), (&split.val, true)] {
            assert!(rows.windows(2).all(|w| w[0] < w[1]));
            for &row in rows {
                assert_eq!(*side.entry(hashes[row as usize]).or_insert(held), held, "prompt on both sides");
            }
        }
    }
    assert_eq!(splits[0].val.len(), 30);
    assert!((15..=35).contains(&splits[1].val.len()), "{}", splits[1].val.len());
}

#[test]
fn val_fraction_rounds_up_keeps_a_training_row_and_may_be_zero() {
    let unique = |n: u64| vec![(0..n).collect::<Vec<u64>>()];
    let n_val = |n: u64, f: f64| split_sets(&unique(n), f, 1).unwrap()[0].val.len();
    assert_eq!(n_val(100, 0.0), 0);
    assert_eq!(n_val(60, 0.05), 3);
    assert_eq!(n_val(61, 0.05), 4);
    assert_eq!(n_val(2, 0.05), 1);
    assert_eq!(n_val(1, 0.5), 0);
    assert_eq!(n_val(3, 0.99), 2);
    let same = vec![vec![9u64; 50]];
    assert_eq!(split_sets(&same, 0.1, 1).unwrap()[0].val.len(), 0);
    let why = |sets: &[Vec<u64>], fraction: f64| split_sets(sets, fraction, 1).unwrap().last().unwrap().none.clone();
    let says = |sets: &[Vec<u64>], fraction: f64, part: &str| {
        let why = why(sets, fraction).unwrap();
        assert!(why.contains(part), "{why}");
    };
    assert_eq!(why(&unique(100), 0.1), None);
    says(&unique(100), 0.0, "val_fraction is 0");
    says(&unique(1), 0.1, "but one row");
    says(&same, 0.1, "all 50 rows have one context");
    let two = vec![[vec![1; 25], vec![2; 25]].concat()];
    says(&two, 0.1, "the smallest of the 2 groups has 25 rows, more than the 5 to hold out");
    let held: Vec<u32> = split_sets(&unique(20), 0.1, 1).unwrap()[0].train.clone();
    says(&[unique(20).remove(0), held.iter().map(|&i| u64::from(i)).collect()], 0.1, "an earlier data set");
    for bad in [-0.1, 1.0, 1.5, f64::NAN] {
        assert_eq!(split_sets(&unique(5), bad, 1).unwrap_err().exit_code(), 2, "{bad}");
    }
}
