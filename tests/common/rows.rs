//! What every device's rows by index and its gradient of the embedding are held to.

use ringtune::backend::Backend;
use ringtune::batch::IGNORE;
use ringtune::tensor::DType;

use super::batches::loaded;
use super::close::{tensor, tensor_i32, values};

/// Gather, scatter and the embedding's gradient of rows of `c` elements.
pub fn gather_scatter_and_embedding_gradient<B: Backend>(dev: &B, name: &str, dtype: DType, c: usize) {
    let v = 300;
    // All of them are exact in bf16.
    let w: Vec<f32> = (0..v * c).map(|i| (i % 251) as f32).collect();
    let tokens: Vec<i32> = (0..77).map(|i| (i * i * 7) % v as i32).collect();
    let n = tokens.len();
    let wt = tensor(dev, v, c, dtype, &w);
    let t = tensor_i32(dev, &tokens);
    let mut out = dev.alloc(n, c, dtype).unwrap();
    dev.embedding_forward(&mut out, &wt, &t).unwrap();
    let got = values(dev, &out);
    for (i, &token) in tokens.iter().enumerate() {
        assert_eq!(got[i * c..(i + 1) * c], w[token as usize * c..(token as usize + 1) * c], "{name}");
    }
    // Small integers: the sums are exact in any order. Rows below `first` and beyond the table are skipped.
    let (first, rows) = (17, 250);
    let mut dw = tensor(dev, rows, c, DType::F32, &vec![1.0; rows * c]);
    let batch = loaded(dev, &tokens, &vec![IGNORE; n], &vec![0; n]);
    dev.embedding_backward(&mut dw, &out, &batch, first).unwrap();
    let mut expected = vec![1.0; rows * c];
    for (i, &token) in tokens.iter().enumerate() {
        let token = token as usize;
        if (first..first + rows).contains(&token) {
            (0..c).for_each(|j| expected[(token - first) * c + j] += got[i * c + j]);
        }
    }
    assert_eq!(values(dev, &dw), expected, "{name} {dtype:?} {c}");
    let rows: Vec<i32> = (0..n as i32).map(|i| (i * 7 + 2) % 300).collect();
    let mut back = tensor(dev, v, c, dtype, &w);
    dev.scatter_rows(&mut back, &out, &tensor_i32(dev, &rows)).unwrap();
    let back = values(dev, &back);
    for r in 0..v {
        let expected = match rows.iter().position(|&x| x as usize == r) {
            Some(i) => &got[i * c..(i + 1) * c],
            None => &w[r * c..(r + 1) * c],
        };
        assert_eq!(&back[r * c..(r + 1) * c], expected, "{name} {dtype:?} {c} row {r}");
    }
}

/// The sum of a token's gradients runs from its first place to its last, on top of what was there: the bits say so.
pub fn the_embedding_gradient_is_summed_in_order<B: Backend>(dev: &B, name: &str) {
    let (n, c) = (60, 20);
    let dout = super::close::normal(1, n * c);
    let tokens: Vec<i32> = (0..n as i32).map(|i| i % 3).collect();
    let batch = loaded(dev, &tokens, &vec![IGNORE; n], &vec![0; n]);
    let before = super::close::normal(2, 3 * c);
    let (dt, mut dw) = (tensor(dev, n, c, DType::F32, &dout), tensor(dev, 3, c, DType::F32, &before));
    dev.embedding_backward(&mut dw, &dt, &batch, 0).unwrap();
    let mut expected = before;
    for (i, &token) in tokens.iter().enumerate() {
        (0..c).for_each(|j| expected[token as usize * c + j] += dout[i * c + j]);
    }
    super::close::assert_same(name, &values(dev, &dw), &expected);
}
