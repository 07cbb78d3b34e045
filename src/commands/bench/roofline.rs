//! What a run has to do at least, and how near the device's ceilings it came.

use crate::error::{Error, Result};
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

/// Clocks rise and fall: a result may be so much above a peak that was measured at another time.
const DRIFT: f64 = 1.02;

/// Holds rates to the peak of a loop in registers, which is measured again, at most eight times, where one is above it; the highest
/// counts.
///
/// # Errors
/// If one stays above: then the loop is not what bounds it.
pub fn hold_to_peak(rates: &[(String, f64)], peak: &mut f64, mut again: impl FnMut() -> Option<f64>) -> Result<()> {
    let Some((name, rate)) = rates.iter().max_by(|a, b| a.1.total_cmp(&b.1)) else { return Ok(()) };
    for _ in 0..8 {
        if *rate <= DRIFT * *peak {
            return Ok(());
        }
        *peak = again().map_or(*peak, |p| peak.max(p));
    }
    if *rate <= DRIFT * *peak {
        return Ok(());
    }
    Err(Error::new(format!(
        "bench: {name}: {:.1} GFLOP/s, expected at most the {:.1} that a loop in registers reaches: the measured peak is wrong",
        rate / 1e9,
        *peak / 1e9
    )))
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

    #[test]
    fn a_rate_above_the_peak_is_an_error_unless_the_peak_rises() {
        let rates = [("slow".to_string(), 5e9), ("square".to_string(), 20e9)];
        let mut peak = 10e9;
        let mut tries = 0;
        let error = hold_to_peak(&rates, &mut peak, || {
            tries += 1;
            Some(11e9)
        })
        .unwrap_err();
        assert_eq!((tries, peak, error.exit_code()), (8, 11e9, 1));
        let said = error.to_string();
        assert!(said.contains("square") && said.contains("20.0 GFLOP/s") && said.contains("11.0"), "{said}");
        let mut peak = 10e9;
        hold_to_peak(&rates, &mut peak, || Some(19.7e9)).unwrap();
        assert_eq!(peak, 19.7e9);
        hold_to_peak(&rates, &mut peak, || unreachable!("within the drift of clocks")).unwrap();
    }
}
