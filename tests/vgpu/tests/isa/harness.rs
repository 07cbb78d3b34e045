//! Runs one instruction over many cases, in either build.

use vgpu::exec::code::Build;
use vgpu::{Config, Memory, Module};

/// Bits of a type's register: 0 for predicates.
pub fn width(ty: &str) -> u32 {
    match ty {
        "pred" => 0,
        "f16" | "bf16" | "e4m3x2" | "e5m2x2" => 16,
        "tf32" | "f16x2" | "bf16x2" | "u16x2" | "s16x2" => 32,
        "f32x2" => 64,
        _ => ty[1..].parse::<u32>().unwrap().max(16),
    }
}

fn register(ty: &str, name: &str) -> String {
    format!("%{}{name}", ["p", "h", "w", "l"][[0, 16, 32, 64].iter().position(|w| *w == width(ty)).unwrap()])
}

/// What to run: opcode, types of destinations and sources, and a constant operand at the end if there is one.
pub struct Instruction<'a> {
    pub opcode: &'a str,
    pub d: Vec<&'a str>,
    pub s: Vec<&'a str>,
    /// Index of an operand to put an immediate before, and the immediate.
    pub immediate: Option<(usize, u64)>,
    pub sm: u32,
}

/// Results of the instruction for each case: one or two destinations.
pub fn run(i: &Instruction<'_>, cases: &[Vec<u64>], build: Build) -> Vec<[u64; 2]> {
    let (mut load, mut store) = (String::new(), String::new());
    let mut operands = Vec::new();
    for (n, ty) in i.s.iter().enumerate() {
        let r = register(ty, &n.to_string());
        let at = 8 * n;
        load += &match width(ty) {
            0 => format!("ld.global.u32 %wt, [%in+{at}]; setp.ne.u32 {r}, %wt, 0;\n"),
            w => format!("ld.global.b{w} {r}, [%in+{at}];\n"),
        };
        operands.push(r);
    }
    if let Some((at, x)) = i.immediate {
        operands.insert(at, x.to_string());
    }
    let mut names = Vec::new();
    for (n, ty) in i.d.iter().enumerate() {
        let r = register(ty, &format!("d{n}"));
        let at = 8 * n;
        // Every bit of the destination has to be written.
        load += &match width(ty) {
            0 => format!("mov.pred {r}, 0;\n"),
            16 => format!("mov.u16 {r}, 0xa5a5;\n"),
            32 => format!("mov.u32 {r}, 0xa5a5a5a5;\n"),
            _ => format!("mov.u64 {r}, 0xa5a5a5a5a5a5a5a5;\n"),
        };
        store += &match width(ty) {
            0 => format!("selp.u64 %lt, 1, 0, {r}; st.global.u64 [%out+{at}], %lt;\n"),
            64 => format!("st.global.b64 [%out+{at}], {r};\n"),
            w => format!("cvt.u64.u{w} %lt, {r}; st.global.u64 [%out+{at}], %lt;\n"),
        };
        names.push(r);
    }
    let stride = 8 * i.s.len().max(1);
    let text = format!(
        ".version 8.8\n.target sm_{}\n.address_size 64\n.entry k(.param .u64 in, .param .u64 out, .param .u32 n) {{
        .reg .pred %p<9>, %pd<2>, %pg; .reg .b16 %h<9>, %hd<2>; .reg .b32 %w<9>, %wd<2>, %wt, %n, %b; .reg .b64 %l<9>, %ld<2>, %lt, %in, %out;
        ld.param.u64 %in, [in]; ld.param.u64 %out, [out]; ld.param.u32 %n, [n];
        mov.u32 %wt, %tid.x; mov.u32 %b, %ctaid.x; shl.b32 %b, %b, 5; add.u32 %wt, %wt, %b;
        setp.ge.u32 %pg, %wt, %n; @%pg exit;
        mad.wide.u32 %in, %wt, {stride}, %in; mad.wide.u32 %out, %wt, 16, %out;
        {load} {} {}, {};
        {store} ret; }}",
        i.sm.max(80),
        i.opcode,
        names.join("|"),
        operands.join(", ")
    );
    let mut m = Memory::new();
    let module = Module::load_for(build, &text, &mut m).unwrap_or_else(|e| panic!("{e}"));
    let bytes: Vec<u8> = cases.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
    let (a, b) = (m.alloc(bytes.len().max(8)).unwrap(), m.alloc(cases.len() * 16).unwrap());
    m.write(a, &bytes).unwrap();
    m.fill(b, 0, cases.len() * 16).unwrap();
    let n = cases.len() as u32;
    let shape = Config { grid: [n.div_ceil(32), 1, 1], ..Config::default() };
    module
        .launch("k", &shape, &[&a.to_le_bytes(), &b.to_le_bytes(), &n.to_le_bytes()], &m)
        .unwrap_or_else(|e| panic!("{}: {e}", i.opcode));
    let mut out = vec![0; cases.len() * 16];
    m.read(b, &mut out).unwrap();
    let word = |c: &[u8]| u64::from_le_bytes(c.try_into().unwrap());
    out.chunks(16).map(|c| [word(&c[..8]), word(&c[8..])]).collect()
}

/// The builds this processor runs.
pub fn builds() -> Vec<Build> {
    [Build::Portable, Build::V3].into_iter().filter(|b| b.supported()).collect()
}
