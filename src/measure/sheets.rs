//! What makers promise of a GPU: dense bf16 products with f32 sums, memory and its rate, by the name that the driver gives the board. The one
//! home of these figures: `bench` compares with them, MFU is a share of them, `plan` reckons with them.
//!
//! A figure that a document prints with sparsity alone is halved. A board that no document describes, and a name that several boards share
//! (GeForce RTX 3080 with 10 and with 12 GB), is left out: no figure is better than that of another board.

/// A board as its maker describes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sheet {
    /// As the driver calls it, without `NVIDIA` and `GeForce`.
    pub name: &'static str,
    /// Dense bf16 products with f32 sums, FLOP/s.
    pub flops: f64,
    /// Bytes of memory.
    pub memory: f64,
    /// Bytes a second of memory.
    pub memory_rate: f64,
    /// The document that says so.
    pub source: &'static str,
}

/// 40 GB: 312 | 624 with sparsity, 1,555 GB/s. 80 GB: the same, 2,039 GB/s (SXM), 1,935 GB/s (PCIe).
const A100: &str = "NVIDIA A100 Tensor Core GPU, data sheet";
/// 165 | 330, 933 GB/s.
const A30: &str = "NVIDIA A30 Tensor Core GPU, data sheet";
/// 149.7 | 299.4 with f32 sums, 696 GB/s.
const A40: &str = "NVIDIA A40 GPU, data sheet";
/// 125 | 250, 600 GB/s.
const A10: &str = "NVIDIA A10 Tensor Core GPU, data sheet";
/// 242 with sparsity, 300 GB/s.
const L4: &str = "NVIDIA L4 Tensor Core GPU, data sheet";
/// 181.05 | 362.1, 864 GB/s.
const L40: &str = "NVIDIA L40 GPU, data sheet";
/// 362.05 | 733, 864 GB/s.
const L40S: &str = "NVIDIA L40S GPU, data sheet";
/// SXM 1,979 with sparsity (989.4 dense in the H100 white paper), 3.35 TB/s; PCIe 1,513, 2 TB/s; NVL 1,671, 94 GB, 3.9 TB/s.
const H100: &str = "NVIDIA H100 Tensor Core GPU, data sheet";
/// SXM 1,979 with sparsity, NVL 1,671; 141 GB, 4.8 TB/s both.
const H200: &str = "NVIDIA H200 Tensor Core GPU, data sheet";
/// 1,979 | 990 dense, 96 GB of HBM3 at 4 TB/s; the driver's name has the 480 GB of the processor.
const GH200: &str = "NVIDIA GH200 Grace Hopper Superchip, data sheet";
/// A GPU of eight: 4.5 PFLOP/s with sparsity, 180 GB, 7.7 TB/s.
const B200: &str = "NVIDIA HGX B200, data sheet";
/// `Peak BF16 Tensor TFLOPS with FP32 Accumulate` 71 | 142; 936 GB/s.
const GA102: &str = "NVIDIA Ampere GA102 GPU Architecture, white paper, appendix A";
/// The same row: RTX 4090 165.2 | 330.4, RTX 4080 97.5 | 194.9, RTX 3090 Ti beside them 80 | 160.
const ADA: &str = "NVIDIA Ada GPU Architecture, white paper, appendices A and B";
/// The same row: RTX 5090 209.5 | 419, RTX 5080 112.6, RTX 5070 Ti 87.9, RTX 5070 61.7.
const BLACKWELL: &str = "NVIDIA RTX Blackwell GPU Architecture, white paper, appendices A to C";

const fn sheet(name: &'static str, tera: f64, gb: f64, gb_s: f64, source: &'static str) -> Sheet {
    Sheet { name, flops: tera * 1e12, memory: gb * 1e9, memory_rate: gb_s * 1e9, source }
}

