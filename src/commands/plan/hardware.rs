//! GPUs and networks as their makers describe them.

use super::links::Link;
use crate::error::{Error, Result};

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

const fn gpu(name: &'static str, tera: f64, gb: f64, gb_s: f64, link: Link, link_gb_s: f64) -> Gpu {
    Gpu { name, flops: tera * 1e12, memory: gb * 1e9, memory_rate: gb_s * 1e9, link, link_rate: link_gb_s * 1e9 }
}

/// Sources: NVIDIA's data sheets, dense figures; NVLink both ways is twice what is here; PCI Express is x16, generation 4 or 5.
pub const GPUS: [Gpu; 14] = [
    gpu("b200", 2250.0, 180.0, 8000.0, Link::NvLink, 900.0),
    gpu("h200", 989.4, 141.0, 4800.0, Link::NvLink, 450.0),
    gpu("h100", 989.4, 80.0, 3350.0, Link::NvLink, 450.0),
    gpu("h100-pcie", 756.5, 80.0, 2000.0, Link::Pcie, 64.0),
    gpu("a100", 312.0, 80.0, 2039.0, Link::NvLink, 300.0),
    gpu("a100-40gb", 312.0, 40.0, 1555.0, Link::NvLink, 300.0),
    gpu("a100-pcie", 312.0, 80.0, 1935.0, Link::Pcie, 32.0),
    gpu("l40s", 362.05, 48.0, 864.0, Link::Pcie, 32.0),
    gpu("a40", 149.7, 48.0, 696.0, Link::Pcie, 32.0),
    gpu("a10", 125.0, 24.0, 600.0, Link::Pcie, 32.0),
    gpu("l4", 121.0, 24.0, 300.0, Link::Pcie, 32.0),
    gpu("rtx-3090", 71.0, 24.0, 936.0, Link::Pcie, 32.0),
    gpu("rtx-4090", 165.2, 24.0, 1008.0, Link::Pcie, 32.0),
    gpu("rtx-5090", 209.5, 32.0, 1792.0, Link::Pcie, 64.0),
];

/// The GPU of a name.
///
/// # Errors
/// A usage error that lists those that are known.
pub fn find(name: &str) -> Result<Gpu> {
    let known = || GPUS.iter().map(|g| g.name).collect::<Vec<_>>().join(", ");
    let same = |g: &&Gpu| g.name.eq_ignore_ascii_case(name);
    GPUS.iter().find(same).copied().ok_or_else(|| {
        Error::usage(format!(
            "--gpu: {name:?} is not known; expected {}, or the nearest of them with --peak-tflops, --device-memory and --memory-bandwidth",
            known()
        ))
    })
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
