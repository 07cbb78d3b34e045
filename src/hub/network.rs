//! How a request reaches a server: through which proxy, believing whose certificates; and what it means when it does not.
//!
//! The variables are those of curl and of Python's requests: `HTTPS_PROXY` for https, `HTTP_PROXY` for http, `ALL_PROXY` for both, in small
//! letters first, `NO_PROXY` for what needs none; `SSL_CERT_FILE`, `SSL_CERT_DIR`, `REQUESTS_CA_BUNDLE` and `CURL_CA_BUNDLE` instead of the
//! system's certificates. (ureq reads the first four itself, but takes one proxy for both schemes, whichever variable it finds first, goes
//! without one where its address is none, and takes `NO_PROXY` by the letter.)

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ureq::config::ConfigBuilder;
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::typestate::AgentScope;
use ureq::{Agent, Proxy};

use crate::error::{Error, Result, in_words};

/// Where systems keep the certificates that they believe.
const BUNDLES: [&str; 7] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/etc/ssl/certs",
    "/etc/pki/tls/certs",
];

/// Variables that name certificates instead of the system's: files, folders, and (the second) several of them.
const CERTIFICATES: [&str; 4] = ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"];

/// A proxy, and how it is spoken of.
#[derive(Clone, Debug)]
struct Through {
    agent: Agent,
    /// Its host and port.
    shown: String,
    /// The variable that names it.
    variable: &'static str,
    /// Whether a name and a password go with it.
    named: bool,
}

/// How requests reach servers, as the environment says.
#[derive(Clone, Debug)]
pub struct Network {
    direct: Agent,
    /// Of https, and of http: one that is wrong is no matter for who needs the other.
    https: Result<Option<Through>, String>,
    http: Result<Option<Through>, String>,
    around: Vec<Around>,
}

/// Hosts that are reached without a proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Around {
    All,
    /// A host and what is below it; on this port, where there is one.
    Host(String, Option<u16>),
    /// Addresses that agree in so many bits.
    Net(IpAddr, u32),
}

/// Why a request got no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoAnswer {
    /// In words, with what to do.
    pub why: String,
    /// Whether the same request may get one in a moment.
    pub passing: bool,
}

fn var(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?;
    Some(value.trim().to_string()).filter(|v| !v.is_empty())
}

