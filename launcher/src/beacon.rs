//! Where a rank is: step, phase and layer in a page of memory that it shares with its parent, so that the parent can say where a
//! process was that can no longer speak.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::system::{is_memory_file, memory_file};

/// What a rank is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// It has begun and knows its peers, or not yet.
    #[default]
    Start,
    /// Rows become tokens.
    Tokenise,
    /// Weights and moments are read and allocated.
    Load,
    /// Forward pass.
    Forward,
    /// Backward pass.
    Backward,
    /// It waits for sums of gradients.
    Reduce,
    /// It waits for weights that other ranks updated.
    Gather,
    /// The optimiser's step.
    Update,
    /// Evaluation.
    Evaluate,
    /// A checkpoint is copied or written.
    Save,
    /// The loop is over; final files are written.
    Finish,
    /// The adapter is merged into its base.
    Merge,
    /// Prompts are answered.
    Generate,
}

const PHASES: [(Phase, &str); 13] = [
    (Phase::Start, "start"),
    (Phase::Tokenise, "tokenise"),
    (Phase::Load, "load"),
    (Phase::Forward, "forward"),
    (Phase::Backward, "backward"),
    (Phase::Reduce, "reduce"),
    (Phase::Gather, "gather"),
    (Phase::Update, "update"),
    (Phase::Evaluate, "evaluate"),
    (Phase::Save, "save"),
    (Phase::Finish, "finish"),
    (Phase::Merge, "merge"),
    (Phase::Generate, "generate"),
];

impl Phase {
    /// The phase of a word.
    pub fn of(word: &str) -> Option<Self> {
        PHASES.into_iter().find(|(_, name)| *name == word).map(|(phase, _)| phase)
    }

    /// Its word.
    pub fn word(self) -> &'static str {
        PHASES[self as usize].1
    }
}

/// Where a rank is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The step under way, from 1; 0 before the first.
    pub step: u64,
    /// What it does.
    pub phase: Phase,
    /// In which layer, where that is known.
    pub layer: Option<u16>,
}

impl Position {
    /// As one number, so that a store is whole.
    pub fn pack(self) -> u64 {
        let layer = self.layer.map_or(0, |l| u64::from(l.min(u16::MAX - 1)) + 1);
        (self.step << 24) | (u64::from(self.phase as u8) << 16) | layer
    }

    /// What [`Position::pack`] gave.
    pub fn unpack(bits: u64) -> Self {
        let phase = ((bits >> 16) & 0xff) as usize;
        let layer = (bits & 0xffff) as u16;
        Self { step: bits >> 24, phase: PHASES.get(phase).map_or(Phase::Start, |p| p.0), layer: layer.checked_sub(1) }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.step > 0 {
            write!(f, "step {}, ", self.step)?;
        }
        f.write_str(self.phase.word())?;
        self.layer.map_or(Ok(()), |layer| write!(f, ", layer {layer}"))
    }
}

struct Page {
    position: AtomicU64,
    /// Number of stores: it grows even where the position comes again.
    moves: AtomicU64,
}

/// A rank's page. It is never unmapped: there is one for each rank of a process.
#[derive(Clone, Copy)]
pub struct Beacon {
    page: &'static Page,
}

const NAME: &std::ffi::CStr = c"ringtune-beacon";

impl Beacon {
    /// A new page, and the file that a child inherits to map it too.
    ///
    /// # Errors
    /// If the system gives no memory.
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let fd = memory_file(NAME)?;
        // SAFETY: the descriptor is open.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), size_of::<Page>() as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok((Self::map(fd.as_raw_fd())?, fd))
    }

    /// The page of an inherited file.
    ///
    /// # Errors
    /// If the descriptor is none of [`Beacon::create`].
    pub fn inherited(fd: RawFd) -> io::Result<Self> {
        if !is_memory_file(fd, NAME) {
            return Err(io::Error::other(format!("descriptor {fd} is no beacon")));
        }
        Self::map(fd)
    }

    /// A page that nobody else sees.
    pub fn private() -> Self {
        Self { page: Box::leak(Box::new(Page { position: AtomicU64::new(0), moves: AtomicU64::new(0) })) }
    }

    fn map(fd: RawFd) -> io::Result<Self> {
        let (read_write, len) = (libc::PROT_READ | libc::PROT_WRITE, size_of::<Page>());
        // SAFETY: a new mapping of a file of at least this length, which `create` made; the address is the system's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, read_write, libc::MAP_SHARED, fd, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping is aligned to a page, lives as long as the process, and any bytes are atomics of integers.
        Ok(Self { page: unsafe { &*at.cast::<Page>() } })
    }

    /// The rank is here now: two stores.
    pub fn set(&self, at: Position) {
        self.page.position.store(at.pack(), Relaxed);
        self.page.moves.fetch_add(1, Relaxed);
    }

    /// Where it was last.
    pub fn position(&self) -> Position {
        Position::unpack(self.page.position.load(Relaxed))
    }

    /// How often it moved.
    pub fn moves(&self) -> u64 {
        self.page.moves.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_one_number_and_reads_like_a_sentence() {
        for (i, (phase, word)) in PHASES.into_iter().enumerate() {
            assert_eq!((phase as usize, Phase::of(word)), (i, Some(phase)));
            for (step, layer) in [(0, None), (120, Some(7)), ((1 << 40) - 1, Some(0)), (1, Some(65_534))] {
                let at = Position { step, phase, layer };
                assert_eq!(Position::unpack(at.pack()), at);
            }
        }
        let at = Position { step: 120, phase: Phase::Backward, layer: Some(7) };
        assert_eq!(at.to_string(), "step 120, backward, layer 7");
        assert_eq!(Position::default().to_string(), "start");
    }

    #[test]
    fn two_maps_of_a_page_are_one() {
        let (ours, fd) = Beacon::create().unwrap();
        let theirs = Beacon::inherited(fd.as_raw_fd()).unwrap();
        let at = Position { step: 3, phase: Phase::Reduce, layer: None };
        theirs.set(at);
        theirs.set(at);
        assert_eq!((ours.position(), ours.moves()), (at, 2));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(Beacon::inherited(file.as_raw_fd()).is_err());
    }
}
