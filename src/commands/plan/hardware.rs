//! GPUs and networks as their makers describe them.

use super::links::Link;
use crate::error::{Error, Result};
use crate::measure::sheets;

/// A kind of GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// Its name here.
    pub name: &'static str,
    /// Dense bf16 products with f32 sums, FLOP/s.
    pub flops: f64,
    /// Bytes of memory.
    pub memory: f64,
    /// Bytes a second of memory.
    pub memory_rate: f64,
    /// What joins the GPUs of a machine.
    pub link: Link,
    /// Bytes a second of that, in one direction.
    pub link_rate: f64,
}

/// The kinds: name here, the board whose data sheet counts ([`sheets`]), what joins the GPUs of a machine and GB/s of that in one direction.
/// Sources: the same documents; NVLink both ways is twice what is here; PCI Express is x16, generation 4 or 5.
const GPUS: [(&str, &str, Link, f64); 14] = [
    ("b200", "B200", Link::NvLink, 900.0),
    ("h200", "H200", Link::NvLink, 450.0),
    ("h100", "H100 80GB HBM3", Link::NvLink, 450.0),
    ("h100-pcie", "H100 PCIe", Link::Pcie, 64.0),
    ("a100", "A100-SXM4-80GB", Link::NvLink, 300.0),
    ("a100-40gb", "A100-SXM4-40GB", Link::NvLink, 300.0),
    ("a100-pcie", "A100 80GB PCIe", Link::Pcie, 32.0),
    ("l40s", "L40S", Link::Pcie, 32.0),
    ("a40", "A40", Link::Pcie, 32.0),
    ("a10", "A10", Link::Pcie, 32.0),
    ("l4", "L4", Link::Pcie, 32.0),
    ("rtx-3090", "RTX 3090", Link::Pcie, 32.0),
    ("rtx-4090", "RTX 4090", Link::Pcie, 32.0),
    ("rtx-5090", "RTX 5090", Link::Pcie, 64.0),
];

/// The GPU of a name.
///
/// # Errors
/// A usage error that lists those that are known.
pub fn find(name: &str) -> Result<Gpu> {
    let Some(&(name, board, link, rate)) = GPUS.iter().find(|(known, ..)| known.eq_ignore_ascii_case(name)) else {
        let known = GPUS.map(|(known, ..)| known).join(", ");
        return Err(Error::usage(format!(
            "--gpu: {name:?} is not known; expected {known}, or the nearest of them with --peak-tflops, --device-memory and --memory-bandwidth"
        )));
    };
    let sheets::Sheet { flops, memory, memory_rate, .. } = *sheets::of(board).expect("every kind has a sheet");
    Ok(Gpu { name, flops, memory, memory_rate, link, link_rate: rate * 1e9 })
}

/// `8x400`, or `400`: network cards of a machine and the gigabits a second of each, as bytes a second of all together.
///
/// # Errors
/// A usage error if it is something else.
pub fn network(text: &str) -> Result<f64> {
    let (cards, rate) = text.split_once(['x', 'X']).unwrap_or(("1", text));
    let cards = cards.trim().parse::<u32>().ok().filter(|n| (1..=64).contains(n));
    let rate = rate.trim().parse::<f64>().ok().filter(|r| r.is_finite() && *r > 0.0 && *r <= 1e5);
    match (cards, rate) {
        (Some(cards), Some(rate)) => Ok(f64::from(cards) * rate * 1e9 / 8.0),
        _ => Err(Error::usage(format!(
            "--network: expected CARDSxGBITS as 8x400, or GBITS as 25, for a machine; found {text:?}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_networks() {
        assert_eq!(find("H100").unwrap().link_rate, 450e9);
        // Every kind has a data sheet.
        assert!(GPUS.iter().all(|(name, ..)| find(name).unwrap().memory > 1e10));
        let e = find("h1000").unwrap_err();
        assert!(e.exit_code() == 2 && e.to_string().contains("b200, h200, h100, h100-pcie"), "{e}");
        assert_eq!(
            (network("8x400").unwrap(), network("25").unwrap(), network("2 x 100").unwrap()),
            (400e9, 3.125e9, 25e9)
        );
        for wrong in ["", "x", "0x400", "8x", "8x-1", "nan", "99x400", "1e9"] {
            let e = network(wrong).unwrap_err().to_string();
            assert!(e.contains("expected CARDSxGBITS"), "{wrong}: {e}");
        }
    }
}
