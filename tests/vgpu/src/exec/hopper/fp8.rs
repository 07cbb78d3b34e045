//! The two 8-bit float formats as f32.

/// e4m3: bias 7, no infinities, NaN is all ones.
#[inline]
pub fn e4m3(x: u8) -> f32 {
    let sign = if x & 0x80 == 0 { 1.0 } else { -1.0 };
    let (e, m) = (i32::from(x >> 3 & 15), f32::from(x & 7));
    match (e, x & 7) {
        (15, 7) => f32::NAN,
        (0, _) => sign * m * 2f32.powi(-9),
        _ => sign * (1.0 + m / 8.0) * 2f32.powi(e - 7),
    }
}

/// e5m2: the upper byte of an f16.
#[inline]
pub fn e5m2(x: u8) -> f32 {
    let sign = if x & 0x80 == 0 { 1.0 } else { -1.0 };
    let (e, m) = (i32::from(x >> 2 & 31), f32::from(x & 3));
    match (e, x & 3) {
        (31, 0) => sign * f32::INFINITY,
        (31, _) => f32::NAN,
        (0, _) => sign * m * 2f32.powi(-16),
        _ => sign * (1.0 + m / 4.0) * 2f32.powi(e - 15),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        for (x, v) in [(0x38, 1.0), (0xb8, -1.0), (0x7e, 448.0), (0x08, 0.015625), (0x01, 0.001953125), (0x00, 0.0)] {
            assert_eq!(e4m3(x), v, "{x:#x}");
        }
        for (x, v) in [(0x3c, 1.0), (0xbc, -1.0), (0x7b, 57344.0), (0x04, 6.1035156e-5), (0x01, 1.5258789e-5)] {
            assert_eq!(e5m2(x), v, "{x:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan() && e5m2(0x7d).is_nan());
        assert_eq!((e5m2(0x7c), e5m2(0xfc)), (f32::INFINITY, f32::NEG_INFINITY));
    }
}
