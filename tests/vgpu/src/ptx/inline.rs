//! Calls of device functions, resolved before decoding: each call becomes a copy of the function's body with registers and
//! variables of its own, so that a kernel is one list of instructions. `brx.idx` becomes a chain of comparisons.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};

use super::{Function, Instr, Module, Operand, Space, Ty, Var};
use crate::error::{Error, Result};

/// Instructions of all kernels of a module with everything inlined; calls that double at each level must end somewhere.
const MAX_BODY: usize = 1 << 20;
/// Calls within calls.
const MAX_DEPTH: usize = 64;
/// Registers of one kernel with everything inlined.
const MAX_REGS: usize = 1 << 22;
/// Functions the runtime provides; the decoder knows them under these names behind `call `.
const BUILTIN: [&str; 2] = ["vprintf", "__assertfail"];

/// The functions of a module by name.
pub struct Calls<'a> {
    functions: HashMap<&'a str, &'a Function>,
    sm: u32,
    /// Instructions that may still be made.
    left: Cell<usize>,
}

/// One copy of a function: where its registers start and what its variables are called now.
struct Frame<'a> {
    regs: u32,
    names: HashMap<&'a str, String>,
    /// The function's own variables, as it calls them.
    own: HashSet<&'a str>,
}

struct Inliner<'a, 'c> {
    calls: &'c Calls<'a>,
    out: Function,
    /// Sizes of the variables of `out`.
    sizes: HashMap<String, usize>,
    copies: usize,
    stack: Vec<&'a str>,
}

impl<'a> Calls<'a> {
    /// Collects functions and their aliases; a definition wins over a declaration.
    pub fn new(module: &'a Module) -> Calls<'a> {
        let mut functions: HashMap<&str, &Function> = HashMap::new();
        for f in module.functions.iter().filter(|f| !f.entry) {
            let known = functions.entry(&f.name).or_insert(f);
            if f.defined {
                *known = f;
            }
        }
        for (alias, name) in &module.aliases {
            if let Some(f) = functions.get(name.as_str()).copied() {
                functions.insert(alias, f);
            }
        }
        Calls { functions, sm: module.sm(), left: Cell::new(MAX_BODY) }
    }

    /// The kernel with every call replaced by what it does.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for recursion, calls through registers, functions without a body and arguments that do not fit.
    pub fn inline(&self, entry: &'a Function) -> Result<Function> {
        let mut out = Function {
            body: Vec::with_capacity(entry.body.len()),
            regs: Vec::new(),
            vars: Vec::new(),
            sm: self.sm,
            ..entry.clone()
        };
        out.body.clear();
        let mut inliner = Inliner { calls: self, out, sizes: HashMap::new(), copies: 0, stack: vec![&entry.name] };
        inliner.copy(entry, HashMap::new())?;
        Ok(inliner.out)
    }
}

impl<'a> Inliner<'a, '_> {
    fn fail<T>(&self, i: &Instr, message: impl Into<String>) -> Result<T> {
        Err(Error::Unsupported {
            kernel: self.out.name.clone(),
            line: i.line,
            text: i.text.clone(),
            message: message.into(),
        })
    }

