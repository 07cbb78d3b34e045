//! From parsed functions to programs: symbols, parameter layout, rows of registers and constants.

mod operands;

use std::collections::HashMap;
use std::sync::Mutex;

use super::alu::Op;
use super::cfg::{Flow, allocate, intervals, liveness, reconvergence};
use super::code::Build;
use super::schedule::Pooled;
use super::uses::Registers;
use super::{Act, Alu, Class, File, Inst, NONE, finish, forms};
use crate::error::{Error, Result};
use crate::ptx::{Function, Instr, Limits, Operand, Space, Ty, Var};

/// How a row is filled when a CTA starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowInit {
    /// A constant.
    Word(u32),
    /// A 64-bit constant.
    Long(u64),
    /// A constant predicate.
    Pred(bool),
    /// Thread index, by dimension.
    Tid(usize),
    /// Block index.
    Block(usize),
    /// Block size.
    BlockDim(usize),
    /// Grid size.
    GridDim(usize),
    /// Lane number.
    LaneId,
    /// Warp number.
    WarpId,
    /// Warps of the block.
    Warps,
    /// Lane masks: eq, le, lt, ge, gt.
    LaneMask(usize),
    /// Dynamic shared bytes.
    DynamicShared,
    /// Something about clusters, by dimension.
    Cluster(super::hopper::ClusterRegister, usize),
}

/// Where an instruction came from.
#[derive(Clone, Debug)]
pub struct Source {
    /// Line of the PTX.
    pub line: u32,
    /// Line of the CUDA source.
    pub source_line: Option<u32>,
    /// The text.
    pub text: String,
}

/// A kernel, ready to run.
pub struct Program {
    /// Name.
    pub name: String,
    /// Instructions.
    pub code: Vec<Inst>,
    /// Where they came from.
    pub source: Vec<Source>,
    /// Rows of each file.
    pub rows: [usize; 3],
    /// Rows with a start value.
    pub init: Vec<(u16, RowInit)>,
    /// Local bytes of a thread.
    pub local_size: usize,
    /// Static shared bytes.
    pub static_shared: usize,
    /// Where dynamic shared memory starts.
    pub dynamic_offset: usize,
    /// Offset and size of each parameter.
    pub params: Vec<(usize, usize)>,
    /// `.maxntid` product.
    pub max_threads: Option<u32>,
    /// Build of the handlers; this processor supports it.
    pub build: Build,
    /// `.maxntid` and its kin.
    pub limits: Limits,
    /// End of the stretch without jumps and labels that each instruction is in.
    pub ends: Vec<u32>,
    /// Memory instructions; see [`super::site::Site`].
    pub sites: usize,
    /// Whether it has asynchronous instructions of sm_90a, which other accesses are checked against.
    pub asynchronous: bool,
    /// Registers of warpgroup products.
    pub tracked: usize,
    /// Rows that each instruction reads and writes.
    pub registers: Registers,
    /// What launches hand on to each other.
    pub pool: Mutex<Vec<Pooled>>,
}

/// Value of a symbol: the space and the address or offset in it.
pub type Symbols = HashMap<String, (Space, u64)>;

/// Decoder of one function.
pub(super) struct Decoder<'a> {
    f: &'a Function,
    pub(super) build: Build,
    symbols: Symbols,
    row_of: Vec<usize>,
    rows: [usize; 3],
    constants: HashMap<(usize, u64), u16>,
    specials: HashMap<String, u16>,
    /// Predicate row with the carry bits, once an instruction uses them.
    carry: Option<u16>,
    /// Rows for addresses and a half, once a `wmma` instruction uses them.
    matrix: Option<(u16, u16)>,
    /// Whether the instruction may name special registers and variables as values: `mov` and `cvt` alone may.
    values: bool,
    init: Vec<(u16, RowInit)>,
}

fn bits(t: Ty) -> bool {
    matches!(t, Ty::B8 | Ty::B16 | Ty::B32 | Ty::B64 | Ty::B128)
}

fn integer(t: Ty) -> bool {
    t.signed() || matches!(t, Ty::U8 | Ty::U16 | Ty::U32 | Ty::U64)
}

