//! What is beyond the counts, grids and coordinates of kernels is an error in words before anything is launched: kernels/README.md has the list.

use ringtune::backend::{Attention, AttentionGrads, Backend, Heads, Mask, MatMul, Norm, Write};
use ringtune::cuda::{Cuda, matmul_sm90};
use ringtune::tensor::{DType, Device, Tensor};

use crate::batches::documents;
use crate::hopper::in_a_child;
use crate::skip::device;

/// A tensor that says it is so large and has no memory behind it: nothing may be launched with it.
fn claimed(dev: &Cuda, rows: usize, cols: usize, dtype: DType) -> Tensor<Cuda> {
    Tensor::from_buf(dev.alloc(1, 1, dtype).unwrap().buf, rows, cols, dtype)
}

/// A device, and what it says of an operation; it has launched nothing.
fn refused(dev: &Cuda, operation: impl FnOnce() -> ringtune::error::Result<()>) -> String {
    let launched = || dev.tally().unwrap().launches;
    let before = launched();
    let said = operation().unwrap_err().to_string();
    assert_eq!(launched(), before, "{said}");
    said
}

#[test]
fn counts_and_grids_beyond_32_bits() {
    let Some(dev) = device() else { return };
    let beyond = (1 << 32) - (1 << 16);
    // One more than the largest count, then as many blocks as there are numbers for, and one more.
    for (rows, cols, said) in [
        (
            1,
            beyond,
            "cuda: add_bias: 4294901760 rows, columns or elements in one launch, at most 4294901759 are possible",
        ),
        (1 << 31, 8, "cuda: add_bias: 2147483648 blocks in one launch, at most 2147483647 are possible"),
        (1 << 33, 8, "cuda: add_bias: 8589934592 blocks in one launch, at most 2147483647 are possible"),
    ] {
        let (mut x, bias) = (claimed(&dev, rows, cols, DType::Bf16), claimed(&dev, 1, cols, DType::Bf16));
        let e = refused(&dev, || dev.add_bias(&mut x, &bias));
        assert!(e.starts_with(said) && e.contains("--per-device-train-batch-size"), "{e}");
    }
    let e = dev.new_batch((1 << 30) + 1).err().unwrap().to_string();
    assert!(
        e.starts_with("cuda: a micro-batch: 1073741825 tokens in one launch, at most 1073741824 are possible"),
        "{e}"
    );
}

#[test]
fn rows_of_operands_beyond_32_bits_inside_a_tile() {
    let Some(dev) = device() else { return };
    let long = 1 << 24;
    let (a, b) = (claimed(&dev, 1, long, DType::F32), claimed(&dev, 1, long, DType::Bf16));
    for (a, b) in [(&a, &b), (&b, &a)] {
        let mut c = dev.alloc(1, 1, DType::F32).unwrap();
        let e = refused(&dev, || dev.matmul(&mut c, a, b, MatMul::NT, 1.0, Write::Set));
        assert_eq!(e, "cuda: a product of rows of 16777216 elements, at most 16777215 are supported");
    }
    // Of the second alone.
    let (a, b) = (claimed(&dev, 1, 8, DType::F32), claimed(&dev, 8, long, DType::Bf16));
    let mut c = claimed(&dev, 1, long, DType::F32);
    let e = refused(&dev, || dev.matmul(&mut c, &a, &b, MatMul::NN, 1.0, Write::Set));
    assert_eq!(e, "cuda: a product of rows of 16777216 elements, at most 16777215 are supported");
}

