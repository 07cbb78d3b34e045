//! Which opcodes PTX has: every mnemonic with the modifiers it takes, in their order. An instruction outside this table is
//! refused when a module is loaded, as the assembler does. Source: PTX ISA 8.8 and 9.0, sections 9.7.1 to 9.7.16.

use crate::ptx::Ty;

/// Mnemonic, modifiers and the first `sm_` that has the form.
///
/// Modifiers are groups in order, separated by spaces: `a|b` takes one of them, `a|b?` at most one. `@name` stands for a
/// group of [`GROUPS`].
type Form = (&'static str, &'static str, u32);

/// Groups that many forms share.
#[rustfmt::skip]
const GROUPS: &[(&str, &str)] = &[
    ("int", "u16|u32|u64|s16|s32|s64"),
    ("word", "u32|s32"),
    ("words", "u32|s32|u64|s64"),
    ("bits", "b16|b32|b64"),
    ("rnd", "rn|rz|rm|rp"),
    ("half", "f16|f16x2"),
    ("bhalf", "bf16|bf16x2"),
    ("any", "b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64"),
    ("mem", "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64"),
    // Scalars, pairs, and quadruples of up to 32 bits; and the 256-bit vectors.
    ("vmem", "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64|v2.b8|v2.b16|v2.b32|v2.b64|v2.u8|v2.u16|v2.u32|v2.u64|v2.s8|v2.s16|v2.s32|v2.s64|v2.f32|v2.f64|v4.b8|v4.b16|v4.b32|v4.u8|v4.u16|v4.u32|v4.s8|v4.s16|v4.s32|v4.f32"),
    ("wide", "v4.b64|v4.u64|v4.s64|v4.f64|v8.b32|v8.u32|v8.s32|v8.f32"),
    ("bool", "and|or|xor"),
    ("icmp", "eq|ne|lt|le|gt|ge"),
    ("ucmp", "eq|ne|lt|le|gt|ge|lo|ls|hi|hs"),
    ("fcmp", "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan"),
    ("scope", "cta|cluster|gpu|sys"),
    ("ldspace", "global|const|shared|shared::cta|shared::cluster|local|param|param::entry"),
    ("stspace", "global|shared|shared::cta|shared::cluster|local"),
    ("atspace", "global|shared|shared::cta|shared::cluster"),
    ("evict", "L1::evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate"),
    ("evict2", "L2::evict_normal|L2::evict_first|L2::evict_last"),
    ("prefetch", "L2::64B|L2::128B|L2::256B"),
    ("irnd", "rni|rzi|rmi|rpi"),
    ("wmma", "m16n16k16|m32n8k16|m8n32k16"),
    ("smallint", "u8|u16|u32|u64|s8|s16|s32|s64"),
];