/// Whether a register may be an operand of an instruction's type: the same size, and bits on either side, integers on both,
/// or the same float. Source: PTX ISA, "Type checking rules", table of operands and instructions.
pub(super) fn agrees(register: Ty, ty: Ty) -> bool {
    register == ty || register.size() == ty.size() && compatible(register, ty)
}

fn compatible(register: Ty, ty: Ty) -> bool {
    if register == Ty::Pred || ty == Ty::Pred {
        return false;
    }
    bits(register) || bits(ty) || integer(register) && integer(ty)
}

/// Lays variables out one after the other; returns the end.
fn layout(vars: &[&Var], mut at: usize, symbols: &mut Symbols) -> usize {
    for v in vars {
        at = at.next_multiple_of(v.align);
        symbols.insert(v.name.clone(), (v.space, at as u64));
        at += v.size;
    }
    at
}

pub(super) fn file_of(t: Ty) -> File {
    match t {
        Ty::Pred => File::P,
        t if t.size() == 8 => File::Q,
        _ => File::W,
    }
}

/// Decodes a kernel for a build of the handlers. `module_vars` are the module's variables, `globals` the addresses of the global ones.
pub fn decode(f: &Function, module_vars: &[Var], globals: &Symbols, build: Build) -> Result<Program> {
    let mut symbols = globals.clone();
    let of = |space: Space, external: bool| -> Vec<&Var> {
        module_vars
            .iter()
            .chain(&f.vars)
            .filter(|v| v.space == space && (v.external || v.size == 0) == external)
            .collect()
    };
    let static_shared = layout(&of(Space::Shared, false), 0, &mut symbols);
    let dynamic = of(Space::Shared, true);
    let dynamic_offset = static_shared.next_multiple_of(dynamic.iter().map(|v| v.align).max().unwrap_or(1));
    for v in dynamic {
        symbols.insert(v.name.clone(), (Space::Shared, dynamic_offset as u64));
    }
    let local_size = layout(&of(Space::Local, false), 0, &mut symbols).next_multiple_of(16);
    layout(&f.params.iter().collect::<Vec<_>>(), 0, &mut symbols);
    let params = f.params.iter().map(|v| (symbols[&v.name].1 as usize, v.size)).collect();

    let flow: Vec<Flow> = f.body.iter().map(flow_of).collect();
    let meet = if flow.is_empty() { Vec::new() } else { reconvergence(&flow) };
    let live = liveness(&flow, f.regs.len());
    let spans = intervals(&flow, f.regs.len(), &live);
    let mut d = Decoder {
        f,
        build,
        symbols,
        row_of: vec![usize::MAX; f.regs.len()],
        rows: [0; 3],
        constants: HashMap::new(),
        specials: HashMap::new(),
        carry: None,
        matrix: None,
        values: false,
        init: Vec::new(),
    };
    for (n, file) in [File::W, File::Q, File::P].into_iter().enumerate() {
        let mine = |r: &usize| f.regs[*r] != Ty::B128 && file_of(f.regs[*r]) == file;
        let list: Vec<_> = (0..f.regs.len()).filter(mine).filter_map(|r| spans[r].map(|s| (r as u32, s))).collect();
        d.rows[n] = allocate(&list, 0, &mut d.row_of);
    }
    let mut code = Vec::with_capacity(f.body.len());
    for (n, i) in f.body.iter().enumerate() {
        let fail = |message: String| Error::Unsupported {
            kernel: f.name.clone(),
            line: i.line,
            text: i.text.clone(),
            message,
        };
        let mut inst = d.instruction(i).map_err(fail)?;
        if let Some((r, not)) = i.guard {
            if f.regs[r as usize] != Ty::Pred {
                return Err(fail("the guard is not a predicate".into()));
            }
            (inst.guard, inst.guard_not) = (d.row_of[r as usize] as u16, not);
        }
        if matches!(inst.act, Act::Branch) {
            inst.y = meet[n] as u32;
        }
        code.push(inst);
    }
    if d.rows.iter().any(|n| *n >= NONE as usize) {
        return Err(Error::Invalid(format!("kernel {} needs too many registers: {:?}", f.name, d.rows)));
    }
    let sites = finish::sites(&mut code);
    let ends = finish::ends(&code);
    finish::chains(&mut code, &ends);
    finish::orders(&mut code, f.body.iter().map(|i| i.opcode.as_str()));
    finish::polls(&mut code, f.body.iter().map(|i| i.opcode.as_str()));
    let asynchronous = code.iter().any(|i| matches!(i.act, Act::Hopper(_)));
    let tracked = super::hopper::track::wrap(&mut code, f);
    let registers = Registers::new(f, &d.row_of, d.rows, d.carry, &live, &ends);
    let source =
        f.body.iter().map(|i| Source { line: i.line, source_line: i.source_line, text: i.text.clone() }).collect();
    Ok(Program {
        name: f.name.clone(),
        source,
        rows: d.rows,
        init: d.init,
        local_size,
        static_shared,
        dynamic_offset,
        params,
        build,
        max_threads: f.limits.threads(),
        limits: f.limits.clone(),
        ends,
        sites,
        asynchronous,
        tracked,
        registers,
        code,
        pool: Mutex::default(),
    })
}

