//! What the ranks tell each other: one page for each rank, one mailbox for each pair.

use std::fs;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::*};

use crate::call::Words;
use crate::shared::MAILS;

/// Calls that stay readable: a rank is never two calls ahead of another, so four are ample.
const CALLS: usize = 4;

/// What a rank is doing with the communicator; `Member::state`.
pub mod state {
    /// Nobody came yet.
    pub const EMPTY: u32 = 0;
    /// Takes part.
    pub const JOINED: u32 = 1;
    /// Destroyed its communicator.
    pub const LEFT: u32 = 2;
    /// Aborted it.
    pub const ABORTED: u32 = 3;
    /// Met an error; the message says which.
    pub const FAILED: u32 = 4;
}

/// Nobody: [`Member::waits_for`] of a rank that does not wait.
pub const NOBODY: u32 = u32::MAX;

/// One rank's page.
#[repr(C, align(4096))]
pub struct Member {
    pub state: AtomicU32,
    pub pid: AtomicU32,
    /// Thread that used the communicator last.
    pub tid: AtomicU32,
    /// Start time of the process, so that a number used again is told apart.
    pub started: AtomicU64,
    pub device: AtomicU32,
    pub uuid: [AtomicU64; 2],
    /// Chunks put into slots so far, and chunks of all ranks read so far.
    pub produced: AtomicU64,
    pub consumed: AtomicU64,
    /// Collective calls posted so far.
    pub posted: AtomicU64,
    calls: [[AtomicU64; 6]; CALLS],
    /// What the rank runs now, for messages; kind 255 means nothing.
    current: [AtomicU64; 6],
    /// Rank this one needs something of, or [`NOBODY`]; how often it looked in vain; what it got done.
    pub waits_for: AtomicU32,
    pub looks: AtomicU64,
    pub progress: AtomicU64,
    /// Rung by ranks that wait for this one: its queue must run.
    pub wanted: AtomicU32,
    /// Splits posted so far; colour and key of the last two.
    pub splits: AtomicU64,
    split: [[AtomicU64; 2]; 2],
    message_len: AtomicU32,
    message: [AtomicU8; 1024],
}

/// Mailbox from one rank to another.
#[repr(C, align(64))]
pub struct Mail {
    /// Chunks put in, chunks taken out.
    pub sent: AtomicU64,
    pub taken: AtomicU64,
    /// Words of the call each chunk belongs to, and the bytes of the chunk.
    heads: [[AtomicU64; 7]; MAILS],
}

fn store(to: &[AtomicU64], from: &[u64]) {
    for (t, f) in to.iter().zip(from) {
        t.store(*f, Relaxed);
    }
}

fn load<const N: usize>(from: &[AtomicU64]) -> [u64; N] {
    std::array::from_fn(|i| from[i].load(Relaxed))
}

impl Member {
    /// Publishes collective number `number`; the caller counts [`Member::posted`] up.
    pub fn post(&self, number: u64, words: &Words) {
        store(&self.calls[number as usize % CALLS], words);
        self.posted.store(number + 1, Release);
    }

    /// Collective number `number`, if posted.
    pub fn posted_call(&self, number: u64) -> Option<Words> {
        (self.posted.load(Acquire) > number).then(|| load(&self.calls[number as usize % CALLS]))
    }

    pub fn set_current(&self, words: Option<&Words>) {
        store(&self.current, words.unwrap_or(&[255; 6]));
    }

    /// What the rank runs now.
    pub fn current(&self) -> Option<Words> {
        let words: Words = load(&self.current);
        (words[0] != 255).then_some(words)
    }

    pub fn post_split(&self, number: u64, color: i32, key: i32) {
        store(&self.split[number as usize % 2], &[color as u64, key as u64]);
        self.splits.store(number + 1, Release);
    }

    /// Colour and key of split `number`, if posted.
    pub fn posted_split(&self, number: u64) -> Option<(i32, i32)> {
        (self.splits.load(Acquire) > number).then(|| {
            let [color, key] = load(&self.split[number as usize % 2]);
            (color as i32, key as i32)
        })
    }

    /// Says why the rank failed.
    pub fn fail(&self, text: &str) {
        let bytes = &text.as_bytes()[..text.len().min(self.message.len())];
        for (to, from) in self.message.iter().zip(bytes) {
            to.store(*from, Relaxed);
        }
        self.message_len.store(bytes.len() as u32, Relaxed);
        self.state.store(state::FAILED, Release);
    }

    pub fn message(&self) -> String {
        let n = (self.message_len.load(Relaxed) as usize).min(self.message.len());
        let bytes: Vec<u8> = self.message[..n].iter().map(|b| b.load(Relaxed)).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether the process is still there. A process that ended and waits for its parent counts as gone.
    pub fn alive(&self) -> bool {
        let pid = self.pid.load(Acquire);
        started(pid).is_some_and(|s| s == self.started.load(Relaxed))
    }

    /// Whether the thread that used the communicator last is still there.
    pub fn thread_alive(&self) -> bool {
        let (pid, tid) = (self.pid.load(Acquire), self.tid.load(Relaxed));
        fs::metadata(format!("/proc/{pid}/task/{tid}")).is_ok()
    }
}

impl Mail {
    pub fn set_head(&self, chunk: u64, words: &Words, bytes: usize) {
        let head = &self.heads[chunk as usize % MAILS];
        store(&head[..6], words);
        head[6].store(bytes as u64, Relaxed);
    }

    pub fn head(&self, chunk: u64) -> (Words, usize) {
        let head = &self.heads[chunk as usize % MAILS];
        (load(&head[..6]), head[6].load(Relaxed) as usize)
    }
}

/// Start time of a running process in clock ticks since boot; `None` if it ended.
pub fn started(pid: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; fields are counted behind it.
    let mut fields = text[text.rfind(')')? + 1..].split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// Kernel's number of the calling thread.
pub fn thread_id() -> u32 {
    // SAFETY: gettid has no arguments and cannot fail.
    unsafe { libc::syscall(libc::SYS_gettid) as u32 }
}
