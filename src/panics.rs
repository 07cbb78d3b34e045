//! Panics of libraries on input from outside (templates, tokenizers, Parquet files): an error in words, with nothing on the screen, and
//! no word of it to other ranks.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

thread_local! {
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread ends in [`caught`].
pub fn is_caught() -> bool {
    CAUGHT.get()
}

/// What `call` gives; `None` where it panicked. What it had in hand then must not be used again.
pub fn caught<T>(call: impl FnOnce() -> T) -> Option<T> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !is_caught() {
                before(info);
            }
        }));
    });
    let outer = CAUGHT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    CAUGHT.set(outer);
    result.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_nothing_and_the_next_one_is_one() {
        assert_eq!(caught(|| 7), Some(7));
        assert_eq!(caught(|| caught(|| panic!("inner")).is_none() && is_caught()), Some(true));
        assert_eq!(caught(|| -> u8 { panic!("outer") }), None);
        assert!(!is_caught());
    }
}
