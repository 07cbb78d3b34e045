//! Requests to the hub: the token stays with the endpoint, redirects are followed by hand, failures are of three kinds.

use std::time::Duration;

use ureq::Body;
use ureq::http::{HeaderMap, Response};

use super::checksum::is_sha256;
use super::network::Network;
use crate::ensure;
use crate::error::{Error, Result};

/// Longest pause that a server may ask for: the hub counts requests in windows of five minutes.
const LONGEST_PAUSE: Duration = Duration::from_secs(301);
/// Longest time for a body; the next attempt resumes it.
const LONGEST: Duration = Duration::from_secs(6 * 3600);

/// Who asks the hub, and how patiently.
#[derive(Clone, Debug)]
pub struct Client {
    /// Or why nobody can be asked, for whom it is not in the cache.
    network: Result<Network, String>,
    endpoint: String,
    token: Option<String>,
    stall: Duration,
}

/// What went wrong in one attempt.
#[derive(Debug)]
pub enum Failure {
    /// Another attempt may succeed; after this long, if the server said so.
    Retry(String, Option<Duration>),
    /// The server says no, and will say it again.
    Refused(Refusal),
    /// It will not get better.
    Fatal(Error),
    /// No server was reached, and none will be while the network is set up as it is.
    Unreachable(String),
}

/// A status that stays, and what the server said with it.
#[derive(Clone, Debug, Default)]
pub struct Refusal {
    /// 401, 404, …
    pub status: u16,
    /// `X-Error-Code`: `RepoNotFound`, `RevisionNotFound`, `EntryNotFound`, `GatedRepo`; may be empty.
    pub code: String,
    /// `X-Error-Message`; may be empty.
    pub message: String,
}

/// The last answer of a chain of redirects: 200, 206 or 416.
pub struct Answer {
    /// Status, headers and a body that is not read yet.
    pub response: Response<Body>,
    /// The sha256 that the endpoint named for the file.
    pub sha256: Option<String>,
}

/// What a file's headers say.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// Name of the content: the sha256 of a large file, the git hash of another.
    pub etag: Option<String>,
    /// Its length in bytes.
    pub size: Option<u64>,
}

impl Client {
    /// Of the hub at `endpoint`, which alone gets the token; proxies and certificates are those of [`Network`]. `connect` and `stall` are the longest waits for a connection and for the next byte.
    pub fn new(endpoint: &str, token: Option<String>, connect: Duration, stall: Duration) -> Self {
        let network = Network::from_env(None, |client| {
            client
                .max_redirects(0)
                .max_redirects_will_error(false)
                .http_status_as_error(false)
                .timeout_connect(Some(connect))
                .timeout_recv_response(Some(stall))
                .timeout_recv_body(Some(LONGEST))
                .accept_encoding("identity")
                .user_agent(concat!("ringtune/", env!("CARGO_PKG_VERSION")))
        });
        let network = network.map_err(|e| e.to_string());
        Self { network, endpoint: endpoint.trim_end_matches('/').into(), token, stall }
    }

    /// Base address of the hub, without a final slash.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Whether a token is sent.
    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// Longest wait for the next byte.
    pub fn stall(&self) -> Duration {
        self.stall
    }

    /// Asks for `url` and follows redirects. The token must not leave the endpoint, and the checksum comes with the first answer.
    ///
    /// # Errors
    /// Any status but 200, 206 and 416.
    pub fn get(&self, url: &str, headers: &[(&str, String)]) -> Result<Answer, Failure> {
        let (mut url, mut sha256) = (url.to_string(), None);
        for _ in 0..8 {
            let response = self.ask(&url, false, headers)?;
            let status = response.status().as_u16();
            let linked = header(response.headers(), "x-linked-etag").map(|v| plain_tag(&v));
            sha256 = sha256.or(linked.filter(|v| is_sha256(v)));
            match status {
                200 | 206 | 416 => return Ok(Answer { response, sha256 }),
                301 | 302 | 303 | 307 | 308 => url = target(&url, &response)?,
                _ => return Err(refused(&response)),
            }
        }
        Err(Failure::Fatal(Error::new("more than 8 redirects")))
    }

