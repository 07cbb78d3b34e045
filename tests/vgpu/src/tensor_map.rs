//! Tensor maps: what `cuTensorMapEncodeTiled` takes, every rule it documents, and 128 opaque bytes of our own encoding.
//!
//! The bytes begin with a mark and end with a checksum, so that a kernel given anything else is told so.

use std::fmt;

/// Bytes of an encoded map.
pub const BYTES: usize = 128;
/// Alignment that an encoded map must have.
pub const ALIGN: u64 = 64;
const MARK: [u8; 8] = *b"vgputma1";

/// Element types, numbered as `CUtensorMapDataType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DataType {
    U8,
    U16,
    U32,
    I32,
    U64,
    I64,
    F16,
    F32,
    F64,
    Bf16,
    /// Single precision with denormals flushed to zero on a load.
    F32Ftz,
}

impl DataType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DataType::U8 => 1,
            DataType::U16 | DataType::F16 | DataType::Bf16 => 2,
            DataType::U32 | DataType::I32 | DataType::F32 | DataType::F32Ftz => 4,
            DataType::U64 | DataType::I64 | DataType::F64 => 8,
        }
    }

    fn float(self) -> bool {
        matches!(self, DataType::F16 | DataType::Bf16 | DataType::F32 | DataType::F32Ftz | DataType::F64)
    }

    const ALL: [DataType; 11] = [
        DataType::U8,
        DataType::U16,
        DataType::U32,
        DataType::I32,
        DataType::U64,
        DataType::I64,
        DataType::F16,
        DataType::F32,
        DataType::F64,
        DataType::Bf16,
        DataType::F32Ftz,
    ];

    /// From the number that `CUtensorMapDataType` gives it; `None` for packed 4- and 6-bit types, tf32 and unknown numbers.
    pub fn from_number(n: u32) -> Option<DataType> {
        DataType::ALL.get(n as usize).copied()
    }
}

/// Order of 16-byte pieces in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// As they come.
    None,
    /// Within 32 bytes, by address bit 7.
    B32,
    /// Within 64 bytes, by address bits 7 and 8.
    B64,
    /// Within 128 bytes, by address bits 7 to 9.
    B128,
}

impl Swizzle {
    /// Bytes within which pieces change places; zero without swizzle.
    pub fn span(self) -> usize {
        match self {
            Swizzle::None => 0,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        }
    }

    /// Where the byte of a linear shared address lies: bits 4.. are xored with bits 7.. .
    ///
    /// `base` is subtracted from the row number (bits 7 to 9) first: the base offset of a matrix descriptor, zero for copies.
    #[inline(always)]
    pub fn place(self, address: u64, base: u64) -> u64 {
        let mask = match self {
            Swizzle::None => return address,
            Swizzle::B32 => 1,
            Swizzle::B64 => 3,
            Swizzle::B128 => 7,
        };
        address ^ (((address >> 7).wrapping_sub(base) & mask) << 4)
    }
}

/// What a map describes: `cuTensorMapEncodeTiled`'s arguments with dimensions from the innermost outwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Element type.
    pub data_type: DataType,
    /// Dimensions in use, 1 to 5.
    pub rank: usize,
    /// First byte of the tensor.
    pub address: u64,
    /// Elements in each dimension.
    pub dims: [u64; 5],
    /// Bytes between neighbours in each dimension; the first is the element size.
    pub strides: [u64; 5],
    /// Elements that the box spans in each dimension.
    pub box_dims: [u32; 5],
    /// Steps within the box.
    pub element_strides: [u32; 5],
    /// Order of pieces in shared memory.
    pub swizzle: Swizzle,
    /// Whether elements outside are NaN instead of zero.
    pub fill_nan: bool,
}

/// The arguments as the driver function takes them; enumerations by number.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Tiled<'a> {
    pub data_type: u32,
    pub rank: u32,
    pub address: u64,
    /// `rank` elements.
    pub dims: &'a [u64],
    /// `rank - 1` elements, bytes.
    pub strides: &'a [u64],
    /// `rank` elements.
    pub box_dims: &'a [u32],
    /// `rank` elements.
    pub element_strides: &'a [u32],
    pub interleave: u32,
    pub swizzle: u32,
    pub l2_promotion: u32,
    pub oob_fill: u32,
}

/// Why arguments were refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The documentation forbids them: `CUDA_ERROR_INVALID_VALUE`.
    Invalid(String),
    /// Allowed, but not executed here: `CUDA_ERROR_NOT_SUPPORTED`.
    Unsupported(String),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refused::Invalid(m) => write!(f, "tensor map: {m}"),
            Refused::Unsupported(m) => write!(f, "tensor map: {m} is not executed here"),
        }
    }
}

