//! Tensors of more than 2^32 elements: a block that works far behind their beginning gives the bits that it gives at the beginning.
//!
//! The emulator's memory takes no room before it is written, so tensors can be as large as on a GPU. A grid that reaches the end of one
//! would run for days: the program's text is changed so that its first block has a large number. Needs NVRTC, no device.
//! `offsets_groups.rs` has low-rank updates and Hopper's kernels.

use ringtune::backend::MatMul;
use ringtune::cuda::compile::{Compiler, Target};
use ringtune::cuda::kernels::{Configuration, Kernel};
use ringtune::cuda::tiles::Tile;
use ringtune::cuda::{
    cast, configurations, cross_entropy, dropout, elementwise, matmul, norm, project, rope, rows, swiglu,
};
use ringtune::tensor::DType;
use vgpu::tensor_map::{Tiled, encode};
use vgpu::{Config, Memory, Module};

use crate::close::normal;
use crate::skip::{nvrtc, skipped};

/// As many elements lie before the far end of what is tested.
pub const FAR: usize = 1 << 32;

/// Whether this machine promises as much memory as the largest tensor here, of which almost nothing is written.
pub fn is_promised() -> bool {
    let promised = Vec::<u64>::new().try_reserve_exact((FAR + FAR / 16) / 2).is_ok();
    if !promised {
        skipped("the machine promises no 18 GiB of memory that is not written");
    }
    promised
}

/// An argument of a launch, at the beginning of its tensor and far behind it.
pub enum Arg {
    /// Rows of bytes, so many bytes apart from a first byte on, near and far. `None`: the kernel writes them, and they are compared.
    Rows {
        rows: usize,
        row: usize,
        stride: [usize; 2],
        at: [usize; 2],
        values: Option<Vec<u8>>,
        compared: bool,
    },
    /// Rows of a matrix of bf16 from one on, near and far, that tensor copies take boxes of so many rows of; all before them are not written.
    Map {
        rows: [usize; 2],
        cols: usize,
        at: [usize; 2],
        box_rows: usize,
        values: Vec<u8>,
    },
    U32([usize; 2]),
    U64([usize; 2]),
    F32(f32),
    Null,
}

use Arg::{F32, Null, U32, U64};

/// Rows that are read, the first of them row `far` of the large tensor.
pub fn read(values: Vec<u8>, row: usize, far: usize) -> Arg {
    let rows = values.len() / row;
    Arg::Rows { rows, row, stride: [row; 2], at: [0, far * row], values: Some(values), compared: false }
}

/// A small tensor that is read.
pub fn whole(values: Vec<u8>) -> Arg {
    let row = values.len();
    read(values, row, 0)
}

/// Rows that are written.
pub fn written(rows: usize, row: usize, far: usize) -> Arg {
    Arg::Rows { rows, row, stride: [row; 2], at: [0, far * row], values: None, compared: true }
}

impl Arg {
    /// The same where rows of the large tensor are so many bytes apart, and the first one begins there.
    pub fn within(self, far_stride: usize, far_at: usize) -> Self {
        let Arg::Rows { rows, row, values, compared, .. } = self else { panic!("rows") };
        Arg::Rows { rows, row, stride: [row, far_stride], at: [0, far_at], values, compared }
    }

    /// The same with values that the kernel changes.
    fn changed(self) -> Self {
        let Arg::Rows { rows, row, stride, at, values, .. } = self else { panic!("rows") };
        Arg::Rows { rows, row, stride, at, values, compared: true }
    }
}

pub fn both(x: usize) -> Arg {
    U32([x; 2])
}

pub fn f32s(seed: u64, n: usize) -> Vec<u8> {
    normal(seed, n).into_iter().flat_map(f32::to_le_bytes).collect()
}

pub fn bf16s(seed: u64, n: usize) -> Vec<u8> {
    normal(seed, n).into_iter().flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect()
}

pub fn i32s(values: impl IntoIterator<Item = usize>) -> Vec<u8> {
    values.into_iter().flat_map(|x| (x as i32).to_le_bytes()).collect()
}

/// A launch near and far: its first block, and how many.
pub struct Case {
    pub kernel: Kernel,
    pub shared: usize,
    pub far_block: usize,
    pub blocks: usize,
    pub args: Vec<Arg>,
}

