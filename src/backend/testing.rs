//! A device without memory, for tests of what the checks refuse.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::batch::Batch;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

/// It has shapes and no elements.
pub struct Shapes;

impl Device for Shapes {
    type Buf = ();
    type Plan = ();

    fn describe(&self) -> String {
        "shapes alone".into()
    }

    fn alloc(&self, rows: usize, cols: usize, dtype: DType) -> Result<Tensor<Self>> {
        Ok(Tensor::from_buf((), rows, cols, dtype))
    }

    fn upload(&self, _dst: &mut Tensor<Self>, _src: &[f32]) -> Result<()> {
        Ok(())
    }

    fn upload_i32(&self, _dst: &mut Tensor<Self>, _src: &[i32]) -> Result<()> {
        Ok(())
    }

    fn download(&self, _dst: &mut [f32], _src: &Tensor<Self>) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn fill_zero(&self, _dst: &mut Tensor<Self>) -> Result<()> {
        Ok(())
    }

    fn copy(&self, _dst: &mut Tensor<Self>, _src: &Tensor<Self>) -> Result<()> {
        Ok(())
    }
}

/// A tensor of f32.
pub fn f32s(rows: usize, cols: usize) -> Tensor<Shapes> {
    Tensor::from_buf((), rows, cols, DType::F32)
}

/// A micro-batch of `n` tokens.
pub fn batch(n: usize) -> Batch<Shapes> {
    let [tokens, targets, positions, doc_start, rows, by_token] = [n; 6].map(i32s);
    Batch { tokens, targets, positions, doc_start, rows, by_token, plan: () }
}

/// A column of integers.
pub fn i32s(rows: usize) -> Tensor<Shapes> {
    Tensor::from_buf((), rows, 1, DType::I32)
}

/// Asserts that a check panics and names the argument.
pub fn refuses<T>(name: &str, check: impl FnOnce() -> T) {
    let panic = catch_unwind(AssertUnwindSafe(check)).err().unwrap_or_else(|| panic!("a wrong {name} was accepted"));
    let message = panic.downcast_ref::<String>().expect("a message with values");
    assert!(message.contains(name), "{name} is wrong, the message says: {message}");
}

/// Runs a check with the right shapes, then with each argument in turn one row and one column larger: it has to accept the first
/// and to refuse the others by name. `arguments` are names and shapes; integers are columns called so.
pub fn each_wrong_shape_is_refused(arguments: &[(&str, (usize, usize), DType)], check: impl Fn(&[Tensor<Shapes>])) {
    let tensors = |wrong: Option<(usize, (usize, usize))>| -> Vec<Tensor<Shapes>> {
        let make = |(i, &(_, (rows, cols), dtype)): (usize, &(&str, (usize, usize), DType))| {
            let (more_rows, more_cols) = wrong.filter(|(at, _)| *at == i).map_or((0, 0), |(_, more)| more);
            Tensor::from_buf((), rows + more_rows, cols + more_cols, dtype)
        };
        arguments.iter().enumerate().map(make).collect()
    };
    check(&tensors(None));
    for (i, (name, ..)) in arguments.iter().enumerate() {
        for more in [(1, 0), (0, 1)] {
            refuses(&format!("shape of {name} is"), || check(&tensors(Some((i, more)))));
        }
    }
}
