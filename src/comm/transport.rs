//! Bytes between ranks: each exchange is one call on every rank, over a socket to every other one.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;

use crate::error::{Error, Result};
use crate::{bail, ensure};

/// What is exchanged, as a number that all ranks give: each kind of call has its own for every bucket.
pub mod call {
    /// A micro-batch's terms of a bucket of gradients, to their owners.
    pub const TERMS: u32 = 0;
    /// The sums of a bucket, to all.
    pub const SUMS: u32 = 1 << 28;
    /// The updated weights of a bucket, to all.
    pub const WEIGHTS: u32 = 2 << 28;
    /// What owners alone hold of a bucket, to the main rank.
    pub const HELD: u32 = 3 << 28;
    /// Sums of squares of the gradient, to all.
    pub const SQUARES: u32 = 4 << 28;

    /// What a call is in a trace, and of which bucket.
    pub fn described(call: u32) -> (&'static str, Option<usize>) {
        let bucket = call & (SUMS - 1);
        match call - bucket {
            WEIGHTS => ("gather", Some(bucket as usize)),
            SQUARES => ("share", None),
            _ => ("collect", Some(bucket as usize)),
        }
    }

    /// What a call is, for people.
    pub fn name(call: u32) -> String {
        let bucket = call & (SUMS - 1);
        match call - bucket {
            TERMS => format!("the terms of bucket {bucket}"),
            SUMS => format!("the sums of bucket {bucket}"),
            WEIGHTS => format!("the weights of bucket {bucket}"),
            HELD => format!("the masters of bucket {bucket}"),
            SQUARES => "the squares of the gradient".into(),
            _ => format!("an unknown call {call}"),
        }
    }
}

/// What goes to a rank.
#[derive(Clone, Copy, Debug)]
pub enum Outgoing<'a> {
    /// Nothing is expected there.
    Nothing,
    /// This rank has nothing to add.
    Skip,
    /// Values.
    Data(&'a [f32]),
}

/// What comes from a rank.
#[derive(Clone, Debug, Default)]
pub struct Incoming {
    /// Values that are expected; 0: nothing comes.
    pub len: usize,
    /// What came; empty where the rank skipped.
    pub data: Vec<f32>,
}

/// Moves values between ranks. It lives in the thread of the collectives.
pub trait Transport: Send {
    /// Called once in that thread, before the first exchange, on all ranks.
    ///
    /// # Errors
    /// If the ranks cannot exchange anything this way.
    fn open(&mut self) -> Result<()> {
        Ok(())
    }

    /// One exchange: `to[r]` goes to rank r, `from[r]` comes from it; the places of this rank are left alone. `call` is what this rank
    /// thinks is exchanged.
    ///
    /// # Errors
    /// If a peer is gone, or exchanges something else.
    fn exchange(&mut self, call: u32, to: &[Outgoing], from: &mut [Incoming]) -> Result<()>;

    /// Called once in that thread, after the last exchange, on all ranks of a run that did not fail.
    ///
    /// # Errors
    /// If what carried the exchanges does not end as it should.
    fn close(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A connection between two ranks that does not block.
pub trait Stream: Read + Write + AsRawFd + Send {}

impl<T: Read + Write + AsRawFd + Send> Stream for T {}

/// Sockets to all other ranks: Unix sockets on one machine, TCP between machines.
pub struct Sockets {
    /// By rank; none at this one's place.
    peers: Vec<Option<Box<dyn Stream>>>,
    sequence: u32,
}

/// Bytes of a [`Header`].
pub const HEADER: usize = 16;
const SKIP: u64 = u64::MAX;

/// What stands in front of the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Number of the exchange, from 1.
    pub sequence: u32,
    /// What is exchanged.
    pub call: u32,
    /// Number of values; none: the rank has nothing to add.
    pub len: Option<usize>,
}

impl Header {
    /// As bytes: three little-endian numbers.
    pub fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.call.to_le_bytes());
        bytes[8..].copy_from_slice(&self.len.map_or(SKIP, |len| len as u64).to_le_bytes());
        bytes
    }

    /// What [`Header::encode`] gave.
    pub fn decode(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let len = u64::from_le_bytes(bytes[8..].try_into().expect("eight bytes"));
        Self { sequence: word(0), call: word(4), len: (len != SKIP).then_some(len as usize) }
    }

    /// The number of values that follow this header, which came from a rank where another one was expected.
    ///
    /// # Errors
    /// If it is that of another exchange.
    pub fn answer(self, expected: Header, rank: usize) -> Result<usize> {
        let Header { sequence, call, len } = expected;
        let expected = len.unwrap_or(0);
        if (self.sequence, self.call) == (sequence, call) && self.len.is_none_or(|len| len == expected) {
            return Ok(self.len.unwrap_or(0));
        }
        bail!(
            "exchange {sequence} is {}, {expected} values, here; exchange {} is {}, {} values, on rank {rank}: the ranks have lost each \
             other",
            call::name(call),
            self.sequence,
            call::name(self.call),
            self.len.map_or("no".into(), |len| len.to_string())
        )
    }
}

