//! Operands: registers, numbers and constant expressions, symbols, addresses, vectors, pairs.

use super::Operand;
use super::body::{Body, Found, is_special, lookup};
use super::lexer::Kind;
use super::parser::{MAX_DEPTH, Parser};
use crate::error::Result;

/// Elements of a vector operand; the largest real one is the 256 accumulators of a warp-group product.
const MAX_VECTOR: usize = 512;

impl Parser<'_> {
    /// An integer: a literal, or an expression of literals.
    pub(super) fn int(&mut self) -> Result<u64> {
        self.expression(0, 0)
    }

    /// Operators by precedence, lowest first, as in C.
    fn expression(&mut self, level: usize, depth: usize) -> Result<u64> {
        const LEVELS: [&[&str]; 6] = [&["|"], &["^"], &["&"], &["<<", ">>"], &["+", "-"], &["*", "/", "%"]];
        if depth > MAX_DEPTH {
            return self.error("expression nested too deeply");
        }
        if level == LEVELS.len() {
            let t = self.next();
            return match t.kind {
                Kind::Int(x) => Ok(x),
                Kind::Word("WARP_SZ") => Ok(32),
                Kind::Punct('-') => Ok(self.expression(level, depth + 1)?.wrapping_neg()),
                Kind::Punct('+') => self.expression(level, depth + 1),
                Kind::Punct('~') => Ok(!self.expression(level, depth + 1)?),
                Kind::Punct('(') => {
                    let x = self.expression(0, depth + 1)?;
                    self.expect(')')?;
                    Ok(x)
                }
                _ => Err(self.error_at(t, "expected an integer")),
            };
        }
        let mut left = self.expression(level + 1, depth)?;
        while let Some(op) = LEVELS[level].iter().find(|op| self.operator(op)) {
            let t = self.peek();
            self.next();
            if op.len() == 2 {
                self.next();
            }
            let right = self.expression(level + 1, depth)?;
            left = match *op {
                "|" => left | right,
                "^" => left ^ right,
                "&" => left & right,
                "<<" => left.checked_shl(right.min(64) as u32).unwrap_or(0),
                ">>" => left.checked_shr(right.min(64) as u32).unwrap_or(0),
                "+" => left.wrapping_add(right),
                "-" => left.wrapping_sub(right),
                "*" => left.wrapping_mul(right),
                _ if right == 0 => return Err(self.error_at(t, "division by zero")),
                "/" => (left as i64).wrapping_div(right as i64) as u64,
                _ => (left as i64).wrapping_rem(right as i64) as u64,
            };
        }
        Ok(left)
    }

    fn operator(&self, op: &str) -> bool {
        let mut chars = op.chars();
        let first = chars.next().unwrap_or(' ');
        match (self.peek().kind, chars.next()) {
            (Kind::Word("%"), None) => first == '%',
            (Kind::Punct(c), None) => c == first,
            (Kind::Punct(c), Some(second)) => {
                c == first && self.tokens.get(self.at + 1).is_some_and(|t| t.kind == Kind::Punct(second))
            }
            _ => false,
        }
    }

    /// One operand.
    pub(super) fn operand(&mut self, b: &Body, scope: usize, depth: usize) -> Result<Operand> {
        if depth > 4 {
            return self.error("operand nested too deeply");
        }
        let t = self.peek();
        let op = match t.kind {
            Kind::F32(x) => {
                self.next();
                Operand::F32(x)
            }
            Kind::F64(x) => {
                self.next();
                Operand::F64(x)
            }
            Kind::Punct('-') if matches!(self.tokens.get(self.at + 1).map(|t| t.kind), Some(Kind::F64(_))) => {
                self.next();
                match self.next().kind {
                    Kind::F64(x) => Operand::F64(x ^ 1 << 63),
                    _ => return Err(self.error_at(t, "expected a number after `-`")),
                }
            }
            Kind::Int(_) | Kind::Punct('-' | '~' | '(') | Kind::Word("WARP_SZ") => Operand::Int(self.int()?),
            Kind::Punct('!') => {
                self.next();
                match self.operand(b, scope, depth + 1)? {
                    Operand::Reg(r) => Operand::NotReg(r),
                    _ => return Err(self.error_at(t, "`!` needs a register")),
                }
            }
            Kind::Punct('{') => {
                self.next();
                Operand::Vector(self.operands_until('}', b, scope, depth)?)
            }
            Kind::Punct('[') => {
                self.next();
                self.address(b, scope, depth)?
            }
            Kind::Word("_") => {
                self.next();
                Operand::Sink
            }
            Kind::Word(w) => {
                self.next();
                match lookup(w, scope, &b.scopes) {
                    Some(Found::Reg(r)) => Operand::Reg(r),
                    Some(Found::Vector(first, n)) => Operand::Vector((first..first + n).map(Operand::Reg).collect()),
                    None if w.starts_with('%') && is_special(w) => Operand::Special(w.to_string()),
                    None if w.starts_with('%') => return Err(self.error_at(t, "undeclared register")),
                    None if w.starts_with('.') => return Err(self.error_at(t, "expected an operand")),
                    None => Operand::Symbol(w.to_string(), self.offset()?),
                }
            }
            _ => return Err(self.error_at(t, "expected an operand")),
        };
        if self.is('|') && matches!(op, Operand::Reg(_) | Operand::Sink) {
            self.next();
            let second = self.operand(b, scope, depth + 1)?;
            return Ok(Operand::Pair(Box::new(op), Box::new(second)));
        }
        Ok(op)
    }

    /// A list that ends with `end`, after its opening bracket.
    pub(super) fn operands_until(&mut self, end: char, b: &Body, scope: usize, depth: usize) -> Result<Vec<Operand>> {
        let mut list = Vec::new();
        while !self.accept(end) {
            list.push(self.operand(b, scope, depth + 1)?);
            if list.len() > MAX_VECTOR {
                return self.error("too many elements");
            }
            if !self.accept(',') && !self.is(end) {
                return self.error(format!("expected `,` or `{end}`"));
            }
        }
        Ok(list)
    }

    /// What stands in square brackets, after the first.
    fn address(&mut self, b: &Body, scope: usize, depth: usize) -> Result<Operand> {
        let t = self.peek();
        let (base, offset) = match self.operand(b, scope, depth + 1)? {
            Operand::Symbol(s, o) => (Operand::Symbol(s, 0), o),
            base @ (Operand::Reg(_) | Operand::Int(_)) => (base, self.offset()?),
            _ => return Err(self.error_at(t, "an address starts with a register, a symbol or a number")),
        };
        let address = Operand::Address(Box::new(base), offset);
        if self.accept(',') {
            let rest = self.operands_until(']', b, scope, depth)?;
            return Ok(Operand::Tensor(Box::new(address), rest));
        }
        self.expect(']')?;
        Ok(address)
    }
}
