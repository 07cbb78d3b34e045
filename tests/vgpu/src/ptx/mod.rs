//! PTX modules as text and as a tree: what was declared, and instructions with resolved registers and labels.

mod body;
mod inline;
mod lexer;
mod operand;
mod parser;
mod variable;

pub use inline::Calls;
pub use parser::parse;

/// Register or data type of PTX, by its width and how bits are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Ty {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    U16x2,
    S16x2,
    F32x2,
    E4m3x2,
    E5m2x2,
}

impl Ty {
    /// From the name without its dot.
    pub fn from_name(name: &str) -> Option<Ty> {
        Some(match name {
            "pred" => Ty::Pred,
            "b8" => Ty::B8,
            "b16" => Ty::B16,
            "b32" => Ty::B32,
            "b64" => Ty::B64,
            "b128" => Ty::B128,
            "u8" => Ty::U8,
            "u16" => Ty::U16,
            "u32" => Ty::U32,
            "u64" => Ty::U64,
            "s8" => Ty::S8,
            "s16" => Ty::S16,
            "s32" => Ty::S32,
            "s64" => Ty::S64,
            "f16" => Ty::F16,
            "f16x2" => Ty::F16x2,
            "bf16" => Ty::Bf16,
            "bf16x2" => Ty::Bf16x2,
            "tf32" => Ty::Tf32,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            "u16x2" => Ty::U16x2,
            "s16x2" => Ty::S16x2,
            "f32x2" => Ty::F32x2,
            "e4m3x2" => Ty::E4m3x2,
            "e5m2x2" => Ty::E5m2x2,
            _ => return None,
        })
    }

    /// The name without its dot.
    pub fn name(self) -> &'static str {
        match self {
            Ty::Pred => "pred",
            Ty::B8 => "b8",
            Ty::B16 => "b16",
            Ty::B32 => "b32",
            Ty::B64 => "b64",
            Ty::B128 => "b128",
            Ty::U8 => "u8",
            Ty::U16 => "u16",
            Ty::U32 => "u32",
            Ty::U64 => "u64",
            Ty::S8 => "s8",
            Ty::S16 => "s16",
            Ty::S32 => "s32",
            Ty::S64 => "s64",
            Ty::F16 => "f16",
            Ty::F16x2 => "f16x2",
            Ty::Bf16 => "bf16",
            Ty::Bf16x2 => "bf16x2",
            Ty::Tf32 => "tf32",
            Ty::F32 => "f32",
            Ty::F64 => "f64",
            Ty::U16x2 => "u16x2",
            Ty::S16x2 => "s16x2",
            Ty::F32x2 => "f32x2",
            Ty::E4m3x2 => "e4m3x2",
            Ty::E5m2x2 => "e5m2x2",
        }
    }

    /// Bytes in memory; a predicate counts as one.
    pub fn size(self) -> usize {
        match self {
            Ty::Pred | Ty::B8 | Ty::U8 | Ty::S8 => 1,
            Ty::B16 | Ty::U16 | Ty::S16 | Ty::F16 | Ty::Bf16 | Ty::E4m3x2 | Ty::E5m2x2 => 2,
            Ty::B32 | Ty::U32 | Ty::S32 | Ty::F32 | Ty::F16x2 | Ty::Bf16x2 | Ty::Tf32 | Ty::U16x2 | Ty::S16x2 => 4,
            Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 | Ty::F32x2 => 8,
            Ty::B128 => 16,
        }
    }

    /// Whether integers of this type are signed.
    pub fn signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }
}

/// State space of a variable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Space {
    Global,
    Const,
    Shared,
    Local,
    Param,
}

/// One piece of an initialiser.
#[derive(Clone, Debug, PartialEq)]
pub enum Init {
    /// A number, as the bits of an integer or of the variable's float type.
    Bits(u64),
    /// The address of another variable plus an offset.
    Symbol(String, i64),
    /// Those bits of an address that a mask such as 0xff00 picks, moved down to bit 0.
    Masked(String, i64, u64),
}

/// A variable or parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Var {
    /// Name as written.
    pub name: String,
    /// Where it lives.
    pub space: Space,
    /// Element type.
    pub ty: Ty,
    /// Bytes; zero for an `extern` array without a size.
    pub size: usize,
    /// Alignment in bytes.
    pub align: usize,
    /// Elements of the initialiser, in order; the rest is zero. Empty: none given.
    pub init: Vec<Init>,
    /// Declared `.extern`.
    pub external: bool,
    /// The register, for a parameter that is declared `.reg`.
    pub reg: Option<u32>,
    /// Line from 1.
    pub line: u32,
}

