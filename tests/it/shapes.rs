//! Every operation refuses every argument of a wrong shape, by name, whatever the backend: the checks of `src/backend`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use ringtune::backend::*;
use ringtune::batch::Batch;
use ringtune::error::Result;
use ringtune::tensor::{DType, Device, Tensor};

/// A device without memory: it has shapes and no elements.
struct Shapes;

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
fn f32s(rows: usize, cols: usize) -> Tensor<Shapes> {
    Tensor::from_buf((), rows, cols, DType::F32)
}

/// A micro-batch of `n` tokens.
fn batch(n: usize) -> Batch<Shapes> {
    let [tokens, targets, positions, doc_start, rows, by_token] = [n; 6].map(i32s);
    Batch { tokens, targets, positions, doc_start, rows, by_token, plan: () }
}

/// A column of integers.
fn i32s(rows: usize) -> Tensor<Shapes> {
    Tensor::from_buf((), rows, 1, DType::I32)
}

/// Asserts that a check panics and names the argument.
fn refuses<T>(name: &str, check: impl FnOnce() -> T) {
    let panic = catch_unwind(AssertUnwindSafe(check)).err().unwrap_or_else(|| panic!("a wrong {name} was accepted"));
    let message = panic.downcast_ref::<String>().expect("a message with values");
    assert!(message.contains(name), "{name} is wrong, the message says: {message}");
}