#[derive(Default)]
struct Sending<'a> {
    header: [u8; HEADER],
    body: &'a [u8],
    done: usize,
    active: bool,
}

#[derive(Default)]
struct Receiving {
    header: [u8; HEADER],
    /// Bytes of header and body that came.
    done: usize,
    /// Bytes of the body, once the header is there.
    len: Option<usize>,
    active: bool,
}

impl Sockets {
    /// Over these connections, which do not block.
    pub fn new(peers: Vec<Option<Box<dyn Stream>>>) -> Self {
        Self { peers, sequence: 0 }
    }
}

impl Transport for Sockets {
    fn exchange(&mut self, call: u32, to: &[Outgoing], from: &mut [Incoming]) -> Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let n = self.peers.len();
        let mut sends: Vec<Sending> = Vec::with_capacity(n);
        let mut receives: Vec<Receiving> = Vec::with_capacity(n);
        for r in 0..n {
            let peer = self.peers[r].is_some();
            let (active, body, len) = match to[r] {
                Outgoing::Nothing => (false, &[][..], None),
                Outgoing::Skip => (peer, &[][..], None),
                Outgoing::Data(values) => (peer, bytemuck::cast_slice(values), Some(values.len())),
            };
            let header = Header { sequence: self.sequence, call, len }.encode();
            sends.push(Sending { header, body, done: 0, active });
            receives.push(Receiving { active: peer && from[r].len > 0, ..Receiving::default() });
        }
        loop {
            let mut fds: Vec<libc::pollfd> = Vec::with_capacity(n);
            for r in 0..n {
                let Some(peer) = &mut self.peers[r] else { continue };
                let lost = |e: io::Error| lost(r, &e);
                if sends[r].active {
                    send(peer, &mut sends[r]).map_err(lost)?;
                }
                if receives[r].active {
                    receive(peer, &mut receives[r], &mut from[r], (self.sequence, call, r))?;
                }
                let wants = [(sends[r].active, libc::POLLOUT), (receives[r].active, libc::POLLIN)];
                let events = wants.iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, event)| all | event);
                if events != 0 {
                    fds.push(libc::pollfd { fd: peer.as_raw_fd(), events, revents: 0 });
                }
            }
            if fds.is_empty() {
                return Ok(());
            }
            wait(&mut fds)?;
        }
    }
}

/// Waits until one of them can go on. There is no time limit: the control channel ends a process whose peers are gone.
fn wait(fds: &mut [libc::pollfd]) -> Result<()> {
    // SAFETY: the pointer and the length are those of a slice that lives during the call.
    let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
    let e = io::Error::last_os_error();
    ensure!(n >= 0 || e.kind() == ErrorKind::Interrupted, "waiting for other ranks: {e}");
    Ok(())
}

fn lost(rank: usize, e: &io::Error) -> Error {
    Error::new(format!("the connection to rank {rank} is lost: {e}"))
}

