//! What happens when the system grants no more memory: the program ends with 1 and with what to do, not with a signal or a panic.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// What follows the number of bytes.
const ADVICE: &[u8] = b" bytes more: out of memory, and what was written before is whole; smaller --per-device-train-batch-size, \
--per-device-eval-batch-size and --max-seq-len, --recompute layer and --mixed-precision bf16 take less, and `ringtune check` with the same \
flags says how much; limits are those of ulimit -v, a container or a batch system\n";

/// Bytes of the last request that was refused; 0: none was.
static REFUSED: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, which remembers what was refused.
pub struct Heap;

fn noted(memory: *mut u8, bytes: usize) -> *mut u8 {
    if memory.is_null() {
        REFUSED.store(bytes.max(1), Ordering::Relaxed);
    }
    memory
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        noted(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's.
        noted(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: the caller's.
        noted(unsafe { System.realloc(memory, layout, bytes) }, bytes)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// From here on an abort for want of memory is an error with exit code 1.
pub fn explain_refusals() {
    // SAFETY: the handler calls nothing but what a signal handler may.
    unsafe { libc::signal(libc::SIGABRT, aborted as *const () as libc::sighandler_t) };
}

/// What is said of a stack that was not deep enough for a template.
const NESTED: &[u8] =
    b"error: the chat template nests its expressions or values deeper than can be rendered; simplify it\n";

/// Templates that are parsed or rendered now, in all threads.
static TEMPLATES: AtomicUsize = AtomicUsize::new(0);

/// While it lives, a stack that overflows is the fault of a chat template: its values may nest without end.
#[derive(Debug)]
pub struct OfTemplate(());

impl OfTemplate {
    /// From here on.
    pub fn begin() -> Self {
        TEMPLATES.fetch_add(1, Ordering::SeqCst);
        Self(())
    }
}

impl Drop for OfTemplate {
    fn drop(&mut self) {
        TEMPLATES.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Another reason to abort goes on to its core dump.
extern "C" fn aborted(_signal: libc::c_int) {
    let bytes = REFUSED.load(Ordering::Relaxed);
    if bytes != 0 {
        end(bytes);
    }
    if TEMPLATES.load(Ordering::SeqCst) > 0 {
        // SAFETY: the bytes live; ends the process, from a signal handler too.
        unsafe {
            libc::write(libc::STDERR_FILENO, NESTED.as_ptr().cast(), NESTED.len());
            libc::_exit(1)
        }
    }
}

/// Ends the program for want of `bytes` bytes that nothing can go on without.
pub fn end(bytes: usize) -> ! {
    // No memory is needed for any of it.
    let mut digits = [0u8; 20];
    let (mut first, mut rest) = (digits.len(), bytes);
    loop {
        first -= 1;
        digits[first] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    for part in [b"error: the system grants no ".as_slice(), &digits[first..], ADVICE] {
        // SAFETY: the bytes live; what is not written is lost.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    // SAFETY: ends the process, from a signal handler too.
    unsafe { libc::_exit(1) }
}