impl Case {
    /// What the launch leaves in the rows that are compared.
    fn run(&self, far: bool) -> Option<Vec<Vec<u8>>> {
        let target = if self.kernel.entry.ends_with("sm90") { Target::OwnPtx(90) } else { Target::Ptx(80) };
        let compiler = Compiler::new(nvrtc()?, target, Some(&crate::skip::scratch()));
        let image = compiler.image(&self.kernel.source, &self.kernel.defines).unwrap();
        let text = String::from_utf8(image).unwrap();
        let mut ptx = text.trim_end_matches('\0').to_string();
        let side = usize::from(far);
        if far && self.far_block > 0 {
            ptx = with_first_block(&ptx, self.far_block);
        }
        let mut memory = Memory::new();
        let module = Module::load(&ptx, &mut memory).unwrap();
        let (mut bytes, mut compared) = (Vec::new(), Vec::new());
        for arg in &self.args {
            bytes.push(match arg {
                Arg::Rows { rows, row, stride, at, values, compared: kept } => {
                    let address = memory.alloc(at[side] + (rows - 1) * stride[side] + row).unwrap();
                    let begins: Vec<u64> = (0..*rows).map(|i| address + (at[side] + i * stride[side]) as u64).collect();
                    for (begin, values) in begins.iter().zip(values.iter().flat_map(|v| v.chunks(*row))) {
                        memory.write(*begin, values).unwrap();
                    }
                    if *kept {
                        compared.push((begins, *row));
                    }
                    address.to_le_bytes().to_vec()
                }
                Arg::Map { rows, cols, at, box_rows, values } => {
                    let address = memory.alloc(rows[side] * cols * 2).unwrap();
                    memory.write(address + (at[side] * cols * 2) as u64, values).unwrap();
                    map(address, (rows[side], *cols), *box_rows)
                }
                U32(x) => u32::try_from(x[side]).unwrap().to_le_bytes().to_vec(),
                U64(x) => (x[side] as u64).to_le_bytes().to_vec(),
                F32(x) => x.to_le_bytes().to_vec(),
                Null => 0u64.to_le_bytes().to_vec(),
            });
        }
        let config = Config {
            grid: [self.blocks as u32, 1, 1],
            block: [self.kernel.threads as u32, 1, 1],
            dynamic_shared: self.shared,
            ..Config::default()
        };
        let args: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
        let entry = self.kernel.entry;
        module.launch(entry, &config, &args, &memory).unwrap_or_else(|e| panic!("{entry}, far: {far}: {e}"));
        let left = compared.into_iter().map(|(begins, row)| {
            let mut all = vec![0; begins.len() * row];
            begins.iter().zip(all.chunks_mut(row)).for_each(|(begin, to)| memory.read(*begin, to).unwrap());
            all
        });
        Some(left.collect())
    }

    pub fn holds(&self) {
        let (Some(near), Some(far)) = (self.run(false), self.run(true)) else { return };
        let entry = self.kernel.entry;
        assert!(!near.is_empty() && near.iter().flatten().any(|&b| b != vgpu_fill()), "{entry} wrote nothing");
        for (i, (near, far)) in near.iter().zip(&far).enumerate() {
            let differs = near.iter().zip(far).position(|(a, b)| a != b);
            assert_eq!(differs, None, "{entry}: result {i} differs at this byte far behind the beginning");
        }
    }
}

/// A matrix of bf16 as `src/cuda/tensor_map.rs` describes it.
fn map(address: u64, (rows, cols): (usize, usize), box_rows: usize) -> Vec<u8> {
    let tiled = Tiled {
        data_type: 9,
        rank: 2,
        address,
        dims: &[cols as u64, rows as u64],
        strides: &[cols as u64 * 2],
        box_dims: &[64, box_rows as u32],
        element_strides: &[1, 1],
        interleave: 0,
        swizzle: 3,
        l2_promotion: 0,
        oob_fill: 0,
    };
    encode(&tiled).unwrap().to_vec()
}

/// What memory that nobody wrote reads as.
fn vgpu_fill() -> u8 {
    0xff
}

/// The program with its blocks counted from `first` on.
fn with_first_block(ptx: &str, first: usize) -> String {
    let mut changed = 0;
    let line = |line: &str| match line.trim().strip_prefix("mov.u32") {
        Some(rest) if rest.contains("%ctaid.x") => {
            changed += 1;
            let register = rest.split(',').next().unwrap().trim();
            format!("{line}\nadd.s32 {register}, {register}, {first};\n")
        }
        _ => format!("{line}\n"),
    };
    let text: String = ptx.lines().map(line).collect();
    assert!(changed > 0, "the kernel does not look at its block");
    text
}

