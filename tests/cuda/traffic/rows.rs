//! Operations that go through rows or elements once: what they ask of the device's memory is their floor, and what they ask for again, which a
//! cache has, is known.

use ringtune::cuda::{
    adamw, cast, cross_entropy, dropout, elementwise, fold, kernels::Kernel, rope, rows, stats, swiglu,
};
use ringtune::tensor::DType;
use vgpu::Memory;

use super::{Arg, run};

/// Rows and elements of each, in bf16 where nothing else is said.
const ROWS: usize = 64;
const COLS: usize = 2048;
const N: usize = ROWS * COLS;

/// A launch; the bytes that have to come from memory and go there, and those that are asked for once more.
struct Launch {
    kernel: Kernel,
    blocks: usize,
    args: Vec<Arg>,
    floor: usize,
    again: usize,
}

fn holds(name: &str, of: Launch) -> bool {
    let Launch { kernel, blocks, args, floor, again } = of;
    let Some(c) = run(&kernel, blocks, 0, &args) else { return false };
    let asked = c.global_sectors as usize * 32;
    println!("{name}: {asked} bytes, floor {floor}, again {again}: {:.3}", (asked - again) as f64 / floor as f64);
    assert!(asked >= floor && (asked - again) as f64 <= 1.05 * floor as f64, "{name}: floor {floor}, {again}: {c:?}");
    true
}

/// A buffer of `size` bytes an element.
fn elements(size: usize) -> Arg {
    Arg::Buffer(N * size)
}

fn word(x: usize) -> Arg {
    Arg::U32(x as u32)
}

/// A table of 64-bit words, for which memory may be taken.
fn table(words: impl Fn(&mut Memory) -> Vec<u64> + 'static) -> Arg {
    Arg::Table(std::rc::Rc::new(words))
}

/// Memory of zeros.
fn zeros(memory: &mut Memory, bytes: usize) -> u64 {
    let address = memory.alloc(bytes).unwrap();
    memory.write(address, &vec![0; bytes]).unwrap();
    address
}

#[test]
fn elements_are_read_and_written_once() {
    let (b, all) = (DType::Bf16, N.div_ceil(256 * 8));
    let n = Arg::U64(N as u64);
    let draws = [n.clone(), word(1), word(2), word(3), word(4), word(1 << 14), Arg::F32(1.25)];
    let launch = |kernel, args: Vec<Arg>, floor| Launch { kernel, blocks: all, args, floor, again: 0 };
    let one = elements(2);
    let dropped = [vec![one.clone(), one.clone()], draws.to_vec()].concat();
    let three = vec![one.clone(), one.clone(), one.clone(), n.clone()];
    // Of eight f32 a thread writes a sector in two halves, which the last cache joins.
    let halves = N * 4;
    let args = vec![elements(4), one.clone(), n.clone()];
    if !holds("cast", Launch { again: halves, ..launch(cast::kernel(DType::F32, b), args, N * 6) }) {
        return;
    }
    holds("dropout", launch(dropout::kernel(b, b), dropped, N * 4));
    holds("add", launch(elementwise::kernel("add", b, b, 8), vec![one.clone(), one.clone(), n.clone()], N * 6));
    holds("swiglu forward", launch(swiglu::forward_kernel(b), three.clone(), N * 6));
    holds("swiglu backward", launch(swiglu::backward_kernel(b), three, N * 12));
    let ordered = vec![elements(4), elements(4), Arg::Buffer(3 * N * 4), word(4), word(3), n.clone()];
    let ordered = [ordered, vec![Arg::U64(N as u64 / 4), word(0)]].concat();
    let kernel = fold::kernel();
    holds("fold", Launch { kernel, blocks: N / 4 / 256, args: ordered, floor: N * 4 * 6, again: 0 });
}

