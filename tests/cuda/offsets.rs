//! Tensors of more than 2^32 elements: a block that works far behind their beginning gives the bits that it gives at the beginning.
//!
//! The emulator's memory takes no room before it is written, so tensors can be as large as on a GPU. A grid that reaches the end of one
//! would run for days: the program's text is changed so that its first block has a large number. Needs NVRTC, no device.
//! This file has what the tests share.

mod attention;
mod figures;
mod groups;
pub mod hopper;
mod masks;
mod products;
mod rows;
mod tables;

use ringtune::cuda::compile::{Compiler, Target};
use ringtune::cuda::configurations;
use ringtune::cuda::kernels::{Configuration, Kernel};
use ringtune::tensor::DType;
use vgpu::tensor_map::{Tiled, encode};
use vgpu::{Config, Memory, Module};

use crate::close::normal;
use crate::skip::{nvrtc, skipped};

const B: DType = DType::Bf16;

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
    /// Rows as a matrix of bf16 of this shape, near and far, that tensor copies take boxes of so many rows of.
    Map {
        of: Box<Arg>,
        shape: [(usize, usize); 2],
        box_rows: usize,
    },
    /// 64-bit words, some of them addresses of rows: a head, then, so many words behind it near and far, more.
    Table {
        of: Vec<Arg>,
        head: Vec<Word>,
        at: [usize; 2],
        more: Vec<Word>,
    },
    /// An address so many bytes behind the beginning of rows, near and far.
    Behind(Box<Arg>, [usize; 2]),
    U32([usize; 2]),
    U64([usize; 2]),
    F32(f32),
    Null,
}

use Arg::{F32, Null, U32, U64};

/// A word of a table.
#[derive(Clone, Copy)]
pub enum Word {
    /// So many bytes behind the beginning of one of its tensors.
    Address(usize, [usize; 2]),
    Number([usize; 2]),
}

/// What memory that is compared holds: where rows begin, and their bytes.
type Compared = Vec<(Vec<u64>, usize)>;

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
    pub fn changed(self) -> Self {
        let Arg::Rows { rows, row, stride, at, values, .. } = self else { panic!("rows") };
        Arg::Rows { rows, row, stride, at, values, compared: true }
    }

    /// A map of boxes of so many rows of the matrix in which they lie.
    pub fn boxes(self, shape: [(usize, usize); 2], box_rows: usize) -> Self {
        Arg::Map { of: Box::new(self), shape, box_rows }
    }

    /// Puts it into memory, near (0) or far (1): the bytes of the argument.
    fn place(&self, side: usize, memory: &mut Memory, compared: &mut Compared) -> Vec<u8> {
        match self {
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
            Arg::Map { of, shape, box_rows } => map(address(&of.place(side, memory, compared)), shape[side], *box_rows),
            Arg::Table { of, head, at, more } => {
                let addresses: Vec<u64> = of.iter().map(|arg| address(&arg.place(side, memory, compared))).collect();
                let word = |word: &Word| match word {
                    Word::Address(i, behind) => (addresses[*i] + behind[side] as u64).to_le_bytes(),
                    Word::Number(x) => (x[side] as u64).to_le_bytes(),
                };
                let words = |of: &[Word]| of.iter().flat_map(word).collect::<Vec<u8>>();
                let table = memory.alloc((head.len() + at[side] + more.len()) * 8).unwrap();
                memory.write(table, &words(head)).unwrap();
                memory.write(table + (head.len() + at[side]) as u64 * 8, &words(more)).unwrap();
                table.to_le_bytes().to_vec()
            }
            Arg::Behind(of, bytes) => {
                let begin = address(&of.place(side, memory, compared));
                (begin + bytes[side] as u64).to_le_bytes().to_vec()
            }
            U32(x) => u32::try_from(x[side]).unwrap().to_le_bytes().to_vec(),
            U64(x) => (x[side] as u64).to_le_bytes().to_vec(),
            F32(x) => x.to_le_bytes().to_vec(),
            Null => 0u64.to_le_bytes().to_vec(),
        }
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

pub fn f64s(values: impl IntoIterator<Item = f64>) -> Vec<u8> {
    values.into_iter().flat_map(f64::to_le_bytes).collect()
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
    /// What the launch leaves in the rows that are compared; `None` without NVRTC.
    pub fn run(&self, far: bool) -> Option<Vec<Vec<u8>>> {
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
        let mut compared = Compared::new();
        let bytes: Vec<Vec<u8>> = self.args.iter().map(|arg| arg.place(side, &mut memory, &mut compared)).collect();
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

    /// Near and far give the same bits.
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

/// An argument that is an address.
fn address(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().unwrap())
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

/// Holds a kernel to its bits where more than places differ, as numbers of rows do: what it has near, then far.
pub fn alike(case: impl Fn(usize) -> Case) {
    let (Some(near), Some(far)) = (case(0).run(false), case(1).run(true)) else { return };
    let entry = case(0).kernel.entry;
    assert!(!near.is_empty() && near.iter().flatten().any(|&b| b != vgpu_fill()), "{entry} wrote nothing");
    assert!(near == far, "{entry} differs far behind the beginning");
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
