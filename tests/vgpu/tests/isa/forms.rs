//! Walks over the table of forms: each arithmetic one is run over edge values in both builds.

use std::collections::BTreeSet;

use vgpu::exec::forms::{Group, forms};

use super::edges::cases;
use super::exact::Format;
use super::harness::{Instruction, builds, run};
use super::reference::{Want, reference, signature};

/// Opcodes whose tests are elsewhere: in which file of `tests`.
const ELSEWHERE: &[(&str, &str)] = &[
    ("activemask", "isa/exchange.rs"),
    ("addc", "instructions.rs"),
    ("applypriority", "isa/memory.rs"),
    ("atom", "isa/memory.rs"),
    ("bar", "warp.rs"),
    ("barrier", "isa/exchange.rs"),
    ("bra", "warp.rs"),
    ("brkpt", "isa/memory.rs"),
    ("cp", "isa/memory.rs"),
    ("createpolicy", "isa/memory.rs"),
    ("cvta", "isa/memory.rs"),
    ("discard", "isa/memory.rs"),
    ("exit", "isa/exchange.rs"),
    ("fence", "isa/memory.rs"),
    ("isspacep", "isa/memory.rs"),
    ("ld", "isa/memory.rs"),
    ("ldmatrix", "warp.rs"),
    ("ldu", "isa/memory.rs"),
    ("madc", "instructions.rs"),
    ("match", "isa/exchange.rs"),
    ("membar", "isa/memory.rs"),
    ("mma", "isa/matrix.rs"),
    ("movmatrix", "isa/matrix.rs"),
    ("nanosleep", "isa/memory.rs"),
    ("pmevent", "isa/memory.rs"),
    ("prefetch", "isa/memory.rs"),
    ("prefetchu", "isa/memory.rs"),
    ("red", "isa/memory.rs"),
    ("redux", "isa/exchange.rs"),
    ("ret", "calls.rs"),
    ("shfl", "isa/exchange.rs"),
    ("st", "isa/memory.rs"),
    ("stmatrix", "isa/matrix.rs"),
    ("subc", "instructions.rs"),
    ("trap", "isa/exchange.rs"),
    ("vote", "isa/exchange.rs"),
    ("wmma", "wmma.rs"),
];

/// Every choice of modifiers.
pub fn expand(groups: &[Group]) -> Vec<Vec<&'static str>> {
    groups.iter().fold(vec![Vec::new()], |all, g| {
        let mut next = Vec::new();
        for head in &all {
            for option in &g.options {
                let mut one: Vec<&'static str> = head.clone();
                one.extend(option.split('.'));
                next.push(one);
            }
            if g.optional {
                next.push(head.clone());
            }
        }
        next
    })
}

fn close(f: Format, got: u64, want: f64, relative: f64, absolute: f64) -> bool {
    let value = match f.fraction {
        52 => f64::from_bits(got),
        23 => f64::from(f32::from_bits(got as u32)),
        _ => {
            let Some(b) = super::exact::F64.write(&f.read(got), super::exact::Mode::Nearest) else {
                return false;
            };
            f64::from_bits(b)
        }
    };
    // Results below the format's normal range may be flushed, those above its largest number are infinite.
    let smallest = 2f64.powi(2 - (1 << (f.exponent - 1)));
    let largest = 2f64.powi((1 << (f.exponent - 1)) - 1) * (2.0 - 2f64.powi(-f.fraction));
    match () {
        () if value.is_nan() => false,
        () if want.is_infinite() => value == want,
        () if want.abs() > largest * (1.0 + relative) => value.is_infinite() && value.signum() == want.signum(),
        () if want.abs() < smallest => (value - want).abs() <= smallest,
        () if value.is_infinite() => want.abs() * (1.0 + relative) >= largest,
        () => (value - want).abs() <= (relative * want.abs()).max(absolute) + want.abs() * 2f64.powi(-f.fraction - 1),
    }
}