    /// Appends the body of `f`; `names` says what its parameters are called in the kernel.
    fn copy(&mut self, f: &'a Function, mut names: HashMap<&'a str, String>) -> Result<()> {
        let top = self.stack.len() == 1;
        let copy = self.copies;
        self.copies += 1;
        let regs = self.out.regs.len() as u32;
        self.out.regs.extend_from_slice(&f.regs);
        for v in &f.vars {
            // Shared variables exist once, all others once per copy.
            let name = match v.space {
                _ if top => v.name.clone(),
                Space::Shared => format!("{}@{}", v.name, f.name),
                _ => format!("{}@{}@{copy}", v.name, f.name),
            };
            if self.sizes.insert(name.clone(), v.size).is_none() {
                let space = if v.space == Space::Param { Space::Local } else { v.space };
                self.out.vars.push(Var { name: name.clone(), space, ..v.clone() });
            }
            names.insert(&v.name, name);
        }
        let frame = Frame { regs, names, own: f.vars.iter().map(|v| v.name.as_str()).collect() };
        let mut starts = Vec::with_capacity(f.body.len() + 1);
        let mut own = Vec::with_capacity(f.body.len());
        for (n, i) in f.body.iter().enumerate() {
            starts.push(self.out.body.len());
            let left = self.calls.left.get();
            if left == 0 || self.out.regs.len() > MAX_REGS {
                return self.fail(i, "the kernels with their calls inlined are too large");
            }
            self.calls.left.set(left - 1);
            let base = i.opcode.split('.').next().unwrap_or("");
            match base {
                "call" => self.call(&frame, i, n, &mut own)?,
                "brx" => self.branch(&frame, i, n, &mut own)?,
                "ret" if !top => {
                    if n + 1 < f.body.len() || i.guard.is_some() {
                        let jump = self.instr(i, "bra", vec![Operand::Label(f.body.len())]);
                        self.push(&frame, jump, &mut own);
                    }
                }
                _ => {
                    let renamed = self.renamed(&frame, i, top);
                    self.push(&frame, renamed, &mut own);
                }
            }
        }
        starts.push(self.out.body.len());
        for n in own {
            for o in &mut self.out.body[n].operands {
                if let Operand::Label(l) = o {
                    *l = starts[*l];
                }
            }
        }
        Ok(())
    }

    fn instr(&self, like: &Instr, opcode: &str, operands: Vec<Operand>) -> Instr {
        Instr { opcode: opcode.to_string(), operands, ..like.clone() }
    }

    /// Appends an instruction of the frame, whose registers and labels are still those of its function.
    fn push(&mut self, frame: &Frame<'_>, mut i: Instr, own: &mut Vec<usize>) {
        i.guard = i.guard.map(|(r, not)| (r + frame.regs, not));
        i.operands.iter_mut().for_each(|o| shift(o, frame.regs));
        own.push(self.out.body.len());
        self.out.body.push(i);
    }

    /// The instruction with the names of variables as they are in the kernel, and `.param` as `.local` where that is what it is.
    fn renamed(&self, frame: &Frame<'_>, i: &Instr, top: bool) -> Instr {
        let mut i = i.clone();
        i.operands.iter_mut().for_each(|o| rename(o, &frame.names));
        if matches!(i.opcode.split('.').next(), Some("ld" | "st" | "cvta")) && i.opcode.contains(".param") {
            // A kernel's own parameters stay; those of calls and of functions are local memory.
            let of_call = i.operands.iter().any(|o| match o {
                Operand::Address(base, _) => {
                    matches!(&**base, Operand::Symbol(n, _) if frame.own.contains(n.as_str()))
                }
                Operand::Symbol(n, _) => frame.own.contains(n.as_str()),
                _ => false,
            });
            if of_call || !top || i.opcode.contains(".param::func") {
                let pieces = i.opcode.split('.').map(|p| match p {
                    "param" | "param::func" => "local",
                    p => p,
                });
                i.opcode = pieces.collect::<Vec<_>>().join(".");
            }
        }
        i
    }

