//! The hub through proxies and over TLS, as companies have them: it works, or is answered at once with what to do.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;

use crate::hub_server::{Access, Fault, HubServer};
use crate::program::{Outcome, Workplace, repository};
use crate::proxy::{Proxy, TlsFront};
use crate::skip::skipped;
use crate::tuned::{fails, ok};

const TINY: &str = "models/org/tiny";

fn hub() -> HubServer {
    let server = HubServer::start();
    server.put(
        TINY,
        &[("config.json", b"{}".to_vec()), ("model.safetensors", (0..9000u32).flat_map(u32::to_le_bytes).collect())],
    );
    server
}

/// Downloads the weights (and with them the hub is asked what it has), with these variables and no others of the network.
fn download(w: &Workplace, variables: &str) -> Outcome {
    let cleared =
        ["https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"]
            .into_iter()
            .chain(["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
            .map(|name| format!("-u {name} "));
    w.shell(&format!(
        "env {}HF_HUB_OFFLINE=0 {variables} ringtune download org/tiny --include model.safetensors",
        cleared.collect::<String>()
    ))
}

/// What came is what was put.
fn came(outcome: Outcome) {
    let folder = ok(outcome).stdout.trim().to_string();
    let expected: Vec<u8> = (0..9000u32).flat_map(u32::to_le_bytes).collect();
    assert!(fs::read(std::path::Path::new(&folder).join("model.safetensors")).unwrap() == expected, "{folder}");
}

fn forget(w: &Workplace) {
    let _ = fs::remove_dir_all(w.path("hf"));
}

#[test]
fn through_a_proxy() {
    let (w, server) = (Workplace::new(), hub());
    let names = [("hub.test", server.port()), ("cdn.test", server.storage_port())];
    server.storage_at("http://cdn.test");
    server.close(TINY, Access::Gated);
    // Names that the proxy alone knows; the token goes to the hub and not to where it leads.
    let open = Proxy::start(&names, None);
    let at = format!("HF_TOKEN=good HF_ENDPOINT=http://hub.test/ HTTP_PROXY=http://{}", open.address());
    came(download(&w, &at));
    let seen = open.seen();
    for name in ["CONNECT hub.test:80 ", "CONNECT cdn.test:80 "] {
        assert!(seen.iter().any(|head| head.starts_with(name)), "{name}: {seen:?}");
    }
    assert!(seen.iter().all(|head| !head.contains("Authorization") && !head.contains("good")), "{seen:?}");
    assert!(server.seen().iter().all(|head| head.contains("authorization: bearer good")));
    assert!(server.stored().iter().all(|head| !head.contains("authorization")));
    // The scheme's own variable goes before the one for all, small letters before capital ones; one that is not used may be anything.
    forget(&w);
    came(download(&w, &format!("{at} ALL_PROXY=socks5://nowhere:1 HTTPS_PROXY=http://nowhere:1")));
    forget(&w);
    came(download(&w, &at.replace("HTTP_PROXY=http://", "HTTP_PROXY=http://nowhere:1 http_proxy=")));
    // A passing failure.
    forget(&w);
    open.refuse(&[502]);
    let outcome = download(&w, &at);
    assert!(outcome.stderr.contains("cannot reach hub.test:80 (502); attempt 2"), "{}", outcome.stderr);
    came(outcome);
    // Refusals are said once, with what to do.
    forget(&w);
    open.seen();
    open.refuse(&[403]);
    fails(&download(&w, &at), 1, &["refuses to connect to hub.test:80 (403)", "NO_PROXY=hub.test", &open.address()]);
    assert_eq!(open.seen().len(), 1);
    // What is here needs nobody.
    came(download(&w, &at));
    let cached = download(&w, &at.replace("HTTP_PROXY=http://", "HTTP_PROXY=socks5://me:secret@"));
    assert!(
        cached.stderr.contains("HTTP_PROXY: proxies of the kind socks5:// are not spoken to")
            && cached.stderr.contains("is taken from the cache")
            && !cached.stderr.contains("secret"),
        "{}",
        cached.stderr
    );
    came(cached);
    // This machine is reached without one, and what NO_PROXY names.
    forget(&w);
    server.storage_at(&format!("http://127.0.0.1:{}", server.storage_port()));
    came(download(&w, &format!("HF_TOKEN=good HF_ENDPOINT={} HTTP_PROXY=http://nowhere:1", server.endpoint())));
}

#[test]
fn a_proxy_that_wants_a_name() {
    let (w, server) = (Workplace::new(), hub());
    server.storage_at("http://cdn.test");
    // me:p@ss
    let proxy = Proxy::start(&[("hub.test", server.port()), ("cdn.test", server.storage_port())], Some("bWU6cEBzcw=="));
    let with =
        |who: &str| download(&w, &format!("HF_ENDPOINT=http://hub.test HTTP_PROXY=http://{who}{}", proxy.address()));
    fails(&with(""), 1, &["wants a name and a password (407)", "HTTP_PROXY=http://NAME:PASSWORD@", &proxy.address()]);
    let wrong = with("me:secret@");
    fails(&wrong, 1, &["refuses the name and password that it was given (407)", "%40 for @"]);
    assert!(!wrong.stderr.contains("secret"), "{}", wrong.stderr);
    assert_eq!(proxy.seen().len(), 2, "asked again in vain");
    came(with("me:p%40ss@"));
}

#[test]
fn over_tls() {
    let (w, server) = (Workplace::new(), hub());
    let tls = repository().join("tests/data/tls");
    let front = |certificate: &str, port: u16| TlsFront::start(&tls, certificate, port);
    let Some(hub) = front("server.pem", server.port()) else {
        return skipped("no Python to speak TLS", false);
    };
    let storage = front("server.pem", server.storage_port()).unwrap();
    server.storage_at(&format!("https://127.0.0.1:{}", storage.port));
    let at = |host: &str, port: u16| format!("HF_ENDPOINT=https://{host}:{port} HF_TOKEN=good");
    let (here, ca) = (at("127.0.0.1", hub.port), tls.join("ca.pem").display().to_string());
    let unknown = download(&w, &here);
    fails(&unknown, 1, &["signed by nobody who is believed; believed are those of the system", "SSL_CERT_FILE"]);
    assert!(!unknown.stderr.contains("attempt"), "{}", unknown.stderr);
    w.write("certificates/one.pem", fs::read(&ca).unwrap());
    w.write("other.pem", fs::read(tls.join("server.pem")).unwrap());
    for variables in [
        format!("SSL_CERT_FILE={ca}"),
        format!("REQUESTS_CA_BUNDLE={ca}"),
        format!("CURL_CA_BUNDLE={ca}"),
        "SSL_CERT_DIR=certificates".to_string(),
        "REQUESTS_CA_BUNDLE=certificates".to_string(),
        // An environment of conda names its own.
        format!("SSL_CERT_FILE=other.pem REQUESTS_CA_BUNDLE={ca}"),
    ] {
        forget(&w);
        came(download(&w, &format!("{here} {variables}")));
    }
    assert!(server.seen().iter().all(|head| head.contains("authorization: bearer good")));
    assert!(server.stored().iter().all(|head| !head.contains("authorization")));
    forget(&w);
    let with = |variables: &str| download(&w, &format!("{here} {variables}"));
    fails(&with("SSL_CERT_FILE=nowhere.pem"), 1, &["SSL_CERT_FILE: nowhere.pem: No such file or directory"]);
    w.write("empty.pem", "no certificate\n");
    fails(&with("CURL_CA_BUNDLE=empty.pem"), 1, &["CURL_CA_BUNDLE: empty.pem: no certificate is in it", "PEM"]);
    fails(&with("SSL_CERT_FILE=other.pem"), 1, &["believed are those of SSL_CERT_FILE"]);
    let believing = format!("SSL_CERT_FILE={ca}");
    let old = front("expired.pem", server.port()).unwrap();
    let says = |at: String, parts: &[&str]| {
        let outcome = download(&w, &format!("{at} {believing}"));
        fails(&outcome, 1, parts);
        assert!(!outcome.stderr.contains("attempt"), "{}", outcome.stderr);
    };
    says(at("127.0.0.1", old.port), &["127.0.0.1: the certificate has expired", "clock"]);
    says(at("localhost", hub.port), &["localhost: the certificate is another server's", "HF_ENDPOINT"]);
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = plain.local_addr().unwrap().port();
    // For one connection: that it is not asked again is seen by the end.
    let answers = std::thread::spawn(move || {
        let (mut stream, _) = plain.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").unwrap();
        // Until the other one has hung up.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    says(at("127.0.0.1", port), &["no TLS is spoken there", "http://"]);
    answers.join().unwrap();
    // What came by https does not go on without.
    server.storage_at(&format!("http://127.0.0.1:{}", server.storage_port()));
    says(here.clone(), &["redirected from https://127.0.0.1", "expected https, found http://"]);
    // Through a proxy: the tunnel is to the hub, the certificate the hub's.
    let proxy = Proxy::start(&[("hub.test", hub.port), ("cdn.test", storage.port)], None);
    server.storage_at("https://cdn.test");
    let through = format!("HF_ENDPOINT=https://hub.test {believing} HTTPS_PROXY={}", proxy.address());
    came(download(&w, &through));
    assert!(proxy.seen().iter().all(|head| head.contains(".test:443 ")));
}

/// Mirrors under a path, counted requests, ranges that are ignored.
#[test]
fn servers_of_other_habits() {
    let (w, server) = (Workplace::new(), hub());
    came(download(&w, &format!("HF_ENDPOINT={}/mirror/hf/", server.endpoint())));
    assert!(server.seen().iter().any(|head| head.starts_with("get /mirror/hf/api/models/org/tiny/")));
    forget(&w);
    server.limited(2);
    let outcome = download(&w, &format!("HF_ENDPOINT={}", server.endpoint()));
    assert!(
        outcome.stderr.contains("the server answered 429, too many requests")
            && outcome.stderr.contains("attempt 2 of 4 in 0"),
        "{}",
        outcome.stderr
    );
    came(outcome);
    // The second answer begins at the start again although a range was asked for.
    forget(&w);
    server.fault([Fault::Cut(5000), Fault::NoRange]);
    came(download(&w, &format!("HF_ENDPOINT={}", server.endpoint())));
    let stored = server.stored();
    assert!(stored.iter().any(|head| head.contains("range: bytes=5000-")), "{stored:?}");
    // Words for "yes", a file of the token with a line end, quotes around it.
    forget(&w);
    for yes in ["1", "ON", "yes", "True"] {
        let offline = w.shell(&format!("HF_HUB_OFFLINE={yes} ringtune download org/tiny"));
        fails(&offline, 1, &["HF_HUB_OFFLINE is set"]);
    }
    server.close(TINY, Access::Gated);
    w.write("secrets/token", "good\r\n");
    came(download(&w, &format!("HF_TOKEN_PATH=secrets/token HF_HUB_CACHE=there HF_ENDPOINT={}", server.endpoint())));
    assert!(w.path("there/models--org--tiny").is_dir());
    came(download(
        &w,
        &format!("HF_TOKEN='\"good\"' HUGGINGFACE_HUB_CACHE=elsewhere HF_ENDPOINT={}", server.endpoint()),
    ));
    assert!(w.path("elsewhere/models--org--tiny").is_dir());
    let spaced = download(&w, &format!("HF_TOKEN='go od' HF_ENDPOINT={}", server.endpoint()));
    fails(&spaced, 1, &["gated (401, GatedRepo)"]);
    assert!(spaced.stderr.contains("look at HF_TOKEN"), "{}", spaced.stderr);
}