#[rustfmt::skip]
const FORMS: &[Form] = &[
    // Integer arithmetic, 9.7.1 and 9.7.2.
    ("add", "@int", 0), ("add", "sat s32", 0), ("add", "cc @words", 0), ("add", "u16x2|s16x2", 90),
    ("sub", "@int", 0), ("sub", "sat s32", 0), ("sub", "cc @words", 0),
    ("addc", "cc? @words", 0), ("subc", "cc? @words", 0),
    ("mul", "hi|lo @int", 0), ("mul", "wide u16|u32|s16|s32", 0),
    ("mad", "hi|lo @int", 0), ("mad", "wide u16|u32|s16|s32", 0), ("mad", "hi sat s32", 0),
    ("mad", "hi|lo cc @words", 0), ("madc", "hi|lo cc? @words", 0),
    ("mul24", "hi|lo @word", 0), ("mad24", "hi|lo @word", 0), ("mad24", "hi sat s32", 0),
    ("sad", "@int", 0), ("div", "@int", 0), ("rem", "@int", 0),
    ("abs", "s16|s32|s64", 0), ("neg", "s16|s32|s64", 0),
    ("min", "@int", 0), ("max", "@int", 0), ("min", "u16x2|s16x2", 90), ("max", "u16x2|s16x2", 90),
    ("min", "relu s16x2|s32", 90), ("max", "relu s16x2|s32", 90),
    ("popc", "b32|b64", 0), ("clz", "b32|b64", 0), ("brev", "b32|b64", 0), ("fns", "b32", 0),
    ("bfind", "shiftamt? @words", 0), ("bfe", "@words", 0), ("bfi", "b32|b64", 0),
    ("szext", "clamp|wrap @word", 70), ("bmsk", "clamp|wrap b32", 70),
    ("dp4a", "@word @word", 61), ("dp2a", "lo|hi @word @word", 61),
    // Floating point, 9.7.3 to 9.7.5.
    ("testp", "finite|infinite|number|notanumber|normal|subnormal f32|f64", 0),
    ("copysign", "f32|f64", 0),
    ("add", "@rnd? ftz? sat? f32", 0), ("add", "@rnd? f64", 0), ("add", "rn? ftz? sat? @half", 53), ("add", "rn? @bhalf", 90),
    ("sub", "@rnd? ftz? sat? f32", 0), ("sub", "@rnd? f64", 0), ("sub", "rn? ftz? sat? @half", 53), ("sub", "rn? @bhalf", 90),
    ("mul", "@rnd? ftz? sat? f32", 0), ("mul", "@rnd? f64", 0), ("mul", "rn? ftz? sat? @half", 53), ("mul", "rn? @bhalf", 90),
    ("add", "@rnd? ftz? f32x2", 100), ("sub", "@rnd? ftz? f32x2", 100), ("mul", "@rnd? ftz? f32x2", 100), ("fma", "@rnd ftz? f32x2", 100),
    ("fma", "@rnd ftz? sat? f32", 20), ("fma", "@rnd f64", 0), ("fma", "rn ftz? sat? @half", 53), ("fma", "rn ftz? relu @half", 80),
    ("fma", "rn relu? @bhalf", 80),
    ("mad", "@rnd ftz? sat? f32", 20), ("mad", "@rnd f64", 0),
    ("div", "approx|full ftz? f32", 0), ("div", "@rnd ftz? f32", 20), ("div", "@rnd f64", 0),
    ("rcp", "approx ftz? f32", 0), ("rcp", "@rnd ftz? f32", 20), ("rcp", "@rnd f64", 0), ("rcp", "approx ftz f64", 20),
    ("sqrt", "approx ftz? f32", 0), ("sqrt", "@rnd ftz? f32", 20), ("sqrt", "@rnd f64", 0),
    ("rsqrt", "approx ftz? f32", 0), ("rsqrt", "approx ftz? f64", 20),
    ("sin", "approx ftz? f32", 0), ("cos", "approx ftz? f32", 0), ("lg2", "approx ftz? f32", 0), ("ex2", "approx ftz? f32", 0),
    ("ex2", "approx @half", 75), ("ex2", "approx ftz @bhalf", 90),
    ("tanh", "approx f32", 75), ("tanh", "approx @half", 75), ("tanh", "approx @bhalf", 90),
    ("abs", "ftz? f32", 0), ("abs", "f64", 0), ("abs", "ftz? @half", 53), ("abs", "@bhalf", 80),
    ("neg", "ftz? f32", 0), ("neg", "f64", 0), ("neg", "ftz? @half", 53), ("neg", "@bhalf", 80),
    ("min", "ftz? f32", 0), ("min", "ftz? NaN f32", 80), ("min", "ftz? NaN? xorsign.abs f32", 86), ("min", "f64", 0),
    ("min", "ftz? NaN? @half", 80), ("min", "ftz? NaN? xorsign.abs @half", 86), ("min", "NaN? @bhalf", 80), ("min", "NaN? xorsign.abs @bhalf", 86),
    ("max", "ftz? f32", 0), ("max", "ftz? NaN f32", 80), ("max", "ftz? NaN? xorsign.abs f32", 86), ("max", "f64", 0),
    ("max", "ftz? NaN? @half", 80), ("max", "ftz? NaN? xorsign.abs @half", 86), ("max", "NaN? @bhalf", 80), ("max", "NaN? xorsign.abs @bhalf", 86),
    // Comparison and selection, 9.7.6 and 9.7.7.
    ("set", "@icmp @bool? u32|s32|f32 s16|s32|s64", 0), ("set", "@ucmp @bool? u32|s32|f32 u16|u32|u64", 0),
    ("set", "eq|ne @bool? u32|s32|f32 b16|b32|b64", 0), ("set", "@fcmp @bool? ftz? u32|s32|f32 f32", 0), ("set", "@fcmp @bool? u32|s32|f32 f64", 0),
    ("set", "@fcmp @bool? ftz? f16|u16|s16|u32|s32 f16", 53), ("set", "@fcmp @bool? bf16|u16|s16|u32|s32 bf16", 90),
    ("set", "@fcmp @bool? ftz? f16x2 f16x2", 53), ("set", "@fcmp @bool? bf16x2 bf16x2", 90),
    ("setp", "@icmp @bool? s16|s32|s64", 0), ("setp", "@ucmp @bool? u16|u32|u64", 0), ("setp", "eq|ne @bool? b16|b32|b64", 0),
    ("setp", "@fcmp @bool? ftz? f32", 0), ("setp", "@fcmp @bool? f64", 0), ("setp", "@fcmp @bool? ftz? @half", 53), ("setp", "@fcmp @bool? @bhalf", 90),
    ("selp", "@any", 0), ("slct", "@any s32", 0), ("slct", "ftz? @any f32", 0),
    // Logic and shifts, 9.7.8.
    ("and", "pred|b16|b32|b64", 0), ("or", "pred|b16|b32|b64", 0), ("xor", "pred|b16|b32|b64", 0), ("not", "pred|b16|b32|b64", 0),
    ("cnot", "@bits", 0), ("lop3", "b32", 50), ("lop3", "or|and b32", 70),
    ("shf", "l|r clamp|wrap b32", 32), ("shl", "@bits", 0), ("shr", "b16|b32|b64|u16|u32|u64|s16|s32|s64", 0),
    ("prmt", "b32 f4e|b4e|rc8|ecl|ecr|rc16?", 20),
    // Data movement, 9.7.9.
    ("mov", "pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64", 0), ("mov", "b128", 70),
    ("ld", "weak? @ldspace? ca|cg|cs|lu|cv? @vmem", 0),
    ("ld", "weak? global? ca|cg|cs|lu|cv? L2::cache_hint? @prefetch? @vmem", 75),
    ("ld", "weak? global? @evict? L2::cache_hint? @prefetch? @vmem", 75),
    ("ld", "weak? global? @evict? @evict2? L2::cache_hint? @prefetch? @wide", 100),
    ("ld", "volatile shared|shared::cta|shared::cluster? @vmem", 0), ("ld", "volatile global? @prefetch? @vmem", 75),
    ("ld", "relaxed|acquire @scope shared|shared::cta|shared::cluster? @vmem", 70),
    ("ld", "relaxed|acquire @scope global? @evict? L2::cache_hint? @prefetch? @vmem", 75),
    ("ld", "global ca|cg|cs? nc L2::cache_hint? @prefetch? @vmem", 75),
    ("ld", "global nc @evict? L2::cache_hint? @prefetch? @vmem", 75),
    ("ld", "global nc @evict? @evict2? L2::cache_hint? @prefetch? @wide", 100),
    ("ld", "mmio relaxed sys global? @mem", 70),
    ("ldu", "global? @vmem", 0),
    ("st", "weak? @stspace|param|param::func? wb|cg|cs|wt? @vmem", 0),
    ("st", "weak? global? wb|cg|cs|wt? L2::cache_hint? @vmem", 75),
    ("st", "weak? global? @evict? L2::cache_hint? @vmem", 75),
    ("st", "weak? global? @evict? @evict2? L2::cache_hint? @wide", 100),
    ("st", "volatile global|shared|shared::cta|shared::cluster? @vmem", 0),
    ("st", "relaxed|release @scope shared|shared::cta|shared::cluster? @vmem", 70),
    ("st", "relaxed|release @scope global? @evict? L2::cache_hint? @vmem", 75),
    ("st", "mmio relaxed sys global? @mem", 70),
    ("prefetch", "global|local? L1|L2", 0), ("prefetch", "global L2::evict_last|L2::evict_normal", 80), ("prefetchu", "L1", 0),
    ("applypriority", "global? L2::evict_normal", 80), ("discard", "global? L2", 80),
    ("createpolicy", "fractional L2::evict_last|L2::evict_normal|L2::evict_first|L2::evict_unchanged L2::evict_first|L2::evict_unchanged? b64", 80),
    ("createpolicy", "range global? L2::evict_last|L2::evict_normal|L2::evict_first|L2::evict_unchanged L2::evict_first|L2::evict_unchanged? b64", 80),
    ("createpolicy", "cvt L2 b64", 80),
    ("isspacep", "global|const|local|shared|shared::cta|param|param::entry", 0),
    ("cvta", "to? global|const|local|shared|shared::cta|shared::cluster|param|param::entry u64", 0),
    // Conversions, 9.7.9.21.
    ("cvt", "@smallint @smallint", 0), ("cvt", "sat u8 u16|u32|u64|s8|s16|s32|s64", 0), ("cvt", "sat s8 u8|u16|u32|u64|s16|s32|s64", 0),
    ("cvt", "sat u16 u32|u64|s8|s16|s32|s64", 0), ("cvt", "sat s16 u16|u32|u64|s32|s64", 0), ("cvt", "sat u32 u64|s8|s16|s32|s64", 0),
    ("cvt", "sat s32 u32|u64|s64", 0), ("cvt", "sat u64 s8|s16|s32|s64", 0), ("cvt", "sat s64 u64", 0),
    ("cvt", "@irnd ftz? sat? @smallint f32", 0), ("cvt", "@irnd sat? @smallint f64", 0), ("cvt", "@irnd sat? @smallint f16", 53), ("cvt", "@irnd u16|u32|u64|s16|s32|s64 bf16", 90),
    ("cvt", "@rnd ftz? sat? f32 @smallint", 0), ("cvt", "@rnd sat? f64 @smallint", 0), ("cvt", "@rnd sat? f16 @smallint", 53), ("cvt", "@rnd bf16 u16|u32|u64|s16|s32|s64", 90),
    ("cvt", "@irnd? ftz? sat? f32 f32", 0), ("cvt", "@irnd? sat? f64 f64", 0), ("cvt", "@irnd sat? f16 f16", 53), ("cvt", "sat? f16 f16", 53), ("cvt", "@irnd bf16 bf16", 90),
    ("cvt", "@rnd ftz? sat? f32 f64", 0), ("cvt", "ftz? sat? f64 f32", 0),
    ("cvt", "@rnd ftz? sat? f16 f32", 53), ("cvt", "@rnd sat? f16 f64", 53), ("cvt", "ftz? sat? f32 f16", 53), ("cvt", "sat? f64 f16", 53),
    ("cvt", "rn|rz relu? bf16 f32", 80), ("cvt", "f32 bf16", 80), ("cvt", "rn|rz relu f16 f32", 80), ("cvt", "rm|rp bf16 f32", 90),
    ("cvt", "@rnd bf16 f16|f64", 90), ("cvt", "@rnd f16 bf16", 90), ("cvt", "f64 bf16", 90),
    ("cvt", "rn|rz relu? f16x2|bf16x2 f32", 80), ("cvt", "rna tf32 f32", 80), ("cvt", "rn|rz relu? tf32 f32", 90),
    ("cvt", "rn satfinite relu? e4m3x2|e5m2x2 f32|f16x2", 89), ("cvt", "rn relu? f16x2 e4m3x2|e5m2x2", 89),
    ("cvt", "pack sat u16|s16 s32", 72), ("cvt", "pack sat u8|s8 s32 b32", 72), ("cvt", "pack sat u4|s4|u2|s2 s32 b32", 75),
    // Atomics, 9.7.13.
    ("atom", "relaxed|acquire|release|acq_rel? @scope? @atspace? add u32|s32|u64|f32", 0),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? global? add L2::cache_hint u32|s32|u64|f32", 80),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? @atspace? add f64", 60),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? global? add L2::cache_hint f64", 80),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? @atspace? add noftz f16x2", 60),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? global? add noftz L2::cache_hint f16x2", 80),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? @atspace? add noftz f16", 70),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? global? add noftz L2::cache_hint f16", 80),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? @atspace? add noftz bf16|bf16x2", 90),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? global? add noftz L2::cache_hint bf16|bf16x2", 90),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? @atspace? min|max @words", 0),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? global? min|max L2::cache_hint @words", 80),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? @atspace? inc|dec u32", 0),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? global? inc|dec L2::cache_hint u32", 80),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? @atspace? and|or|xor b32|b64", 0),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? global? and|or|xor L2::cache_hint b32|b64", 80),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? @atspace? exch b32|b64", 0),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? @atspace? cas b32|b64", 0),
    ("atom", "relaxed|acquire|release|acq_rel? @scope? @atspace? cas b16", 70),
    ("red", "relaxed|release? @scope? @atspace? add u32|s32|u64|f32", 0),
    ("red", "relaxed|release? @scope? global? add L2::cache_hint u32|s32|u64|f32", 80),
    ("red", "relaxed|release? @scope? @atspace? add f64", 60),
    ("red", "relaxed|release? @scope? global? add L2::cache_hint f64", 80),
    ("red", "relaxed|release? @scope? @atspace? add noftz f16x2", 60),
    ("red", "relaxed|release? @scope? global? add noftz L2::cache_hint f16x2", 80),
    ("red", "relaxed|release? @scope? @atspace? add noftz f16", 70),
    ("red", "relaxed|release? @scope? global? add noftz L2::cache_hint f16", 80),
    ("red", "relaxed|release? @scope? @atspace? add noftz bf16|bf16x2", 90),
    ("red", "relaxed|release? @scope? global? add noftz L2::cache_hint bf16|bf16x2", 90),
    ("red", "relaxed|release? @scope? @atspace? min|max @words", 0),
    ("red", "relaxed|release? @scope? global? min|max L2::cache_hint @words", 80),
    ("red", "relaxed|release? @scope? @atspace? inc|dec u32", 0),
    ("red", "relaxed|release? @scope? global? inc|dec L2::cache_hint u32", 80),
    ("red", "relaxed|release? @scope? @atspace? and|or|xor b32|b64", 0),
    ("red", "relaxed|release? @scope? global? and|or|xor L2::cache_hint b32|b64", 80),
    // Barriers, fences and exchange between lanes, 9.7.13.
    ("bar", "cta? sync|arrive", 0), ("bar", "cta? red popc u32", 0), ("bar", "cta? red and|or pred", 0), ("bar", "warp sync", 0),
    ("barrier", "cta? sync|arrive aligned?", 0), ("barrier", "cta? red popc aligned? u32", 0), ("barrier", "cta? red and|or aligned? pred", 0),
    ("membar", "cta|gl|sys", 0), ("fence", "sc|acq_rel? cta|cluster|gpu|sys", 70),
    ("shfl", "sync up|down|bfly|idx b32", 30), ("vote", "sync all|any|uni pred", 30), ("vote", "sync ballot b32", 30),
    ("match", "any|all sync b32|b64", 70), ("redux", "sync add|min|max @word", 80), ("redux", "sync and|or|xor b32", 80),
    ("activemask", "b32", 30),
    // Asynchronous copies, 9.7.9.25.
    ("cp", "async ca|cg shared|shared::cta global L2::cache_hint? @prefetch?", 80),
    ("cp", "async commit_group|wait_group|wait_all", 80),
    // Matrices, 9.7.14.
    ("mma", "sync aligned m16n8k8|m16n8k16 row col f16 f16 f16 f16", 80), ("mma", "sync aligned m16n8k8|m16n8k16 row col f32 f16 f16 f32", 80),
    ("mma", "sync aligned m16n8k8|m16n8k16 row col f32 bf16 bf16 f32", 80),
    ("mma", "sync aligned m16n8k4|m16n8k8 row col f32 tf32 tf32 f32", 80),
    ("mma", "sync aligned m8n8k16|m16n8k16|m16n8k32 row col satfinite? s32 u8|s8 u8|s8 s32", 75),
    ("mma", "sync aligned m8n8k4 row col f64 f64 f64 f64", 80),
    ("ldmatrix", "sync aligned m8n8 x1|x2|x4 trans? shared|shared::cta? b16", 75),
    ("stmatrix", "sync aligned m8n8 x1|x2|x4 trans? shared|shared::cta? b16", 90),
    ("movmatrix", "sync aligned m8n8 trans b16", 75),
    ("wmma", "load a|b sync aligned row|col @wmma global|shared|shared::cta? f16", 70),
    ("wmma", "load a|b sync aligned row|col @wmma global|shared|shared::cta? u8|s8", 72),
    ("wmma", "load a|b sync aligned row|col @wmma global|shared|shared::cta? bf16", 80),
    ("wmma", "load a|b sync aligned row|col m16n16k8 global|shared|shared::cta? tf32", 80),
    ("wmma", "load c sync aligned row|col @wmma global|shared|shared::cta? f16|f32|s32", 70),
    ("wmma", "load c sync aligned row|col m16n16k8 global|shared|shared::cta? f32", 80),
    ("wmma", "store d sync aligned row|col @wmma global|shared|shared::cta? f16|f32|s32", 70),
    ("wmma", "store d sync aligned row|col m16n16k8 global|shared|shared::cta? f32", 80),
    ("wmma", "mma sync aligned row|col row|col @wmma f16|f32 f16|f32", 70),
    ("wmma", "mma sync aligned row|col row|col @wmma f32 bf16 bf16 f32", 80),
    ("wmma", "mma sync aligned row|col row|col m16n16k8 f32 tf32 tf32 f32", 80),
    ("wmma", "mma sync aligned row|col row|col @wmma satfinite? s32 s8 s8 s32", 72),
    ("wmma", "mma sync aligned row|col row|col @wmma satfinite? s32 u8 u8 s32", 72),
    // Control flow, 9.7.12 and 9.7.16.
    ("bra", "uni?", 0), ("ret", "uni?", 0), ("exit", "", 0), ("trap", "", 0), ("brkpt", "", 0),
    ("nanosleep", "u32", 70), ("pmevent", "mask?", 0),
];
/// Every form as mnemonic, groups of modifiers and the first architecture that has it.
pub fn forms() -> impl Iterator<Item = (&'static str, Vec<Group>, u32)> {
    FORMS.iter().map(|(base, pattern, sm)| (*base, groups(pattern), *sm))
}

