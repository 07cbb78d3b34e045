//! What the kernels ask of memory, counted by the emulator: every request to global memory is made of whole sectors, and the loop of a
//! product meets no bank of shared memory twice. Needs NVRTC, no device.

mod rows;

use std::rc::Rc;

use ringtune::backend::MatMul;
use ringtune::cuda::compile::{Target, compile};
use ringtune::cuda::kernels::Kernel;
use ringtune::cuda::tiles::Tile;
use ringtune::cuda::{attention_tiles, matmul, norm};
use ringtune::tensor::DType;
use vgpu::{Config, Counters, Memory, Module};

use crate::products::{OPS, Shape};
use crate::skip::nvrtc;

/// What makes the words of a table.
type Words = dyn Fn(&mut Memory) -> Vec<u64>;

/// An argument of a launch.
#[derive(Clone)]
enum Arg {
    /// A buffer of so many bytes, all zero.
    Buffer(usize),
    /// A buffer of words.
    Words(Vec<u32>),
    /// 64-bit words, for which memory may be taken.
    Table(Rc<Words>),
    /// No buffer.
    Null,
    U32(u32),
    U64(u64),
    F32(f32),
}

/// Runs a kernel on buffers of zeros.
fn run(kernel: &Kernel, blocks: usize, shared: usize, args: &[Arg]) -> Option<Counters> {
    let ptx = compile(nvrtc()?, &kernel.source, &kernel.defines, Target::Ptx(80)).unwrap().ptx;
    let mut memory = Memory::new();
    let module = Module::load(&String::from_utf8(ptx).unwrap(), &mut memory).unwrap();
    let bytes: Vec<Vec<u8>> = args
        .iter()
        .map(|arg| match arg {
            Arg::Buffer(n) => {
                let address = memory.alloc(*n).unwrap();
                memory.write(address, &vec![0; *n]).unwrap();
                address.to_le_bytes().to_vec()
            }
            Arg::Words(words) => {
                let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                let address = memory.alloc(bytes.len()).unwrap();
                memory.write(address, &bytes).unwrap();
                address.to_le_bytes().to_vec()
            }
            Arg::Table(words) => {
                let bytes: Vec<u8> = words(&mut memory).iter().flat_map(|w| w.to_le_bytes()).collect();
                let address = memory.alloc(bytes.len()).unwrap();
                memory.write(address, &bytes).unwrap();
                address.to_le_bytes().to_vec()
            }
            Arg::Null => 0u64.to_le_bytes().to_vec(),
            Arg::U64(x) => x.to_le_bytes().to_vec(),
            Arg::U32(x) => x.to_le_bytes().to_vec(),
            Arg::F32(x) => x.to_le_bytes().to_vec(),
        })
        .collect();
    let config = Config {
        grid: [blocks as u32, 1, 1],
        block: [kernel.threads as u32, 1, 1],
        dynamic_shared: shared,
        ..Config::default()
    };
    let args: Vec<&[u8]> = bytes.iter().map(Vec::as_slice).collect();
    Some(module.launch(kernel.entry, &config, &args, &memory).unwrap())
}

fn matmul(tile: Tile, op: MatMul, Shape { m, n, k }: Shape) -> Option<Counters> {
    let kernel = matmul::kernel(tile, op, DType::Bf16, DType::Bf16, true);
    let (block_m, block_n) = tile.block();
    let [(ar, ac), (br, bc)] = Shape { m, n, k }.operands(op);
    let words = [m, n, k, ac, bc].map(|x| Arg::U32(x as u32));
    let mut args = vec![Arg::Buffer(m * n * 2), Arg::Buffer(ar * ac * 2), Arg::Buffer(br * bc * 2)];
    args.extend(words);
    args.extend([Arg::F32(1.0), Arg::U32(1), Arg::U32(0)]);
    run(&kernel, m.div_ceil(block_m) * n.div_ceil(block_n), tile.shared(), &args)
}

#[test]
fn a_product_reads_whole_sectors_and_its_loop_meets_no_bank_twice() {
    for tile in Tile::ALL {
        let (block_m, block_n) = tile.block();
        for op in OPS {
            let s = Shape { m: 2 * block_m, n: block_n, k: 128 };
            let Some(short) = matmul(tile, op, s) else { return };
            let Some(long) = matmul(tile, op, Shape { k: 320, ..s }) else {
                return;
            };
            let what = format!("{tile:?} {op:?}: {long:?}");
            assert_eq!(long.tensor_flops, (2 * s.m * s.n * 320) as u64, "{what}");
            // Each tile of A and of B is read once per tile of C; C is written once.
            let read = 2 * 320 * (s.m * (s.n / block_n) + s.n * (s.m / block_m));
            assert_eq!((long.global_read, long.global_written), (read as u64, (2 * s.m * s.n) as u64), "{what}");
            assert_eq!(long.global_sectors * 32, long.global_read + long.global_written, "{what}");
            // What conflicts there are belong to the staging of the result, which k does not lengthen.
            assert_eq!(long.bank_conflicts, short.bank_conflicts, "{what}");
            // One barrier for each 64 steps, one before the loop, per warp.
            let warps = (matmul::kernel(tile, op, DType::Bf16, DType::Bf16, true).threads / 32 * 2) as u64;
            assert_eq!(long.barriers - short.barriers, warps * 3, "{what}");
        }
    }
}

