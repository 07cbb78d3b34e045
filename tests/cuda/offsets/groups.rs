//! Strips of low-rank updates, whose sums wait for those of others.

use super::Arg::{F32, Null, U32};
use super::{Arg, Case, FAR, bf16s, both, configuration, f32s, i32s, is_promised, read, whole, written};

#[test]
fn strips_of_updates_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let (n, rank, strip) = (4096, 16, 512);
    let far = FAR / n;
    let strips = far / strip + 2;
    let m = || U32([strip + 1, far + strip + 1]);
    let rows = |seed, width| read(bf16s(seed, strip * width), 2 * width, far);
    let none = |count| (0..count).map(|_| Null);

    let (kernel, shared) = configuration("lora_u_db", &["RANK=16"]);
    let chunks = n / 512;
    let mut args: Vec<Arg> = none(3).collect();
    args.extend([whole(f32s(9, n * rank)), Null, Null]);
    // Sums of u of the first chunk, then those of dB of its columns.
    args.extend([written(strip, 4 * rank, far), written(512, 4 * rank, far / strip * n)]);
    args.push(whole(i32s(vec![0; 3 * strips + chunks])));
    for operand in [rows(1, n), whole(bf16s(3, n * rank)), rows(2, rank)] {
        args.extend([operand, Null, Null]);
    }
    args.extend([m(), both(n), both(0), both(0), both(rank), F32(0.5)]);
    Case { kernel, shared, far_block: far / strip * chunks, blocks: 1, args }.holds();

    let (kernel, shared) = configuration("lora_da", &["RANK=16"]);
    let mut args = vec![whole(f32s(9, n * rank)), Null, Null, written(rank, 4 * n, far / strip * rank)];
    args.extend([whole(i32s(vec![0; n / 128])), rows(1, n), rows(2, rank), Null, Null]);
    args.extend([m(), both(n), both(rank), both(1), both(0)]);
    args.extend((0..12).map(|_| both(0)));
    Case { kernel, shared, far_block: far / strip * (n / 128), blocks: 1, args }.holds();
}