/// The configuration of sm_80 with this entry whose defines have all of these words.
pub fn configuration(entry: &str, words: &[&str]) -> Configuration {
    let has = |k: &Kernel| {
        let all: Vec<String> = k.defines.iter().map(|(name, value)| format!("{name}={value}")).collect();
        words.iter().all(|w| all.iter().any(|d| d == w))
    };
    configurations(80)
        .into_iter()
        .find(|(k, _)| k.entry == entry && has(k))
        .unwrap_or_else(|| panic!("{entry} {words:?}"))
}

const B: DType = DType::Bf16;

#[test]
fn rows_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let (cols, n) = (4096, 32);
    // A multiple of the rows of every block.
    let far = FAR / cols + 16;
    let x = || read(bf16s(1, n * cols), 2 * cols, far);
    let w = || whole(bf16s(2, cols));
    let groups = || U32([n, far + n]);
    let cases = [
        Case {
            kernel: norm::forward_kernel(B, B, B, cols),
            shared: 0,
            far_block: far,
            blocks: n,
            args: vec![
                written(n, 2 * cols, far),
                written(n, 4, far),
                x(),
                w(),
                F32(1e-5),
                groups(),
                both(cols),
                both(256),
            ],
        },
        Case {
            kernel: norm::backward_kernel(B, B, B, B, cols),
            shared: 4 * cols,
            far_block: far / norm::ROUNDS,
            blocks: n / norm::ROUNDS,
            args: vec![
                read(bf16s(3, n * cols), 2 * cols, far).changed(),
                written(n / norm::ROUNDS, 4 * cols, far / norm::ROUNDS),
                read(bf16s(4, n * cols), 2 * cols, far),
                x(),
                w(),
                read(f32s(5, n), 4, far),
                groups(),
                both(cols),
                both(256),
                both(1),
                both(1),
            ],
        },
        Case {
            kernel: elementwise::kernel("add_bias", B, B, cols),
            shared: 0,
            far_block: far * cols.div_ceil(256 * 8),
            blocks: n * cols.div_ceil(256 * 8),
            args: vec![x().changed(), w(), both(cols)],
        },
        Case {
            // A strip of several: its sums wait for the others'.
            kernel: elementwise::column_kernel(B),
            shared: 0,
            far_block: FAR / cols / 512 * cols / 256,
            blocks: cols / 256,
            args: vec![
                Null,
                Null,
                Null,
                written(1, 4 * cols, FAR / cols / 512),
                whole(i32s(vec![0; cols / 256])),
                read(bf16s(1, 513 * cols), 2 * cols, FAR / cols),
                Null,
                Null,
                U32([513, FAR / cols + 513]),
                both(cols),
                both(0),
                both(0),
            ],
        },
        Case {
            kernel: rope::kernel(B),
            shared: 0,
            far_block: far * (cols / 2).div_ceil(256),
            blocks: n * (cols / 2).div_ceil(256),
            args: vec![
                x().changed(),
                whole(f32s(6, 50 * 64)),
                read(i32s((0..n).map(|i| i % 50)), 4, far),
                both(cols),
                both(64),
                both(0),
            ],
        },
        Case {
            kernel: cross_entropy::kernel(),
            shared: 0,
            far_block: far,
            blocks: 2,
            args: vec![
                written(2, 4, far),
                written(2, 4, far),
                written(2, 2 * cols, far),
                read(f32s(7, 2 * cols), 4 * cols, far),
                Arg::Rows { rows: 2, row: 4, stride: [4; 2], at: [0, 4 * far], values: None, compared: false },
                read(i32s([5, 4095]), 4, far),
                both(cols),
                F32(0.25),
                both(1),
            ],
        },
    ];
    // Updates read rows in 64s.
    let ((kernel, shared), beyond) = (configuration("lora_t", &["RANK=16"]), FAR / cols + 64);
    let x = || read(bf16s(1, 64 * cols), 2 * cols, beyond);
    let mut args = vec![written(64, 32, beyond), Null, Null, x(), whole(bf16s(2, 16 * cols)), Null, Null];
    args.extend([U32([64, beyond + 64]), both(cols), both(16), both(1), F32(0.5)]);
    args.extend((0..13).map(|_| both(0)));
    Case { kernel, shared, far_block: beyond / 64, blocks: 1, args }.holds();
    for mut case in cases {
        if case.kernel.entry == "cross_entropy" {
            // Which rows they are is another number far behind the beginning.
            rows_named(&mut case, far);
            continue;
        }
        case.holds();
    }
}

