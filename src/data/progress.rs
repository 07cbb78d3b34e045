//! Progress bars of long preparations; nothing is printed where the error output is no terminal.

use indicatif::{ProgressBar, ProgressStyle};

use crate::say::visible;

/// Whether progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A bar on a terminal.
    Show,
    /// Nothing.
    Hide,
}

impl Progress {
    /// A bar over `total` items.
    pub fn bar(self, total: u64, what: &str) -> ProgressBar {
        if self == Self::Hide {
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template("{msg} {wide_bar} {percent:>3} % eta {eta}");
        ProgressBar::new(total)
            .with_style(style.expect("the style is well formed"))
            .with_message(visible(what).into_owned())
    }
}
