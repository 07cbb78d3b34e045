//! The frames of the control channel: a length (u32, little-endian), a kind (one byte), a body.
//!
//! A rank proves that it knows the secret ([`crate::secret`]) and says hello; when all have, each is told of all. From then on ranks exchange small values
//! ([`Message::Gather`]), show that they live ([`Message::Beat`]) and say why they end.

use std::io::{self, Read, Write};

use serde_json::Value;

use crate::cause::Cause;

/// Longest frame. Before the secret is proven there are none: see [`crate::secret`].
pub const LIMIT: usize = 256 << 20;

/// One frame.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// Rank to hub, first of all: see [`Hello`].
    Hello(Value),
    /// Hub to rank: the hello was understood.
    Known,
    /// Hub to rank: the hellos of all ranks, in their order.
    Welcome(Value),
    /// Rank to hub: its part of exchange `seq`, which all ranks call `what`.
    Gather {
        /// Number of the exchange.
        seq: u64,
        /// What is exchanged: ranks that name it differently have lost each other.
        what: String,
        /// How often this rank has asked for sums or weights since the exchange before: ranks that differ have lost each other.
        asked: u64,
        /// This rank's bytes.
        own: Vec<u8>,
    },
    /// Hub to rank: the parts of all ranks.
    Gathered {
        /// Number of the exchange.
        seq: u64,
        /// By rank.
        all: Vec<Vec<u8>>,
    },
    /// Rank to hub: it lives, is at this packed position, has moved so often, and has come so far.
    Beat {
        /// See [`crate::beacon::Position::pack`].
        position: u64,
        /// See [`crate::beacon::Beacon::moves`].
        moves: u64,
        /// The next exchange that it will call.
        next: u64,
        /// How often it has asked for sums or weights since the one before.
        asked: u64,
    },
    /// Rank to hub: the checkpoint of this step is complete.
    Saved(u64),
    /// Rank to hub: this went wrong here. Hub to rank: this went wrong somewhere; end.
    Failed(Cause),
    /// Rank to hub: it ends as it should, with this exit code.
    Goodbye(u8),
    /// Hub to rank: end as after this signal.
    Stop(i32),
    /// From a parent of ranks whose hub is elsewhere: one of its ranks is here, as its page says.
    Place {
        /// Which.
        rank: u64,
        /// See [`crate::beacon::Position::pack`].
        position: u64,
    },
}

impl Message {
    fn encode(&self) -> (u8, Vec<u8>) {
        match self {
            Message::Hello(v) => (1, v.to_string().into_bytes()),
            Message::Known => (2, Vec::new()),
            Message::Welcome(v) => (3, v.to_string().into_bytes()),
            Message::Gather { seq, what, asked, own } => {
                let mut body = [seq.to_le_bytes(), asked.to_le_bytes()].concat();
                body.extend((what.len() as u32).to_le_bytes());
                body.extend(what.as_bytes());
                body.extend(own);
                (4, body)
            }
            Message::Gathered { seq, all } => {
                let mut body = seq.to_le_bytes().to_vec();
                for part in all {
                    body.extend((part.len() as u32).to_le_bytes());
                    body.extend(part);
                }
                (5, body)
            }
            Message::Beat { position, moves, next, asked } => {
                (6, [position, moves, next, asked].map(|n| n.to_le_bytes()).concat())
            }
            Message::Saved(step) => (7, step.to_le_bytes().to_vec()),
            Message::Failed(cause) => (8, cause.to_json().to_string().into_bytes()),
            Message::Goodbye(code) => (9, vec![*code]),
            Message::Stop(signal) => (10, signal.to_le_bytes().to_vec()),
            Message::Place { rank, position } => (11, [rank.to_le_bytes(), position.to_le_bytes()].concat()),
        }
    }

    fn decode(kind: u8, body: &[u8]) -> Option<Self> {
        let json = || serde_json::from_slice::<Value>(body).ok();
        let mut rest = body;
        Some(match kind {
            1 => Message::Hello(json()?),
            2 => Message::Known,
            3 => Message::Welcome(json()?),
            4 => {
                let (seq, asked) = (number(&mut rest)?, number(&mut rest)?);
                let what = String::from_utf8(part(&mut rest)?.to_vec()).ok()?;
                Message::Gather { seq, what, asked, own: rest.to_vec() }
            }
            5 => {
                let seq = number(&mut rest)?;
                let mut all = Vec::new();
                while !rest.is_empty() {
                    all.push(part(&mut rest)?.to_vec());
                }
                Message::Gathered { seq, all }
            }
            6 => {
                let [position, moves, next, asked] =
                    [number(&mut rest)?, number(&mut rest)?, number(&mut rest)?, number(&mut rest)?];
                Message::Beat { position, moves, next, asked }
            }
            7 => Message::Saved(number(&mut rest)?),
            8 => Message::Failed(Cause::from_json(&json()?)?),
            9 => Message::Goodbye(*body.first()?),
            10 => Message::Stop(i32::from_le_bytes(body.try_into().ok()?)),
            11 => Message::Place { rank: number(&mut rest)?, position: number(&mut rest)? },
            _ => return None,
        })
    }

