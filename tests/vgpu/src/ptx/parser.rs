//! Recursive-descent parser from tokens to [`Module`].

use super::body::{Body, Scope, resolve};
use super::lexer::{Kind, Token, lex};
use super::variable::space_of;
use super::{Function, Module, Space, Ty, Var};
use crate::error::{Error, Result};

/// Registers that all functions of a module may declare together; a guard against absurd counts.
const MODULE_REGS: usize = 1 << 22;
/// Bytes that all variables of a module may have together.
const MODULE_BYTES: usize = 1 << 30;
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
        source: None,
        files: Vec::new(),
        regs_left: MODULE_REGS,
        bytes_left: MODULE_BYTES,
    };
    p.module()
}

/// The error of a function's text, with its name.
fn within(function: &str, mut e: Error) -> Error {
    if let Error::Parse { kernel, .. } = &mut e {
        *kernel = Some(function.into());
    }
    e
}

pub(super) struct Parser<'a> {
    pub(super) text: &'a str,
    pub(super) tokens: Vec<Token<'a>>,
    pub(super) at: usize,
    /// File number and line of the last `.loc`.
    pub(super) source: Option<(u32, u32)>,
    files: Vec<(u32, String)>,
    pub(super) regs_left: usize,
    pub(super) bytes_left: usize,
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
        let text: String = self.text[t.start..].lines().next().unwrap_or("").chars().take(80).collect();
        let message = match t.kind {
            Kind::Malformed => "malformed number".into(),
            _ => message.into(),
        };
        Error::Parse { kernel: None, line: t.line, message, text }
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
        if self.accept(c) { Ok(()) } else { self.error(format!("expected `{c}`")) }
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

    /// Takes the next word if it is the one wanted.
    pub(super) fn next_if(&mut self, wanted: impl Fn(&str) -> bool) -> bool {
        let yes = matches!(self.peek().kind, Kind::Word(w) if wanted(w));
        if yes {
            self.next();
        }
        yes
    }

    fn small(&mut self) -> Result<u32> {
        let t = self.peek();
        u32::try_from(self.int()?).map_err(|_| self.error_at(t, "the number is too large"))
    }

    /// `.loc file line column [, function_name label [+ n]] [, inlined_at file line column]`
    pub(super) fn location(&mut self) -> Result<()> {
        self.next();
        let file = self.literal()?;
        let line = self.literal()?;
        self.literal()?;
        self.source = Some((file, line));
        while self.accept(',') {
            if self.next_if(|w| w == "inlined_at") {
                for _ in 0..3 {
                    self.literal()?;
                }
            } else if self.next_if(|w| w == "function_name") {
                self.word("a label")?;
                if self.accept('+') {
                    self.literal()?;
                }
            } else {
                return self.error("expected `function_name` or `inlined_at`");
            }
        }
        Ok(())
    }

    /// A number that no operator follows, as in `.loc 1 -5`.
    fn literal(&mut self) -> Result<u32> {
        let t = self.next();
        match t.kind {
            Kind::Int(x) => Ok(x.min(u64::from(u32::MAX)) as u32),
            _ => Err(self.error_at(t, "expected a number")),
        }
    }

    /// `.pragma "text", ...;`
    pub(super) fn pragma(&mut self) -> Result<()> {
        self.next();
        loop {
            if !matches!(self.next().kind, Kind::Str(_)) {
                return self.error("expected a string");
            }
            if !self.accept(',') {
                break;
            }
        }
        self.expect(';')
    }

    /// `.file number "name" [, time, size]`
    pub(super) fn file(&mut self) -> Result<()> {
        self.next();
        let n = self.literal()?;
        match self.next().kind {
            Kind::Str(name) => self.files.push((n, name.to_string())),
            _ => return self.error("expected the name of a file"),
        }
        while self.accept(',') {
            self.next();
        }
        Ok(())
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
                    if self.literal()? != 64 {
                        return Err(self.error_at(t, "only 64-bit addresses are known"));
                    }
                }
                ".file" => self.file()?,
                ".loc" => self.location()?,
                ".pragma" => self.pragma()?,
                ".alias" => {
                    self.next();
                    let name = self.word("a function name")?.to_string();
                    self.expect(',')?;
                    m.aliases.push((name, self.word("a function name")?.to_string()));
                    self.expect(';')?;
                }
                ".section" => {
                    self.next();
                    self.word("a section name")?;
                    self.skip_braces()?;
                }
                _ => {
                    if m.version == (0, 0) {
                        return self.error("no .version directive before the first declaration");
                    }
                    self.declaration(&mut m)?;
                }
            }
        }
        if m.version == (0, 0) {
            return self.error("no .version directive");
        }
        m.files = std::mem::take(&mut self.files);
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
            Kind::Word(w) if space_of(w).is_some() => self.variables(external, &mut m.vars)?,
            _ => return self.error("unknown directive"),
        }
        Ok(())
    }

    fn function(&mut self, entry: bool) -> Result<Function> {
        let mut b = Body {
            f: Function { entry, line: self.peek().line, ..Function::default() },
            scopes: vec![Scope::default()],
            instr_scopes: Vec::new(),
        };
        self.source = None;
        b.f.limits.no_return = self.next_if(|w| w == ".noreturn");
        if !entry && self.is('(') {
            b.f.returns = self.params(&mut b)?;
        }
        b.f.name = self.word("a function name")?.to_string();
        self.definition(&mut b).map_err(|e| within(&b.f.name, e))?;
        let Body { mut f, scopes, instr_scopes } = b;
        for (instr, scope) in f.body.iter_mut().zip(&instr_scopes) {
            for op in &mut instr.operands {
                resolve(op, *scope, &scopes);
            }
        }
        Ok(f)
    }

    /// What follows a function's name: parameters, directives, and the body if there is one.
    fn definition(&mut self, b: &mut Body) -> Result<()> {
        if self.is('(') {
            b.f.params = self.params(b)?;
        }
        loop {
            let t = self.peek();
            match t.kind {
                Kind::Punct(';') => {
                    self.next();
                    return Ok(());
                }
                Kind::Punct('{') => break,
                Kind::Word(w) => self.attribute(w, &mut b.f)?,
                _ => return self.error("expected a function body"),
            }
        }
        b.f.defined = true;
        self.next();
        self.block(b, 0, 0)
    }

    /// A directive between the parameters and the body.
    fn attribute(&mut self, w: &str, f: &mut Function) -> Result<()> {
        let t = self.peek();
        if w != ".pragma" {
            self.next();
        }
        match w {
            ".maxntid" => f.limits.max_threads = Some(self.shape()?),
            ".reqntid" => f.limits.required_threads = Some(self.shape()?),
            ".reqnctapercluster" => f.limits.cluster = Some(self.shape()?),
            ".minnctapersm" => f.limits.min_ctas = Some(self.small()?),
            ".maxnreg" => f.limits.max_regs = Some(self.small()?),
            ".maxclusterrank" => f.limits.max_cluster = Some(self.small()?),
            ".explicitcluster" => f.limits.explicit_cluster = true,
            ".blocksareclusters" => {}
            ".noreturn" => f.limits.no_return = true,
            ".abi_preserve" | ".abi_preserve_control" => {
                self.int()?;
            }
            ".pragma" => self.pragma()?,
            _ => return Err(self.error_at(t, "unknown directive of a function")),
        }
        Ok(())
    }

    /// One to three numbers.
    fn shape(&mut self) -> Result<[u32; 3]> {
        let mut v = [1; 3];
        for (n, x) in v.iter_mut().enumerate() {
            if n > 0 && !self.accept(',') {
                break;
            }
            *x = self.small()?;
        }
        Ok(v)
    }

    fn params(&mut self, b: &mut Body) -> Result<Vec<Var>> {
        self.expect('(')?;
        let mut out = Vec::new();
        while !self.accept(')') {
            let line = self.peek().line;
            if self.next_if(|w| w == ".reg") {
                let (ty, name, r) = self.register_parameter(b)?;
                out.push(Var {
                    name,
                    space: Space::Param,
                    ty,
                    size: ty.size(),
                    align: ty.size(),
                    init: Vec::new(),
                    external: false,
                    reg: Some(r),
                    line,
                });
            } else {
                out.push(self.parameter()?);
            }
            if !self.accept(',') && !self.is(')') {
                return self.error("expected `,` or `)`");
            }
        }
        Ok(out)
    }

    pub(super) fn ty(&mut self) -> Result<Ty> {
        let t = self.peek();
        let w = self.word("a type")?;
        w.strip_prefix('.').and_then(Ty::from_name).ok_or_else(|| self.error_at(t, "unknown type"))
    }
}