    /// `call{.uni} (ret), name, (args), prototype;` with any of the lists left out.
    fn call(&mut self, frame: &Frame<'a>, i: &Instr, n: usize, own: &mut Vec<usize>) -> Result<()> {
        if !matches!(i.opcode.as_str(), "call" | "call.uni") {
            return self.fail(i, "unknown modifiers of call");
        }
        let mut rest = i.operands.as_slice();
        let returns: &[Operand] = match rest {
            [Operand::Vector(list), tail @ ..] => {
                rest = tail;
                list
            }
            _ => &[],
        };
        let Some((target, tail)) = rest.split_first() else {
            return self.fail(i, "call names no function");
        };
        let args: &[Operand] = match tail.first() {
            Some(Operand::Vector(list)) => list,
            _ => &[],
        };
        let name = match target {
            Operand::Symbol(name, 0) => name.as_str(),
            Operand::Reg(_) => return self.fail(i, "calls through a register are not known"),
            _ => return self.fail(i, "call names no function"),
        };
        let Some(callee) = self.calls.functions.get(name).copied() else {
            return self.fail(i, format!("unknown function {name}"));
        };
        if let Some((r, not)) = i.guard {
            // Lanes that do not call go on behind the call.
            let mut skip = self.instr(i, "bra", vec![Operand::Label(n + 1)]);
            skip.guard = Some((r, !not));
            self.push(frame, skip, own);
        }
        if returns.len() != callee.returns.len() || args.len() != callee.params.len() {
            return self.fail(
                i,
                format!(
                    "{name} takes {} arguments and returns {}, given are {} and {}",
                    callee.params.len(),
                    callee.returns.len(),
                    args.len(),
                    returns.len()
                ),
            );
        }
        if !callee.defined && BUILTIN.contains(&name) {
            let mut operands = Vec::new();
            for o in returns.iter().chain(args) {
                let Operand::Symbol(..) = o else {
                    return self.fail(i, format!("arguments of {name} are not parameters"));
                };
                operands.push(Operand::Address(Box::new(o.clone()), 0));
            }
            let mut print = self.instr(i, &format!("call {name}"), operands);
            print.operands.iter_mut().for_each(|o| rename(o, &frame.names));
            print.guard = None;
            self.push(frame, print, own);
            return Ok(());
        }
        if !callee.defined {
            return self.fail(i, format!("{name} has no body in this module"));
        }
        if self.stack.iter().skip(1).any(|s| *s == name) {
            return self.fail(i, format!("{name} calls itself; recursion is not known"));
        }
        if self.stack.len() > MAX_DEPTH {
            return self.fail(i, "calls nested too deeply");
        }
        let regs = self.out.regs.len() as u32;
        let mut names = HashMap::new();
        let mut before = Vec::new();
        for (formal, actual) in callee.params.iter().zip(args) {
            if let Some(i) = self.bind(frame, i, formal, actual, regs, &mut names, true)? {
                before.push(i);
            }
        }
        let mut after = Vec::new();
        for (formal, actual) in callee.returns.iter().zip(returns) {
            if let Some(i) = self.bind(frame, i, formal, actual, regs, &mut names, false)? {
                after.push(i);
            }
        }
        // Moves between the frames name registers of the kernel already. Those into the callee's registers, which the copy
        // is about to declare, come first.
        self.out.body.extend(before);
        self.stack.push(&callee.name);
        self.copy(callee, names)?;
        self.stack.pop();
        self.out.body.extend(after);
        Ok(())
    }

    /// Ties a parameter to what the call gives for it: two names of one variable, or a move.
    #[expect(clippy::too_many_arguments, reason = "each is one fact of the call")]
    fn bind(
        &mut self,
        frame: &Frame<'a>,
        i: &Instr,
        formal: &'a Var,
        actual: &Operand,
        regs: u32,
        names: &mut HashMap<&'a str, String>,
        into: bool,
    ) -> Result<Option<Instr>> {
        let mut actual = actual.clone();
        rename(&mut actual, &frame.names);
        shift(&mut actual, frame.regs);
        let bits = match formal.ty {
            Ty::Pred => "pred".to_string(),
            t => format!("b{}", 8 * t.size()),
        };
        let plain = |i: &Instr| Instr { guard: None, ..i.clone() };
        let make = |opcode: String, operands| Instr { opcode, operands, ..plain(i) };
        let memory = |name: &str| Operand::Address(Box::new(Operand::Symbol(name.into(), 0)), 0);
        match (formal.reg, &actual) {
            (None, Operand::Symbol(name, 0)) => {
                if self.sizes.get(name) != Some(&formal.size) {
                    return self.fail(i, format!("{name} does not fit the parameter {}", formal.name));
                }
                names.insert(&formal.name, name.clone());
                Ok(None)
            }
            (None, Operand::Reg(_) | Operand::Int(_) | Operand::F32(_) | Operand::F64(_)) => {
                let name = format!("{}@{}", formal.name, self.out.vars.len());
                self.out.vars.push(Var { name: name.clone(), space: Space::Local, ..formal.clone() });
                names.insert(&formal.name, name.clone());
                self.sizes.insert(name.clone(), formal.size);
                Ok(Some(if into {
                    make(format!("st.local.{bits}"), vec![memory(&name), actual])
                } else {
                    make(format!("ld.local.{bits}"), vec![actual, memory(&name)])
                }))
            }
            (Some(r), Operand::Symbol(name, 0)) => {
                let inner = Operand::Reg(r + regs);
                Ok(Some(if into {
                    make(format!("ld.local.{bits}"), vec![inner, memory(name)])
                } else {
                    make(format!("st.local.{bits}"), vec![memory(name), inner])
                }))
            }
            (Some(r), Operand::Reg(_) | Operand::Int(_) | Operand::F32(_) | Operand::F64(_)) => {
                let inner = Operand::Reg(r + regs);
                let operands = if into { vec![inner, actual] } else { vec![actual, inner] };
                Ok(Some(make(format!("mov.{bits}"), operands)))
            }
            _ => self.fail(i, format!("this argument does not fit the parameter {}", formal.name)),
        }
    }