/// An operand of an instruction.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand {
    /// A register of the function.
    Reg(u32),
    /// `!%p`.
    NotReg(u32),
    /// `%a|%b`; either side may be [`Operand::Sink`].
    Pair(Box<Operand>, Box<Operand>),
    /// `%tid.x` and the like.
    Special(String),
    /// Integer literal.
    Int(u64),
    /// Single precision literal, bits.
    F32(u32),
    /// Double precision literal, bits.
    F64(u64),
    /// Variable, parameter or function, with a constant offset.
    Symbol(String, i64),
    /// Label: index of a statement in the function body.
    Label(usize),
    /// `[base + offset]`.
    Address(Box<Operand>, i64),
    /// `[base, {coordinates}, ...]` of tensor copies; the base may carry an offset as an [`Operand::Address`].
    Tensor(Box<Operand>, Vec<Operand>),
    /// `{a, b, ...}`.
    Vector(Vec<Operand>),
    /// `_`.
    Sink,
}

/// One instruction.
#[derive(Clone, Debug, PartialEq)]
pub struct Instr {
    /// Guard register and whether it is negated.
    pub guard: Option<(u32, bool)>,
    /// Opcode with all modifiers, as written.
    pub opcode: String,
    /// Operands in order.
    pub operands: Vec<Operand>,
    /// Line from 1.
    pub line: u32,
    /// Line of the source from the last `.loc`.
    pub source_line: Option<u32>,
    /// File number of that line; [`Module::files`] has the name.
    pub source_file: Option<u32>,
    /// The text, one line.
    pub text: String,
}

/// What a kernel's directives promise and demand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// `.maxntid`.
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid`.
    pub required_threads: Option<[u32; 3]>,
    /// `.minnctapersm`.
    pub min_ctas: Option<u32>,
    /// `.maxnreg`.
    pub max_regs: Option<u32>,
    /// `.reqnctapercluster`.
    pub cluster: Option<[u32; 3]>,
    /// `.explicitcluster`.
    pub explicit_cluster: bool,
    /// `.maxclusterrank`.
    pub max_cluster: Option<u32>,
    /// `.noreturn`.
    pub no_return: bool,
}

impl Limits {
    /// Threads a block may have, from `.reqntid` or `.maxntid`.
    pub fn threads(&self) -> Option<u32> {
        let v = self.required_threads.or(self.max_threads)?;
        Some(v.into_iter().fold(1, u32::saturating_mul))
    }
}

/// A kernel or a device function.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Function {
    /// Name.
    pub name: String,
    /// `.entry` rather than `.func`.
    pub entry: bool,
    /// Parameters in order.
    pub params: Vec<Var>,
    /// Return values in order.
    pub returns: Vec<Var>,
    /// Types of the registers, indexed by [`Operand::Reg`].
    pub regs: Vec<Ty>,
    /// Shared and local variables and parameters of calls declared inside, each under a name of its own.
    pub vars: Vec<Var>,
    /// Instructions; labels are indices into it.
    pub body: Vec<Instr>,
    /// `.maxntid` and its kin.
    pub limits: Limits,
    /// Whether a body was given.
    pub defined: bool,
    /// Number of the module's `.target sm_`; zero when it names none.
    pub sm: u32,
    /// Line from 1.
    pub line: u32,
}

impl Module {
    /// Number of `.target sm_`, without its letter; zero when there is none.
    pub fn sm(&self) -> u32 {
        let digits = |t: &String| {
            let rest = t.strip_prefix("sm_").or(t.strip_prefix("compute_"))?;
            rest.trim_end_matches(|c: char| !c.is_ascii_digit()).parse().ok()
        };
        self.target.iter().find_map(digits).unwrap_or(0)
    }
}

/// A whole module.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Module {
    /// `.version`, as major and minor.
    pub version: (u32, u32),
    /// `.target` words.
    pub target: Vec<String>,
    /// Module-scope variables.
    pub vars: Vec<Var>,
    /// Kernels and functions.
    pub functions: Vec<Function>,
    /// Other names of functions: alias, function.
    pub aliases: Vec<(String, String)>,
    /// Source files by number.
    pub files: Vec<(u32, String)>,
}
