//! Cuts PTX text into words, numbers, strings and punctuation, each with its line.

use crate::error::{Error, Result};

/// One token's kind and value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind<'a> {
    /// Directive, opcode, register or symbol, with its dots: `ld.global.f32`, `%tid.x`, `.reg`.
    Word(&'a str),
    /// Integer literal, two's complement in 64 bits.
    Int(u64),
    /// `0f` literal: the bits.
    F32(u32),
    /// `0d` or decimal literal: the bits.
    F64(u64),
    /// Quoted string without its quotes.
    Str(&'a str),
    /// One punctuation character.
    Punct(char),
    /// What starts like a number and is none. No statement takes it; the parser then knows in which kernel it stands.
    Malformed,
    /// After the last token.
    End,
}

/// A token with its place in the text.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    /// What it is.
    pub kind: Kind<'a>,
    /// Line from 1.
    pub line: u32,
    /// Byte range in the text.
    pub start: usize,
    /// End of the byte range.
    pub end: usize,
}

fn word_start(c: u8) -> bool {
    c.is_ascii_alphabetic() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

fn word_part(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'.')
}

/// Tokens of `text`, the last one [`Kind::End`].
pub fn lex(text: &str) -> Result<Vec<Token<'_>>> {
    let bytes = text.as_bytes();
    let (mut i, mut line) = (0, 1u32);
    let mut out = Vec::with_capacity(bytes.len() / 4);
    while i < bytes.len() {
        let (c, start, first_line) = (bytes[i], i, line);
        match c {
            b'\n' => {
                line += 1;
                i += 1;
                continue;
            }
            c if c.is_ascii_whitespace() || c == 0 => {
                i += 1;
                continue;
            }
            b'/' if bytes.get(i + 1) == Some(&b'/') => {
                while i < bytes.len() && bytes[i] != b'\n' {
                    i += 1;
                }
                continue;
            }
            b'/' if bytes.get(i + 1) == Some(&b'*') => {
                i += 2;
                while i < bytes.len() && !(bytes[i] == b'*' && bytes.get(i + 1) == Some(&b'/')) {
                    line += u32::from(bytes[i] == b'\n');
                    i += 1;
                }
                if i >= bytes.len() {
                    return Err(Error::Parse {
                        kernel: None,
                        line: first_line,
                        message: "comment without an end".into(),
                        text: "/*".into(),
                    });
                }
                i += 2;
                continue;
            }
            _ => {}
        }
        let fail = |message: &str, end: usize| Error::Parse {
            kernel: None,
            line: first_line,
            message: message.into(),
            text: String::from_utf8_lossy(&bytes[start..end.min(bytes.len())]).into_owned(),
        };
        let kind = if c == b'"' {
            i += 1;
            while i < bytes.len() && bytes[i] != b'"' {
                line += u32::from(bytes[i] == b'\n');
                i += 1;
            }
            if i >= bytes.len() {
                return Err(fail("string without an end", start + 20));
            }
            i += 1;
            // Quotes are ASCII, so these are character boundaries.
            Kind::Str(&text[start + 1..i - 1])
        } else if word_start(c) {
            i += 1;
            while i < bytes.len() {
                let scoped = bytes[i..].starts_with(b"::") && bytes.get(i + 2).is_some_and(u8::is_ascii_alphanumeric);
                // A directive ends at the next one: `.reg.b16` is `.reg .b16`.
                let next = c == b'.' && bytes[i] == b'.';
                if scoped {
                    i += 2;
                } else if word_part(bytes[i]) && !next {
                    i += 1;
                } else {
                    break;
                }
            }
            Kind::Word(&text[start..i])
        } else if c.is_ascii_digit() {
            while i < bytes.len()
                && (word_part(bytes[i])
                    || (matches!(bytes[i], b'+' | b'-')
                        && matches!(bytes[i - 1], b'e' | b'E')
                        && !bytes[start..i].starts_with(b"0x")
                        && !bytes[start..i].starts_with(b"0X")))
            {
                i += 1;
            }
            number(&text[start..i]).unwrap_or(Kind::Malformed)
        } else if c.is_ascii() && !c.is_ascii_control() {
            i += 1;
            Kind::Punct(c as char)
        } else {
            return Err(fail("unexpected character", start + 4));
        };
        out.push(Token { kind, line: first_line, start, end: i });
    }
    out.push(Token { kind: Kind::End, line, start: bytes.len(), end: bytes.len() });
    Ok(out)
}

fn number<'a>(s: &str) -> Option<Kind<'a>> {
    let lower = s.to_ascii_lowercase();
    if let Some(h) = lower.strip_prefix("0f").filter(|h| h.len() == 8) {
        return u32::from_str_radix(h, 16).ok().map(Kind::F32);
    }
    if let Some(h) = lower.strip_prefix("0d").filter(|h| h.len() == 16) {
        return u64::from_str_radix(h, 16).ok().map(Kind::F64);
    }
    let based =
        lower.starts_with("0x") || lower.starts_with("0f") || lower.starts_with("0d") || lower.starts_with("0b");
    if s.contains('.') || lower.contains('e') && !based {
        return s.parse::<f64>().ok().map(|x| Kind::F64(x.to_bits()));
    }
    let digits = lower.strip_suffix('u').unwrap_or(&lower);
    let parsed = if let Some(h) = digits.strip_prefix("0x") {
        u64::from_str_radix(h, 16)
    } else if let Some(b) = digits.strip_prefix("0b") {
        u64::from_str_radix(b, 2)
    } else if digits.len() > 1 && digits.starts_with('0') {
        u64::from_str_radix(digits, 8)
    } else {
        digits.parse()
    };
    parsed.ok().map(Kind::Int)
}
