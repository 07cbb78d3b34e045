//! Where kernels print.

use std::fmt;
use std::sync::Arc;

/// A place for the text of `printf` in kernels; standard output unless said otherwise.
#[derive(Clone)]
pub struct Output(Arc<dyn Fn(&str) + Send + Sync>);

impl Output {
    /// Text goes to `f`, one call per `printf` of a thread; host threads may call it at the same time.
    pub fn new(f: impl Fn(&str) + Send + Sync + 'static) -> Output {
        Output(Arc::new(f))
    }

    /// Prints one text.
    pub fn print(&self, text: &str) {
        (self.0)(text);
    }
}

impl Default for Output {
    fn default() -> Output {
        Output::new(|text| print!("{text}"))
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Output")
    }
}