/// The boards.
pub const SHEETS: [Sheet; 26] = [
    sheet("A100-SXM4-40GB", 312.0, 40.0, 1555.0, A100),
    sheet("A100-SXM4-80GB", 312.0, 80.0, 2039.0, A100),
    sheet("A100-PCIE-40GB", 312.0, 40.0, 1555.0, A100),
    sheet("A100 80GB PCIe", 312.0, 80.0, 1935.0, A100),
    sheet("A30", 165.0, 24.0, 933.0, A30),
    sheet("A40", 149.7, 48.0, 696.0, A40),
    sheet("A10", 125.0, 24.0, 600.0, A10),
    sheet("L4", 121.0, 24.0, 300.0, L4),
    sheet("L40", 181.05, 48.0, 864.0, L40),
    sheet("L40S", 362.05, 48.0, 864.0, L40S),
    sheet("H100 80GB HBM3", 989.4, 80.0, 3350.0, H100),
    // As the emulator calls it.
    sheet("H100 SXM5", 989.4, 80.0, 3350.0, H100),
    sheet("H100 PCIe", 756.5, 80.0, 2000.0, H100),
    sheet("H100 NVL", 835.5, 94.0, 3900.0, H100),
    sheet("H200", 989.4, 141.0, 4800.0, H200),
    sheet("H200 NVL", 835.5, 141.0, 4800.0, H200),
    sheet("GH200 480GB", 989.4, 96.0, 4000.0, GH200),
    sheet("B200", 2250.0, 180.0, 7700.0, B200),
    sheet("RTX 3090", 71.0, 24.0, 936.0, GA102),
    sheet("RTX 3090 Ti", 80.0, 24.0, 1008.0, ADA),
    sheet("RTX 4080", 97.5, 16.0, 717.0, ADA),
    sheet("RTX 4090", 165.2, 24.0, 1008.0, ADA),
    sheet("RTX 5070", 61.7, 12.0, 672.0, BLACKWELL),
    sheet("RTX 5070 Ti", 87.9, 16.0, 896.0, BLACKWELL),
    sheet("RTX 5080", 112.6, 16.0, 960.0, BLACKWELL),
    sheet("RTX 5090", 209.5, 32.0, 1792.0, BLACKWELL),
];

/// The sheet of the board that the driver gives this name; `None` for one that the table does not have: variants (`Laptop GPU`, `D`, slices
/// of a device) differ from the board they are named after.
pub fn of(name: &str) -> Option<&'static Sheet> {
    // The emulator names the board that it poses as: `vgpu 0 (sm_80, A100-SXM4-80GB)`.
    let board = name.strip_prefix("vgpu ").and_then(|n| n.strip_suffix(')')?.split_once(", ")).map(|(_, board)| board);
    let name = board.unwrap_or_else(|| name.strip_prefix("NVIDIA ").unwrap_or(name));
    let name = name.strip_prefix("GeForce ").unwrap_or(name);
    SHEETS.iter().find(|sheet| sheet.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_known_by_their_whole_name() {
        let peak = |name| of(name).map(|s| s.flops / 1e12);
        assert_eq!(peak("NVIDIA H200"), Some(989.4));
        assert_eq!(peak("NVIDIA H100 80GB HBM3"), Some(989.4));
        assert_eq!(peak("NVIDIA GeForce RTX 4090"), Some(165.2));
        assert_eq!(
            (peak("vgpu 0 (sm_80, A100-SXM4-80GB)"), peak("vgpu 1 (sm_120, RTX 5090)")),
            (Some(312.0), Some(209.5))
        );
        // Other boards behind a known name, and a name of two boards.
        for name in [
            "NVIDIA GeForce RTX 4090 D",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "NVIDIA GeForce RTX 3080",
            "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
            "Tesla T4",
        ] {
            assert_eq!(peak(name), None, "{name}");
        }
    }

    /// A figure with sparsity, of another precision, or bits for bytes would be two to eight times another one.
    #[test]
    fn figures_are_of_one_kind() {
        for (i, s) in SHEETS.iter().enumerate() {
            // Operations for a byte of memory: least for GeForce of Ampere, most for the L40S.
            let ridge = s.flops / s.memory_rate;
            assert!((75.0..=420.0).contains(&ridge), "{}: {ridge} operations a byte", s.name);
            assert!(SHEETS[..i].iter().all(|other| other.name != s.name), "{}: twice", s.name);
        }
        let ratio = |a, b| of(a).unwrap().flops / of(b).unwrap().flops;
        // The same chip, slower clocks and fewer multiprocessors; chips of a kind by their tensor cores and clocks.
        assert!((1.1..1.4).contains(&ratio("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe")));
        assert!((3.0..3.3).contains(&ratio("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB")));
        assert!((2.1..2.5).contains(&ratio("NVIDIA B200", "NVIDIA H200")));
        assert!((2.1..2.5).contains(&ratio("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3090")));
        assert_eq!(of("NVIDIA H200").unwrap().memory_rate, 4800e9);
    }

    /// Peaks of GeForce follow from multiprocessors and boost clocks, as the same white papers print them: 512 operations a clock.
    #[test]
    fn peaks_of_geforce_are_those_of_their_clocks() {
        for (name, multiprocessors, ghz) in [
            ("RTX 3090", 82.0, 1.695),
            ("RTX 3090 Ti", 84.0, 1.860),
            ("RTX 4080", 76.0, 2.505),
            ("RTX 4090", 128.0, 2.520),
            ("RTX 5070", 48.0, 2.512),
            ("RTX 5070 Ti", 70.0, 2.452),
            ("RTX 5080", 84.0, 2.617),
            ("RTX 5090", 170.0, 2.407),
        ] {
            let (peak, printed) = (multiprocessors * ghz * 512e9, of(name).unwrap().flops);
            assert!((peak / printed - 1.0).abs() < 0.003, "{name}: {peak} and {printed}");
        }
    }
}
