//! Sends and receives of one group, progressed together through the mailboxes of the pairs.

use std::slice;
use std::sync::atomic::Ordering::*;

use crate::call::{Call, Kind, describe};
use crate::comm::Comm;
use crate::engine::Step;
use crate::error::{Failure, Result};
use crate::shared::{MAIL, MAILS};

/// One send or receive and how far it is.
#[derive(Clone)]
struct Part {
    call: Call,
    /// Bytes moved so far.
    at: usize,
    started: bool,
    /// Chunks of the mailbox when the last byte of a send was put: done when as many are taken.
    last: Option<u64>,
    done: bool,
}

/// The sends and receives of a group on one communicator.
pub(crate) struct Points {
    parts: Vec<Part>,
}

impl Points {
    pub fn new(calls: &[Call]) -> Points {
        let part = |call: &Call| Part { call: *call, at: 0, started: false, last: None, done: false };
        Points { parts: calls.iter().map(part).collect() }
    }

    /// Moves what can be moved. Calls between the same two ranks in the same direction go one after the other.
    ///
    /// # Errors
    /// If two ends name different sizes or types, or memory is not what a call says.
    pub fn step(&mut self, comm: &Comm) -> Result<Step> {
        let (mut moved, mut waits) = (false, None);
        let mut busy: Vec<(Kind, usize)> = Vec::new();
        for part in self.parts.iter_mut().filter(|p| !p.done) {
            let lane = (part.call.kind, part.call.peer);
            if busy.contains(&lane) {
                continue;
            }
            busy.push(lane);
            if !part.started {
                part.started = true;
                let bytes = part.call.count * part.call.dtype.size();
                let (address, name) = match part.call.kind {
                    Kind::Send => (part.call.send, "sendbuff"),
                    _ => (part.call.recv, "recvbuff"),
                };
                if bytes > 0 {
                    comm.check(address, bytes, false, &format!("{}: {name}", part.call))?;
                }
            }
            let went = if part.call.kind == Kind::Send { part.send(comm)? } else { part.receive(comm)? };
            moved |= went;
            if !went && !part.done && waits.is_none() {
                waits = Some((part.call.peer, part.call));
            }
        }
        if moved {
            comm.shared().ring();
            return Ok(Step::Moved);
        }
        match waits {
            Some((peer, call)) => {
                comm.shared().member(comm.rank).set_current(Some(&call.words(0)));
                Ok(Step::Wait(peer))
            }
            None => Ok(Step::Done),
        }
    }
}

impl Part {
    /// Puts one chunk, if there is room. A send is done when the receiver has taken all of it: a program that counts
    /// on buffers of the library must fail here, because it hangs elsewhere.
    fn send(&mut self, comm: &Comm) -> Result<bool> {
        let (shared, to) = (comm.shared(), self.call.peer);
        let mail = shared.mail(comm.rank, to);
        let (sent, taken) = (mail.sent.load(Relaxed), mail.taken.load(Acquire));
        if let Some(last) = self.last {
            self.done = taken >= last;
            return Ok(self.done);
        }
        if sent - taken >= MAILS as u64 {
            return Ok(false);
        }
        let total = self.call.count * self.call.dtype.size();
        let len = MAIL.min(total - self.at);
        // SAFETY: the slot is MAIL bytes that this rank alone writes; the receiver has taken its last chunk (counted
        // above) and reads it again only after `sent` counts up.
        let slot = unsafe { slice::from_raw_parts_mut(shared.mail_slot(comm.rank, to, sent), MAIL) };
        if len > 0 {
            let what = format!("{}: sendbuff", self.call);
            comm.read(self.call.send + self.at as u64, &mut slot[..len], &what)?;
        }
        mail.set_head(sent, &self.call.words(0), len);
        mail.sent.store(sent + 1, Release);
        self.at += len;
        if self.at == total {
            self.last = Some(sent + 1);
        }
        Ok(true)
    }

    /// Takes one chunk, if there is one.
    fn receive(&mut self, comm: &Comm) -> Result<bool> {
        let (shared, from) = (comm.shared(), self.call.peer);
        let mail = shared.mail(from, comm.rank);
        let (sent, taken) = (mail.sent.load(Acquire), mail.taken.load(Relaxed));
        if sent == taken {
            return Ok(false);
        }
        let (words, len) = mail.head(taken);
        let total = self.call.count * self.call.dtype.size();
        let mine = self.call.words(0);
        if (words[1], words[2]) != (mine[1], mine[2]) || self.at + len > total || len > MAIL {
            let (a, b) = (describe(&mine), describe(&words));
            return Err(Failure::usage(format!(
                "rank {} calls {a}, rank {from} calls {b}; count and type have to be the same",
                comm.rank
            )));
        }
        // SAFETY: `len` is at most MAIL; the sender has filled the slot (counted above) and writes it again only after
        // `taken` counts up.
        let slot = unsafe { slice::from_raw_parts(shared.mail_slot(from, comm.rank, taken), len) };
        if len > 0 {
            let what = format!("{}: recvbuff", self.call);
            comm.write(self.call.recv + self.at as u64, slot, &what)?;
        }
        mail.taken.store(taken + 1, Release);
        self.at += len;
        self.done = self.at == total;
        Ok(true)
    }
}