pub(super) fn registers(op: &Operand, out: &mut Vec<u32>) {
    match op {
        Operand::Reg(r) | Operand::NotReg(r) => out.push(*r),
        Operand::Pair(a, b) => {
            registers(a, out);
            registers(b, out);
        }
        Operand::Address(a, _) => registers(a, out),
        Operand::Vector(v) => v.iter().for_each(|o| registers(o, out)),
        Operand::Tensor(a, v) => {
            registers(a, out);
            v.iter().for_each(|o| registers(o, out));
        }
        _ => {}
    }
}

pub(super) fn flow_of(i: &Instr) -> Flow {
    let base = i.opcode.split('.').next().unwrap_or("");
    let mut flow = Flow { falls: true, ..Flow::default() };
    match base {
        "bra" => {
            flow.target = i.operands.iter().find_map(|o| if let Operand::Label(t) = o { Some(*t) } else { None });
            flow.falls = i.guard.is_some();
        }
        "ret" | "exit" | "trap" => flow.falls = i.guard.is_some(),
        _ => {}
    }
    (flow.defs, flow.uses) = operands_of(i);
    if let Some((r, _)) = i.guard {
        // Lanes that the guard leaves out keep the old value.
        let kept = flow.defs.clone();
        flow.uses.extend(kept);
        flow.uses.push(r);
    }
    flow
}

/// Registers that an instruction writes and reads, its guard aside.
pub(super) fn operands_of(i: &Instr) -> (Vec<u32>, Vec<u32>) {
    let base = i.opcode.split('.').next().unwrap_or("");
    let (mut defs, mut uses) = (Vec::new(), Vec::new());
    // The first operand is the destination, but for these; an address is never one.
    let writes = match base {
        "st" | "red" | "bra" | "cp" | "membar" | "fence" | "prefetch" | "nanosleep" | "pmevent" | "setmaxnreg" => false,
        "bar" | "barrier" => i.opcode.contains(".red"),
        _ => true,
    };
    for (n, o) in i.operands.iter().enumerate() {
        let written = n == 0 && writes && !matches!(o, Operand::Address(..));
        registers(o, if written { &mut defs } else { &mut uses });
    }
    // A product adds to its accumulators.
    if i.opcode.starts_with("wgmma.mma_async") {
        uses.extend(defs.iter().copied());
    }
    (defs, uses)
}

pub(super) type Decoded<T> = std::result::Result<T, String>;

