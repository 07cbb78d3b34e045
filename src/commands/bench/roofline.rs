//! What a run has to do at least, and how near the device's ceilings it came.

use crate::words::words;

/// What one run has to do at least.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Floating-point operations; a multiply-add is two.
    pub flop: f64,
    /// Bytes that cross the memory's border when each operand is read once and each result written once.
    pub bytes: f64,
}

/// Ceilings of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Floating-point operations a second.
    pub flops: f64,
    /// Bytes a second, read and written.
    pub bandwidth: f64,
}

/// Which ceiling is lower for a piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// The arithmetic.
    Product,
    /// The memory.
    Copy,
}
words!(Bound { Product = "product", Copy = "copy" });

impl Ceilings {
    /// The least time of a piece of work under these ceilings, and which of them decides.
    pub fn least(self, work: Work) -> (f64, Bound) {
        let (arithmetic, memory) = (work.flop / self.flops, work.bytes / self.bandwidth);
        if arithmetic >= memory { (arithmetic, Bound::Product) } else { (memory, Bound::Copy) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_ceiling_decides() {
        let device = Ceilings { flops: 1e12, bandwidth: 1e10 };
        // 8192 cubed in bf16 against a norm of as many elements.
        let product = Work { flop: 2.0 * 8192f64.powi(3), bytes: 3.0 * 8192.0 * 8192.0 * 2.0 };
        let (seconds, bound) = device.least(product);
        assert_eq!((bound, (seconds * 1e3) as u64), (Bound::Product, 1099));
        let (seconds, bound) = device.least(Work { flop: 4.0 * 8192.0 * 8192.0, bytes: 4.0 * 8192.0 * 8192.0 });
        assert_eq!(bound, Bound::Copy);
        assert!((seconds - 4.0 * 8192.0 * 8192.0 / 1e10).abs() < 1e-12);
    }
}