/// Runs one opcode; the number of results compared.
fn check(base: &str, mods: &[&'static str], sm: u32) -> usize {
    let (d, s) = signature(base, mods).expect("asked before");
    let opcode = std::iter::once(base).chain(mods.iter().copied()).collect::<Vec<_>>().join(".");
    let immediate = (base == "lop3").then_some((3, 0xca));
    let mut cases = cases(&s);
    if base == "div" && mods.contains(&"approx") {
        // Beyond 2^126 the text lets the quotient be zero or NaN.
        cases.retain(|c| (0x0080_0000..0x7e80_0000).contains(&(c[1] & 0x7fff_ffff)));
    }
    if matches!(base, "sin" | "cos") {
        // The error is given for angles up to 2 pi.
        cases.retain(|c| f32::from_bits(c[0] as u32).abs() < 6.3 || c[0] & 0x7fff_ffff >= 0x7f80_0000);
    }
    if matches!(base, "set" | "setp") {
        // There are thousands of these forms: a fifth of the cases for each, another fifth for the next.
        let first = mods.iter().map(|m| m.len()).sum::<usize>() + mods.len();
        cases = cases.into_iter().skip(first % 5).step_by(5).collect();
    }
    let instruction = Instruction { opcode: &opcode, d: d.clone(), s, immediate, sm };
    for build in builds() {
        for (case, got) in cases.iter().zip(run(&instruction, &cases, build)) {
            let mut want = reference(base, mods, case);
            let packed = want.len() == 2 && d.len() == 1;
            let n = match d[0] {
                "f32x2" => 32,
                _ => 16,
            };
            if want.len() < d.len() {
                want.resize(d.len(), Want::Bits(0));
            }
            for (i, w) in want.into_iter().enumerate() {
                let got = match packed {
                    true => got[0] >> (n * i) & ((1 << n) - 1),
                    false => got[i],
                };
                let fine = match w {
                    Want::Bits(b) => got == b,
                    Want::Nan(f) => f.is_nan(got),
                    Want::Near(f, v, relative, absolute) => close(f, got, v, relative, absolute),
                };
                assert!(fine, "{opcode} of {case:x?} in {build:?}: result {i} is {got:#x}, expected {w:x?}");
            }
        }
    }
    cases.len()
}

/// All forms of some opcodes.
fn all(wanted: &[&str]) {
    let mut seen = BTreeSet::new();
    let mut results = 0;
    for (base, groups, sm) in forms().filter(|f| wanted.contains(&f.0)) {
        for mods in expand(&groups) {
            if signature(base, &mods).is_some() {
                results += check(base, &mods, sm);
                seen.insert(base);
            }
        }
    }
    let missing: Vec<&&str> = wanted.iter().filter(|b| !seen.contains(**b)).collect();
    assert!(missing.is_empty(), "not in the table: {missing:?}");
    assert!(results > 100, "only {results} results");
}

const INTEGER: [&str; 33] = [
    "add", "sub", "mul", "mad", "mul24", "mad24", "sad", "div", "rem", "abs", "neg", "min", "max", "popc", "clz",
    "brev", "fns", "bfind", "bfe", "bfi", "szext", "bmsk", "dp4a", "dp2a", "and", "or", "xor", "not", "cnot", "lop3",
    "shf", "shl", "shr",
];
const FLOAT: [&str; 11] = ["fma", "rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh", "copysign", "testp"];
const OTHER: [&str; 4] = ["prmt", "selp", "slct", "mov"];

#[test]
fn integer_and_common_arithmetic() {
    all(&INTEGER);
}

#[test]
fn floating_point() {
    all(&FLOAT);
}

#[test]
fn comparisons() {
    all(&["setp"]);
}

#[test]
fn comparisons_as_values() {
    all(&["set"]);
}

#[test]
fn selections_and_moves() {
    all(&OTHER);
}

#[test]
fn conversions() {
    all(&["cvt"]);
}

/// An opcode that gets into the table without a test fails here.
#[test]
fn every_opcode_has_a_test() {
    let here: Vec<&str> = INTEGER.into_iter().chain(FLOAT).chain(OTHER).chain(["setp", "set", "cvt"]).collect();
    let known: BTreeSet<&str> = forms().map(|f| f.0).collect();
    for base in known {
        if here.contains(&base) {
            continue;
        }
        let Some((_, file)) = ELSEWHERE.iter().find(|(b, _)| *b == base) else {
            panic!("{base} has no test");
        };
        let path = format!("{}/tests/{file}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let used = [".", " ", ";", "\""].iter().any(|end| text.contains(&format!("{base}{end}")));
        assert!(used, "{file} does not use {base}");
    }
}