/// One group of a form.
#[derive(Clone, Debug)]
pub struct Group {
    /// What may stand here; each may be several modifiers with dots between them.
    pub options: Vec<&'static str>,
    /// Whether it may be left out.
    pub optional: bool,
}

fn groups(pattern: &'static str) -> Vec<Group> {
    pattern
        .split_whitespace()
        .map(|g| {
            let optional = g.ends_with('?');
            let list = g.trim_end_matches('?').split('|');
            let options = list.flat_map(|name| match name.strip_prefix('@') {
                Some(name) => {
                    let found = GROUPS.iter().find(|(n, _)| *n == name);
                    found.expect("every group of the table is defined").1.split('|').collect()
                }
                None => vec![name],
            });
            Group { options: options.collect(), optional }
        })
        .collect()
}

/// Takes one modifier for each group, wherever it stands; `out` gets them in the order of the form. Types stay in the order
/// of the text: `place` is that of the last one taken.
fn matches<'a>(
    groups: &[Group],
    mods: &mut Vec<(usize, &'a str)>,
    out: &mut Vec<&'a str>,
    place: Option<usize>,
) -> bool {
    let Some((first, rest)) = groups.split_first() else {
        return mods.is_empty();
    };
    for option in &first.options {
        let (kept, mark, mut last) = (mods.clone(), out.len(), place);
        let found = option.split('.').all(|piece| {
            let Some(i) = mods.iter().position(|(_, m)| *m == piece) else {
                return false;
            };
            // Layouts of A and B stay in their order too.
            let layout = |m: &str| matches!(m, "row" | "col");
            if layout(piece) && mods[..i].iter().any(|(_, m)| layout(m)) {
                return false;
            }
            let (at, m) = mods.remove(i);
            if Ty::from_name(m).is_some() {
                if last.is_some_and(|l| at < l) {
                    return false;
                }
                last = Some(at);
            }
            out.push(m);
            true
        });
        if found && matches(rest, mods, out, last) {
            return true;
        }
        *mods = kept;
        out.truncate(mark);
    }
    first.optional && matches(rest, mods, out, place)
}

