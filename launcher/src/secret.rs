//! Both ends of a connection prove that they know the secret of the run, and neither says it.
//!
//! ```text
//! caller                              who is called
//!   greeting, nonce a           ─►
//!                               ◄─   nonce b, MAC("answer", a, b)
//!   MAC("call", a, b)           ─►
//! ```
//! The MAC is BLAKE3 keyed with a key derived from the secret. What follows on the connection is neither encrypted nor signed: the network
//! between the machines of a run has to be one that nobody else changes packets in.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a stranger may take, from its first byte to the last one.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// First of all; the last byte is the version of what follows.
const GREETING: [u8; 8] = *b"ringrun2";
const CONTEXT: &str = "ringtune 2026-11-30 both ends of a connection know the secret of a run";

type Nonce = [u8; 32];

/// A connection whose reads can be given a time limit.
pub trait Timed: Read + Write {
    /// From now on a read fails that takes longer; none: it waits.
    ///
    /// # Errors
    /// If the limit is zero, or the system does not want it.
    fn limit(&self, time: Option<Duration>) -> io::Result<()>;
}

impl Timed for TcpStream {
    fn limit(&self, time: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(time)
    }
}

impl Timed for UnixStream {
    fn limit(&self, time: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(time)
    }
}

/// What the ranks of a run know, and nobody else.
#[derive(Clone)]
pub struct Secret {
    key: [u8; 32],
}

impl Secret {
    /// The secret of these words.
    pub fn of(text: &str) -> Self {
        Self { key: blake3::derive_key(CONTEXT, text.as_bytes()) }
    }

    /// Proofs are compared in constant time.
    fn proof(&self, role: &str, a: &Nonce, b: &Nonce) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(role.as_bytes()).update(a).update(b);
        hasher.finalize()
    }

    /// Proves to whoever was called that it knows the secret, and asks the same back. `false`: something else listens there.
    ///
    /// # Errors
    /// If the connection breaks, or nothing answers in time.
    pub fn call(&self, stream: &mut impl Timed, within: Duration) -> io::Result<bool> {
        let (a, until) = (nonce()?, Instant::now() + within);
        stream.write_all(&[&GREETING[..], &a].concat())?;
        let (mut b, mut mac) = ([0; 32], [0; 32]);
        read(stream, &mut b, until)?;
        read(stream, &mut mac, until)?;
        if self.proof("answer", &a, &b) != mac {
            return Ok(false);
        }
        stream.write_all(self.proof("call", &a, &b).as_bytes())?;
        stream.limit(None).map(|()| true)
    }

    /// The other end of [`Secret::call`]: whether the caller knows the secret. One that does not leaves when it has heard the answer.
    ///
    /// # Errors
    /// If the caller says something else, leaves, or takes longer than [`PATIENCE`].
    pub fn answer(&self, stream: &mut impl Timed) -> io::Result<bool> {
        let until = Instant::now() + PATIENCE;
        let (mut greeting, mut a) = ([0; 8], [0; 32]);
        read(stream, &mut greeting, until)?;
        if greeting != GREETING {
            return Err(io::Error::new(ErrorKind::InvalidData, "no greeting of a rank"));
        }
        read(stream, &mut a, until)?;
        let b = nonce()?;
        stream.write_all(&[&b[..], self.proof("answer", &a, &b).as_bytes()].concat())?;
        let mut mac = [0; 32];
        match read(stream, &mut mac, until) {
            Err(e) if [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset].contains(&e.kind()) => return Ok(false),
            read => read?,
        }
        stream.limit(None)?;
        Ok(self.proof("call", &a, &b) == mac)
    }
}

/// Bits that were never used before.
///
/// # Errors
/// If the system has none.
pub fn nonce() -> io::Result<Nonce> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Reads to the end of the buffer until then: a byte now and then does not prolong it.
fn read(stream: &mut impl Timed, mut to: &mut [u8], until: Instant) -> io::Result<()> {
    while !to.is_empty() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.limit(Some(left))?;
        match stream.read(to) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => to = &mut to[n..],
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What both ends make of each other, and every byte that passed from the caller.
    fn meet(ours: &str, theirs: &str) -> (bool, bool) {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        let answering = std::thread::spawn({
            let secret = Secret::of(theirs);
            move || secret.answer(&mut b).unwrap_or(false)
        });
        let called = Secret::of(ours).call(&mut a, PATIENCE).unwrap();
        drop(a);
        (called, answering.join().unwrap())
    }

    #[test]
    fn both_ends_know_it_or_neither_goes_on() {
        assert_eq!(meet("s", "s"), (true, true));
        assert_eq!(meet("", ""), (true, true));
        assert_eq!(meet("s", "t"), (false, false));
        assert_eq!(meet("", "t"), (false, false));
    }

    #[test]
    fn what_was_recorded_proves_nothing_again() {
        let (mut caller, mut relay) = UnixStream::pair().unwrap();
        let (mut wire, mut called) = UnixStream::pair().unwrap();
        let secret = Secret::of("a secret");
        let both = std::thread::spawn({
            let secret = secret.clone();
            move || (secret.answer(&mut called).unwrap(), called)
        });
        let calling = std::thread::spawn(move || Secret::of("a secret").call(&mut caller, PATIENCE).unwrap());
        let mut said = vec![0; 40];
        relay.read_exact(&mut said).unwrap();
        wire.write_all(&said).unwrap();
        let mut answer = vec![0; 64];
        wire.read_exact(&mut answer).unwrap();
        relay.write_all(&answer).unwrap();
        let mut mac = vec![0; 32];
        relay.read_exact(&mut mac).unwrap();
        wire.write_all(&mac).unwrap();
        assert!(calling.join().unwrap() && both.join().unwrap().0);
        let all = [said.clone(), answer.clone(), mac.clone()].concat();
        assert!(!all.windows(8).any(|w| w == b"a secret"), "the secret itself never passes");
        // The same bytes again: to who is called, and back to a caller; and a proof in the wrong direction.
        let (mut again, mut called) = UnixStream::pair().unwrap();
        let known = std::thread::spawn(move || Secret::of("a secret").answer(&mut called).unwrap());
        again.write_all(&[said.clone(), mac].concat()).unwrap();
        assert!(!known.join().unwrap());
        let (mut caller, mut other) = UnixStream::pair().unwrap();
        other.write_all(&answer).unwrap();
        assert!(!secret.call(&mut caller, PATIENCE).unwrap());
        let (mut mirror, mut called) = UnixStream::pair().unwrap();
        let known = std::thread::spawn(move || Secret::of("a secret").answer(&mut called).unwrap());
        mirror.write_all(&said).unwrap();
        mirror.read_exact(&mut answer).unwrap();
        mirror.write_all(&answer[32..]).unwrap();
        assert!(!known.join().unwrap());
    }

    #[test]
    fn strangers_are_turned_away_at_once_or_in_time() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        a.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert_eq!(Secret::of("s").answer(&mut b).unwrap_err().kind(), ErrorKind::InvalidData);
        let (mut a, b) = UnixStream::pair().unwrap();
        drop(b);
        assert!(Secret::of("s").call(&mut a, PATIENCE).is_err());
        // Nobody answers: the limit is on the whole, however slowly bytes come.
        let (mut a, mut b) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            while b.write_all(&[0]).is_ok() {
                std::thread::sleep(Duration::from_millis(20))
            }
        });
        let kind = Secret::of("s").call(&mut a, Duration::from_millis(100)).unwrap_err().kind();
        assert!([ErrorKind::TimedOut, ErrorKind::WouldBlock].contains(&kind), "{kind}");
    }
}