/// Runs the loss where the list of rows holds other numbers near and far.
fn rows_named(case: &mut Case, far: usize) {
    let mut named = |first: usize, side: bool| {
        let Arg::Rows { values, .. } = &mut case.args[4] else { panic!("rows") };
        *values = Some(i32s([first, first + 1]));
        case.run(side)
    };
    let (Some(near), Some(beyond)) = (named(0, false), named(far, true)) else { return };
    assert!(near == beyond, "cross_entropy differs far behind the beginning");
}

#[test]
fn rows_by_index_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    // An odd width: rows are copied in pieces of two bytes, of which there are as many as elements.
    let cols = 4095;
    let far = FAR / cols + 3;
    let bytes = 2 * cols;
    let (gather, units) = rows::kernel("gather", bytes);
    let (scatter, _) = rows::kernel("scatter", bytes);
    let blocks = units.div_ceil(256);
    for (kernel, swapped) in [(gather, false), (scatter, true)] {
        // From row `far` of one to row `far` of the other.
        let index = |at: usize| read(i32s([at]), 4, far);
        let case = |at: usize| Case {
            kernel,
            shared: 0,
            far_block: far * blocks,
            blocks,
            args: vec![
                written(1, bytes, far),
                read(bf16s(1, cols), bytes, far),
                index(at),
                both(units),
                U32([1, far + 1]),
            ],
        };
        let (Some(near), Some(beyond)) = (case(0).run(false), case(far).run(true)) else { return };
        assert!(near == beyond && near[0] == bf16s(1, cols), "{} (scatter: {swapped})", kernel.entry);
    }
    let cols = 4096;
    let far = FAR / cols + 3;
    let case = |token: usize| Case {
        kernel: rows::backward_kernel(B),
        shared: 0,
        far_block: 0,
        blocks: cols / 256,
        args: vec![
            read(f32s(1, cols), 4 * cols, far).changed(),
            whole(bf16s(2, cols)),
            whole(i32s([token])),
            whole(i32s([0])),
            both(1),
            both(cols),
            both(0),
            U32([1, far + 1]),
        ],
    };
    let (Some(near), Some(beyond)) = (case(0).run(false), case(far).run(true)) else { return };
    assert!(near == beyond, "embedding_backward");
}

#[test]
fn elements_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let block = 256 * 8;
    let (first, n) = (FAR / block + 1, 2 * block - 3);
    let at = first * block;
    let wide = |seed| read(f32s(seed, n), 4 * n, 0).within(4 * n, 4 * at);
    let narrow = |seed| read(bf16s(seed, n), 2 * n, 0).within(2 * n, 2 * at);
    let to = || written(1, 2 * n, 0).within(2 * n, 2 * at);
    let len = || U64([n, at + n]);
    let of = |kernel, args| Case { kernel, shared: 0, far_block: first, blocks: 2, args };
    let mut draws = vec![to(), narrow(1), len()];
    // Nothing is dropped, since what is goes by the place of an element.
    draws.extend([both(1), both(2), both(3), both(4), both(0), F32(1.25)]);
    for case in [
        of(swiglu::forward_kernel(B), vec![to(), narrow(1), narrow(2), len()]),
        of(swiglu::backward_kernel(B), vec![narrow(1).changed(), narrow(2).changed(), narrow(3).changed(), len()]),
        of(elementwise::kernel("add", B, B, 8), vec![narrow(1).changed(), narrow(2), len()]),
        of(dropout::kernel(B, B), draws),
        of(cast::kernel(B, DType::F32), vec![to(), wide(1), len()]),
    ] {
        case.holds();
    }
}

