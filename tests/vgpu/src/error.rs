//! What can go wrong: text that does not parse, instructions that are not known, and faults of a running kernel.

use std::fmt;

/// Why a module was refused or a launch stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The text is not PTX as the parser knows it.
    Parse {
        /// The kernel or function whose parameters, directives or body it stands in.
        kernel: Option<String>,
        /// Line of the PTX text, from 1.
        line: u32,
        /// What was expected or wrong.
        message: String,
        /// The offending piece of text.
        text: String,
    },
    /// An instruction, modifier or operand that the interpreter does not execute.
    Unsupported {
        /// The kernel or function.
        kernel: String,
        /// Line of the PTX text, from 1.
        line: u32,
        /// The instruction as written.
        text: String,
        /// Which part of it is the problem.
        message: String,
    },
    /// The kernel did something wrong while it ran.
    Fault(Box<Fault>),
    /// The call itself was wrong: unknown kernel, wrong argument size, block too large, bad pointer of a copy.
    Invalid(String),
}

/// The kind of fault of a running kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// An access outside every live allocation, or over the end of one.
    OutOfBounds,
    /// An address that is not a multiple of the access size.
    Misaligned,
    /// A use of bytes that nothing has written.
    Uninitialised,
    /// An access to memory that was freed.
    UseAfterFree,
    /// A write to constant memory or parameters.
    ReadOnly,
    /// A barrier reached by only some live threads of a warp.
    DivergentBarrier,
    /// Two accesses of one byte, at least one of them a write, that nothing orders.
    Race,
    /// Warps that disagree about a barrier's threads, or one that does not exist.
    Barrier,
    /// Every warp waits for something that cannot happen.
    Deadlock,
    /// The instruction budget of the launch ran out.
    Watchdog,
    /// The kernel executed `trap`.
    Trap,
    /// An `assert` of the kernel failed.
    Assert,
    /// A barrier object in shared memory that is used wrongly.
    Mbarrier,
    /// An access to registers or shared memory that an asynchronous operation may still read or write.
    InFlight,
    /// Shared memory that ordinary stores and an asynchronous operation access without a proxy fence between.
    ProxyFence,
    /// A warpgroup instruction that not all of its threads execute alike, or without the fence or wait it needs.
    Warpgroup,
    /// A matrix descriptor or tensor map that is none.
    Descriptor,
    /// A warp-level instruction whose mask names lanes that do not execute it, or none at all.
    BadMask,
}

/// A fault with the place it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What kind of fault.
    pub kind: FaultKind,
    /// Sentence with addresses and sizes.
    pub message: String,
    /// The kernel.
    pub kernel: String,
    /// Line of the PTX text, from 1.
    pub line: u32,
    /// Line of the CUDA source, when `.loc` gives one.
    pub source_line: Option<u32>,
    /// The instruction as written.
    pub text: String,
    /// Block index.
    pub block: [u32; 3],
    /// Linear thread index in the block.
    pub thread: u32,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Parse { kernel, line, message, text } => {
                if let Some(kernel) = kernel {
                    write!(f, "kernel {kernel}, ")?;
                }
                write!(f, "PTX line {line}: {message} at `{text}`")
            }
            Error::Unsupported { kernel, line, text, message } => {
                write!(f, "kernel {kernel}, PTX line {line}: {message}: `{text}`")
            }
            Error::Fault(x) => write!(
                f,
                "kernel {}, block {:?}, thread {}, PTX line {}: {:?}: {}: `{}`",
                x.kernel, x.block, x.thread, x.line, x.kind, x.message, x.text
            ),
            Error::Invalid(m) => f.write_str(m),
        }
    }
}

impl std::error::Error for Error {}

/// Result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;