    /// What the endpoint says of a file; a redirect that leaves the endpoint is its answer.
    ///
    /// # Errors
    /// Any status that is neither success nor redirect.
    pub fn head(&self, url: &str) -> Result<Head, Failure> {
        let mut url = url.to_string();
        for _ in 0..8 {
            let response = self.ask(&url, true, &[])?;
            let status = response.status().as_u16();
            let headers = response.headers();
            let of = |name: &str| header(headers, name);
            let etag = of("x-linked-etag").or_else(|| of("etag")).map(|v| plain_tag(&v));
            let number = |name: &str| of(name).and_then(|v| v.parse().ok());
            match status {
                200 => return Ok(Head { etag, size: number("x-linked-size").or_else(|| number("content-length")) }),
                301 | 302 | 303 | 307 | 308 => {
                    let to = target(&url, &response)?;
                    if !same_origin(&to, &url) {
                        return Ok(Head { etag, size: number("x-linked-size") });
                    }
                    url = to;
                }
                _ => return Err(refused(&response)),
            }
        }
        Err(Failure::Fatal(Error::new("more than 8 redirects")))
    }

    /// One request, for the head of an answer or for all of it.
    fn ask(&self, url: &str, head: bool, headers: &[(&str, String)]) -> Result<Response<Body>, Failure> {
        let network = self.network.as_ref().map_err(|why| Failure::Unreachable(why.clone()))?;
        let agent = network.agent(url).map_err(Failure::Unreachable)?;
        let mut request = if head { agent.head(url) } else { agent.get(url) };
        if let Some(token) = self.token.as_ref().filter(|_| same_origin(url, &self.endpoint)) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        request.call().map_err(|e| {
            let none = network.no_answer(url, &e);
            if none.passing { Failure::Retry(none.why, None) } else { Failure::Unreachable(none.why) }
        })
    }

    /// Tries `work` up to `attempts` times, with pauses that double; what brought new bytes counts as a first attempt again.
    /// `what` begins the warnings, `grown` says how far `work` has come.
    ///
    /// # Errors
    /// The last failure; of those that may pass, with the number of attempts.
    pub fn insist<T>(
        &self,
        what: &str,
        (attempts, backoff): (u32, Duration),
        grown: impl Fn() -> u64,
        mut work: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let (mut attempt, mut pause) = (1, backoff);
        loop {
            let before = grown();
            let (message, after) = match work() {
                Err(Failure::Retry(message, after)) => (message, after),
                done => return done,
            };
            if grown() > before {
                (attempt, pause) = (1, backoff);
            }
            if attempt >= attempts {
                let tried = if attempts > 1 { format!("; gave up after {attempt} attempts") } else { String::new() };
                return Err(Failure::Retry(format!("{message}{tried}"), None));
            }
            let wait = after.map_or(pause.min(Duration::from_secs(60)), |asked| asked.min(LONGEST_PAUSE));
            attempt += 1;
            crate::say::warning(&format!("{what}: {message}; attempt {attempt} of {attempts} in {wait:.1?}"));
            std::thread::sleep(wait);
            pause *= 2;
        }
    }
}

fn refused(response: &Response<Body>) -> Failure {
    let status = response.status().as_u16();
    let of = |name: &str| header(response.headers(), name).unwrap_or_default();
    if status == 408 || status == 429 || (500..600).contains(&status) {
        // The hub says in another header when it counts anew: `RateLimit: "api";r=0;t=55`.
        let limit = of("ratelimit");
        let anew = limit.split(';').find_map(|part| part.trim().strip_prefix("t=")).filter(|_| status == 429);
        let seconds: Option<u64> = of("retry-after").parse().ok().or_else(|| anew?.parse().ok());
        let why = if status == 429 { ", too many requests (a token in HF_TOKEN may have more)" } else { "" };
        return Failure::Retry(format!("the server answered {status}{why}"), seconds.map(Duration::from_secs));
    }
    Failure::Refused(Refusal { status, code: of("x-error-code"), message: of("x-error-message") })
}