#[test]
fn attention_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let (heads, dim, n) = (4usize, 64, 70);
    let (cols, scale) = (heads * dim, 0.125);
    let far = FAR / cols + 8;
    let x = |seed| read(bf16s(seed, n * cols), 2 * cols, far);
    let to = || written(n, 2 * cols, far);
    let of_heads = |seed| read(f32s(seed, n * heads), 4 * heads, far);
    // A figure of all tokens, then another one.
    let stats = |values| {
        let (row, all) = (4 * n * heads, 4 * (far + n) * heads);
        Arg::Rows {
            rows: 2,
            row,
            stride: [row, all],
            at: [0, 4 * far * heads],
            compared: Option::is_none(&values),
            values,
        }
    };
    // The log of a sum of exponentials, so that weights are of order one.
    let lse = || read(vec![2.0f32; n * heads].into_iter().flat_map(f32::to_le_bytes).collect(), 4 * heads, far);
    let table = || whole(f32s(8, 80 * dim));
    let positions = || read(i32s(0..n), 4, far);
    let end = || [both(heads), both(heads), both(0), F32(scale)];
    let words = [format!("HEAD_DIM={dim}")];
    let of_width = |entry: &str| configuration(entry, &[words[0].as_str()]);

    // Lists of tiles name rows.
    let tiles = |rows: usize, first: usize| i32s((0..n).step_by(rows).flat_map(|i| [first, first + n, first + i]));
    let listed = |entry: &str, rows: usize, before: &dyn Fn() -> Vec<Arg>, after: &dyn Fn() -> Vec<Arg>| {
        let (kernel, shared) = of_width(entry);
        let case = |first: usize| {
            let mut args = before();
            args.push(whole(tiles(rows, first)));
            args.extend(after());
            Case { kernel, shared, far_block: 0, blocks: n.div_ceil(rows) * heads, args }
        };
        let (Some(near), Some(beyond)) = (case(0).run(false), case(far).run(true)) else { return };
        assert!(near == beyond, "{entry}");
    };
    let plain = || end().into_iter().collect::<Vec<_>>();
    let tokens = || U32([n, far + n]);
    let turned = || [table(), positions(), tokens()].into_iter().chain(end()).collect::<Vec<_>>();
    listed("attention_tiles_forward", 128, &|| vec![to(), written(n, 4 * heads, far), x(1), x(2), x(3)], &plain);
    let figures = || [vec![3.0f32; n * heads], normal(5, n * heads)].concat();
    let figures = || stats(Some(figures().into_iter().flat_map(f32::to_le_bytes).collect()));
    let backward = || vec![x(4), x(1), x(2), x(3), figures()];
    listed("attention_tiles_dq", 64, &|| [vec![to()], backward()].into_iter().flatten().collect(), &turned);
    listed("attention_tiles_dkdv", 64, &|| [vec![to(), to()], backward()].into_iter().flatten().collect(), &turned);
    let (kernel, shared) = of_width("attention_tiles_delta");
    let tasks = || U32([n * heads, (far + n) * heads]);
    let args = vec![stats(None), x(4), x(1), lse(), tasks()];
    Case { kernel, shared, far_block: far * heads / 32, blocks: (n * heads).div_ceil(32), args }.holds();

    // The plain kernels find the document's beginning beside each token.
    let of_block = |entry: &str, floats: usize, args: &dyn Fn(usize) -> Vec<Arg>| {
        let (kernel, _) = configuration(entry, &["X_T=bf16", "DIMS=2"]);
        let case = |first| Case { kernel, shared: 4 * floats, far_block: far, blocks: n, args: args(first) };
        let (Some(near), Some(beyond)) = (case(0).run(false), case(far).run(true)) else { return };
        assert!(near == beyond, "{entry}");
    };
    let starts = |first: usize| read(i32s(vec![first; n]), 4, far);
    let shape = || [both(heads), both(heads), both(dim), both(0), F32(scale)];
    of_block("attention_forward", 4 * dim, &|first| {
        let args = [to(), written(n, 4 * heads, far), x(1), x(2), x(3), starts(first), tasks()];
        args.into_iter().chain(shape()).collect()
    });
    of_block("attention_dq", 8 * dim, &|first| {
        let args = [to(), written(n, 4 * heads, far), x(4), x(5), x(1), x(2), x(3), lse(), starts(first)];
        args.into_iter().chain([table(), positions(), tasks()]).chain(shape()).collect()
    });
    of_block("attention_dkdv", 8 * dim, &|first| {
        let args = [to(), to(), x(4), x(1), x(2), x(3), lse(), of_heads(5), starts(first)];
        args.into_iter().chain([table(), positions(), tasks(), tokens()]).chain(shape()).collect()
    });
    // A sequence whose cache begins there.
    let (kernel, shared) = configuration("attention_decode", &["X_T=bf16", "DIMS=2"]);
    let (sequence, len) = (3, 40);
    let capacity = far.div_ceil(sequence);
    let cache = |seed| read(bf16s(seed, len * cols), 2 * cols, sequence * capacity);
    let mut args = vec![written(1, 2 * cols, sequence), read(bf16s(1, cols), 2 * cols, sequence), cache(2), cache(3)];
    args.extend([read(i32s([len]), 4, sequence), both(heads), both(heads), both(dim), both(0)]);
    args.extend([U32([64, capacity]), F32(scale)]);
    Case { kernel, shared, far_block: sequence * heads, blocks: heads, args }.holds();
}