impl Network {
    /// As the environment says. `configured` adds what is a client's own; `certificates` is a variable of its server's certificates.
    ///
    /// # Errors
    /// If certificates are named that cannot be read.
    pub fn from_env(
        certificates: Option<&'static str>,
        configured: impl Fn(ConfigBuilder<AgentScope>) -> ConfigBuilder<AgentScope>,
    ) -> Result<Self> {
        let tls = TlsConfig::builder().root_certs(roots(certificates)?).build();
        let agent = |proxy: Option<Proxy>| -> Agent {
            configured(Agent::config_builder().tls_config(tls.clone()).proxy(proxy)).build().into()
        };
        let through = |variables: [&'static str; 4]| -> Result<Option<Through>, String> {
            let Some((variable, address)) = variables.into_iter().find_map(|name| Some((name, var(name)?))) else {
                return Ok(None);
            };
            let proxy = proxy(variable, &address)?;
            let (shown, named) = (format!("{}:{}", proxy.host(), proxy.port()), proxy.username().is_some());
            Ok(Some(Through { agent: agent(Some(proxy)), shown, variable, named }))
        };
        Ok(Self {
            direct: agent(None),
            https: through(["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]),
            http: through(["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"]),
            around: around(&var("no_proxy").or_else(|| var("NO_PROXY")).unwrap_or_default()),
        })
    }

    /// Who asks for `url`.
    ///
    /// # Errors
    /// If it is to go through a proxy that has no address, or one of a kind that is not spoken to.
    pub fn agent(&self, url: &str) -> Result<&Agent, String> {
        Ok(self.through(url)?.map_or(&self.direct, |through| &through.agent))
    }

    fn through(&self, url: &str) -> Result<Option<&Through>, String> {
        let (host, port) = host_and_port(url);
        if is_loopback(&host) || self.around.iter().any(|a| a.fits(&host, port)) {
            return Ok(None);
        }
        let through = if is_https(url) { &self.https } else { &self.http };
        through.as_ref().map(Option::as_ref).map_err(Clone::clone)
    }

    /// What an error means for who asked for `url`.
    pub fn no_answer(&self, url: &str, e: &ureq::Error) -> NoAnswer {
        let (host, port) = host_and_port(url);
        let through = self.through(url).ok().flatten();
        let stays = |why: String| NoAnswer { why, passing: false };
        let passes = |why: String| NoAnswer { why, passing: true };
        let text = match e {
            ureq::Error::Io(e) => in_words(e),
            e => e.to_string(),
        };
        if let (ureq::Error::ConnectProxyFailed(said), Some(Through { shown, variable, named, .. })) = (e, through) {
            let status: Option<u16> = said.split(|c: char| !c.is_ascii_digit()).find_map(|digits| digits.parse().ok());
            return match status {
                Some(407) if *named => stays(format!(
                    "the proxy {shown} ({variable}) refuses the name and password that it was given (407); signs other than letters and \
                     digits are written as %40 for @"
                )),
                Some(407) => stays(format!(
                    "the proxy {shown} ({variable}) wants a name and a password (407); write them into {variable}=http://NAME:PASSWORD@{shown}"
                )),
                Some(status @ 400..500) => stays(format!(
                    "the proxy {shown} ({variable}) refuses to connect to {host}:{port} ({status}); ask who runs it to allow it, or go past \
                     it with NO_PROXY={host}"
                )),
                Some(status) => passes(format!("the proxy {shown} ({variable}) cannot reach {host}:{port} ({status})")),
                None => passes(format!("the proxy {shown} ({variable}): {said}")),
            };
        }
        if let Some(why) = certificate(&text) {
            let seen = through.map(|t| format!(" (through the proxy {})", t.shown)).unwrap_or_default();
            return stays(format!("{host}{seen}: {why}"));
        }
        let peer = match through {
            Some(Through { shown, variable, .. }) => format!("the proxy {shown} ({variable})"),
            None => format!("{host}:{port}"),
        };
        match e {
            ureq::Error::HostNotFound => passes(match through {
                Some(_) => format!("{peer}: no such host; check the variable"),
                None => format!("{host}: no such host; where a proxy leads out of this network, HTTPS_PROXY names it"),
            }),
            ureq::Error::Io(e) if e.kind() == ErrorKind::ConnectionRefused => passes(format!("{peer}: {text}")),
            ureq::Error::Timeout(_) => passes(format!("{peer}: no answer in time ({text})")),
            _ => passes(format!("{peer}: {text}")),
        }
    }
}

/// What is wrong with a certificate or with TLS, of a message that says so.
fn certificate(text: &str) -> Option<String> {
    let has = |sign: &str| text.contains(sign);
    if has("expired") || has("NotValidYet") || has("not valid yet") {
        let what = if has("expired") { "has expired" } else { "is not valid yet" };
        return Some(format!(
            "the certificate {what}; compare this machine's clock (`date`), else whoever runs the server has to renew it ({text})"
        ));
    }
    if has("not valid for name") || has("NotValidForName") {
        return Some(format!(
            "the certificate is another server's; check the address (HF_ENDPOINT), or who answers in its place ({text})"
        ));
    }
    if has("UnknownIssuer") || has("BadSignature") || has("CaUsedAsEndEntity") {
        let named: Vec<&str> = CERTIFICATES.into_iter().filter(|name| var(name).is_some()).collect();
        let believed = match named.is_empty() {
            true => "those of the system (ca-certificates)".to_string(),
            false => format!("those of {}", named.join(", ")),
        };
        return Some(format!(
            "the certificate is signed by nobody who is believed; believed are {believed}: where an organisation looks into connections or \
             has servers of its own, name the file of its certificate in SSL_CERT_FILE ({text})"
        ));
    }
    if has("InvalidMessage") || has("corrupt message") || has("InvalidContentType") {
        return Some(format!("no TLS is spoken there; an address that begins with http:// was meant? ({text})"));
    }
    (has("certificate") || has("HandshakeFailure") || has("fatal alert"))
        .then(|| format!("no secure connection: {text}"))
}

fn proxy(variable: &str, address: &str) -> Result<Proxy, String> {
    // Who reads the message need not see a password.
    let (scheme, rest) = address.split_once("://").map_or((None, address), |(scheme, rest)| (Some(scheme), rest));
    let shown = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    let bad = |what: &str| Err(format!("{variable}: {what}, expected http://HOST:PORT, found one at {shown}"));
    match scheme.map(str::to_ascii_lowercase).as_deref() {
        None | Some("http" | "https") => {}
        Some(other) => return bad(&format!("proxies of the kind {other}:// are not spoken to")),
    }
    match Proxy::new(address) {
        Ok(proxy) if !proxy.host().is_empty() => Ok(proxy),
        _ => bad("this is no address of a proxy"),
    }
}

/// The certificates to believe.
fn roots(own: Option<&'static str>) -> Result<RootCerts> {
    let named: Vec<(&str, String)> =
        CERTIFICATES.into_iter().chain(own).filter_map(|name| Some((name, var(name)?))).collect();
    if named.is_empty() {
        // Small containers have none at all: those that browsers believe are inside the program.
        let some = |place: &str| {
            std::fs::metadata(place).is_ok_and(|m| m.len() > 0 && (m.is_file() || has_files(place.as_ref())))
        };
        return Ok(if BUNDLES.into_iter().any(some) { RootCerts::PlatformVerifier } else { RootCerts::WebPki });
    }
    let (mut all, mut seen) = (Vec::new(), BTreeSet::new());
    for (variable, value) in named {
        let places: Vec<PathBuf> = match variable {
            "SSL_CERT_DIR" => std::env::split_paths(&value).filter(|p| !p.as_os_str().is_empty()).collect(),
            _ => vec![PathBuf::from(&value)],
        };
        let before = all.len();
        for place in &places {
            let fail = |e: std::io::Error| {
                Error::usage(format!("{variable}: {}: {}; expected certificates", place.display(), in_words(&e)))
            };
            let files: Vec<PathBuf> = if place.is_dir() {
                std::fs::read_dir(place)
                    .map_err(fail)?
                    .filter_map(|entry| entry.ok().map(|e| e.path()))
                    .filter(|p| p.is_file())
                    .collect()
            } else {
                vec![place.clone()]
            };
            for file in files {
                let text = std::fs::read(&file).map_err(fail)?;
                for item in parse_pem(&text) {
                    // Folders hold links to one certificate under several names.
                    if let Ok(PemItem::Certificate(certificate)) = item
                        && seen.insert(certificate.der().to_vec())
                    {
                        all.push(certificate.to_owned());
                    }
                }
            }
        }
        // Those that were seen under another variable count.
        if all.len() == before && seen.is_empty() {
            return Err(Error::usage(format!(
                "{variable}: {value}: no certificate is in it, expected some in PEM form (BEGIN CERTIFICATE)"
            )));
        }
    }
    Ok(all.into_iter().into())
}

fn has_files(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

fn is_https(url: &str) -> bool {
    url.get(..8).is_some_and(|start| start.eq_ignore_ascii_case("https://"))
}

/// Host, in small letters and without brackets, and port of an address.
fn host_and_port(url: &str) -> (String, u16) {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let authority = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let default = if is_https(url) { 443 } else { 80 };
    let (host, port) = match authority.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
        Some((host, port)) => (host, port.strip_prefix(':')),
        None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
    };
    (host.trim_end_matches('.').to_ascii_lowercase(), port.and_then(|p| p.parse().ok()).unwrap_or(default))
}

/// Whether it is this machine, which no proxy reaches.
fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.ends_with(".localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// What `NO_PROXY` says: hosts with what is below them (`.corp`, `*.corp` and `corp` are the same), addresses, ranges of them
/// (`10.0.0.0/8`), `*` for all; separated by commas or spaces, each with a port or without.
fn around(list: &str) -> Vec<Around> {
    let words = list.split([',', ' ', '\t', ';']).map(str::trim).filter(|word| !word.is_empty());
    let one = |word: &str| -> Option<Around> {
        if word == "*" {
            return Some(Around::All);
        }
        if let Some((net, bits)) = word.split_once('/') {
            let net: IpAddr = net.parse().ok()?;
            let most = if net.is_ipv4() { 32 } else { 128 };
            return bits.parse().ok().filter(|&bits| bits <= most).map(|bits| Around::Net(net, bits));
        }
        let inner = word.trim_start_matches('[');
        if let Ok(ip) = inner.trim_end_matches(']').parse::<IpAddr>() {
            return Some(Around::Net(ip, if ip.is_ipv4() { 32 } else { 128 }));
        }
        let (host, port) = match word.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().ok()?)),
            None => (word, None),
        };
        let host = host.trim_start_matches('*').trim_matches('.').to_ascii_lowercase();
        (!host.is_empty()).then_some(Around::Host(host, port))
    };
    words.filter_map(one).collect()
}

