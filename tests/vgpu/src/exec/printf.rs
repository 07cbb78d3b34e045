//! The text of `printf` as CUDA C++ formats it: `%[flags][width][.precision][size]type`.

/// Kind of an argument, by its place in the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    /// Four bytes.
    Word,
    /// Eight bytes.
    Long,
    /// Eight bytes that point to text.
    Text,
}

/// What was printed.
#[derive(Debug, PartialEq, Eq)]
pub struct Printed {
    /// The text.
    pub text: String,
    /// Arguments used, which is what `printf` returns on the device.
    pub arguments: u32,
}

#[derive(Default)]
struct Spec {
    left: bool,
    plus: bool,
    space: bool,
    alternate: bool,
    zero: bool,
    width: usize,
    precision: Option<usize>,
}

/// Fields wider than this are an error; formats come from programs under test.
const MAX_WIDTH: usize = 1 << 12;

impl Spec {
    /// Sign or prefix, then digits, padded.
    fn pad(&self, prefix: &str, body: &str, zeros: bool) -> String {
        let len = prefix.chars().count() + body.chars().count();
        let fill = self.width.saturating_sub(len);
        match () {
            () if self.left => format!("{prefix}{body}{}", " ".repeat(fill)),
            () if zeros && self.zero => format!("{prefix}{}{body}", "0".repeat(fill)),
            () => format!("{}{prefix}{body}", " ".repeat(fill)),
        }
    }

    fn sign(&self, negative: bool) -> &'static str {
        match () {
            () if negative => "-",
            () if self.plus => "+",
            () if self.space => " ",
            () => "",
        }
    }

    fn integer(&self, prefix: &str, digits: String) -> String {
        let zero = digits == "0" && self.precision == Some(0);
        let digits = if zero { String::new() } else { digits };
        let missing = self.precision.unwrap_or(0).saturating_sub(digits.len());
        // A precision turns the flag `0` off.
        self.pad(prefix, &format!("{}{digits}", "0".repeat(missing)), self.precision.is_none())
    }

    fn float(&self, kind: char, x: f64) -> String {
        let sign = self.sign(x.is_sign_negative() && !x.is_nan());
        let v = x.abs();
        let upper = kind.is_ascii_uppercase();
        if !x.is_finite() {
            let name = if x.is_nan() { "nan" } else { "inf" };
            let name = if upper { name.to_uppercase() } else { name.to_string() };
            return self.pad(sign, &name, false);
        }
        let p = self.precision.unwrap_or(6);
        let body = match kind.to_ascii_lowercase() {
            'e' => exponent(v, p),
            'g' => self.shortest(v, p.max(1)),
            'a' => hexadecimal(v),
            _ => format!("{v:.p$}"),
        };
        self.pad(sign, &if upper { body.to_uppercase() } else { body }, true)
    }

    /// `%g`: the shorter of the two forms, without trailing zeros unless `#` keeps them.
    fn shortest(&self, v: f64, p: usize) -> String {
        let e: i32 = match format!("{v:.*e}", p - 1).split_once('e') {
            Some((_, e)) => e.parse().unwrap_or(0),
            None => 0,
        };
        let (mut body, tail) = if e < -4 || e >= p as i32 {
            let text = exponent(v, p - 1);
            let at = text.find('e').unwrap_or(text.len());
            (text[..at].to_string(), text[at..].to_string())
        } else {
            (format!("{v:.*}", (p as i32 - 1 - e).max(0) as usize), String::new())
        };
        if !self.alternate && body.contains('.') {
            body.truncate(body.trim_end_matches('0').trim_end_matches('.').len());
        }
        body + &tail
    }
}

/// `d.ddde+dd`.
fn exponent(v: f64, p: usize) -> String {
    let text = format!("{v:.p$e}");
    let (body, e) = text.split_once('e').unwrap_or((&text, "0"));
    let e: i32 = e.parse().unwrap_or(0);
    format!("{body}e{}{:02}", if e < 0 { '-' } else { '+' }, e.abs())
}

/// `0x1.8p+1`.
fn hexadecimal(v: f64) -> String {
    let bits = v.to_bits();
    let (e, f) = ((bits >> 52) as i32, bits & ((1 << 52) - 1));
    let (lead, e) = if e == 0 { (0, if f == 0 { 0 } else { -1022 }) } else { (1, e - 1023) };
    let digits = format!("{f:013x}");
    let digits = digits.trim_end_matches('0');
    let point = if digits.is_empty() { "" } else { "." };
    format!("0x{lead}{point}{digits}p{}{}", if e < 0 { '-' } else { '+' }, e.abs())
}

