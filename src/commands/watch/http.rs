//! As much of HTTP/1.1 (RFC 9112) as a page on one's own machine needs: the head of a request, an answer, one of each a connection.

use std::io::{Read, Write};
use std::net::IpAddr;

/// Longest head of a request.
const LONGEST: usize = 16 << 10;

/// The head of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET`.
    pub method: String,
    /// The path without its query, decoded.
    pub path: String,
    /// The header `Host`.
    pub host: Option<String>,
}

/// An answer: status line, type of what follows, and that.
pub struct Answer {
    /// `200 OK`.
    pub status: &'static str,
    /// As in `Content-Type`.
    pub kind: &'static str,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// A page, or a part of one.
    pub fn html(body: String) -> Self {
        Self { status: "200 OK", kind: "text/html; charset=utf-8", body: body.into_bytes() }
    }

    /// A refusal in words.
    pub fn refusal(status: &'static str, why: &str) -> Self {
        Self { status, kind: "text/plain; charset=utf-8", body: format!("{why}\n").into_bytes() }
    }

    /// Writes it all.
    ///
    /// # Errors
    /// If the reader has gone.
    pub fn write(&self, to: &mut impl Write) -> std::io::Result<()> {
        write!(to, "{}content-length: {}\r\n\r\n", head(self.status, self.kind), self.body.len())?;
        to.write_all(&self.body)?;
        to.flush()
    }
}

/// Status line and headers, up to the length.
pub fn head(status: &str, kind: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\ncache-control: no-store\r\n\
         x-content-type-options: nosniff\r\ncontent-security-policy: frame-ancestors 'none'\r\n\
         cross-origin-resource-policy: same-origin\r\nallow: GET\r\n"
    )
}

/// Reads the head of a request.
///
/// # Errors
/// What to answer where it is none.
pub fn read(from: &mut impl Read) -> Result<Request, Answer> {
    let mut bytes = Vec::new();
    let mut piece = [0; 1024];
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break end;
        }
        if bytes.len() > LONGEST {
            return Err(Answer::refusal("431 Request Header Fields Too Large", "this request is too long"));
        }
        match from.read(&mut piece) {
            Ok(n) if n > 0 => bytes.extend(&piece[..n]),
            _ => return Err(Answer::refusal("400 Bad Request", "this request has no end")),
        }
    };
    let bad = |why: &str| Answer::refusal("400 Bad Request", why);
    let text = std::str::from_utf8(&bytes[..end]).map_err(|_| bad("this request is no text"))?;
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (method, target, version) = (words.next(), words.next(), words.next());
    let (Some(method), Some(target), Some(true), None) =
        (method, target, version.map(|v| v.starts_with("HTTP/1.")), words.next())
    else {
        return Err(bad("expected METHOD PATH HTTP/1.1"));
    };
    let mut hosts = lines.filter_map(|l| l.split_once(':')).filter(|(name, _)| name.eq_ignore_ascii_case("host"));
    let host = hosts.next().map(|(_, value)| value.trim().to_string());
    if hosts.next().is_some() {
        return Err(bad("two headers Host"));
    }
    let path =
        decoded(target.split(['?', '#']).next().unwrap_or_default()).ok_or_else(|| bad("this path is no text"))?;
    Ok(Request { method: method.into(), path, host })
}

/// A path with its `%41` as characters.
fn decoded(path: &str) -> Option<String> {
    let (mut out, mut bytes) = (Vec::new(), path.bytes());
    while let Some(byte) = bytes.next() {
        match byte {
            b'%' => {
                let digit = |b: Option<u8>| char::from(b?).to_digit(16);
                let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
                out.push((high * 16 + low) as u8);
            }
            byte => out.push(byte),
        }
    }
    String::from_utf8(out).ok()
}

/// Whether a page of another name cannot be behind a request. Where a name of some other page leads to this machine (DNS rebinding), a
/// browser lets that page read what is served here; but it sends that name. So a name has to be one of this machine's; an address is
/// nobody's to turn.
pub fn is_ours(host: &str, asked: &str, machine: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let same = |other: &str| !other.is_empty() && name.eq_ignore_ascii_case(other);
    name.parse::<IpAddr>().is_ok() || same("localhost") || same(asked) || same(machine)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(text: &str) -> Result<Request, &'static str> {
        read(&mut text.as_bytes()).map_err(|a| a.status)
    }

    #[test]
    fn heads_are_read_and_others_refused() {
        let request = asked("GET /run/0/a%20b?x=1 HTTP/1.1\r\nhost: localhost:7070\r\nX: y\r\n\r\n").unwrap();
        assert_eq!((request.method.as_str(), request.path.as_str()), ("GET", "/run/0/a b"));
        assert_eq!(request.host.unwrap(), "localhost:7070");
        for bad in ["", "GET / HTTP/1.1\r\n", "GET /\r\n\r\n", "GET / x HTTP/1.1\r\n\r\n", "GET /%zz HTTP/1.1\r\n\r\n"]
        {
            assert_eq!(asked(bad), Err("400 Bad Request"), "{bad:?}");
        }
        assert_eq!(asked("GET / HTTP/1.1\r\nhost: a\r\nHost: b\r\n\r\n"), Err("400 Bad Request"));
        assert_eq!(asked("GET /%ff HTTP/1.1\r\n\r\n"), Err("400 Bad Request"));
        let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(20 << 10));
        assert_eq!(asked(&long), Err("431 Request Header Fields Too Large"));
    }

    #[test]
    fn names_of_other_pages_are_not_ours() {
        for host in
            ["localhost", "LOCALHOST:7070", "127.0.0.1:7070", "[::1]:7070", "192.168.1.4", "box:7070", "gpu1.lan"]
        {
            assert!(is_ours(host, "gpu1.lan", "box"), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example:7070", "127.0.0.1.evil.example", "", ":7070", "box.evil"] {
            assert!(!is_ours(host, "gpu1.lan", "box"), "{host}");
        }
        assert!(!is_ours("", "", ""));
    }
}