impl Around {
    fn fits(&self, host: &str, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::Host(name, at) => {
                let below =
                    || host.strip_suffix(name.as_str()).is_some_and(|front| front.is_empty() || front.ends_with('.'));
                at.is_none_or(|at| at == port) && below()
            }
            Self::Net(net, bits) => {
                let bits_of = |ip: &IpAddr| match ip {
                    IpAddr::V4(ip) => u128::from(u32::from(*ip)) << 96,
                    IpAddr::V6(ip) => u128::from(*ip),
                };
                host.parse::<IpAddr>().is_ok_and(|ip| {
                    let differ = bits_of(&ip) ^ bits_of(net);
                    ip.is_ipv4() == net.is_ipv4() && (*bits == 0 || differ >> (128 - bits) == 0)
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_need_no_proxy() {
        let list = "localhost, .corp,*.lab,example.com 10.0.0.0/8;192.168.1.7, fd00::/8 , host.org:8080,::1,*x";
        let fits = |url: &str| {
            let (host, port) = host_and_port(url);
            around(list).iter().any(|a| a.fits(&host, port))
        };
        for url in [
            "https://hub.corp/x",
            "http://corp",
            "https://a.b.lab:444/",
            "https://EXAMPLE.com",
            "https://sub.example.com./x",
            "http://10.250.3.1:5000/api",
            "http://192.168.1.7",
            "http://[fd12::3]:80/x",
            "http://user:pa@host.org:8080/",
            "http://x",
        ] {
            assert!(fits(url), "{url}");
        }
        for url in [
            "https://huggingface.co",
            "https://notexample.com",
            "http://11.0.0.1",
            "http://192.168.1.8",
            "http://host.org",
            "http://[fe80::1]/",
            "https://corp.com",
            "http://10.0.0.1.evil.org",
        ] {
            assert!(!fits(url), "{url}");
        }
        assert!(
            around("*").iter().all(|a| a.fits("any", 1))
                && around(" , ").is_empty()
                && around("10.0.0.0/33").is_empty()
        );
        assert!(
            is_loopback("127.8.0.1")
                && is_loopback("::1")
                && is_loopback("a.localhost")
                && !is_loopback("localhost.org")
        );
    }

    #[test]
    fn addresses_of_proxies() {
        let of = |address: &str| proxy("HTTPS_PROXY", address).map(|p| format!("{}:{}", p.host(), p.port()));
        assert_eq!(of("http://proxy.corp:3128"), Ok("proxy.corp:3128".into()));
        assert_eq!(of("proxy.corp:3128"), Ok("proxy.corp:3128".into()));
        assert_eq!(of("http://me:p%40ss@proxy.corp"), Ok("proxy.corp:80".into()));
        for (bad, what) in [
            (
                "socks5h://me:secret@proxy:1080",
                "HTTPS_PROXY: proxies of the kind socks5h:// are not spoken to, expected http://HOST:PORT, found one at proxy:1080",
            ),
            ("http://me:secret@", "this is no address of a proxy"),
            ("http://a b", "this is no address of a proxy"),
        ] {
            let e = of(bad).unwrap_err();
            assert!(e.contains(what) && !e.contains("secret"), "{e}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_certificate() {
        for (text, what) in [
            ("invalid peer certificate: UnknownIssuer", "SSL_CERT_FILE"),
            (
                "invalid peer certificate: certificate expired: verification time 5 (UNIX), but certificate is not valid after 3",
                "has expired",
            ),
            (
                "invalid peer certificate: certificate not valid for name \"a\"; certificate is only valid for DnsName(\"b\")",
                "another server's",
            ),
            ("received corrupt message of type InvalidContentType", "no TLS is spoken there"),
            ("received fatal alert: HandshakeFailure", "no secure connection"),
        ] {
            assert!(certificate(text).is_some_and(|why| why.contains(what)), "{text}");
        }
        assert_eq!(certificate("Connection refused"), None);
    }
}
