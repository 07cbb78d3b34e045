//! The parser: what it reads, what it says about mistakes, and that no input makes it panic.

use vgpu::ptx::{Init, Operand, Space, Ty, parse};
use vgpu::{Error, Memory, Module};

const HEAD: &str = ".version 8.8\n.target sm_80\n.address_size 64\n";
const PROGRAMS: &str = include_str!("cuda/programs.ptx");

#[test]
fn reads_the_programs() {
    let m = parse(PROGRAMS).unwrap();
    let names: Vec<&str> = m.functions.iter().map(|f| f.name.as_str()).collect();
    assert_eq!(m.version, (8, 8));
    assert_eq!(names, ["vadd", "rmsnorm", "gemm", "angles", "mixed"]);
    assert_eq!(m.functions[1].params.len(), 5);
    assert!(
        m.vars
            .iter()
            .any(|v| v.space == Space::Const && v.name == "table" && v.size == 16 && v.init[8] == Init::Bits(4))
    );
}

#[test]
fn scopes_hide_outer_names() {
    let text = format!(
        "{HEAD}.entry k() {{ .reg .b32 %r<3>; mov.u32 %r1, 1;\n{{ .reg .f32 %r1; mov.f32 %r1, 0f3F800000;\nL: bra L; }}\nL: bra L; }}"
    );
    let f = &parse(&text).unwrap().functions[0];
    let (Operand::Reg(a), Operand::Reg(b)) = (&f.body[0].operands[0], &f.body[1].operands[0]) else { panic!() };
    assert_eq!((f.regs[*a as usize], f.regs[*b as usize]), (Ty::B32, Ty::F32));
    assert_eq!((&f.body[2].operands[0], &f.body[3].operands[0]), (&Operand::Label(2), &Operand::Label(3)));
}

#[test]
fn directives_may_touch_and_one_register_may_stand_in_braces() {
    let text = format!(
        "{HEAD}.visible .entry k(.param .u64 p) {{ .reg.b64 a; .reg .b32 %r<2>; ld.param.u64 a, [p];\n\
         ld.global.b32 {{ %r1 }}, [ a + 0 ]; {{.reg.b16 l,h; mov.b32 {{l, h}}, %r1; mov.b32 %r1, {{h, l}}; }}\n\
         st.global.b32 [ a + 4 ], {{ %r1 }}; ret; }}"
    );
    let mut memory = Memory::new();
    let module = Module::load(&text, &mut memory).unwrap();
    let at = memory.alloc(8).unwrap();
    memory.write(at, &0x1234_5678u32.to_le_bytes()).unwrap();
    let config = vgpu::Config { block: [1, 1, 1], ..Default::default() };
    module.launch("k", &config, &[&at.to_le_bytes()], &memory).unwrap();
    let mut out = [0; 4];
    memory.read(at + 4, &mut out).unwrap();
    assert_eq!(u32::from_le_bytes(out), 0x5678_1234);
}

#[test]
fn errors_name_line_and_text() {
    let e = parse(&format!("{HEAD}.entry k() {{\n  mov.u32 %r1, 1;\n}}")).unwrap_err();
    let Error::Parse { line, text, .. } = &e else { panic!("{e}") };
    assert_eq!((*line, text.as_str()), (5, "%r1, 1;"));
}

#[test]
fn unknown_opcodes_are_refused_at_load() {
    for bad in
        ["frob.u32 %r1, %r2;", "add.u32.odd %r1, %r1, %r2;", "ld.global.u32 %r1, [nowhere];", "add.f32 %r1, %r2;"]
    {
        let text = format!("{HEAD}.entry k() {{ .reg .b32 %r<3>;\n{bad}\nret; }}");
        let Err(Error::Unsupported { kernel, line, text, .. }) = Module::load(&text, &mut Memory::new()) else {
            panic!("{bad}")
        };
        assert_eq!((kernel.as_str(), line, text.as_str()), ("k", 5, bad));
    }
}

#[test]
fn changed_bytes_never_panic() {
    let bytes = PROGRAMS.as_bytes();
    let mut seed = 1u64;
    let mut random = |n: usize| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as usize % n
    };
    let mut refused = 0;
    for _ in 0..300 {
        let mut text = bytes.to_vec();
        for _ in 0..1 + random(4) {
            let (at, other) = (random(text.len()), random(text.len()));
            match random(4) {
                0 => text[at] = random(128) as u8,
                1 => text[at] = text[other],
                2 => text.truncate(at.max(100)),
                _ => drop(text.drain(at..(at + random(20)).min(text.len()))),
            }
        }
        let text = String::from_utf8_lossy(&text);
        refused += usize::from(Module::load(&text, &mut Memory::new()).is_err());
    }
    assert!(refused > 100, "only {refused} of 300 changed texts were refused");
}
