//! Geometry of tensor copies: which rows of the box lie where in global and in shared memory, and what is outside.

use crate::tensor_map::{DataType, Swizzle, TensorMap};

/// One row of a box along the innermost dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Offset of its first byte from the start of the box in shared memory, before swizzling.
    pub offset: u64,
    /// Address of the first element inside the tensor.
    pub address: u64,
    /// Elements before that one which lie outside.
    pub skipped: usize,
    /// Elements inside.
    pub inside: usize,
}

/// Bytes between rows in shared memory: rows narrower than the swizzle span leave the rest of it unused.
pub fn pitch(m: &TensorMap) -> u64 {
    let inner = (m.counts()[0] * m.data_type.size()) as u64;
    match m.swizzle {
        Swizzle::None => inner,
        s => s.span() as u64,
    }
}

/// Shared bytes that a box covers, holes included.
pub fn span(m: &TensorMap) -> u64 {
    pitch(m) * m.counts()[1..].iter().product::<usize>() as u64
}

/// The rows of the box at `at` (innermost first), in the order of shared memory.
pub fn rows(m: &TensorMap, at: [i64; 5]) -> Vec<Row> {
    let (counts, size, pitch) = (m.counts(), m.data_type.size() as u64, pitch(m));
    // The innermost dimension has no element stride (interleaved layouts are not executed).
    let skipped = (-at[0]).clamp(0, counts[0] as i64);
    let inside = (m.dims[0] as i64 - at[0]).clamp(skipped, counts[0] as i64) - skipped;
    let outer: usize = counts[1..].iter().product();
    (0..outer)
        .map(|i| {
            let (mut rest, mut outside) = (i, false);
            let mut address = m.address.wrapping_add(((at[0] + skipped) as u64).wrapping_mul(size));
            for d in 1..5 {
                let x = at[d] + (rest % counts[d]) as i64 * i64::from(m.element_strides[d]);
                rest /= counts[d];
                outside |= x < 0 || x >= m.dims[d] as i64;
                address = address.wrapping_add((x as u64).wrapping_mul(m.strides[d]));
            }
            Row {
                offset: i as u64 * pitch,
                address,
                skipped: skipped as usize,
                inside: if outside { 0 } else { inside as usize },
            }
        })
        .collect()
}

/// The bytes of an element outside the tensor.
pub fn fill(m: &TensorMap) -> u64 {
    match (m.fill_nan, m.data_type) {
        (false, _) => 0,
        (_, DataType::F16 | DataType::Bf16) => 0x7fff,
        (_, DataType::F64) => 0x7fff_ffff_ffff_ffff,
        _ => 0x7fff_ffff,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor_map::Tiled;

    #[test]
    fn rows_follow_coordinates_strides_and_bounds() {
        let m = TensorMap::new(&Tiled {
            data_type: 9,
            rank: 3,
            address: 0x1000,
            dims: &[20, 5, 3],
            strides: &[48, 240],
            box_dims: &[16, 4, 2],
            element_strides: &[1, 2, 1],
            interleave: 0,
            swizzle: 2,
            l2_promotion: 0,
            oob_fill: 0,
        })
        .unwrap();
        assert_eq!((pitch(&m), span(&m), m.box_bytes()), (64, 64 * 4, 16 * 2 * 2 * 2));
        let list = rows(&m, [-3, 3, 2, 0, 0]);
        // y = 3 and 5 (outside), z = 2 and 3 (outside); x = -3..13 is inside from 0.
        let want = Row { offset: 0, address: 0x1000 + 3 * 48 + 2 * 240, skipped: 3, inside: 13 };
        assert_eq!(list[0], want);
        assert_eq!(list.iter().map(|r| r.inside).collect::<Vec<_>>(), [13, 0, 0, 0]);
        assert_eq!(list.iter().map(|r| r.offset).collect::<Vec<_>>(), [0, 64, 128, 192]);
        let list = rows(&m, [10, -2, -1, 0, 0]);
        assert_eq!(list.iter().map(|r| r.inside).collect::<Vec<_>>(), [0, 0, 0, 10]);
        assert_eq!((list[3].address, list[3].skipped), (0x1000 + 20, 0));
        assert!(rows(&m, [20, 0, 0, 0, 0]).iter().all(|r| r.inside == 0));
        assert!(rows(&m, [-16, 0, 0, 0, 0]).iter().all(|r| (r.skipped, r.inside) == (16, 0)));
    }
}