/// A tile of attention of a document of `n` tokens: forward and dq the last one, dkdv the first.
fn attention(n: usize, dim: usize) -> Option<[Counters; 3]> {
    let like_q = Arg::Buffer(n * dim * 2);
    let word = |x: usize| Arg::U32(x as u32);
    let tile = |first: usize| Arg::Words(vec![0, n as u32, first as u32]);
    let heads = [word(1), word(1), word(0), Arg::F32(0.1)];
    let (forward, shared) = attention_tiles::forward_kernel(dim, 80);
    let mut args =
        vec![like_q.clone(), Arg::Buffer(n * 4), like_q.clone(), like_q.clone(), like_q.clone(), tile(n - 128)];
    args.extend(heads.clone());
    let forward = run(&forward, 1, shared, &args)?;
    let [_, (dq, dq_shared), (dkdv, dkdv_shared)] = attention_tiles::backward_kernels(dim);
    let backward = |kernel, shared, results: usize, first| {
        let mut args = vec![like_q.clone(); results + 4];
        args.extend([Arg::Buffer(2 * n * 4), tile(first), Arg::Buffer(n * dim * 4), Arg::Buffer(n * 4), word(n)]);
        args.extend(heads.clone());
        run(kernel, 1, shared, &args)
    };
    Some([forward, backward(&dq, dq_shared, 1, n - 64)?, backward(&dkdv, dkdv_shared, 2, 0)?])
}

/// The loops over blocks: what does not grow with the document belongs to what stands before and behind them.
#[test]
fn attention_meets_no_bank_twice_and_reads_each_block_once() {
    for dim in [64, 80, 128] {
        let (Some(short), Some(long)) = (attention(256, dim), attention(512, dim)) else { return };
        for (at, (short, long)) in short.iter().zip(&long).enumerate() {
            let what = format!("{} of {dim}: {short:?} {long:?}", ["forward", "dq", "dkdv"][at]);
            assert_eq!(long.bank_conflicts, short.bank_conflicts, "{what}");
            // 256 more rows of k and v, or of q and dout with two figures each.
            let rows = 256 * (2 * dim * 2 + if at == 2 { 8 } else { 0 });
            assert_eq!(long.global_read - short.global_read, rows as u64, "{what}");
            assert_eq!((long.global_sectors - short.global_sectors) * 32, rows as u64, "{what}");
        }
    }
}

#[test]
fn a_norm_reads_and_writes_whole_sectors() {
    let (rows, width) = (32, 2048);
    let bytes = rows * width * 2;
    let b = DType::Bf16;
    let kernel = norm::forward_kernel(b, b, b, width);
    let counts = [rows, width, kernel.threads].map(|x| Arg::U32(x as u32));
    let mut args =
        vec![Arg::Buffer(bytes), Arg::Buffer(rows * 4), Arg::Buffer(bytes), Arg::Buffer(width * 2), Arg::F32(1e-5)];
    args.extend(counts);
    let Some(c) = run(&kernel, rows, 0, &args) else { return };
    // x twice (the second time from a cache), the weight, out; a sector of its own for each rstd.
    assert_eq!(c.global_sectors as usize * 32, bytes * 4 + rows * 32, "{c:?}");

    let kernel = norm::backward_kernel(b, b, b, b, width);
    let blocks = rows / norm::ROUNDS;
    let mut args = vec![Arg::Buffer(bytes), Arg::Buffer(blocks * width * 4), Arg::Buffer(bytes), Arg::Buffer(bytes)];
    args.extend([Arg::Buffer(width * 2), Arg::Buffer(rows * 4)]);
    args.extend([rows, width, kernel.threads, 0, 1].map(|x| Arg::U32(x as u32)));
    let Some(c) = run(&kernel, blocks, width * 4, &args) else {
        return;
    };
    // x, dout and w twice, dx once, the partial sums once; each warp reads the sector of its rstd.
    let sectors = (bytes * 7 + blocks * width * 4) / 32 + rows * (kernel.threads / 32);
    assert_eq!(c.global_sectors as usize, sectors, "{c:?}");
}