#[test]
fn rows_are_read_and_written_once() {
    let (b, one) = (DType::Bf16, elements(2));
    let pieces = COLS.div_ceil(256 * 8) * ROWS;
    // The bias is asked for in every row.
    let bias = vec![one.clone(), Arg::Buffer(COLS * 2), word(COLS)];
    let kernel = elementwise::kernel("add_bias", b, b, COLS);
    if !holds("add_bias", Launch { kernel, blocks: pieces, args: bias, floor: N * 4, again: N * 2 }) {
        return;
    }
    let sums =
        [vec![Arg::Buffer(COLS * 4), Arg::Null, Arg::Null, Arg::Null, Arg::Null, one.clone(), Arg::Null, Arg::Null]];
    let sums = [sums.concat(), vec![word(ROWS), word(COLS), word(0), word(0)]].concat();
    let kernel = elementwise::column_kernel(b);
    holds("column_sums", Launch { kernel, blocks: COLS / 256, args: sums, floor: N * 2 + COLS * 8, again: 0 });
    // Each head asks for its angles, each warp for its row's position.
    let (dim, warps) = (128, ROWS * COLS / 2 / 32);
    let args = vec![one.clone(), Arg::Buffer(dim * 4), Arg::Words(vec![0; ROWS]), word(COLS), word(dim), word(0)];
    let again = ROWS * COLS * 4 + warps * 32;
    holds("rope", Launch { kernel: rope::kernel(b), blocks: ROWS * COLS / 2 / 256, args, floor: N * 4, again });
    for entry in ["gather", "scatter"] {
        let (kernel, units) = rows::kernel(entry, COLS * 2);
        let places = Arg::Words((0..ROWS as u32).rev().collect());
        let args = vec![one.clone(), one.clone(), places, word(units), word(ROWS)];
        holds(entry, Launch { kernel, blocks: ROWS * units.div_ceil(256), args, floor: N * 4, again: 0 });
    }
    // A run of one: every warp looks at its own place, the one before and the one behind, each by the token there.
    let (tokens, blocks) = (Arg::Words((0..ROWS as u32).collect()), ROWS * COLS / 256);
    let args =
        vec![elements(4), one.clone(), tokens.clone(), tokens.clone(), word(ROWS), word(COLS), word(0), word(ROWS)];
    let again = blocks * 8 * 8 * 32;
    let kernel = rows::backward_kernel(b);
    holds("embedding_backward", Launch { kernel, blocks, args, floor: N * (2 + 8), again });
    // Logits once for the largest, once for the sum, once for the gradient; every warp its row's token, target and logit of the target.
    let again = N * 8 + ROWS * (8 * 3 + 2) * 32;
    let args = vec![Arg::Buffer(ROWS * 4), Arg::Buffer(ROWS * 4), one.clone(), elements(4), tokens.clone()];
    let args = [args, vec![tokens, word(COLS), Arg::F32(1.0), word(1)]].concat();
    let kernel = cross_entropy::kernel();
    holds("cross_entropy", Launch { kernel, blocks: ROWS, args, floor: N * (4 + 2), again });
}

#[test]
fn what_is_trained_is_read_and_written_once() {
    let finite = || Arg::Table(std::rc::Rc::new(|_: &mut Memory| [0.0, 0.0, 1.0, 1.0].map(f64::to_bits).to_vec()));
    for (master, each) in [(true, 30), (false, 28)] {
        let slot = move |memory: &mut Memory| {
            let [p, m, v, g] = [4; 4].map(|size| zeros(memory, N * size));
            let of_bf16 = if master { zeros(memory, N * 4) } else { 0 };
            let slot = [p, of_bf16, m, v, g, N as u64, 1f64.to_bits(), 1];
            slot.into_iter().chain(0..N as u64 / 16_384).collect()
        };
        let rates = [0.9, 0.99, 0.1, 0.01, 1e-8, 0.1, 0.1, 0.01].map(Arg::F32);
        let args = [vec![finite(), table(slot), word(1), Arg::U64(1e-3f64.to_bits())], rates.to_vec()].concat();
        let (kernel, blocks) = (adamw::kernel(), N / 16_384);
        if !holds("adamw", Launch { kernel, blocks, args, floor: N * each, again: 0 }) {
            return;
        }
    }
    let chunks = |memory: &mut Memory| {
        let g = zeros(memory, N * 4);
        (0..N as u64 / 16_384).flat_map(|i| [g + i * 65_536, 16_384]).collect()
    };
    let (blocks, squares) = (N / 16_384, stats::all().into_iter().find(|(k, _)| k.entry == "stats_squares").unwrap().0);
    let args = vec![Arg::Buffer(8 * blocks), table(chunks)];
    holds("stats_squares", Launch { kernel: squares, blocks, args, floor: N * 4, again: 0 });
}
