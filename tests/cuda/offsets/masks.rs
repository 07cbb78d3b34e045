//! Masks of dropout go by the place of an element in its tensor, so they are others far behind the beginning: those of the formula.

use ringtune::backend::Dropout;
use ringtune::cuda::kernels::Kernel;
use ringtune::cuda::matmul_sm90::{Cluster, Columns};
use ringtune::cuda::tiles::Tile;
use ringtune::cuda::{dropout, project, project_sm90};

use super::Arg::{self, F32, Null, U32, U64};
use super::hopper::absent;
use super::{B, Case, FAR, both, configuration, i32s, is_promised, read, whole, written};

const DROPOUT: Dropout = Dropout { key: 7, p: 0.4 };

/// A matrix of 0 and 1.
fn bits(rows: usize, cols: usize, one: impl Fn(usize, usize) -> bool) -> Vec<u8> {
    let value = |i| half::bf16::from_f32(f32::from(u8::from(one(i / cols, i % cols))));
    (0..rows * cols).flat_map(|i| value(i).to_le_bytes()).collect()
}

fn ones(rows: usize, cols: usize) -> Vec<u8> {
    bits(rows, cols, |_, _| true)
}

/// What a launch leaves far behind the beginning: where it is not zero, element by element.
fn kept(case: &Case, bytes: usize) -> Option<Vec<bool>> {
    let left = case.run(true)?.remove(0);
    Some(left.chunks(bytes).map(|x| x.iter().any(|&b| b != 0)).collect())
}

/// Holds it to the formula, `element` naming the place of each.
fn masked(case: Case, bytes: usize, element: impl Fn(usize) -> usize) {
    let Some(kept) = kept(&case, bytes) else { return };
    let wrong = (0..kept.len()).find(|&i| kept[i] == DROPOUT.drops(element(i) as u64));
    assert_eq!(wrong, None, "{}: the mask of this element", case.kernel.entry);
    assert!(kept.contains(&true) && kept.contains(&false));
}

/// Threshold, then the streams of three updates, of which there is one.
fn draws() -> Vec<Arg> {
    let words = DROPOUT.stream().words().map(|w| both(w as usize));
    let mut all = vec![both(DROPOUT.threshold() as usize)];
    all.extend(words);
    all.extend((0..8).map(|_| both(0)));
    all
}

#[test]
fn elements() {
    if !is_promised() {
        return;
    }
    let block = 256 * 8;
    let (first, n) = (FAR / block + 1, 2 * block - 3);
    let at = first * block;
    let place = |arg: Arg| arg.within(2 * n, 2 * at);
    let mut args = vec![place(written(1, 2 * n, 0)), place(read(ones(1, n), 2 * n, 0)), U64([n, at + n])];
    args.extend(DROPOUT.stream().words().map(|w| both(w as usize)));
    args.extend([both(DROPOUT.threshold() as usize), F32(1.25)]);
    masked(Case { kernel: dropout::kernel(B, B), shared: 0, far_block: first, blocks: 2, args }, 2, |i| at + i);
}

#[test]
fn updates() {
    if !is_promised() {
        return;
    }
    let (cols, rank) = (4096, 16);
    // t = x Aᵀ where each row of A takes one column.
    let far = FAR / cols + 64;
    let column = |r: usize| r * 256 + 3 * r;
    let a = bits(rank, cols, |r, c| c == column(r));
    let mut args = vec![written(64, 2 * rank, far), Null, Null, read(ones(64, cols), 2 * cols, far)];
    args.extend([whole(a), Null, Null, U32([64, far + 64]), both(cols), both(rank), both(1), F32(0.5)]);
    args.extend(draws());
    let (kernel, shared) = configuration("lora_t", &["RANK=16"]);
    let case = Case { kernel, shared, far_block: far / 64, blocks: 1, args };
    masked(case, 2, |i| (far + i / rank) * cols + column(i % rank));

    // dA = uᵀ x where each row of u has one update: the sums of a strip.
    let (strip, far) = (512, FAR / cols);
    let row = |r: usize| 31 * r;
    let u = bits(strip, rank, |i, r| i == row(r));
    let sums = written(rank, 4 * 128, 0).within(4 * cols, far / strip * rank * cols * 4);
    let mut args = vec![whole(vec![0; 4 * cols * rank]), Null, Null, sums, whole(i32s(vec![0; cols / 128]))];
    args.extend([read(ones(strip, cols), 2 * cols, far), read(u, 2 * rank, far), Null, Null]);
    args.extend([U32([strip + 1, far + strip + 1]), both(cols), both(rank), both(1)]);
    args.extend(draws());
    let (kernel, shared) = configuration("lora_da", &["RANK=16"]);
    let case = Case { kernel, shared, far_block: far / strip * (cols / 128), blocks: 1, args };
    masked(case, 4, |i| (far + row(i / 128)) * cols + i % 128);
}

/// The gradient of an input where dy is zero and u A is one everywhere.
#[test]
fn gradients_of_inputs() {
    if !is_promised() {
        return;
    }
    let (wide, k, rank) = (256 * 264, 64, 8);
    assert!(wide * wide > FAR);
    let place = |high: usize, side: usize| {
        let at = (wide - high) * wide + wide - side;
        let element = move |i: usize| at + i / side * wide + i % side;
        (written(high, 2 * side, 0).within(2 * wide, 2 * at), element)
    };
    let along = |values, high: usize, of: usize| read(values, 2 * of, wide - high);
    let across = |values: Vec<u8>, side: usize| read(values, 2 * side, 0).within(2 * wide, 2 * (wide - side));
    let u = |high| along(bits(high, rank, |_, r| r == 0), high, rank);
    let a = |side| across(bits(rank, side, |r, _| r == 0), side);
    let zeros = |n: usize| vec![0; 2 * n];

    let (tile, side) = (Tile::Small, 64);
    let (dx, element) = place(side, side);
    let mut args = vec![dx, along(zeros(side * k), side, k), Null, Null, across(zeros(k * side), side), Null, Null];
    args.extend([u(side), Null, Null, a(side), Null, Null]);
    args.extend([both(wide), both(wide), both(k), both(0), both(0), both(rank)]);
    args.extend(draws());
    let far_block = (wide / side) * (wide / side) - 1;
    masked(Case { kernel: project::dx_kernel(tile), shared: tile.shared(), far_block, blocks: 1, args }, 2, element);

    let (columns, cluster, side, high) = (Columns::N128, Cluster::Two, 128, 256);
    let (dx, element) = place(high, side);
    let rows = |arg: Arg, of, n: usize| arg.boxes([(n, of), (wide, of)], 128);
    let across = |values, n| across(values, side).boxes([(n, side), (n, wide)], 64);
    let absents = |n: usize| (0..n).map(|_| absent());
    let mut args = vec![dx, rows(along(zeros(high * k), high, k), k, high)];
    args.extend(absents(2));
    args.push(across(zeros(k * side), k));
    args.extend(absents(2));
    args.push(rows(u(high), rank, high));
    args.extend(absents(2));
    args.push(across(bits(rank, side, |r, _| r == 0), rank));
    args.extend(absents(2));
    args.extend([both(wide), both(wide), both(k), both(0), both(0), both(rank), both(1)]);
    args.extend(draws());
    let kernel: Kernel = project_sm90::dx_kernel((columns, cluster), 1);
    let far_block = wide / 128 * (wide / side) - 2;
    masked(Case { kernel, shared: columns.shared(), far_block, blocks: 2, args }, 2, element);
}