fn send(peer: &mut Box<dyn Stream>, s: &mut Sending) -> io::Result<()> {
    while s.done < HEADER + s.body.len() {
        let rest = if s.done < HEADER { &s.header[s.done..] } else { &s.body[s.done - HEADER..] };
        match peer.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => s.done += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    s.active = false;
    Ok(())
}

fn receive(
    peer: &mut Box<dyn Stream>,
    s: &mut Receiving,
    to: &mut Incoming,
    (sequence, call, rank): (u32, u32, usize),
) -> Result<()> {
    loop {
        let whole = HEADER + s.len.unwrap_or(0);
        if s.done == whole && s.len.is_some() {
            s.active = false;
            return Ok(());
        }
        let rest = match s.done.checked_sub(HEADER) {
            None => &mut s.header[s.done..],
            Some(done) => &mut bytemuck::cast_slice_mut::<f32, u8>(&mut to.data)[done..],
        };
        match peer.read(rest) {
            Ok(0) => return Err(lost(rank, &ErrorKind::UnexpectedEof.into())),
            Ok(n) => s.done += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(lost(rank, &e)),
        }
        if s.done == HEADER && s.len.is_none() {
            let len = Header::decode(&s.header).answer(Header { sequence, call, len: Some(to.len) }, rank)?;
            to.data.resize(len, 0.0);
            s.len = Some(len * 4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn pair() -> (Sockets, Sockets) {
        let (a, b) = UnixStream::pair().unwrap();
        [&a, &b].iter().for_each(|s| s.set_nonblocking(true).unwrap());
        (Sockets::new(vec![None, Some(Box::new(a))]), Sockets::new(vec![Some(Box::new(b)), None]))
    }

    #[test]
    fn more_than_a_socket_holds_goes_both_ways_at_once() {
        let (mut a, mut b) = pair();
        let values: Vec<f32> = (0..3_000_000).map(|i| i as f32).collect();
        std::thread::scope(|scope| {
            let values = &values;
            scope.spawn(move || {
                let mut from = [Incoming { len: 3_000_000, ..Default::default() }, Incoming::default()];
                b.exchange(7, &[Outgoing::Data(&values[..5]), Outgoing::Nothing], &mut from).unwrap();
                assert!(from[0].data == *values);
                let mut from = [Incoming { len: 4, ..Default::default() }, Incoming::default()];
                b.exchange(8, &[Outgoing::Data(values), Outgoing::Nothing], &mut from).unwrap();
                assert!(from[0].data.is_empty(), "skipped");
            });
            let mut from = [Incoming::default(), Incoming { len: 5, ..Default::default() }];
            a.exchange(7, &[Outgoing::Nothing, Outgoing::Data(values)], &mut from).unwrap();
            assert_eq!(from[1].data, values[..5]);
            let mut from = [Incoming::default(), Incoming { len: 3_000_000, ..Default::default() }];
            a.exchange(8, &[Outgoing::Nothing, Outgoing::Skip], &mut from).unwrap();
            assert!(from[1].data == *values);
        });
    }

    #[test]
    fn a_peer_that_is_elsewhere_or_gone_is_named() {
        let (mut a, mut b) = pair();
        let one = [1.0];
        let in_thread = std::thread::spawn(move || {
            let mut from = [Incoming { len: 1, ..Default::default() }, Incoming::default()];
            b.exchange(3, &[Outgoing::Data(&one), Outgoing::Nothing], &mut from).unwrap_err().to_string()
        });
        let mut from = [Incoming::default(), Incoming { len: 1, ..Default::default() }];
        let e = a.exchange(4, &[Outgoing::Nothing, Outgoing::Data(&one)], &mut from).unwrap_err().to_string();
        assert!(e.contains("exchange 1 is the terms of bucket 4, 1 values, here"), "{e}");
        assert!(e.contains("exchange 1 is the terms of bucket 3, 1 values, on rank 1"), "{e}");
        assert!(in_thread.join().unwrap().contains("lost each other"));
        let e = a.exchange(5, &[Outgoing::Nothing, Outgoing::Data(&one)], &mut from).unwrap_err().to_string();
        assert!(e.contains("connection to rank 1 is lost"), "{e}");
    }
}
