//! Variables: state space, type, dimensions and initialiser.

use super::lexer::Kind;
use super::parser::{MAX_DEPTH, Parser};
use super::{Init, Space, Ty, Var};
use crate::error::Result;

/// Bytes that all variables of a module may have together; a guard against absurd sizes.
const MAX_BYTES: usize = 1 << 30;

pub(super) fn space_of(w: &str) -> Option<Space> {
    Some(match w {
        ".global" => Space::Global,
        ".const" => Space::Const,
        ".shared" => Space::Shared,
        ".local" => Space::Local,
        ".param" => Space::Param,
        _ => return None,
    })
}

/// What stands between the state space and the name of a variable.
struct Kindred {
    align: usize,
    vector: usize,
    ty: Ty,
}

impl<'a> Parser<'a> {
    /// `.space attributes type name[dims] = init, name2 ...;`
    pub(super) fn variables(&mut self, external: bool, out: &mut Vec<Var>) -> Result<()> {
        let (space, kindred) = self.variable_head()?;
        loop {
            out.push(self.variable(space, &kindred, external)?);
            if !self.accept(',') {
                return self.expect(';');
            }
        }
    }

    /// One parameter of a function, up to the comma or parenthesis.
    pub(super) fn parameter(&mut self) -> Result<Var> {
        let (space, kindred) = self.variable_head()?;
        self.variable(space, &kindred, false)
    }

    fn variable_head(&mut self) -> Result<(Space, Kindred)> {
        let t = self.peek();
        let space = match t.kind {
            // `.const[2]` and the like name old banks, which no version from 7.0 on has.
            Kind::Word(w) => space_of(w),
            _ => None,
        };
        let Some(space) = space else {
            return self.error("expected a state space");
        };
        self.next();
        let (mut align, mut vector, mut ty) = (0, 1, None);
        while let Kind::Word(w) = self.peek().kind {
            if !w.starts_with('.') {
                break;
            }
            let at = self.next();
            match w {
                ".align" => {
                    align = self.int()? as usize;
                    if !align.is_power_of_two() || align > 1 << 20 {
                        return Err(self.error_at(at, "alignment is not a power of two"));
                    }
                }
                // `.ptr .global .align 8` describes what a pointer parameter points to, not the parameter.
                ".ptr" => {
                    self.next_if(|w| space_of(w).is_some());
                    if self.next_if(|w| w == ".align") {
                        self.int()?;
                    }
                }
                ".attribute" => {
                    self.expect('(')?;
                    while !self.accept(')') {
                        if self.next().kind == Kind::End {
                            return self.error("expected `)`");
                        }
                    }
                }
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                _ if ty.is_none() => {
                    ty = Some(Ty::from_name(&w[1..]).ok_or_else(|| self.error_at(at, "unknown type"))?);
                }
                _ => return Err(self.error_at(at, "a second type")),
            }
        }
        let Some(ty) = ty else {
            return self.error("a variable without a type");
        };
        if ty == Ty::Pred {
            return Err(self.error_at(t, "predicates live in registers only"));
        }
        if align == 0 {
            align = ty.size() * vector;
        }
        Ok((space, Kindred { align, vector, ty }))
    }