impl Decoder<'_> {
    /// The arithmetic action of the build in use.
    pub(super) fn alu(&self, f: Alu) -> Act {
        Act::Alu(f.pick(self.build))
    }

    /// Number of the `.target`.
    pub(super) fn sm(&self) -> u32 {
        self.f.sm
    }

    pub(super) fn reg_ty(&self, r: u32) -> Ty {
        self.f.regs[r as usize]
    }

    /// Whether the operand is a predicate register.
    pub(super) fn is_predicate(&self, o: &Operand) -> bool {
        matches!(o, Operand::Reg(r) | Operand::NotReg(r) if self.reg_ty(*r) == Ty::Pred)
    }

    fn constant(&mut self, file: File, bits: u64) -> u16 {
        let n = file as usize;
        if let Some(row) = self.constants.get(&(n, bits)) {
            return *row;
        }
        let row = self.new_row(n);
        let init = match file {
            File::W => RowInit::Word(bits as u32),
            File::Q => RowInit::Long(bits),
            File::P => RowInit::Pred(bits != 0),
        };
        self.init.push((row, init));
        self.constants.insert((n, bits), row);
        row
    }

    fn new_row(&mut self, file: usize) -> u16 {
        self.rows[file] += 1;
        // More rows than fit are refused when the kernel is complete.
        (self.rows[file] - 1).min(NONE as usize - 1) as u16
    }

    /// The row of the carry bits.
    pub(super) fn carry_row(&mut self) -> u16 {
        if let Some(row) = self.carry {
            return row;
        }
        let row = self.new_row(File::P as usize);
        self.init.push((row, RowInit::Pred(false)));
        self.carry = Some(row);
        row
    }

    /// Rows that `wmma` instructions use for addresses and for a half.
    pub(super) fn matrix_rows(&mut self) -> (u16, u16) {
        if let Some(rows) = self.matrix {
            return rows;
        }
        let rows = (self.new_row(File::Q as usize), self.new_row(File::W as usize));
        self.matrix = Some(rows);
        rows
    }

    pub(super) fn special(&mut self, name: &str) -> Decoded<u16> {
        if let Some(row) = self.specials.get(name) {
            return Ok(*row);
        }
        let (stem, dim) = name.split_once('.').unwrap_or((name, "x"));
        let dim = match dim {
            "x" => 0,
            "y" => 1,
            "z" => 2,
            _ => return Err(format!("unknown component of {name}")),
        };
        let init = match stem {
            "%tid" => RowInit::Tid(dim),
            "%ctaid" => RowInit::Block(dim),
            "%ntid" => RowInit::BlockDim(dim),
            "%nctaid" => RowInit::GridDim(dim),
            "%laneid" => RowInit::LaneId,
            "%warpid" => RowInit::WarpId,
            "%nwarpid" => RowInit::Warps,
            "%smid" => RowInit::Word(0),
            "%nsmid" => RowInit::Word(1),
            "%lanemask_eq" => RowInit::LaneMask(0),
            "%lanemask_le" => RowInit::LaneMask(1),
            "%lanemask_lt" => RowInit::LaneMask(2),
            "%lanemask_ge" => RowInit::LaneMask(3),
            "%lanemask_gt" => RowInit::LaneMask(4),
            "%dynamic_smem_size" => RowInit::DynamicShared,
            _ if super::hopper::ClusterRegister::of(stem).is_some() => {
                RowInit::Cluster(super::hopper::ClusterRegister::of(stem).ok_or("no register")?, dim)
            }
            _ => return Err(format!("special register {name} is not known")),
        };
        let row = self.new_row(0);
        self.init.push((row, init));
        self.specials.insert(name.to_string(), row);
        Ok(row)
    }

    /// Value of a symbol used as a number.
    pub(super) fn symbol(&self, name: &str) -> Decoded<(Space, u64)> {
        self.symbols.get(name).copied().ok_or_else(|| format!("unknown symbol {name}"))
    }

    /// An instruction with nothing filled in but what it does.
    pub(super) fn blank(act: Act, class: Class) -> Inst {
        Inst {
            act,
            d: NONE,
            a: NONE,
            b: NONE,
            c: NONE,
            guard: NONE,
            guard_not: false,
            class,
            k: 0,
            x: u32::from(NONE),
            y: 0,
            site: 0,
            polls: false,
            order: 0,
        }
    }

    fn instruction(&mut self, i: &Instr) -> Decoded<Inst> {
        let mut op = Op::new(&i.opcode);
        self.values = matches!(op.base, "mov" | "cvt" | "cvta");
        let inst = match self.hopper(&mut op, &i.operands) {
            Some(found) => found?,
            None => {
                // Calls that the runtime serves are no opcodes of PTX.
                if !i.opcode.starts_with("call ") {
                    op.mods = forms::check(op.base, &op.mods, self.f.sm)?;
                }
                self.opcode(&mut op, &i.operands)?
            }
        };
        if op.mods.is_empty() { Ok(inst) } else { Err(format!("unknown modifier .{}", op.mods.join("."))) }
    }
}
