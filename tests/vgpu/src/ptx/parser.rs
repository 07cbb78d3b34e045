//! Recursive-descent parser from tokens to [`Module`].

use super::body::{Body, Scope, resolve};
use super::lexer::{Kind, Token, lex};
use super::{Function, Init, Module, Space, Ty, Var};
use crate::error::{Error, Result};

/// Bytes of one variable; the same kind of guard.
const MAX_BYTES: usize = 1 << 31;
/// Depth of nested scopes and operands.
pub(super) const MAX_DEPTH: usize = 64;

/// Parses a module.
///
/// # Errors
/// [`Error::Parse`] with the line and the text at which the parser stopped.
pub fn parse(text: &str) -> Result<Module> {
    let mut p = Parser {
        text,
        tokens: lex(text)?,
        at: 0,
        source_line: None,
    };
    p.module()
}

pub(super) struct Parser<'a> {
    pub(super) text: &'a str,
    pub(super) tokens: Vec<Token<'a>>,
    pub(super) at: usize,
    pub(super) source_line: Option<u32>,
}

impl<'a> Parser<'a> {
    pub(super) fn peek(&self) -> Token<'a> {
        self.tokens[self.at]
    }

    pub(super) fn next(&mut self) -> Token<'a> {
        let t = self.tokens[self.at];
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        t
    }

    pub(super) fn error_at(&self, t: Token<'a>, message: impl Into<String>) -> Error {
        let text: String = self.text[t.start..]
            .lines()
            .next()
            .unwrap_or("")
            .chars()
            .take(80)
            .collect();
        Error::Parse {
            line: t.line,
            message: message.into(),
            text,
        }
    }

    pub(super) fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(self.error_at(self.peek(), message))
    }

    pub(super) fn is(&self, c: char) -> bool {
        self.peek().kind == Kind::Punct(c)
    }

    pub(super) fn accept(&mut self, c: char) -> bool {
        let yes = self.is(c);
        if yes {
            self.next();
        }
        yes
    }

    pub(super) fn expect(&mut self, c: char) -> Result<()> {
        if self.accept(c) {
            Ok(())
        } else {
            self.error(format!("expected `{c}`"))
        }
    }

    pub(super) fn word(&mut self, what: &str) -> Result<&'a str> {
        match self.peek().kind {
            Kind::Word(w) => {
                self.next();
                Ok(w)
            }
            _ => self.error(format!("expected {what}")),
        }
    }

    pub(super) fn int(&mut self) -> Result<u64> {
        let negative = self.accept('-');
        match self.peek().kind {
            Kind::Int(x) => {
                self.next();
                Ok(if negative { x.wrapping_neg() } else { x })
            }
            _ => self.error("expected an integer"),
        }
    }

    /// Skips the rest of the current line (`.loc`, `.file`, `.pragma` and friends).
    pub(super) fn skip_line(&mut self, line: u32) {
        while self.peek().line == line && self.peek().kind != Kind::End {
            self.next();
        }
    }

    fn skip_braces(&mut self) -> Result<()> {
        self.expect('{')?;
        let mut depth = 1;
        while depth > 0 {
            match self.next().kind {
                Kind::Punct('{') => depth += 1,
                Kind::Punct('}') => depth -= 1,
                Kind::End => return self.error("`{` without `}`"),
                _ => {}
            }
        }
        Ok(())
    }

    fn module(&mut self) -> Result<Module> {
        let mut m = Module::default();
        loop {
            let t = self.peek();
            let w = match t.kind {
                Kind::End => break,
                Kind::Punct(';') => {
                    self.next();
                    continue;
                }
                Kind::Word(w) => w,
                _ => return self.error("expected a directive"),
            };
            match w {
                ".version" => {
                    self.next();
                    let v = self.next();
                    let s = &self.text[v.start..v.end];
                    let parts: Vec<Option<u32>> = s.split('.').map(|x| x.parse().ok()).collect();
                    match parts[..] {
                        [Some(a), Some(b)] if (7..=9).contains(&a) => m.version = (a, b),
                        _ => return Err(self.error_at(v, "expected a PTX version from 7.0 to 9.x")),
                    }
                }
                ".target" => {
                    self.next();
                    loop {
                        m.target.push(self.word("a target")?.to_string());
                        if !self.accept(',') {
                            break;
                        }
                    }
                }
                ".address_size" => {
                    self.next();
                    if self.int()? != 64 {
                        return Err(self.error_at(t, "only 64-bit addresses are known"));
                    }
                }
                ".file" | ".loc" | ".pragma" | ".alias" => self.skip_line(t.line),
                ".section" => {
                    self.next();
                    self.word("a section name")?;
                    self.skip_braces()?;
                }
                _ => self.declaration(&mut m)?,
            }
        }
        if m.version == (0, 0) {
            return self.error("no .version directive");
        }
        Ok(m)
    }

    /// A variable or function with its linkage words.
    fn declaration(&mut self, m: &mut Module) -> Result<()> {
        let mut external = false;
        loop {
            match self.peek().kind {
                Kind::Word(".extern") => external = true,
                Kind::Word(".visible" | ".weak" | ".common") => {}
                _ => break,
            }
            self.next();
        }
        match self.peek().kind {
            Kind::Word(".entry") => {
                self.next();
                m.functions.push(self.function(true)?);
            }
            Kind::Word(".func") => {
                self.next();
                m.functions.push(self.function(false)?);
            }
            Kind::Word(w) if space_of(w).is_some() => {
                loop_vars(self, external, &mut m.vars)?;
            }
            _ => return self.error("unknown directive"),
        }
        Ok(())
    }

    fn function(&mut self, entry: bool) -> Result<Function> {
        let mut f = Function {
            entry,
            line: self.peek().line,
            ..Function::default()
        };
        if !entry && self.is('(') {
            f.returns = self.params()?;
        }
        f.name = self.word("a function name")?.to_string();
        if self.is('(') {
            f.params = self.params()?;
        }
        loop {
            let t = self.peek();
            match t.kind {
                Kind::Punct(';') => {
                    self.next();
                    return Ok(f);
                }
                Kind::Punct('{') => break,
                Kind::Word(w @ (".maxntid" | ".reqntid")) => {
                    self.next();
                    let mut product = 1u64;
                    loop {
                        product = product.saturating_mul(self.int()?);
                        if !self.accept(',') {
                            break;
                        }
                    }
                    let n = u32::try_from(product).map_err(|_| self.error_at(t, format!("{w} is too large")))?;
                    f.max_threads = Some(n);
                }
                Kind::Word(w) if w.starts_with('.') => {
                    self.next();
                    while !matches!(self.peek().kind, Kind::Punct('{' | ';') | Kind::End)
                        && !matches!(self.peek().kind, Kind::Word(w) if w.starts_with('.'))
                    {
                        self.next();
                    }
                    if w == ".pragma" {
                        self.accept(';');
                    }
                }
                _ => return self.error("expected a function body"),
            }
        }
        f.defined = true;
        let mut body = Body {
            f,
            scopes: vec![Scope::default()],
            instr_scopes: Vec::new(),
        };
        self.next();
        self.block(&mut body, 0, 0)?;
        let Body {
            mut f,
            scopes,
            instr_scopes,
        } = body;
        for (instr, scope) in f.body.iter_mut().zip(&instr_scopes) {
            for op in &mut instr.operands {
                resolve(op, *scope, &scopes);
            }
        }
        Ok(f)
    }

    fn params(&mut self) -> Result<Vec<Var>> {
        self.expect('(')?;
        let mut out = Vec::new();
        if self.accept(')') {
            return Ok(out);
        }
        loop {
            if matches!(self.peek().kind, Kind::Word(".reg")) {
                self.next();
                let ty = self.ty()?;
                let line = self.peek().line;
                let name = self.word("a name")?.to_string();
                let (size, space) = (ty.size(), Space::Param);
                out.push(Var {
                    name,
                    space,
                    ty,
                    size,
                    align: size,
                    init: Vec::new(),
                    external: false,
                    line,
                });
            } else {
                out.push(self.var(false)?);
            }
            if !self.accept(',') {
                break;
            }
        }
        self.expect(')')?;
        Ok(out)
    }

    pub(super) fn ty(&mut self) -> Result<Ty> {
        let t = self.peek();
        let w = self.word("a type")?;
        w.strip_prefix('.')
            .and_then(Ty::from_name)
            .ok_or_else(|| self.error_at(t, "unknown type"))
    }

    /// One variable, from its space word on.
    fn var(&mut self, external: bool) -> Result<Var> {
        let t = self.peek();
        let space = match t.kind {
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
            self.next();
            match w {
                ".align" => align = self.int()? as usize,
                ".ptr" | ".global" | ".shared" | ".const" | ".local" => {}
                ".v2" => vector = 2,
                ".v4" => vector = 4,
                _ => ty = Some(Ty::from_name(&w[1..]).ok_or_else(|| self.error_at(t, "unknown type"))?),
            }
        }
        let ty = match ty {
            Some(ty) => ty,
            None => return self.error("a variable without a type"),
        };
        let name = self.word("a variable name")?.to_string();
        let mut size = Some(ty.size() * vector);
        while self.accept('[') {
            let n = if self.is(']') { 0 } else { self.int()? as usize };
            self.expect(']')?;
            size = size.and_then(|s| s.checked_mul(n)).filter(|s| *s <= MAX_BYTES);
        }
        let Some(mut size) = size else {
            return Err(self.error_at(t, "variable too large"));
        };
        let mut init = Vec::new();
        if self.accept('=') {
            self.init(ty, &mut init, 0)?;
            size = size.max(init.len() * ty.size());
        }
        let align = if align == 0 { ty.size() * vector } else { align };
        if !align.is_power_of_two() || align > 1 << 20 {
            return Err(self.error_at(t, "alignment is not a power of two"));
        }
        Ok(Var {
            name,
            space,
            ty,
            size,
            align,
            init,
            external,
            line: t.line,
        })
    }

    fn init(&mut self, ty: Ty, out: &mut Vec<Init>, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return self.error("initialiser nested too deeply");
        }
        if self.accept('{') {
            while !self.accept('}') {
                self.init(ty, out, depth + 1)?;
                if !self.accept(',') && !self.is('}') {
                    return self.error("expected `,` or `}`");
                }
            }
            return Ok(());
        }
        let negative = self.accept('-');
        let item = match self.next().kind {
            Kind::Int(x) => Init::Bits(if negative { x.wrapping_neg() } else { x }),
            Kind::F32(x) => Init::Bits(u64::from(x)),
            Kind::F64(x) if ty == Ty::F32 => Init::Bits(u64::from((f64::from_bits(x) as f32).to_bits())),
            Kind::F64(x) => Init::Bits(x),
            Kind::Word("generic") => {
                self.expect('(')?;
                let name = self.word("a symbol")?.to_string();
                self.expect(')')?;
                let offset = if self.accept('+') { self.int()? as i64 } else { 0 };
                Init::Symbol(name, offset)
            }
            Kind::Word(w) => {
                let offset = if self.accept('+') { self.int()? as i64 } else { 0 };
                Init::Symbol(w.to_string(), offset)
            }
            _ => return self.error("expected a value"),
        };
        out.push(item);
        Ok(())
    }
}

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

pub(super) fn loop_vars(p: &mut Parser<'_>, external: bool, out: &mut Vec<Var>) -> Result<()> {
    out.push(p.var(external)?);
    p.expect(';')
}