    fn variable(&mut self, space: Space, kindred: &Kindred, external: bool) -> Result<Var> {
        let t = self.peek();
        let name = self.word("a variable name")?.to_string();
        // `name<4>` declares name0 to name3 for registers only.
        let mut dims = Vec::new();
        while self.accept('[') {
            let open = self.is(']');
            if open && !dims.is_empty() {
                return self.error("only the first dimension may be left open");
            }
            dims.push(if open { None } else { Some(self.int()? as usize) });
            if dims.len() > 8 {
                return self.error("too many dimensions");
            }
            self.expect(']')?;
        }
        if kindred.vector > 1 {
            dims.push(Some(kindred.vector));
        }
        let inner = dims.iter().skip(1).try_fold(1usize, |n, d| n.checked_mul(d.unwrap_or(0)));
        let count = inner.and_then(|n| n.checked_mul(dims.first().map_or(1, |d| d.unwrap_or(0))));
        let size = count.and_then(|n| n.checked_mul(kindred.ty.size()));
        let Some(mut size) = size.filter(|s| *s <= MAX_BYTES) else {
            return Err(self.error_at(t, "variable too large"));
        };
        let mut init = Vec::new();
        if self.accept('=') {
            let open = dims.first() == Some(&None);
            self.initialiser(kindred.ty, &dims, &mut init, 0)?;
            if open {
                let row = inner.unwrap_or(1).max(1);
                size = init.len().next_multiple_of(row) * kindred.ty.size();
            }
            if init.len() * kindred.ty.size() > size {
                return Err(self.error_at(t, "more values than the variable holds"));
            }
        }
        self.bytes_left = match self.bytes_left.checked_sub(size) {
            Some(left) => left,
            None => return Err(self.error_at(t, "the variables of the module are too large")),
        };
        Ok(Var { name, space, ty: kindred.ty, size, align: kindred.align, init, external, reg: None, line: t.line })
    }

    /// Values in braces; a nested brace that is short leaves the rest of its row zero.
    fn initialiser(&mut self, ty: Ty, dims: &[Option<usize>], out: &mut Vec<Init>, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return self.error("initialiser nested too deeply");
        }
        if self.accept('{') {
            let start = out.len();
            let inner = dims.get(1..).unwrap_or(&[]);
            while !self.accept('}') {
                self.initialiser(ty, inner, out, depth + 1)?;
                if !self.accept(',') && !self.is('}') {
                    return self.error("expected `,` or `}`");
                }
            }
            if depth > 0 {
                // Sizes were checked to be small before.
                let row = dims.iter().map(|d| d.unwrap_or(0)).product::<usize>();
                if out.len() - start > row {
                    return self.error("more values than the row holds");
                }
                if self.is(',') || out.len() - start < row {
                    out.resize(start + row, Init::Bits(0));
                }
            }
            return Ok(());
        }
        let item = match self.peek().kind {
            Kind::Word("generic") => {
                self.next();
                self.expect('(')?;
                let name = self.word("a symbol")?.to_string();
                self.expect(')')?;
                Init::Symbol(name, self.offset()?)
            }
            Kind::Word(w) if !w.starts_with('.') => {
                self.next();
                Init::Symbol(w.to_string(), self.offset()?)
            }
            Kind::F32(x) => {
                self.next();
                Init::Bits(u64::from(x))
            }
            _ => {
                let negative = self.accept('-');
                if let Kind::F64(x) = self.peek().kind {
                    self.next();
                    let x = if negative { x ^ 1 << 63 } else { x };
                    Init::Bits(match ty {
                        Ty::F32 => u64::from((f64::from_bits(x) as f32).to_bits()),
                        _ => x,
                    })
                } else {
                    let x = self.int()?;
                    if self.accept('(') {
                        return self.masked(x, out);
                    }
                    Init::Bits(if negative { x.wrapping_neg() } else { x })
                }
            }
        };
        out.push(item);
        Ok(())
    }

    /// `0xff00(symbol + offset)`, after the parenthesis.
    fn masked(&mut self, mask: u64, out: &mut Vec<Init>) -> Result<()> {
        let generic = self.next_if(|w| w == "generic");
        if generic {
            self.expect('(')?;
        }
        let name = self.word("a symbol")?.to_string();
        if generic {
            self.expect(')')?;
        }
        let offset = self.offset()?;
        self.expect(')')?;
        out.push(Init::Masked(name, offset, mask));
        Ok(())
    }

    /// `+ 4`, `- 4` or nothing.
    pub(super) fn offset(&mut self) -> Result<i64> {
        if self.accept('+') {
            return Ok(self.int()? as i64);
        }
        if self.accept('-') {
            return Ok((self.int()? as i64).wrapping_neg());
        }
        Ok(0)
    }
}
