//! Function bodies: scopes, register declarations, labels, tables of branches, instructions.

use std::collections::HashMap;

use super::lexer::{Kind, Token};
use super::parser::{MAX_DEPTH, Parser};
use super::variable::space_of;
use super::{Function, Instr, Operand, Ty};
use crate::error::Result;

/// Registers one function may declare; a guard against absurd counts, real kernels have a few thousand.
const MAX_REGS: usize = 1 << 20;

/// Names a scope declares: single registers, numbered ranges, vectors, labels, variables.
#[derive(Default)]
pub(super) struct Scope {
    parent: Option<usize>,
    names: HashMap<String, u32>,
    ranges: HashMap<String, (u32, u32)>,
    vectors: HashMap<String, (u32, u32)>,
    labels: HashMap<String, usize>,
    /// Variables by the name that is theirs alone in the function.
    variables: HashMap<String, String>,
    /// Targets of `brx.idx` by the name of the table.
    tables: HashMap<String, Vec<String>>,
}

/// What a name in an operand stands for.
pub(super) enum Found {
    Reg(u32),
    /// First register and number of a vector.
    Vector(u32, u32),
}

/// A function whose body is being read.
pub(super) struct Body {
    pub f: Function,
    pub scopes: Vec<Scope>,
    pub instr_scopes: Vec<usize>,
}