/// The modifiers of an instruction of `sm` in the order of the ISA text. The assembler takes them in any order as long as
/// types stay in theirs, and compilers make use of that (`atom.global.gpu.acq_rel.add.u32`).
///
/// # Errors
/// What is wrong with it, as a sentence.
pub fn check<'a>(base: &str, mods: &[&'a str], sm: u32) -> Result<Vec<&'a str>, String> {
    // Clusters came with sm_90, whatever the form.
    let floor = if mods.iter().any(|m| matches!(*m, "cluster" | "shared::cluster")) { 90 } else { 0 };
    let mut known = false;
    let mut needs = u32::MAX;
    let mut all = Vec::new();
    for (_, pattern, since) in FORMS.iter().filter(|f| f.0 == base) {
        known = true;
        let groups = groups(pattern);
        let mut out = Vec::with_capacity(mods.len());
        // A form has at most nine groups; more modifiers than that match none.
        if mods.len() <= 16 && matches(&groups, &mut mods.iter().copied().enumerate().collect(), &mut out, None) {
            let since = floor.max(*since);
            if since <= sm {
                return Ok(out);
            }
            needs = needs.min(since);
        }
        all.extend(groups.into_iter().flat_map(|g| g.options));
    }
    if !known {
        return Err(format!("unknown opcode {base}"));
    }
    if needs != u32::MAX {
        return Err(format!("this form of {base} needs .target sm_{needs}, the module says sm_{sm}"));
    }
    let stranger = mods.iter().find(|m| !all.iter().any(|o| o.split('.').any(|p| p == **m)));
    Err(match stranger {
        Some(m) => format!("unknown modifier .{m} of {base}"),
        None if mods.is_empty() => format!("{base} needs modifiers"),
        None => format!("no form of {base} has the modifiers .{}", mods.join(".")),
    })
}
