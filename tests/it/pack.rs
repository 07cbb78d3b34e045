//! Packing: nothing lost, nothing too long, close to the best possible, and the layout of a packed row.

use proptest::prelude::*;
use ringtune::data::encode::Encoded;
use ringtune::data::pack::{PackedRow, best_fit_decreasing};
use ringtune::rng::Stream;

fn check(lengths: &[u32], capacity: u32) -> usize {
    let rows = best_fit_decreasing(lengths, capacity);
    let mut seen: Vec<u32> = rows.concat();
    seen.sort_unstable();
    assert!(seen.iter().enumerate().all(|(i, &d)| i == d as usize) && seen.len() == lengths.len());
    for row in &rows {
        assert!(!row.is_empty() && row.iter().map(|&d| lengths[d as usize]).sum::<u32>() <= capacity);
    }
    rows.len()
}

proptest! {
    #[test]
    fn every_document_is_packed_once_and_rows_are_near_the_fewest_possible(lengths in prop::collection::vec(1u32..=64, 0..200)) {
        let n = check(&lengths, 64);
        let least = lengths.iter().sum::<u32>().div_ceil(64) as usize;
        prop_assert!(n <= least.max(1) * 11 / 9 + lengths.iter().filter(|&&l| l > 32).count() + 1);
        prop_assert!(n >= least);
    }
}

#[test]
fn best_fit_fills_the_fullest_row_first() {
    // 6+4 and 5+5 fill rows of 10; first-fit by arrival would need a third row.
    assert_eq!(check(&[5, 6, 4, 5], 10), 2);
    assert_eq!(check(&[10, 10], 10), 2);
    assert_eq!(check(&[], 10), 0);
    assert_eq!(best_fit_decreasing(&[7, 5, 3, 5], 10), [vec![0, 2], vec![1, 3]]);
}

#[test]
fn packing_is_a_pure_function_and_fast() {
    let stream = Stream::new(&[1]);
    let lengths: Vec<u32> = (0..200_000).map(|i| 20 + (stream.u64_at(i) % 160) as u32).collect();
    let start = std::time::Instant::now();
    let rows = best_fit_decreasing(&lengths, 2048);
    assert!(start.elapsed().as_secs_f64() < 2.0, "{:?}", start.elapsed());
    assert_eq!(rows, best_fit_decreasing(&lengths, 2048));
    let fill = lengths.iter().map(|&l| u64::from(l)).sum::<u64>() as f64 / (rows.len() as f64 * 2048.0);
    assert!(fill > 0.995, "rows are filled to {fill}");
}

#[test]
fn a_packed_row_restarts_positions_and_has_no_label_across_a_border() {
    let docs = [
        Encoded { tokens: vec![2, 10, 11, 3], supervised: vec![false, false, true, true] },
        Encoded { tokens: vec![20, 21], supervised: vec![true, true] },
    ];
    let row = PackedRow::new(&docs, 9, 0);
    assert_eq!(row.input_ids, [2, 10, 11, 3, 20, 21, 0, 0, 0]);
    assert_eq!(row.labels, [-100, -100, 11, 3, -100, 21, -100, -100, -100]);
    assert_eq!(row.position_ids, [0, 1, 2, 3, 0, 1, 0, 1, 2]);
    assert_eq!(row.cu_seqlens, [0, 4, 6, 9]);
    assert_eq!(PackedRow::new(&docs, 6, 0).cu_seqlens, [0, 4, 6]);
}