impl std::error::Error for Refused {}

fn invalid<T>(message: String) -> Result<T, Refused> {
    Err(Refused::Invalid(message))
}

/// Checks the arguments and makes the 128 bytes of the map.
///
/// Source: the comment of `cuTensorMapEncodeTiled` in cuda.h 12.9.
///
/// # Errors
/// [`Refused`] with the rule that is broken and the value found.
pub fn encode(t: &Tiled<'_>) -> Result<[u8; BYTES], Refused> {
    Ok(TensorMap::new(t)?.bytes())
}

impl TensorMap {
    /// Checks the arguments.
    ///
    /// # Errors
    /// As [`encode`].
    pub fn new(t: &Tiled<'_>) -> Result<TensorMap, Refused> {
        let rank = t.rank as usize;
        if !(1..=5).contains(&rank) {
            return invalid(format!("rank {rank} is not 1 to 5"));
        }
        if t.dims.len() != rank || t.box_dims.len() != rank || t.element_strides.len() != rank {
            return invalid(format!("rank {rank} needs as many dimensions, box sizes and element strides"));
        }
        if t.strides.len() + 1 != rank {
            return invalid(format!("rank {rank} needs {} strides, {} given", rank - 1, t.strides.len()));
        }
        let data_type = match (DataType::from_number(t.data_type), t.data_type) {
            (Some(d), _) => d,
            (None, 11..=15) => {
                let name = ["tf32", "tf32 with flush", "16 x U4 align 8", "16 x U4 align 16", "16 x U6"];
                return Err(Refused::Unsupported(format!("type {}", name[t.data_type as usize - 11])));
            }
            (None, n) => return invalid(format!("data type {n} is not known")),
        };
        match t.interleave {
            0 => {}
            1 | 2 if rank < 3 => return invalid(format!("an interleaved layout of rank {rank}, at least 3 needed")),
            1 | 2 => {
                return Err(Refused::Unsupported(format!("interleave of {} bytes", 16 * t.interleave)));
            }
            n => return invalid(format!("interleave {n} is not known")),
        }
        let swizzle = match t.swizzle {
            0 => Swizzle::None,
            1 => Swizzle::B32,
            2 => Swizzle::B64,
            3 => Swizzle::B128,
            4..=6 => return Err(Refused::Unsupported(format!("swizzle {} (sm_100)", t.swizzle))),
            n => return invalid(format!("swizzle {n} is not known")),
        };
        if t.l2_promotion > 3 {
            return invalid(format!("L2 promotion {} is not known", t.l2_promotion));
        }
        if t.oob_fill > 1 {
            return invalid(format!("out-of-bounds fill {} is not known", t.oob_fill));
        }
        let fill_nan = t.oob_fill == 1;
        if fill_nan && !data_type.float() {
            return invalid(format!("NaN fill for {data_type:?}, which is no float type"));
        }
        if !t.address.is_multiple_of(16) {
            return invalid(format!("address {:#x} is not a multiple of 16", t.address));
        }
        let mut m = TensorMap {
            data_type,
            rank,
            address: t.address,
            dims: [1; 5],
            strides: [0; 5],
            box_dims: [1; 5],
            element_strides: [1; 5],
            swizzle,
            fill_nan,
        };
        let size = data_type.size();
        m.strides[0] = size as u64;
        for i in 0..rank {
            let (d, b, e) = (t.dims[i], t.box_dims[i], t.element_strides[i]);
            if d == 0 || d > 1 << 32 {
                return invalid(format!("dimension {i} of {d} elements is not 1 to 2^32"));
            }
            if b == 0 || b > 256 {
                return invalid(format!("box size {b} in dimension {i} is not 1 to 256"));
            }
            if e == 0 || e > 8 {
                return invalid(format!("element stride {e} in dimension {i} is not 1 to 8"));
            }
            // Without interleave the first element stride is ignored.
            (m.dims[i], m.box_dims[i], m.element_strides[i]) = (d, b, if i == 0 { 1 } else { e });
        }
        for (i, s) in t.strides.iter().enumerate() {
            if !s.is_multiple_of(16) || *s >= 1 << 40 {
                return invalid(format!("stride {s} of dimension {} is not a multiple of 16 below 2^40", i + 1));
            }
            m.strides[i + 1] = *s;
        }
        let inner = m.box_dims[0] as usize * size;
        if !inner.is_multiple_of(16) {
            return invalid(format!("inner box of {inner} bytes is not a multiple of 16"));
        }
        if swizzle != Swizzle::None && inner > swizzle.span() {
            return invalid(format!("inner box of {inner} bytes with a swizzle of {} bytes", swizzle.span()));
        }
        Ok(m)
    }