/// The last tile of a large product, of the same operands as a product of that tile alone.
#[test]
fn products_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let tile = Tile::Small;
    let side = 64;
    // A result of more than 2^32 elements, and operands whose rows are long.
    let (wide, long, steps) = (65_600, (1 << 24) - side, 272);
    assert!(wide * wide > FAR && steps * long > FAR);
    let dims = |far: usize| U32([side, far]);
    // `n` rows of a tile that stands at (row, column) of a matrix of rows of `width` elements of so many bytes.
    let place = |arg: Arg, width: usize, row: usize, column: usize, bytes: usize| {
        arg.within(width * bytes, (row * width + column) * bytes)
    };
    let values = |seed, rows: usize| read(bf16s(seed, rows * side), 2 * side, 0);
    let tiles = |m: usize, n: usize| m.div_ceil(side) * n.div_ceil(side) - 1;
    let product = |op, k, (m, n): (usize, usize), a: Arg, b: Arg, [sa, sb]: [[usize; 2]; 2]| {
        let c = place(written(side, 4 * side, 0), n, m - side, n - side, 4);
        let args = vec![c, a, b, dims(m), dims(n), both(k), U32(sa), U32(sb), F32(1.0), both(0), both(0)];
        let kernel = matmul::kernel(tile, op, B, B, true);
        Case { kernel, shared: tile.shared(), far_block: tiles(m, n), blocks: 1, args }
    };
    let k = 64;
    let along = |seed, far: usize| read(bf16s(seed, side * k), 2 * k, far - side);
    let across = |seed, steps, far: usize| place(values(seed, steps), far, 0, far - side, 2);
    product(MatMul::NT, k, (wide, wide), along(1, wide), along(2, wide), [[k; 2], [k; 2]]).holds();
    let whole_of = |seed| read(bf16s(seed, steps * side), 2 * side, 0);
    let lengths = [side, long];
    product(MatMul::TN, steps, (long, side), across(1, steps, long), whole_of(2), [lengths, [side; 2]]).holds();
    let rows = read(bf16s(1, side * steps), 2 * steps, 0);
    product(MatMul::NN, steps, (side, long), rows, across(2, steps, long), [[steps; 2], lengths]).holds();

    let of_f32 = |seed| read(f32s(seed, side * k), 4 * k, wide - side);
    let c = || place(written(side, 4 * side, 0), wide, wide - side, wide - side, 4);
    let mut args = vec![c(), of_f32(1), of_f32(2), dims(wide), dims(wide), both(k)];
    args.extend([U64([k; 2]), U64([1; 2]), U64([k; 2]), U64([1; 2]), F32(1.0), both(0), both(0)]);
    Case { kernel: matmul::kernel_f32(), shared: 0, far_block: tiles(wide, wide), blocks: 1, args }.holds();

    let narrow = || place(written(side, 2 * side, 0), wide, wide - side, wide - side, 2);
    let residual = place(values(3, side), wide, wide - side, wide - side, 2);
    let mut args = vec![narrow(), Null, Null, Null, along(1, wide), along(2, wide)];
    args.extend((0..11).map(|_| Null));
    args.extend([residual, Null, Null, dims(wide), dims(wide), both(0), both(0), both(k), both(0)]);
    args.extend([both(side), both(0), both(0)]);
    let kernel = project::kernel(tile, false);
    Case { kernel, shared: tile.shared(), far_block: tiles(wide, wide), blocks: 1, args }.holds();

    let mut args = vec![narrow(), along(1, wide), Null, Null, across(2, k, wide), Null, Null];
    args.extend((0..6).map(|_| Null));
    args.extend([dims(wide), dims(wide), both(k), both(0), both(0)]);
    args.extend((0..14).map(|_| both(0)));
    let kernel = project::dx_kernel(tile);
    Case { kernel, shared: tile.shared(), far_block: tiles(wide, wide), blocks: 1, args }.holds();

    let before = place(read(f32s(4, side * side), 4 * side, 0), wide, wide - side, wide - side, 4).changed();
    let mut args = vec![before, Null, Null, across(1, k, wide), Null, Null, across(2, k, wide)];
    args.extend([dims(wide), both(0), both(0), dims(wide), both(k)]);
    let kernel = project::dw_kernel(tile);
    Case { kernel, shared: tile.shared(), far_block: tiles(wide, wide), blocks: 1, args }.holds();
}
