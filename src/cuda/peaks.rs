//! What makers promise: dense bf16 products with f32 sums, and the rate of the memory, by the name that the driver gives a device.

/// TFLOP/s without sparsity, GB/s. Sources: NVIDIA's data sheets (A100, A30, A40, A10, L4, L40, L40S, H100, H200, GH200 with 96 GB of HBM3;
/// HGX B200, an eighth of it), which for most devices give TFLOP/s with sparsity: half of it; for GeForce the appendices of the Ampere GA102,
/// Ada and RTX Blackwell white papers, in which sums of f32 take twice the time of sums of f16.
const SHEETS: [(&str, f64, f64); 28] = [
    ("A100-SXM4-40GB", 312.0, 1555.0),
    ("A100-SXM4-80GB", 312.0, 2039.0),
    ("A100-PCIE-40GB", 312.0, 1555.0),
    ("A100 80GB PCIe", 312.0, 1935.0),
    ("A30", 165.0, 933.0),
    ("A40", 149.7, 696.0),
    ("A10", 125.0, 600.0),
    ("L4", 121.0, 300.0),
    ("L40", 181.05, 864.0),
    ("L40S", 362.05, 864.0),
    ("H100 80GB HBM3", 989.4, 3350.0),
    // As the emulator calls it.
    ("H100 SXM5", 989.4, 3350.0),
    ("H100 PCIe", 756.5, 2000.0),
    ("H100 NVL", 835.5, 3900.0),
    ("H200", 989.4, 4800.0),
    ("H200 NVL", 835.5, 4800.0),
    ("GH200 480GB", 989.4, 4000.0),
    ("GH200 120GB", 989.4, 4000.0),
    ("B200", 2250.0, 8000.0),
    ("RTX 3080", 59.5, 760.0),
    ("RTX 3090", 71.0, 936.0),
    ("RTX 3090 Ti", 80.0, 1008.0),
    ("RTX 4080", 97.5, 717.0),
    ("RTX 4090", 165.2, 1008.0),
    ("RTX 5070", 61.7, 672.0),
    ("RTX 5070 Ti", 87.9, 896.0),
    ("RTX 5080", 112.6, 960.0),
    ("RTX 5090", 209.5, 1792.0),
];

/// The row of a name; `None` for one that the table does not have: variants (`Laptop GPU`, `D`, slices of a device) differ from the board
/// they are named after.
fn sheet(name: &str) -> Option<(f64, f64)> {
    // The emulator names the board that it poses as: `vgpu 0 (sm_80, A100-SXM4-80GB)`.
    let board = name.strip_prefix("vgpu ").and_then(|n| n.strip_suffix(')')?.split_once(", ")).map(|(_, board)| board);
    let name = board.unwrap_or_else(|| name.strip_prefix("NVIDIA ").unwrap_or(name));
    let name = name.strip_prefix("GeForce ").unwrap_or(name);
    SHEETS.iter().find(|(known, ..)| *known == name).map(|&(_, tera, giga)| (tera * 1e12, giga * 1e9))
}

/// Floating-point operations per second of dense bf16 products with f32 sums.
pub fn dense_bf16(name: &str) -> Option<f64> {
    sheet(name).map(|(flops, _)| flops)
}

/// Bytes per second of the memory.
pub fn memory_rate(name: &str) -> Option<f64> {
    sheet(name).map(|(_, rate)| rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_known_by_their_whole_name() {
        let peak = |name| dense_bf16(name).map(|p| p / 1e12);
        assert_eq!(peak("NVIDIA H200"), Some(989.4));
        assert_eq!(peak("NVIDIA H100 80GB HBM3"), Some(989.4));
        assert_eq!(peak("NVIDIA GeForce RTX 4090"), Some(165.2));
        assert_eq!(
            (peak("vgpu 0 (sm_80, A100-SXM4-80GB)"), peak("vgpu 1 (sm_120, RTX 5090)")),
            (Some(312.0), Some(209.5))
        );
        // Other boards behind a known name.
        for name in [
            "NVIDIA GeForce RTX 4090 D",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
            "Tesla T4",
        ] {
            assert_eq!(peak(name), None, "{name}");
        }
    }

    /// A figure with sparsity, of another precision, or bits for bytes would be two to eight times another one.
    #[test]
    fn figures_are_of_one_kind() {
        for (i, (name, tera, giga)) in SHEETS.iter().enumerate() {
            // Operations for a byte of memory: least for GeForce of Ampere, most for the L40S.
            let ridge = tera * 1e3 / giga;
            assert!((75.0..=420.0).contains(&ridge), "{name}: {ridge} operations a byte");
            assert!(SHEETS[..i].iter().all(|(other, ..)| other != name), "{name}: twice");
        }
        let ratio = |a, b| dense_bf16(a).unwrap() / dense_bf16(b).unwrap();
        // The same chip, slower clocks and fewer multiprocessors; chips of a kind by their tensor cores and clocks.
        assert!((1.1..1.4).contains(&ratio("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe")));
        assert!((3.0..3.3).contains(&ratio("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB")));
        assert!((2.1..2.5).contains(&ratio("NVIDIA B200", "NVIDIA H200")));
        assert!((2.1..2.5).contains(&ratio("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3090")));
        assert_eq!(memory_rate("NVIDIA H200"), Some(4800e9));
    }
}