    /// Elements of the box in each dimension: `ceil(box / element stride)`.
    pub fn counts(&self) -> [usize; 5] {
        std::array::from_fn(|i| self.box_dims[i].div_ceil(self.element_strides[i]) as usize)
    }

    /// Bytes that one box brings to the barrier's count.
    pub fn box_bytes(&self) -> usize {
        self.counts().iter().product::<usize>() * self.data_type.size()
    }

    /// The map in 128 bytes.
    pub fn bytes(&self) -> [u8; BYTES] {
        let mut out = [0; BYTES];
        out[..8].copy_from_slice(&MARK);
        out[8] = DataType::ALL.iter().position(|d| *d == self.data_type).unwrap_or(0) as u8;
        out[9] = self.rank as u8;
        out[10] = self.swizzle.span() as u8;
        out[11] = u8::from(self.fill_nan);
        out[16..24].copy_from_slice(&self.address.to_le_bytes());
        for i in 0..5 {
            out[24 + 8 * i..32 + 8 * i].copy_from_slice(&self.strides[i].to_le_bytes());
            out[64 + 5 * i..69 + 5 * i].copy_from_slice(&self.dims[i].to_le_bytes()[..5]);
            out[89 + 2 * i..91 + 2 * i].copy_from_slice(&(self.box_dims[i] as u16).to_le_bytes());
            out[99 + i] = self.element_strides[i] as u8;
        }
        let sum = checksum(&out[..BYTES - 8]);
        out[BYTES - 8..].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads the 128 bytes back; `None` when [`encode`] did not make them.
    pub fn decode(bytes: &[u8; BYTES]) -> Option<TensorMap> {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if bytes[..8] != MARK || word(BYTES - 8) != checksum(&bytes[..BYTES - 8]) {
            return None;
        }
        let swizzle = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];
        Some(TensorMap {
            data_type: DataType::from_number(u32::from(bytes[8]))?,
            rank: bytes[9] as usize,
            address: word(16),
            dims: std::array::from_fn(|i| word(64 + 5 * i) & ((1 << 40) - 1)),
            strides: std::array::from_fn(|i| word(24 + 8 * i)),
            box_dims: std::array::from_fn(|i| u32::from(u16::from_le_bytes([bytes[89 + 2 * i], bytes[90 + 2 * i]]))),
            element_strides: std::array::from_fn(|i| u32::from(bytes[99 + i])),
            swizzle: *swizzle.iter().find(|s| s.span() == bytes[10] as usize)?,
            fill_nan: bytes[11] == 1,
        })
    }
}

/// The same map at another address, as `cuTensorMapReplaceAddress` makes it.
///
/// # Errors
/// [`Refused::Invalid`] when the bytes are no map or the address is not a multiple of 16.
pub fn replace_address(bytes: &[u8; BYTES], address: u64) -> Result<[u8; BYTES], Refused> {
    let Some(mut m) = TensorMap::decode(bytes) else {
        return invalid("these bytes are no tensor map".into());
    };
    if !address.is_multiple_of(16) {
        return invalid(format!("address {address:#x} is not a multiple of 16"));
    }
    m.address = address;
    Ok(m.bytes())
}

