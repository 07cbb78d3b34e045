//! Warpgroup products in a kernel of their own: layouts of operands, the kernel's text, its launch.

use vgpu::{Config, Counters, Error, Memory, Module, Products};

/// Bytes of shared memory.
pub const SPACE: usize = 98304;

/// An operand in shared memory: element (mn, k) lies at `place`.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Bytes of the swizzle: 0, 32, 64, 128.
    pub span: usize,
    /// Whether K is contiguous.
    pub k_major: bool,
    /// Leading and stride byte offsets.
    pub leading: usize,
    pub stride: usize,
    pub start: usize,
    /// Bytes of an element.
    pub size: usize,
}

impl Layout {
    /// The tables of the ISA text: core matrices of 8 rows of 16 bytes without swizzle; otherwise patterns of 8 rows as wide
    /// as the swizzle, in which 16-byte piece c of row r lies at c xor (r, r / 2 or r / 4).
    pub fn place(&self, mn: usize, k: usize) -> usize {
        let per = 16 / self.size;
        let (line, along) = if self.k_major { (mn, k) } else { (k, mn) };
        let (piece, inside) = (along / per, along % per * self.size);
        if self.span == 0 {
            // Without swizzle the leading offset goes along K; the stride along M or N.
            let (group, next) = if self.k_major { (self.stride, self.leading) } else { (self.leading, self.stride) };
            return self.start + line / 8 * group + line % 8 * 16 + piece * next + inside;
        }
        let wide = self.span / 16;
        let (row, column) = (line % 8, piece % wide);
        let column = match self.span {
            128 => column ^ row,
            64 => column ^ (row / 2),
            _ => column ^ (row / 4),
        };
        self.start + line / 8 * self.stride + piece / wide * self.leading + row * self.span + column * 16 + inside
    }

    pub fn descriptor(&self) -> u64 {
        let mode = match self.span {
            0 => 0,
            128 => 1,
            64 => 2,
            _ => 3u64,
        };
        let f = |x: usize| (x >> 4) as u64;
        f(self.start) | f(self.leading) << 16 | f(self.stride) << 32 | mode << 62
    }
}

/// Where B starts.
pub const B_START: usize = 32768;

pub fn k_major(span: usize, size: usize, start: usize) -> Layout {
    Layout {
        span,
        k_major: true,
        leading: if span == 0 { 128 } else { 16 },
        stride: if span == 0 { 288 } else { 8 * span },
        start,
        size,
    }
}

/// A kernel of one warpgroup: fills shared memory from `image`, loads registers of A and of the sums, runs `body`, stores.
pub fn kernel(sums: usize, body: &str) -> String {
    let list = |p: &str, n: usize| (0..n).map(|i| format!("%{p}{i}")).collect::<Vec<_>>().join(", ");
    let each = |f: &dyn Fn(usize) -> String, n: usize| (0..n).map(f).collect::<String>();
    format!(
        ".version 8.0\n.target sm_90a\n.address_size 64
        .entry k(.param .u64 image, .param .u64 regs, .param .u64 sums, .param .u64 out, .param .u64 da, .param .u64 db, .param .u32 add) {{
        .reg .b64 %p<12>; .reg .b32 %t, %s, %r<8>, %a<4>, %d<{sums}>; .reg .b64 %da, %db; .reg .pred %q, %add;
        .shared .align 1024 .b8 sm[{SPACE}];
        mov.u32 %t, %tid.x; mov.u32 %s, sm; ld.param.u64 %p0, [image]; ld.param.u64 %p1, [regs]; ld.param.u64 %p2, [sums];
        ld.param.u64 %p3, [out]; ld.param.u64 %da, [da]; ld.param.u64 %db, [db];
        ld.param.u32 %r6, [add]; setp.ne.u32 %add, %r6, 0;
        shl.b32 %r0, %t, 4;
        COPY: cvt.u64.u32 %p4, %r0; add.u64 %p5, %p0, %p4; ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%p5];
        add.u32 %r5, %s, %r0; st.shared.v4.u32 [%r5], {{%r1, %r2, %r3, %r4}};
        add.u32 %r0, %r0, 2048; setp.lt.u32 %q, %r0, {SPACE}; @%q bra COPY;
        mul.wide.u32 %p6, %t, 16; add.u64 %p6, %p1, %p6; ld.global.v4.u32 {{{}}}, [%p6];
        mul.wide.u32 %p7, %t, {}; add.u64 %p8, %p2, %p7; {}
        fence.proxy.async; bar.sync 0;
        {body}
        add.u64 %p9, %p3, %p7; {} ret; }}",
        list("a", 4),
        sums * 4,
        each(&|i| format!("ld.global.u32 %d{i}, [%p8+{}];\n", 4 * i), sums),
        each(&|i| format!("st.global.u32 [%p9+{}], %d{i};\n", 4 * i), sums),
    )
}

pub struct Ran {
    pub out: Vec<u32>,
    pub counters: Counters,
}

pub fn launch(text: &str, image: &[u8], regs: &[u32], sums: &[u32], da: u64, db: u64, add: bool) -> Result<Ran, Error> {
    launch_as(Products::Exact, text, image, [regs, sums], [da, db], add)
}

/// [`launch`] with products that round.
pub fn launch_as(
    products: Products,
    text: &str,
    image: &[u8],
    [regs, sums]: [&[u32]; 2],
    [da, db]: [u64; 2],
    add: bool,
) -> Result<Ran, Error> {
    let mut m = Memory::new();
    let module = Module::load(text, &mut m).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let words = |v: &[u32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let mut put = |v: &[u8]| {
        let a = m.alloc(v.len()).unwrap();
        m.write(a, v).unwrap();
        a
    };
    let (image, regs, sums_at) = (put(image), put(&words(regs)), put(&words(sums)));
    let out = put(&words(sums));
    let shape = Config { block: [128, 1, 1], products: Some(products), ..Config::default() };
    let args = [image, regs, sums_at, out, da, db].map(u64::to_le_bytes);
    let mut args: Vec<&[u8]> = args.iter().map(|a| &a[..]).collect();
    let add = u32::from(add).to_le_bytes();
    args.push(&add);
    let counters = module.launch("k", &shape, &args, &m)?;
    let mut bytes = vec![0; sums.len() * 4];
    m.read(out, &mut bytes).unwrap();
    Ok(Ran { out: bytes.as_chunks::<4>().0.iter().map(|c| u32::from_le_bytes(*c)).collect(), counters })
}
