//! Result codes of the interface and the last error text.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::io::Write;
use std::sync::Mutex;

/// `ncclResult_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Code {
    /// The call did what it says.
    Success = 0,
    /// A call of the driver failed.
    UnhandledCudaError = 1,
    /// The system refused something, or a wait took too long.
    SystemError = 2,
    /// A mistake of this library.
    InternalError = 3,
    /// An argument is wrong in itself.
    InvalidArgument = 4,
    /// The calls do not fit together.
    InvalidUsage = 5,
    /// Another rank failed, left or died.
    RemoteError = 6,
    /// A non-blocking call goes on in the background.
    InProgress = 7,
}

/// What the driver reports for an operation that failed: `CUresult`.
pub mod cuda {
    /// `CUDA_ERROR_LAUNCH_TIMEOUT`.
    pub const TIMEOUT: i32 = 702;
    /// `CUDA_ERROR_LAUNCH_FAILED`.
    pub const FAILED: i32 = 719;
    /// `CUDA_ERROR_UNKNOWN`.
    pub const UNKNOWN: i32 = 999;
}

/// An error with its text.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The code the caller gets.
    pub code: Code,
    /// The code the stream gets.
    pub cuda: i32,
    /// What went wrong, between whom.
    pub text: String,
}

/// Result of everything below the interface.
pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    /// An error of `code` that fails the stream too, if it happens there.
    pub fn new(code: Code, text: impl Into<String>) -> Failure {
        Failure { code, cuda: cuda::FAILED, text: text.into() }
    }

    /// A wrong argument.
    pub fn argument(text: impl Into<String>) -> Failure {
        Failure::new(Code::InvalidArgument, text)
    }

    /// Calls that do not fit together.
    pub fn usage(text: impl Into<String>) -> Failure {
        Failure::new(Code::InvalidUsage, text)
    }

    /// The same with another code for the stream.
    pub fn with_cuda(self, cuda: i32) -> Failure {
        Failure { cuda, ..self }
    }
}

/// The last error of the process; NCCL keeps one for all communicators too.
static LAST: Mutex<String> = Mutex::new(String::new());

thread_local! {
    /// Keeps the text alive whose address the caller holds.
    static SHOWN: RefCell<CString> = RefCell::new(CString::default());
}

/// One line on stderr, in one write: other libraries of the process write there too, under locks of their own.
pub fn say_line(text: &str) {
    // A closed stderr is no reason to stop.
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}

/// Remembers `failure` for `ncclGetLastError`, prints it, and gives its code.
pub fn report(failure: &Failure) -> c_int {
    say_line(&format!("vgpu nccl: {}", failure.text));
    remember(failure);
    failure.code as c_int
}

/// Remembers `failure` for `ncclGetLastError`.
pub fn remember(failure: &Failure) {
    let text = failure.text.replace('\0', " ");
    let mut last = LAST.lock().unwrap_or_else(|e| e.into_inner());
    *last = text;
}

/// The last text; valid until the same thread asks again.
pub fn last() -> *const c_char {
    let text = LAST.lock().unwrap_or_else(|e| e.into_inner()).clone();
    let text = CString::new(text).unwrap_or_default();
    SHOWN.with(|shown| {
        *shown.borrow_mut() = text;
        shown.borrow().as_ptr()
    })
}

/// The text of a code, as `ncclGetErrorString` gives it.
pub fn describe(code: c_int) -> &'static CStr {
    match code {
        0 => c"no error",
        1 => c"unhandled cuda error",
        2 => c"unhandled system error",
        3 => c"internal error",
        4 => c"invalid argument",
        5 => c"invalid usage",
        6 => c"remote process exited or there was a network error",
        7 => c"NCCL operation in progress",
        8 => c"operation timed out",
        _ => c"unknown result code",
    }
}