/// Runs a check with the right shapes, then with each argument in turn one row and one column larger: it has to accept the first
/// and to refuse the others by name. `arguments` are names and shapes; integers are columns called so.
fn each_wrong_shape_is_refused(arguments: &[(&str, (usize, usize), DType)], check: impl Fn(&[Tensor<Shapes>])) {
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

mod adamw {
    use super::*;

    fn slot<'a>(t: &'a mut [Tensor<Shapes>; 4], g: &'a Tensor<Shapes>) -> AdamWSlot<'a, Shapes> {
        let [p, master, m, v] = t;
        AdamWSlot { p, master: Some(master), m, v, g, first_row: 5, range: 0..g.len(), decays: true, lr_scale: 1.0 }
    }

    #[test]
    fn every_wrong_shape_is_refused() {
        let f = DType::F32;
        // One row more of g would end beyond p; a taller p is none's business.
        let arguments = [("master", (3, 8), f), ("m", (3, 8), f), ("v", (3, 8), f)];
        let g = f32s(3, 8);
        let p = || Tensor::from_buf((), 8, 8, DType::Bf16);
        let copy = |t: &Tensor<Shapes>| f32s(t.rows(), t.cols());
        each_wrong_shape_is_refused(&arguments, |t| {
            let mut all = [p(), copy(&t[0]), copy(&t[1]), copy(&t[2])];
            slot(&mut all, &g).check("adamw");
        });
        for g in [f32s(4, 8), f32s(3, 9)] {
            let mut all = [p(), copy(&g), copy(&g), copy(&g)];
            refuses("shape of p", || slot(&mut all, &g).check("adamw"));
        }
        let mut all = [f32s(8, 8), copy(&g), copy(&g), copy(&g)];
        refuses("element type of p", || slot(&mut all, &g).check("adamw"));
    }
}

mod attention {
    use super::*;

    const HEADS: Heads = Heads { n_query: 4, n_kv: 2, head_dim: 8 };
    const MASK: Mask = Mask { window: None };
    const F: DType = DType::F32;
    const I: DType = DType::I32;

    fn grads(t: &[Tensor<Shapes>], f: impl FnOnce(AttentionGrads<'_, Shapes>)) {
        let copy = |t: &Tensor<Shapes>| f32s(t.rows(), t.cols());
        let (mut dq, mut dk, mut dv) = (copy(&t[0]), copy(&t[1]), copy(&t[2]));
        f(AttentionGrads { dq: &mut dq, dk: &mut dk, dv: &mut dv });
    }

    #[test]
    fn every_wrong_shape_is_refused() {
        // The rows of q decide the others, so another q is seen in its width and in them.
        let (q, batch, other) = (f32s(5, 32), batch(5), batch(6));
        let arguments = [
            ("dq", (5, 32), F),
            ("dk", (5, 16), F),
            ("dv", (5, 16), F),
            ("dout", (5, 32), F),
            ("out", (5, 32), F),
            ("lse", (5, 4), F),
            ("k", (5, 16), F),
            ("v", (5, 16), F),
        ];
        each_wrong_shape_is_refused(&arguments, |t| {
            let x = Attention { q: &q, k: &t[6], v: &t[7], batch: &batch, heads: HEADS, mask: MASK };
            grads(t, |dx| dx.check("backward", &t[3], &t[4], &t[5], x));
        });
        let (q, k) = (f32s(5, 33), f32s(5, 16));
        let x = Attention { q: &q, k: &k, v: &k, batch: &batch, heads: HEADS, mask: MASK };
        refuses("shape of q", || x.check("forward", &[], &f32s(5, 4)));
        let q = f32s(5, 32);
        refuses("shape of doc_start", || Attention { q: &q, batch: &other, ..x }.check("forward", &[], &f32s(5, 4)));
        let three = Heads { n_kv: 3, ..HEADS };
        refuses("4 query heads share 3", || Attention { heads: three, ..x }.check("forward", &[], &f32s(5, 4)));
    }

    #[test]
    fn every_wrong_shape_of_decoding_is_refused() {
        let q = f32s(3, 32);
        let arguments = [("out", (3, 32), F), ("k_cache", (30, 16), F), ("v_cache", (30, 16), F), ("lens", (3, 1), I)];
        each_wrong_shape_is_refused(&arguments, |t| {
            let x = Decode { q: &q, k_cache: &t[1], v_cache: &t[2], lens: &t[3], heads: HEADS, mask: MASK };
            assert_eq!(x.check("decode", &t[0]), 10);
        });
    }
}

mod cross_entropy {
    use super::*;

    #[test]
    fn every_wrong_shape_is_refused() {
        let (x, w, f) = (f32s(3, 8), f32s(20, 8), DType::F32);
        let (batch, other) = (batch(3), batch(4));
        let arguments = [
            ("loss", (3, 1), f),
            ("correct", (3, 1), f),
            ("dx", (3, 8), f),
            // One row more would end beyond w.
            ("dw", (15, 8), f),
        ];
        each_wrong_shape_is_refused(&arguments, |t| {
            let (mut dx, mut dw) = (f32s(t[2].rows(), t[2].cols()), f32s(t[3].rows(), t[3].cols()));
            let grads = HeadGrads { dx: Some(&mut dx), dw: Some(&mut dw), first_row: 5 };
            let x = HeadLoss { x: &x, w: &w, batch: &batch, n_classes: 18, scale: 1.0 };
            x.check("loss", &t[0], Some(&t[1]), &grads);
        });
        let (loss, narrow) = (f32s(3, 1), f32s(20, 7));
        let of = HeadLoss { x: &x, w: &w, batch: &batch, n_classes: 20, scale: 1.0 };
        refuses("w (20, 7)", || HeadLoss { w: &narrow, ..of }.check("loss", &loss, None, &HeadGrads::none()));
        refuses("targets", || HeadLoss { batch: &other, ..of }.check("loss", &loss, None, &HeadGrads::none()));
        for n_classes in [0, 21] {
            refuses("n_classes", || HeadLoss { n_classes, ..of }.check("loss", &loss, None, &HeadGrads::none()));
        }
    }
}

mod dropout {
    use super::*;

    #[test]
    fn every_wrong_shape_is_refused() {
        let (x, d) = (f32s(3, 8), Dropout { key: 0, p: 0.5 });
        each_wrong_shape_is_refused(&[("dst", (3, 8), DType::F32)], |t| d.check("dropout", &t[0], &x));
        for p in [1.0, -0.1, f32::NAN] {
            refuses("p is", || Dropout { key: 0, p }.check("dropout", &x, &x));
        }
    }

    #[test]
    fn the_share_that_falls_is_p_and_the_expectation_stays() {
        for p in [0.05, 0.1, 0.5, 0.9] {
            let d = Dropout { key: 5, p };
            let n = 200_000;
            let dropped = (0..n).filter(|&e| d.drops(e)).count() as f64 / n as f64;
            let p = f64::from(p);
            // Five standard deviations of a binomial share.
            assert!((dropped - p).abs() < 5.0 * (p * (1.0 - p) / n as f64).sqrt(), "{dropped} of {p}");
            assert!((f64::from(d.scale()) * (1.0 - p) - 1.0).abs() < 1e-4, "{}", d.scale());
        }
    }

    #[test]
    fn no_probability_is_lost_to_rounding() {
        let of = |p| Dropout { key: 0, p };
        assert_eq!((of(0.0).threshold(), of(0.0).scale()), (0, 1.0));
        assert_eq!((of(1e-9).threshold(), of(0.5).threshold()), (1, 32_768));
        let most = of(1.0 - f32::EPSILON);
        assert_eq!((most.threshold(), most.scale()), (65_535, 65_536.0));
    }
}

mod elementwise {
    use super::*;
    use ringtune::backend::elementwise::*;

    #[test]
    fn every_wrong_shape_is_refused() {
        let x = f32s(3, 8);
        each_wrong_shape_is_refused(&[("dst", (3, 8), DType::F32)], |t| check_same("add", &t[0], &x));
        each_wrong_shape_is_refused(&[("the bias", (1, 8), DType::F32)], |t| check_bias("add_bias", &t[0], &x));
        let narrow = Tensor::from_buf((), 1, 8, DType::Bf16);
        refuses("element type of the bias", || check_bias_grad("bias_backward", &narrow, &x));
    }
}

mod embedding {
    use super::*;
    use ringtune::backend::embedding::*;

    #[test]
    fn every_wrong_shape_is_refused() {
        let (picked, table) = (f32s(3, 8), f32s(20, 8));
        check_rows("gather", &picked, &table, &i32s(3));
        refuses("rows", || check_rows("gather", &picked, &table, &i32s(4)));
        refuses("table", || check_rows("gather", &picked, &f32s(20, 7), &i32s(3)));
        let narrow = Tensor::from_buf((), 20, 8, DType::Bf16);
        refuses("element type of picked", || check_rows("gather", &picked, &narrow, &i32s(3)));
        check_backward("backward", &table, &picked, &batch(3));
        refuses("tokens", || check_backward("backward", &table, &picked, &batch(4)));
        refuses("dw", || check_backward("backward", &f32s(20, 7), &picked, &batch(3)));
        refuses("element type of dw", || check_backward("backward", &narrow, &picked, &batch(3)));
    }
}

mod matmul {
    use super::*;

    #[test]
    fn shapes_that_disagree_are_refused() {
        for (op, a, b) in [(MatMul::NT, (3, 5), (4, 5)), (MatMul::NN, (3, 5), (5, 4)), (MatMul::TN, (5, 3), (5, 4))] {
            assert_eq!(op.check(&f32s(3, 4), &f32s(a.0, a.1), &f32s(b.0, b.1)), (3, 4, 5));
            for change in 0..6 {
                let mut shapes = [(3, 4), a, b];
                let s = &mut shapes[change / 2];
                if change % 2 == 0 {
                    s.0 += 1
                } else {
                    s.1 += 1
                }
                let [c, a, b] = shapes.map(|(rows, cols)| f32s(rows, cols));
                refuses("matmul", || op.check(&c, &a, &b));
            }
        }
    }
}

mod norm {
    use super::*;

    #[test]
    fn every_wrong_shape_is_refused() {
        let f = DType::F32;
        // x decides the others, so another x is seen in them.
        let x = f32s(3, 8);
        let arguments = [("w", (1, 4), f), ("out", (3, 8), f), ("rstd", (3, 2), f), ("dw", (1, 4), f)];
        each_wrong_shape_is_refused(&arguments, |t| {
            let norm = Norm { x: &x, w: &t[0], eps: 0.0 };
            assert_eq!(norm.check("norm", &[("out", &t[1])], &t[2], Some(&t[3])), 4);
        });
        let (w, rstd) = (f32s(1, 4), Tensor::from_buf((), 3, 2, DType::Bf16));
        refuses("element type of rstd", || Norm { x: &x, w: &w, eps: 0.0 }.check("norm", &[], &rstd, None));
    }
}

mod project {
    use super::*;

    #[test]
    fn every_wrong_shape_is_refused() {
        let f = DType::F32;
        // Rows of w and of a are what the others are compared with.
        let (w, a) = (f32s(5, 8), f32s(2, 8));
        let arguments = [
            ("y", (3, 5), f),
            ("t", (3, 2), f),
            ("b", (5, 2), f),
            ("bias", (1, 5), f),
            ("dw", (5, 8), f),
            ("dbias", (1, 5), f),
            ("da", (2, 8), f),
            ("db", (5, 2), f),
        ];
        each_wrong_shape_is_refused(&arguments, |t| {
            let lora = LowRank { a: &a, b: &t[2], scale: 1.0, dropout: None };
            let by = Projection { w: &w, bias: Some(&t[3]), lora: Some(lora) };
            by.check("project", &t[0], (3, 8), Some(&t[1]));
            let [mut dw, mut dbias, mut da, mut db] = [4, 5, 6, 7].map(|i: usize| f32s(t[i].rows(), t[i].cols()));
            let (w, bias, a, b) = (Some(&mut dw), Some(&mut dbias), Some(&mut da), Some(&mut db));
            ProjectionGrads { w, bias, a, b }.check("project", &by);
        });
        let (y, t, b) = (f32s(3, 5), f32s(3, 2), f32s(5, 2));
        let by = Projection { w: &w, bias: None, lora: Some(LowRank { a: &a, b: &b, scale: 1.0, dropout: None }) };
        refuses("shape of w is", || by.check("project", &y, (3, 9), Some(&t)));
        refuses("t is missing", || by.check("project", &y, (3, 8), None));
        let narrow = f32s(2, 7);
        let other = LowRank { a: &narrow, b: &b, scale: 1.0, dropout: None };
        refuses("shape of a is", || Projection { lora: Some(other), ..by }.check("project", &y, (3, 8), Some(&t)));
    }
}

mod rope {
    use super::*;

    #[test]
    fn every_wrong_shape_is_refused() {
        let (table, positions) = (f32s(9, 4), i32s(3));
        let rope = Rope { table: &table, positions: &positions };
        assert_eq!(rope.check("rope", &f32s(3, 8)), 4);
        refuses("x of 10", || rope.check("rope", &f32s(3, 10)));
        refuses("positions", || rope.check("rope", &f32s(2, 8)));
        for odd in [0, 3, 6] {
            let table = f32s(9, odd);
            refuses("table", || Rope { table: &table, ..rope }.check("rope", &f32s(3, 8)));
        }
    }
}

mod swiglu {
    use super::*;

    #[test]
    fn every_wrong_shape_is_refused() {
        let gate = f32s(3, 8);
        each_wrong_shape_is_refused(&[("up", (3, 8), DType::F32), ("out", (3, 8), DType::F32)], |t| {
            Swiglu { gate: &gate, up: &t[0] }.check("swiglu", &[("out", &t[1])]);
        });
    }
}