    /// Writes the frame, whole.
    ///
    /// # Errors
    /// If the other side is gone, or the frame is too long.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, body) = self.encode();
        if body.len() > LIMIT {
            return Err(io::Error::other(format!("a control message of {} bytes", body.len())));
        }
        let mut frame = Vec::with_capacity(body.len() + 5);
        frame.extend((body.len() as u32).to_le_bytes());
        frame.push(kind);
        frame.extend(body);
        to.write_all(&frame)
    }

    /// Reads a frame of at most `limit` bytes; `None` where the other side closed between frames.
    ///
    /// # Errors
    /// If the connection breaks inside a frame, or what comes is none of ours.
    pub fn read(from: &mut impl Read, limit: usize) -> io::Result<Option<Self>> {
        let mut head = [0; 5];
        match from.read(&mut head[..1])? {
            0 => return Ok(None),
            _ => from.read_exact(&mut head[1..])?,
        }
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let broken = |why: &str| io::Error::new(io::ErrorKind::InvalidData, format!("control channel: {why}"));
        if len > limit {
            return Err(broken("a frame that is too long"));
        }
        let mut body = vec![0; len];
        from.read_exact(&mut body)?;
        Self::decode(head[4], &body).map(Some).ok_or_else(|| broken("a frame that nobody writes"))
    }
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    let (head, tail) = rest.split_first_chunk::<8>()?;
    *rest = tail;
    Some(u64::from_le_bytes(*head))
}

fn part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_first_chunk::<4>()?;
    let (part, tail) = tail.split_at_checked(u32::from_le_bytes(*head) as usize)?;
    *rest = tail;
    Some(part)
}

/// What a rank says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Its rank.
    pub rank: usize,
    /// The name of its machine.
    pub host: String,
    /// What tells machines, or containers on one, apart: ranks of one place reach each other by Unix sockets.
    pub place: String,
    /// Its process.
    pub pid: u32,
    /// Cores it may run on, as `0-3,8`.
    pub cores: String,
    /// Where its peers connect: `@NAME` for a Unix socket without a file, and `ADDRESS:PORT`, or `*:PORT` for the
    /// address that the hub sees, where ranks are on several machines.
    pub listens: Vec<String>,
    /// Whether it can exchange gradients over MPI: where all can, they do.
    pub mpi: bool,
}

impl Hello {
    /// As JSON.
    pub fn to_json(&self) -> Value {
        let Self { rank, host, place, pid, cores, listens, mpi } = self;
        serde_json::json!({
            "rank": rank, "host": host, "place": place, "pid": pid, "cores": cores, "listens": listens, "mpi": mpi
        })
    }

    /// What [`Hello::to_json`] gave.
    pub fn from_json(v: &Value) -> Option<Self> {
        let text = |key: &str| v[key].as_str().map(String::from);
        Some(Self {
            rank: usize::try_from(v["rank"].as_u64()?).ok()?,
            host: text("host")?,
            place: text("place")?,
            pid: u32::try_from(v["pid"].as_u64()?).ok()?,
            cores: text("cores")?,
            listens: v["listens"].as_array()?.iter().map(|l| l.as_str().map(String::from)).collect::<Option<_>>()?,
            mpi: v["mpi"].as_bool()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Message> {
        let cause = Cause { rank: 1, host: "h".into(), position: None, text: "t".into(), code: 1 };
        vec![
            Message::Hello(serde_json::json!({"rank": 1})),
            Message::Known,
            Message::Welcome(serde_json::json!([])),
            Message::Gather { seq: 7, what: "sum 3".into(), asked: 12, own: vec![1, 2, 3] },
            Message::Gathered { seq: 7, all: vec![vec![], vec![9; 300]] },
            Message::Beat { position: u64::MAX, moves: 4, next: 8, asked: 1 << 40 },
            Message::Saved(12),
            Message::Failed(cause),
            Message::Goodbye(75),
            Message::Stop(15),
        ]
    }

    #[test]
    fn frames_survive_the_wire() {
        let mut wire = Vec::new();
        all().iter().for_each(|m| m.write(&mut wire).unwrap());
        let mut from = &wire[..];
        for expected in all() {
            assert_eq!(Message::read(&mut from, LIMIT).unwrap(), Some(expected));
        }
        assert_eq!(Message::read(&mut from, LIMIT).unwrap(), None);
    }

    #[test]
    fn what_is_cut_too_long_or_unknown_is_an_error() {
        for message in all() {
            let mut wire = Vec::new();
            message.write(&mut wire).unwrap();
            for len in 1..wire.len() {
                assert!(Message::read(&mut &wire[..len], LIMIT).is_err(), "{message:?} cut to {len} bytes");
            }
        }
        let strange: [&[u8]; 4] =
            [&[0, 0, 0, 0, 99], &[255, 255, 255, 255, 1, 0], &[1, 0, 0, 0, 6, 0], b"GET / HTTP/1.1\r\n\r\n"];
        strange.iter().for_each(|bytes| assert!(Message::read(&mut &bytes[..], 4096).is_err(), "{bytes:?}"));
        let hello = Hello {
            rank: 3,
            host: "h".into(),
            place: "p".into(),
            pid: 4,
            cores: "0-3".into(),
            listens: vec!["@x".into()],
            mpi: true,
        };
        assert_eq!(Hello::from_json(&hello.to_json()), Some(hello));
    }
}