impl<'a> Parser<'a> {
    pub(super) fn block(&mut self, b: &mut Body, scope: usize, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return self.error("scopes nested too deeply");
        }
        loop {
            let t = self.peek();
            match t.kind {
                Kind::Punct('}') => {
                    self.next();
                    return Ok(());
                }
                Kind::Punct('{') => {
                    self.next();
                    b.scopes.push(Scope { parent: Some(scope), ..Scope::default() });
                    let inner = b.scopes.len() - 1;
                    self.block(b, inner, depth + 1)?;
                }
                Kind::Punct(';') => {
                    self.next();
                }
                Kind::Word(".reg") => {
                    self.next();
                    self.registers(b, scope)?;
                }
                Kind::Word(".loc") => self.location()?,
                Kind::Word(".pragma") => self.pragma()?,
                Kind::Word(".file") => self.file()?,
                Kind::Word(w) if space_of(w).is_some() => {
                    let first = b.f.vars.len();
                    self.variables(false, &mut b.f.vars)?;
                    for v in &mut b.f.vars[first..] {
                        // Scopes of calls all declare `param0`; each needs a name of its own.
                        let unique = if scope == 0 { v.name.clone() } else { format!("{}@{scope}", v.name) };
                        let old = b.scopes[scope].variables.insert(v.name.clone(), unique.clone());
                        if old.is_some() {
                            return Err(self.error_at(t, format!("{} is declared twice", v.name)));
                        }
                        v.name = unique;
                    }
                }
                Kind::Punct('@') => {
                    self.next();
                    let negated = self.accept('!');
                    let r = match self.operand(b, scope, 0)? {
                        Operand::Reg(r) => r,
                        _ => return Err(self.error_at(t, "guard is not a register")),
                    };
                    self.instruction(b, scope, Some((r, negated)), t)?;
                }
                Kind::Word(w) => {
                    let label = self.tokens.get(self.at + 1).is_some_and(|n| n.kind == Kind::Punct(':'));
                    if label {
                        self.next();
                        self.next();
                        self.labelled(b, scope, w, t)?;
                    } else {
                        self.instruction(b, scope, None, t)?;
                    }
                }
                _ => return self.error("expected an instruction"),
            }
        }
    }

    /// What follows `name:`: a table of branch or call targets, the prototype of a call, or any statement.
    fn labelled(&mut self, b: &mut Body, scope: usize, name: &'a str, t: Token<'a>) -> Result<()> {
        match self.peek().kind {
            Kind::Word(".branchtargets") => {
                self.next();
                let mut list = Vec::new();
                loop {
                    list.push(self.word("a label")?.to_string());
                    if !self.accept(',') {
                        break;
                    }
                }
                self.expect(';')?;
                b.scopes[scope].tables.insert(name.to_string(), list);
            }
            // Calls through registers are refused by name, so what they could reach need not be kept.
            Kind::Word(".callprototype" | ".calltargets") => {
                while !self.accept(';') {
                    if matches!(self.next().kind, Kind::End | Kind::Punct('{' | '}')) {
                        return self.error("expected `;`");
                    }
                }
            }
            _ => {
                if b.scopes[scope].labels.insert(name.to_string(), b.f.body.len()).is_some() {
                    return Err(self.error_at(t, "the label is declared twice"));
                }
            }
        }
        Ok(())
    }

    /// `.reg .type name, name<count>, ...;` or with `.v2` or `.v4`.
    pub(super) fn registers(&mut self, b: &mut Body, scope: usize) -> Result<()> {
        let n = match self.peek().kind {
            Kind::Word(".v2") => 2,
            Kind::Word(".v4") => 4,
            _ => 1,
        };
        if n > 1 {
            self.next();
        }
        let ty = self.ty()?;
        if ty.size() < 2 && ty != Ty::Pred {
            return self.error("registers have at least 16 bits");
        }
        loop {
            let t = self.peek();
            let name = self.word("a register name")?;
            let base = b.f.regs.len() as u32;
            let count = if self.accept('<') {
                let count = self.int()?.min(MAX_REGS as u64 + 1) as u32;
                self.expect('>')?;
                if n > 1 {
                    return Err(self.error_at(t, "a range of vectors"));
                }
                let scope = &mut b.scopes[scope];
                // `%r<9>` declares `%r1` too.
                let single = |n: &String| n.strip_prefix(name).is_some_and(|n| number_of(n).is_some_and(|n| n < count));
                if scope.names.keys().any(single) || scope.ranges.insert(name.to_string(), (base, count)).is_some() {
                    return Err(self.error_at(t, "the register is declared twice"));
                }
                count
            } else if n > 1 {
                for (i, part) in ["x", "y", "z", "w"].into_iter().take(n as usize).enumerate() {
                    b.scopes[scope].names.insert(format!("{name}.{part}"), base + i as u32);
                }
                b.scopes[scope].vectors.insert(name.to_string(), (base, n));
                n
            } else {
                let scope = &mut b.scopes[scope];
                let ranged = splits(name).any(|(stem, n)| scope.ranges.get(stem).is_some_and(|(_, count)| n < *count));
                if ranged || scope.names.insert(name.to_string(), base).is_some() {
                    return Err(self.error_at(t, "the register is declared twice"));
                }
                1
            };
            self.add_registers(b, ty, count as usize, t)?;
            if !self.accept(',') {
                break;
            }
        }
        self.expect(';')
    }

    /// A parameter that is declared `.reg`, after that word; its number.
    pub(super) fn register_parameter(&mut self, b: &mut Body) -> Result<(Ty, String, u32)> {
        let t = self.peek();
        let ty = self.ty()?;
        let name = self.word("a name")?;
        let r = b.f.regs.len() as u32;
        b.scopes[0].names.insert(name.to_string(), r);
        self.add_registers(b, ty, 1, t)?;
        Ok((ty, name.to_string(), r))
    }

    fn add_registers(&mut self, b: &mut Body, ty: Ty, count: usize, t: Token<'a>) -> Result<()> {
        if b.f.regs.len() + count > MAX_REGS || count > self.regs_left {
            return Err(self.error_at(t, "too many registers"));
        }
        self.regs_left -= count;
        b.f.regs.resize(b.f.regs.len() + count, ty);
        Ok(())
    }

    fn instruction(&mut self, b: &mut Body, scope: usize, guard: Option<(u32, bool)>, first: Token<'a>) -> Result<()> {
        let op = self.peek();
        let opcode = self.word("an opcode")?;
        if opcode.starts_with(['.', '%', '$']) {
            return Err(self.error_at(op, "expected an opcode"));
        }
        let mut operands = Vec::new();
        while !self.is(';') {
            // `call (ret), name, (args)` writes lists in parentheses.
            if opcode.starts_with("call") && self.accept('(') {
                operands.push(Operand::Vector(self.operands_until(')', b, scope, 0)?));
            } else {
                operands.push(self.operand(b, scope, 0)?);
            }
            if !self.accept(',') && !self.is(';') {
                return self.error("expected `,` or `;`");
            }
        }
        let end = self.next().end;
        let text = self.text[first.start..end].split_whitespace().collect::<Vec<_>>().join(" ");
        b.f.body.push(Instr {
            guard,
            opcode: opcode.to_string(),
            operands,
            line: op.line,
            source_line: self.source.map(|s| s.1),
            source_file: self.source.map(|s| s.0),
            text,
        });
        b.instr_scopes.push(scope);
        Ok(())
    }
}

