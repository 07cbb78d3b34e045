//! What makers promise: dense bf16 products with f32 sums, by the name that the driver gives a device.

/// TFLOP/s without sparsity. Sources: NVIDIA's data sheets (A100, A30, A40, A10, L4, L40, L40S, H100, H200, GH200; HGX B200), which for
/// most devices give the figure with sparsity: half of it; for GeForce the appendices of the Ampere GA102, Ada and RTX Blackwell
/// white papers, in which sums of f32 take twice the time of sums of f16.
const DENSE_BF16: [(&str, f64); 28] = [
    ("A100-SXM4-40GB", 312.0),
    ("A100-SXM4-80GB", 312.0),
    ("A100-PCIE-40GB", 312.0),
    ("A100 80GB PCIe", 312.0),
    ("A30", 165.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("L4", 121.0),
    ("L40", 181.05),
    ("L40S", 362.05),
    ("H100 80GB HBM3", 989.4),
    // As the emulator calls it.
    ("H100 SXM5", 989.4),
    ("H100 PCIe", 756.5),
    ("H100 NVL", 835.5),
    ("H200", 989.4),
    ("H200 NVL", 835.5),
    ("GH200 480GB", 989.4),
    ("GH200 120GB", 989.4),
    ("B200", 2250.0),
    ("RTX 3080", 59.5),
    ("RTX 3090", 71.0),
    ("RTX 3090 Ti", 80.0),
    ("RTX 4080", 97.5),
    ("RTX 4090", 165.2),
    ("RTX 5070", 61.7),
    ("RTX 5070 Ti", 87.9),
    ("RTX 5080", 112.6),
    ("RTX 5090", 209.5),
];

/// Floating-point operations per second of dense bf16 products with f32 sums; `None` for a name that the table does not have: variants
/// (`Laptop GPU`, `D`, slices of a device) differ from the board they are named after.
pub fn dense_bf16(name: &str) -> Option<f64> {
    // The emulator names the board that it poses as: `vgpu 0 (sm_80, A100-SXM4-80GB)`.
    let board = name.strip_prefix("vgpu ").and_then(|n| n.strip_suffix(')')?.split_once(", ")).map(|(_, board)| board);
    let name = board.unwrap_or_else(|| name.strip_prefix("NVIDIA ").unwrap_or(name));
    let name = name.strip_prefix("GeForce ").unwrap_or(name);
    DENSE_BF16.iter().find(|(known, _)| *known == name).map(|(_, tera)| tera * 1e12)
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
}