    /// `brx.idx{.uni} index, table;`
    fn branch(&mut self, frame: &Frame<'_>, i: &Instr, n: usize, own: &mut Vec<usize>) -> Result<()> {
        let (index, table) = match (i.opcode.as_str(), i.operands.as_slice()) {
            ("brx.idx" | "brx.idx.uni", [index @ Operand::Reg(_), Operand::Vector(table)])
                if !table.is_empty() && table.iter().all(|t| matches!(t, Operand::Label(_))) =>
            {
                (index, table)
            }
            _ => return self.fail(i, "brx.idx needs a register and a table of labels"),
        };
        if let Some((r, not)) = i.guard {
            let mut skip = self.instr(i, "bra", vec![Operand::Label(n + 1)]);
            skip.guard = Some((r, !not));
            self.push(frame, skip, own);
        }
        let Some(left) = self.calls.left.get().checked_sub(table.len()) else {
            return self.fail(i, "the kernels with their tables of branches are too large");
        };
        self.calls.left.set(left);
        for (at, label) in table.iter().enumerate() {
            let p = self.out.regs.len() as u32 - frame.regs;
            self.out.regs.push(Ty::Pred);
            let mut test = self.instr(i, "setp.eq.u32", vec![Operand::Reg(p), index.clone(), Operand::Int(at as u64)]);
            test.guard = None;
            self.push(frame, test, own);
            let mut jump = self.instr(i, "bra", vec![label.clone()]);
            jump.guard = Some((p, false));
            self.push(frame, jump, own);
        }
        // An index past the table is undefined; here it stops the kernel.
        let mut fault = self.instr(i, "trap", Vec::new());
        fault.guard = None;
        self.push(frame, fault, own);
        Ok(())
    }
}

/// Adds to every register number.
fn shift(o: &mut Operand, by: u32) {
    match o {
        Operand::Reg(r) | Operand::NotReg(r) => *r += by,
        Operand::Pair(a, b) => {
            shift(a, by);
            shift(b, by);
        }
        Operand::Address(a, _) => shift(a, by),
        Operand::Vector(list) => list.iter_mut().for_each(|o| shift(o, by)),
        Operand::Tensor(a, list) => {
            shift(a, by);
            list.iter_mut().for_each(|o| shift(o, by));
        }
        _ => {}
    }
}

/// Gives symbols the names their variables have in the kernel.
fn rename(o: &mut Operand, names: &HashMap<&str, String>) {
    match o {
        Operand::Symbol(name, _) => {
            if let Some(new) = names.get(name.as_str()) {
                name.clone_from(new);
            }
        }
        Operand::Address(a, _) => rename(a, names),
        Operand::Vector(list) => list.iter_mut().for_each(|o| rename(o, names)),
        Operand::Tensor(a, list) => {
            rename(a, names);
            list.iter_mut().for_each(|o| rename(o, names));
        }
        _ => {}
    }
}