/// FNV-1a.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Tiled<'_> = Tiled {
        data_type: 9,
        rank: 2,
        address: 0x7000_0000_0000,
        dims: &[1 << 32, 100],
        strides: &[256],
        box_dims: &[64, 256],
        element_strides: &[1, 2],
        interleave: 0,
        swizzle: 3,
        l2_promotion: 2,
        oob_fill: 1,
    };

    #[test]
    fn bytes_come_back() {
        let bytes = encode(&GOOD).unwrap();
        let m = TensorMap::decode(&bytes).unwrap();
        assert_eq!(m, TensorMap::new(&GOOD).unwrap());
        assert_eq!((m.dims, m.strides), ([1 << 32, 100, 1, 1, 1], [2, 256, 0, 0, 0]));
        assert_eq!((m.counts(), m.box_bytes()), ([64, 128, 1, 1, 1], 64 * 128 * 2));
        for i in 0..BYTES {
            let mut bad = bytes;
            bad[i] ^= 4;
            assert_eq!(TensorMap::decode(&bad), None, "byte {i}");
        }
        let moved = replace_address(&bytes, 0x7000_0000_0100).unwrap();
        assert_eq!(TensorMap::decode(&moved).unwrap().address, 0x7000_0000_0100);
        assert!(replace_address(&bytes, 8).is_err());
        let five = Tiled {
            rank: 5,
            dims: &[1, 2, 3, 4, 5],
            strides: &[16, 32, 48, (1 << 40) - 16],
            box_dims: &[256, 1, 2, 3, 4],
            element_strides: &[8, 1, 2, 3, 8],
            data_type: 0,
            swizzle: 0,
            oob_fill: 0,
            ..GOOD
        };
        let m = TensorMap::new(&five).unwrap();
        assert_eq!(TensorMap::decode(&m.bytes()), Some(m));
        assert_eq!(m.element_strides, [1, 1, 2, 3, 8]);
    }

    #[test]
    fn each_documented_rule_is_checked() {
        let says = |t: Tiled<'_>, text: &str| {
            let e = encode(&t).expect_err(text);
            assert!(matches!(e, Refused::Invalid(_)) && e.to_string().contains(text), "{text}: {e}");
        };
        says(Tiled { rank: 0, ..GOOD }, "rank 0");
        says(Tiled { rank: 6, ..GOOD }, "rank 6");
        says(Tiled { address: 0x7000_0000_0008, ..GOOD }, "address 0x700000000008");
        says(Tiled { dims: &[0, 100], ..GOOD }, "dimension 0 of 0");
        says(Tiled { dims: &[64, (1 << 32) + 1], ..GOOD }, "dimension 1 of 4294967297");
        says(Tiled { strides: &[264], ..GOOD }, "stride 264");
        says(Tiled { strides: &[1 << 40], ..GOOD }, "below 2^40");
        says(Tiled { box_dims: &[64, 257], ..GOOD }, "box size 257");
        says(Tiled { box_dims: &[64, 0], ..GOOD }, "box size 0");
        says(Tiled { box_dims: &[60, 1], ..GOOD }, "inner box of 120 bytes is not a multiple of 16");
        says(Tiled { box_dims: &[72, 1], ..GOOD }, "inner box of 144 bytes with a swizzle of 128");
        says(Tiled { box_dims: &[40, 1], swizzle: 2, ..GOOD }, "swizzle of 64");
        says(Tiled { box_dims: &[24, 1], swizzle: 1, ..GOOD }, "swizzle of 32");
        says(Tiled { element_strides: &[1, 9], ..GOOD }, "element stride 9");
        says(Tiled { element_strides: &[0, 1], ..GOOD }, "element stride 0");
        says(Tiled { data_type: 1, ..GOOD }, "NaN fill");
        says(Tiled { data_type: 16, ..GOOD }, "data type 16");
        says(Tiled { interleave: 1, ..GOOD }, "rank 2, at least 3");
        says(Tiled { interleave: 3, ..GOOD }, "interleave 3");
        says(Tiled { swizzle: 7, ..GOOD }, "swizzle 7");
        says(Tiled { l2_promotion: 4, ..GOOD }, "L2 promotion 4");
        says(Tiled { oob_fill: 2, ..GOOD }, "fill 2");
        let three = Tiled {
            rank: 3,
            dims: &[8, 8, 8],
            strides: &[16, 128],
            box_dims: &[8, 8, 8],
            element_strides: &[1; 3],
            ..GOOD
        };
        for t in [
            Tiled { interleave: 1, ..three },
            Tiled { interleave: 2, swizzle: 1, ..three },
            Tiled { data_type: 11, ..GOOD },
            Tiled { data_type: 13, ..GOOD },
            Tiled { swizzle: 4, ..GOOD },
        ] {
            assert!(matches!(encode(&t), Err(Refused::Unsupported(_))), "{t:?}");
        }
    }

    #[test]
    fn swizzles_follow_the_tables() {
        // The 16-byte piece c of row r (rows as wide as the span) lies at piece c ^ f(r): rows repeat every 8, 4 (of 64 bytes: pairs), 2.
        for r in 0..16u64 {
            for c in 0..8 {
                assert_eq!(Swizzle::B128.place(r * 128 + c * 16 + 5, 0), r * 128 + (c ^ (r % 8)) * 16 + 5);
            }
            for c in 0..4 {
                assert_eq!(Swizzle::B64.place(r * 64 + c * 16, 0), r * 64 + (c ^ (r / 2 % 4)) * 16);
            }
            for c in 0..2 {
                assert_eq!(Swizzle::B32.place(r * 32 + c * 16, 0), r * 32 + (c ^ (r / 4 % 2)) * 16);
            }
        }
        // A pattern that starts three rows late, with that as its base offset, is the pattern moved.
        for a in 0..1024u64 {
            assert_eq!(Swizzle::B128.place(a + 384, 3), Swizzle::B128.place(a, 0) + 384);
        }
    }
}