fn target(from: &str, response: &Response<Body>) -> Result<String, Failure> {
    let status = response.status().as_u16();
    let to = header(response.headers(), "location")
        .ok_or_else(|| Failure::Fatal(Error::new(format!("status {status} without a location"))))?;
    redirected(from, to).map_err(Failure::Fatal)
}

/// A header as text.
pub(super) fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_string)
}

/// An etag without quotes and the mark of a weak one, in small letters.
fn plain_tag(tag: &str) -> String {
    tag.strip_prefix("W/").unwrap_or(tag).trim_matches('"').to_ascii_lowercase()
}

/// `scheme://host:port` of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |i| i + 3);
    url[host..].find('/').map_or(url, |i| &url[..host + i])
}

/// Where a redirect leads (RFC 3986, section 5.2); what came by https goes on by https.
fn redirected(from: &str, to: String) -> Result<String> {
    let scheme = from.split("://").next().unwrap_or_default();
    let path = from.split(['?', '#']).next().unwrap_or_default();
    let absolute = to.split(['/', '?', '#']).next().is_some_and(|start| start.contains(':'));
    let to = match to.as_str() {
        // Another host of the same scheme.
        network if network.starts_with("//") => format!("{scheme}:{network}"),
        rooted if rooted.starts_with('/') => format!("{}{rooted}", origin(path)),
        query if query.starts_with('?') => format!("{path}{query}"),
        whole if absolute => whole.to_string(),
        // Beside the last part of the path.
        beside => match path.rfind('/').filter(|&i| i >= origin(path).len()) {
            Some(i) => format!("{}/{beside}", &path[..i]),
            None => format!("{path}/{beside}"),
        },
    };
    let secure = |url: &str| url.get(..8).is_some_and(|s| s.eq_ignore_ascii_case("https://"));
    ensure!(secure(&to) || !secure(from), "redirected from {from}, expected https, found {to}");
    Ok(to)
}

fn same_origin(a: &str, b: &str) -> bool {
    let plain = |url: &str| {
        let all = origin(url).to_ascii_lowercase();
        let usual = if all.starts_with("https://") { ":443" } else { ":80" };
        all.strip_suffix(usual).map(String::from).unwrap_or(all)
    };
    plain(a) == plain(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn https_leads_to_https_alone() {
        let to = |from: &str, to: &str| redirected(from, to.into()).map_err(|e| e.to_string());
        assert_eq!(to("https://a.b/c", "/d").unwrap(), "https://a.b/d");
        assert_eq!(to("https://a.b/c", "HTTPS://e/d").unwrap(), "HTTPS://e/d");
        assert_eq!(to("http://a.b/c", "http://e/d").unwrap(), "http://e/d");
        for bad in ["http://e/d", "ftp://e", "mailto:e"] {
            assert!(to("https://a.b/c", bad).is_err(), "{bad}");
        }
        for (there, leads) in [
            ("//e/d", "https://e/d"),
            ("d/e?x=http://f", "https://a.b/c/d/e?x=http://f"),
            ("?x", "https://a.b/c/o?x"),
            ("../d", "https://a.b/c/../d"),
        ] {
            assert_eq!(to("https://a.b/c/o?y/z#w", there).unwrap(), leads);
        }
        assert_eq!(to("https://a.b", "d").unwrap(), "https://a.b/d");
    }

    #[test]
    fn origins_are_compared_whole() {
        let same = |url: &str| same_origin(url, "https://huggingface.co");
        assert!(same("https://huggingface.co/api/models/a/b") && same("HTTPS://HuggingFace.co/x"));
        assert!(same("https://huggingface.co:443/x") && !same("http://huggingface.co:443/x"));
        for other in
            ["https://huggingface.co.evil.org/x", "https://huggingface.co@evil.org/x", "http://huggingface.co/x"]
        {
            assert!(!same(other), "{other}");
        }
        assert!(!same("https://huggingface.co:444/x") && !same("https://huggingface.co?@evil.org/x"));
    }
}
