//! Function bodies: scopes, register declarations, instructions and operands.

use std::collections::HashMap;

use super::lexer::{Kind, Token};
use super::parser::{MAX_DEPTH, Parser, loop_vars, space_of};
use super::{Function, Instr, Operand};
use crate::error::Result;

/// Registers one function may declare; a guard against absurd counts, real kernels have a few thousand.
const MAX_REGS: usize = 1 << 20;

/// Names a scope declares: single registers, numbered ranges, labels.
#[derive(Default)]
pub(super) struct Scope {
    parent: Option<usize>,
    names: HashMap<String, u32>,
    ranges: HashMap<String, (u32, u32)>,
    labels: HashMap<String, usize>,
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
                    b.scopes.push(Scope {
                        parent: Some(scope),
                        ..Scope::default()
                    });
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
                Kind::Word(".loc") => {
                    self.next();
                    self.int()?;
                    self.source_line = u32::try_from(self.int()?).ok();
                    self.skip_line(t.line);
                }
                Kind::Word(".pragma" | ".file") => self.skip_line(t.line),
                Kind::Word(w) if space_of(w).is_some() => loop_vars(self, false, &mut b.f.vars)?,
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
                        b.scopes[scope].labels.insert(w.to_string(), b.f.body.len());
                    } else {
                        self.instruction(b, scope, None, t)?;
                    }
                }
                _ => return self.error("expected an instruction"),
            }
        }
    }

    fn registers(&mut self, b: &mut Body, scope: usize) -> Result<()> {
        let t = self.peek();
        let ty = self.ty()?;
        loop {
            let name = self.word("a register name")?;
            let base = b.f.regs.len();
            let count = if self.accept('<') {
                let n = self.int()? as usize;
                self.expect('>')?;
                b.scopes[scope]
                    .ranges
                    .insert(name.to_string(), (base as u32, n.min(MAX_REGS) as u32));
                n
            } else {
                b.scopes[scope].names.insert(name.to_string(), base as u32);
                1
            };
            if count > MAX_REGS || base + count > MAX_REGS {
                return Err(self.error_at(t, "too many registers"));
            }
            for i in 0..count {
                b.f.regs.push(ty);
                b.f.reg_names.push(if count == 1 {
                    name.to_string()
                } else {
                    format!("{name}{i}")
                });
            }
            if !self.accept(',') {
                break;
            }
        }
        self.expect(';')
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
            if self.accept('(') {
                let mut list = Vec::new();
                while !self.accept(')') {
                    list.push(self.operand(b, scope, 0)?);
                    if !self.accept(',') && !self.is(')') {
                        return self.error("expected `,` or `)`");
                    }
                }
                operands.push(Operand::Vector(list));
            } else {
                operands.push(self.operand(b, scope, 0)?);
            }
            if !self.accept(',') && !self.is(';') {
                return self.error("expected `,` or `;`");
            }
        }
        let end = self.next().end;
        let text = self.text[first.start..end]
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ");
        b.f.body.push(Instr {
            guard,
            opcode: opcode.to_string(),
            operands,
            line: op.line,
            source_line: self.source_line,
            text,
        });
        b.instr_scopes.push(scope);
        Ok(())
    }

    fn operand(&mut self, b: &Body, scope: usize, depth: usize) -> Result<Operand> {
        if depth > 4 {
            return self.error("operand nested too deeply");
        }
        let t = self.next();
        let op = match t.kind {
            Kind::Int(x) => Operand::Int(x),
            Kind::F32(x) => Operand::F32(x),
            Kind::F64(x) => Operand::F64(x),
            Kind::Punct('-') => match self.next().kind {
                Kind::Int(x) => Operand::Int(x.wrapping_neg()),
                Kind::F64(x) => Operand::F64(x ^ 1 << 63),
                _ => return Err(self.error_at(t, "expected a number after `-`")),
            },
            Kind::Punct('!') => match self.operand(b, scope, depth + 1)? {
                Operand::Reg(r) => Operand::NotReg(r),
                _ => return Err(self.error_at(t, "`!` needs a register")),
            },
            Kind::Punct('{') => {
                let mut list = Vec::new();
                while !self.accept('}') {
                    list.push(self.operand(b, scope, depth + 1)?);
                    if !self.accept(',') && !self.is('}') {
                        return self.error("expected `,` or `}`");
                    }
                }
                Operand::Vector(list)
            }
            Kind::Punct('[') => {
                let base = self.operand(b, scope, depth + 1)?;
                let (base, mut offset) = match base {
                    Operand::Symbol(s, o) => (Operand::Symbol(s, 0), o),
                    other => (other, 0),
                };
                if self.accept('+') {
                    offset = self.int()? as i64;
                }
                if self.is(',') {
                    return self.error("tensor coordinates are not known");
                }
                self.expect(']')?;
                Operand::Address(Box::new(base), offset)
            }
            Kind::Word("_") => Operand::Sink,
            Kind::Word(w) => match lookup(w, scope, &b.scopes) {
                Some(r) => Operand::Reg(r),
                None if w.starts_with('%') && is_special(w) => Operand::Special(w.to_string()),
                None if w == "WARP_SZ" => Operand::Int(32),
                None if w.starts_with('%') => return Err(self.error_at(t, "undeclared register")),
                None => {
                    let offset = if self.accept('+') { self.int()? as i64 } else { 0 };
                    Operand::Symbol(w.to_string(), offset)
                }
            },
            _ => return Err(self.error_at(t, "expected an operand")),
        };
        if self.accept('|') {
            let second = self.operand(b, scope, depth + 1)?;
            return Ok(Operand::Pair(Box::new(op), Box::new(second)));
        }
        Ok(op)
    }
}

fn is_special(w: &str) -> bool {
    const NAMES: [&str; 27] = [
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
        "%dynamic_smem_size",
        "%total_smem_size",
        "%clusterid",
        "%cluster_ctarank",
        "%cluster_nctarank",
        "%cluster_ctaid",
        "%cluster_nctaid",
    ];
    NAMES.contains(&w.split('.').next().unwrap_or(w))
}

fn lookup(name: &str, scope: usize, scopes: &[Scope]) -> Option<u32> {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = name[stem.len()..].parse::<u32>().ok();
    let mut at = Some(scope);
    while let Some(s) = at {
        if let Some(r) = scopes[s].names.get(name) {
            return Some(*r);
        }
        if let (Some((base, count)), Some(n)) = (scopes[s].ranges.get(stem), number)
            && n < *count
        {
            return Some(base + n);
        }
        at = scopes[s].parent;
    }
    None
}

/// Turns symbols that are labels of an enclosing scope into labels.
pub(super) fn resolve(op: &mut Operand, scope: usize, scopes: &[Scope]) {
    if let Operand::Symbol(name, 0) = op {
        let mut at = Some(scope);
        while let Some(s) = at {
            if let Some(&i) = scopes[s].labels.get(name.as_str()) {
                *op = Operand::Label(i);
                return;
            }
            at = scopes[s].parent;
        }
    }
}
