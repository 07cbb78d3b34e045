//! Memory of the device: copies both ways, conversion, zeros, and what is said when it is full.

use ringtune::cuda::Cuda;
use ringtune::tensor::{DType, Device};

use crate::close::{assert_same, normal, rounded, tensor, values};
use crate::skip::device;

#[test]
fn values_come_back_as_they_are_stored() {
    let Some(dev) = device() else { return };
    for n in [1, 2, 7, 8, 9, 2047, 2048, 2049, 5000] {
        let x = normal(n as u64, n);
        for dtype in [DType::F32, DType::Bf16] {
            let t = tensor(&dev, 1, n, dtype, &x);
            let expected: Vec<f32> = x.iter().map(|&x| rounded(dtype, f64::from(x)) as f32).collect();
            assert_same(&format!("{dtype:?} {n}"), &values(&dev, &t), &expected);
            // To the other type and back; the bf16 values are exact in both.
            for to in [DType::F32, DType::Bf16] {
                let mut copy = dev.alloc(1, n, to).unwrap();
                dev.copy(&mut copy, &t).unwrap();
                let expected: Vec<f32> = expected.iter().map(|&x| rounded(to, f64::from(x)) as f32).collect();
                assert_same(&format!("{dtype:?} to {to:?} {n}"), &values(&dev, &copy), &expected);
            }
        }
    }
}

#[test]
fn parts_of_a_tensor_go_where_they_belong() {
    let Some(dev) = device() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        let whole: Vec<f32> = (0..40).map(|i| i as f32).collect();
        let mut t = tensor(&dev, 4, 10, dtype, &whole);
        dev.upload_at(&mut t, 7, &[-1.0, -2.0, -3.0]).unwrap();
        dev.upload_at(&mut t, 39, &[-4.0]).unwrap();
        let expected = [&whole[..7], &[-1.0, -2.0, -3.0], &whole[10..39], &[-4.0]].concat();
        assert_eq!(values(&dev, &t), expected, "{dtype:?}");
        let mut part = [0.0; 5];
        dev.download_at(&mut part, &t, 6).unwrap();
        assert_eq!(part, expected[6..11], "{dtype:?}");
    }
}

#[test]
fn conversion_keeps_what_is_not_finite_and_rounds_to_even() {
    let Some(dev) = device() else { return };
    // Halfway between two bf16, once to the even one below and once above; the largest f32 rounds to infinity.
    let x = [f32::NAN, f32::INFINITY, -0.0, 1.003_906_3, 1.011_718_8, f32::MAX, 1e-40, -1e-40, 3.0];
    let t = tensor(&dev, 1, x.len(), DType::F32, &x);
    let mut narrow = dev.alloc(1, x.len(), DType::Bf16).unwrap();
    dev.copy(&mut narrow, &t).unwrap();
    let ours = values(&dev, &narrow);
    assert!(ours[0].is_nan());
    for (i, (&o, &x)) in ours.iter().zip(&x).enumerate().skip(1) {
        let expected = half::bf16::from_f32(x).to_f32();
        assert_eq!(o.to_bits(), expected.to_bits(), "{i}: {x} became {o}, expected {expected}");
    }
}

#[test]
fn tensors_start_at_zero_and_are_filled_with_it() {
    let Some(dev) = device() else { return };
    let fresh = dev.alloc(5, 7, DType::Bf16).unwrap();
    assert_eq!(values(&dev, &fresh), [0.0; 35]);
    // Only the logical part: the rest of the buffer stays.
    let mut t = tensor(&dev, 4, 3, DType::F32, &[1.0; 12]);
    t.set_rows(2);
    dev.fill_zero(&mut t).unwrap();
    t.set_rows(4);
    assert_eq!(values(&dev, &t), [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    let empty = dev.alloc(0, 3, DType::F32).unwrap();
    assert!(values(&dev, &empty).is_empty());
    dev.synchronize().unwrap();
}

#[test]
fn tensors_that_lie_together_keep_apart() {
    let Some(dev) = device() else { return };
    let shapes = [(3, 5), (1, 16), (0, 7), (2, 9), (1, 1)];
    let rooms: Vec<usize> =
        shapes.iter().map(|(rows, cols): &(usize, usize)| (rows * cols).next_multiple_of(16)).collect();
    let mut all = dev.alloc_together(&shapes, &rooms, DType::F32).unwrap();
    let ones = |n: usize| vec![1.0; n];
    for t in &mut all {
        let n = t.len();
        dev.upload(t, &ones(n)).unwrap();
    }
    // One of them alone; then neighbours but for one between them, and one that is shorter than it was made.
    dev.fill_zero(&mut all[1]).unwrap();
    assert_eq!((values(&dev, &all[0]), values(&dev, &all[3])), (ones(15), ones(18)));
    let [a, b, empty, c, d] = &mut all[..] else { panic!("five") };
    dev.upload(b, &ones(16)).unwrap();
    dev.fill_zeros(&mut [a, empty, c, d]).unwrap();
    assert_eq!(values(&dev, b), ones(16));
    assert!([&*a, &*c, &*d].iter().all(|t| values(&dev, t).iter().all(|&x| x == 0.0)));
    for t in [&mut *a, &mut *b, &mut *c] {
        let n = t.len();
        dev.upload(t, &ones(n)).unwrap();
    }
    a.set_rows(2);
    dev.fill_zeros(&mut [&mut *a, &mut *b]).unwrap();
    a.set_rows(3);
    assert_eq!((values(&dev, a), values(&dev, b)), ([vec![0.0; 10], ones(5)].concat(), vec![0.0; 16]));
    assert_eq!(values(&dev, c), ones(18));
}

#[test]
fn a_full_device_names_what_was_asked_for() {
    let Some(dev) = device() else { return };
    let rows = dev.properties().memory / 1024;
    let e = dev.alloc(rows, 1024, DType::F32).err().expect("four times the memory").to_string();
    assert!(
        e.starts_with("cuda: allocating ") && e.contains(&format!("{rows} x 1024 of F32")) && e.contains("MiB free"),
        "{e}"
    );
    assert!(e.contains("--micro-batch-size"), "{e}");
    // The device goes on.
    assert_eq!(values(&dev, &tensor(&dev, 1, 2, DType::F32, &[1.0, 2.0])), [1.0, 2.0]);
    let e = dev.alloc(usize::MAX / 2, 4, DType::F32).err().unwrap().to_string();
    assert!(e.contains("larger than any memory"), "{e}");
}

#[test]
fn a_device_that_is_not_there_is_an_error() {
    if device().is_none() {
        return;
    }
    let e = Cuda::new(1000).err().expect("no machine has so many").to_string();
    assert!(e.starts_with("cuda: ") && e.contains("1000") && e.contains("ringtune doctor"), "{e}");
}