pub(super) fn is_special(w: &str) -> bool {
    const NAMES: [&str; 33] = [
        "%tid",
        "%ntid",
        "%ctaid",
        "%nctaid",
        "%laneid",
        "%warpid",
        "%nwarpid",
        "%smid",
        "%nsmid",
        "%gridid",
        "%lanemask_eq",
        "%lanemask_le",
        "%lanemask_lt",
        "%lanemask_ge",
        "%lanemask_gt",
        "%clock",
        "%clock64",
        "%clock_hi",
        "%globaltimer",
        "%globaltimer_lo",
        "%globaltimer_hi",
        "%dynamic_smem_size",
        "%total_smem_size",
        "%aggr_smem_size",
        "%is_explicit_cluster",
        "%clusterid",
        "%nclusterid",
        "%cluster_ctarank",
        "%cluster_nctarank",
        "%cluster_ctaid",
        "%cluster_nctaid",
        "%current_graph_exec",
        "%reserved_smem_offset_0",
    ];
    NAMES.contains(&w.split('.').next().unwrap_or(w))
}

/// The number at the end of a register's name; numbers have no leading zero.
fn number_of(digits: &str) -> Option<u32> {
    let plain = digits.bytes().all(|b| b.is_ascii_digit()) && (digits.len() == 1 || !digits.starts_with('0'));
    digits.parse().ok().filter(|_| plain)
}

/// Every way to read a name as one of a range: `%r12` may be number 12 of `%r<..>` or number 2 of `%r1<..>`.
fn splits(name: &str) -> impl Iterator<Item = (&str, u32)> {
    let digits = name.bytes().rev().take_while(u8::is_ascii_digit).count().min(7);
    (1..=digits).map(|n| name.split_at(name.len() - n)).filter_map(|(stem, n)| Some((stem, number_of(n)?)))
}

pub(super) fn lookup(name: &str, scope: usize, scopes: &[Scope]) -> Option<Found> {
    let splits: Vec<(&str, u32)> = splits(name).collect();
    let mut at = Some(scope);
    while let Some(s) = at {
        if let Some(r) = scopes[s].names.get(name) {
            return Some(Found::Reg(*r));
        }
        if let Some((first, n)) = scopes[s].vectors.get(name) {
            return Some(Found::Vector(*first, *n));
        }
        for (stem, n) in &splits {
            if let Some((base, count)) = scopes[s].ranges.get(*stem)
                && n < count
            {
                return Some(Found::Reg(base + n));
            }
        }
        at = scopes[s].parent;
    }
    None
}

/// Looks through a scope and those around it.
fn find<'s, T>(scope: usize, scopes: &'s [Scope], get: impl Fn(&'s Scope) -> Option<T>) -> Option<T> {
    let mut at = Some(scope);
    while let Some(s) = at {
        if let Some(x) = get(&scopes[s]) {
            return Some(x);
        }
        at = scopes[s].parent;
    }
    None
}

/// Turns symbols that are labels, tables of labels or variables of an enclosing scope into those.
pub(super) fn resolve(op: &mut Operand, scope: usize, scopes: &[Scope]) {
    match op {
        Operand::Symbol(name, offset) => {
            let key = name.as_str();
            let label = |n: &str| find(scope, scopes, |s| s.labels.get(n).copied());
            if let Some(i) = label(key).filter(|_| *offset == 0) {
                *op = Operand::Label(i);
            } else if let Some(table) = find(scope, scopes, |s| s.tables.get(key)) {
                let list = table.iter().map(|n| match label(n) {
                    Some(i) => Operand::Label(i),
                    None => Operand::Symbol(n.clone(), 0),
                });
                *op = Operand::Vector(list.collect());
            } else if let Some(unique) = find(scope, scopes, |s| s.variables.get(key)) {
                *name = unique.clone();
            }
        }
        Operand::Address(base, _) => resolve(base, scope, scopes),
        Operand::Vector(list) => list.iter_mut().for_each(|o| resolve(o, scope, scopes)),
        Operand::Tensor(base, list) => {
            resolve(base, scope, scopes);
            list.iter_mut().for_each(|o| resolve(o, scope, scopes));
        }
        _ => {}
    }
}