/// A matrix with more rows than tensor copies have coordinates.
#[test]
fn matrices_beyond_the_coordinates_of_tensor_copies() {
    let Some(dev) = device() else { return };
    if dev.properties().cc != matmul_sm90::CC {
        if dev.properties().emulated {
            in_a_child(&["--exact", "beyond::matrices_beyond_the_coordinates_of_tensor_copies"]);
        }
        return;
    }
    let rows = (1 << 30) + 1;
    let (a, b) = (claimed(&dev, rows, 64, DType::Bf16), claimed(&dev, 8, 64, DType::Bf16));
    let mut c = claimed(&dev, rows, 8, DType::Bf16);
    let e = refused(&dev, || dev.matmul(&mut c, &a, &b, MatMul::NT, 1.0, Write::Set));
    assert_eq!(
        e,
        "cuda: tensor copies of a matrix of 1073741825 x 64 elements: at most 1073741824 rows and columns are supported"
    );
}

/// An attention of so many claimed tokens, forward, then backward.
fn attention(dev: &Cuda, n: usize, heads: Heads, dtype: DType) -> [String; 2] {
    let (wide, narrow) = (heads.n_query * heads.head_dim, heads.n_kv * heads.head_dim);
    let of = |cols| claimed(dev, n, cols, dtype);
    let (q, k, v, dout, lse) = (of(wide), of(narrow), of(narrow), of(wide), claimed(dev, n, heads.n_query, DType::F32));
    let mut batch = documents(dev, &[0]);
    batch.doc_start = claimed(dev, n, 1, DType::I32);
    let x = Attention { q: &q, k: &k, v: &v, batch: &batch, heads, mask: Mask { window: None } };
    let (mut out, mut of_lse) = (of(wide), claimed(dev, n, heads.n_query, DType::F32));
    // Forward is refused by the heads alone.
    let forward = if n > 1 { String::new() } else { refused(dev, || dev.attention_forward(&mut out, &mut of_lse, x)) };
    let (mut dq, mut dk, mut dv) = (of(wide), of(narrow), of(narrow));
    let dx = AttentionGrads { dq: &mut dq, dk: &mut dk, dv: &mut dv };
    [forward, refused(dev, || dev.attention_backward(dx, &dout, &out, &lse, x, None))]
}

#[test]
fn heads_and_figures_of_attention() {
    let Some(dev) = device() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        for e in attention(&dev, 1, Heads { n_query: 1, n_kv: 1, head_dim: 512 }, dtype) {
            assert_eq!(e, "cuda: attention with heads of 512 elements, 256 at most are supported");
        }
        for e in attention(&dev, 1, Heads { n_query: 1 << 17, n_kv: 1, head_dim: 128 }, dtype) {
            assert_eq!(
                e,
                "cuda: attention with 131072 heads of 128 elements, 16777215 elements of all heads at most are supported"
            );
        }
    }
    // No memory is taken before: 16 GiB of figures would not fit here.
    let [_, e] = attention(&dev, 1 << 28, Heads { n_query: 8, n_kv: 8, head_dim: 64 }, DType::Bf16);
    let said = "cuda: attention_backward: 4294967296 figures of 268435456 tokens and 8 heads in one launch, at most 4294901759 are possible";
    assert!(e.starts_with(said), "{e}");
}

/// The sums of a block for the gradient of a norm's weight have to fit its shared memory.
#[test]
fn norms_wider_than_shared_memory() {
    let Some(dev) = device() else { return };
    let width = 60_000;
    let of = |dtype| claimed(&dev, 3, width, dtype);
    let (x, dout, rstd) = (of(DType::F32), of(DType::F32), claimed(&dev, 3, 1, DType::F32));
    let w = claimed(&dev, 1, width, DType::F32);
    let (mut dx, mut dw) = (of(DType::F32), claimed(&dev, 1, width, DType::F32));
    let norm = Norm { x: &x, w: &w, eps: 1e-5 };
    let e = refused(&dev, || dev.rmsnorm_backward(&mut dx, Some(&mut dw), &dout, &rstd, norm, Write::Set));
    let said = "cuda: the gradient of a norm over 60000 elements needs 240000 bytes of shared memory, a block has ";
    assert!(e.starts_with(said) && e.ends_with(" at most"), "{e}");
}