/// Digits, or zero.
fn number(rest: &mut std::iter::Peekable<impl Iterator<Item = u8>>) -> i32 {
    let mut n = 0i32;
    while let Some(d) = rest.next_if(u8::is_ascii_digit) {
        n = n.saturating_mul(10).saturating_add(i32::from(d - b'0'));
    }
    n
}

/// Formats `format`; `next` gives the raw value of the next argument, and its text where that is what it points to.
///
/// # Errors
/// The error of `next`, and within, a conversion that `printf` does not have.
pub fn format<E>(
    format: &[u8],
    mut next: impl FnMut(Argument) -> Result<(u64, Vec<u8>), E>,
) -> Result<Result<Printed, String>, E> {
    let (mut out, mut arguments) = (Vec::new(), 0);
    let mut rest = format.iter().copied().peekable();
    while let Some(c) = rest.next() {
        if c != b'%' {
            out.push(c);
            continue;
        }
        if rest.next_if_eq(&b'%').is_some() {
            out.push(b'%');
            continue;
        }
        let mut spec = Spec::default();
        while let Some(flag) = rest.next_if(|c| b"-+ #0".contains(c)) {
            match flag {
                b'-' => spec.left = true,
                b'+' => spec.plus = true,
                b' ' => spec.space = true,
                b'#' => spec.alternate = true,
                _ => spec.zero = true,
            }
        }
        let width = match rest.next_if_eq(&b'*') {
            Some(_) => {
                arguments += 1;
                next(Argument::Word)?.0 as u32 as i32
            }
            None => number(&mut rest),
        };
        spec.left |= width < 0;
        spec.width = width.unsigned_abs() as usize;
        if rest.next_if_eq(&b'.').is_some() {
            let p = match rest.next_if_eq(&b'*') {
                Some(_) => {
                    arguments += 1;
                    next(Argument::Word)?.0 as u32 as i32
                }
                None => number(&mut rest),
            };
            spec.precision = usize::try_from(p).ok();
        }
        if spec.width > MAX_WIDTH || spec.precision.is_some_and(|p| p > MAX_WIDTH) {
            return Ok(Err(format!("printf with a field wider than {MAX_WIDTH}")));
        }
        let mut longs = 0;
        let mut short = 0;
        while let Some(size) = rest.next_if(|c| b"hlLqjzt".contains(c)) {
            if size == b'h' {
                short += 1;
            } else {
                longs += 1;
            }
        }
        let Some(kind) = rest.next() else {
            return Ok(Err("printf with an unfinished conversion".into()));
        };
        let class = match kind {
            b'd' | b'i' | b'u' | b'x' | b'X' | b'o' if longs > 0 => Argument::Long,
            b'd' | b'i' | b'u' | b'x' | b'X' | b'o' | b'c' => Argument::Word,
            b's' => Argument::Text,
            b'f' | b'F' | b'e' | b'E' | b'g' | b'G' | b'a' | b'A' | b'p' => Argument::Long,
            _ => return Ok(Err(format!("printf with the unknown conversion %{}", kind as char))),
        };
        let (x, text) = next(class)?;
        arguments += 1;
        let unsigned = match (class, short) {
            (Argument::Word, 0) => x & 0xffff_ffff,
            (Argument::Word, 1) => x & 0xffff,
            (Argument::Word, _) => x & 0xff,
            _ => x,
        };
        let signed = match (class, short) {
            (Argument::Word, 0) => i64::from(x as i32),
            (Argument::Word, 1) => i64::from(x as i16),
            (Argument::Word, _) => i64::from(x as i8),
            _ => x as i64,
        };
        let hash = |prefix| if spec.alternate && unsigned != 0 { prefix } else { "" };
        let field = match kind {
            b'd' | b'i' => spec.integer(spec.sign(signed < 0), signed.unsigned_abs().to_string()),
            b'u' => spec.integer("", unsigned.to_string()),
            b'x' => spec.integer(hash("0x"), format!("{unsigned:x}")),
            b'X' => spec.integer(hash("0X"), format!("{unsigned:X}")),
            b'o' => spec.integer(hash("0"), format!("{unsigned:o}")),
            b'c' => spec.pad("", &char::from(x as u8).to_string(), false),
            b's' => {
                let cut = spec.precision.unwrap_or(text.len()).min(text.len());
                spec.pad("", &String::from_utf8_lossy(&text[..cut]), false)
            }
            b'p' => spec.pad("", &format!("{x:#x}"), false),
            _ => spec.float(kind as char, f64::from_bits(x)),
        };
        out.extend_from_slice(field.as_bytes());
    }
    Ok(Ok(Printed { text: String::from_utf8_lossy(&out).into_owned(), arguments }))
}
