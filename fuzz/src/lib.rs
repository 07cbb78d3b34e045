//! What the fuzz targets share: the parsers of `parsers.rs`, found by the target's name.

pub mod parsers;
pub mod seeds;

/// Runs one input through the parser of a target.
///
/// # Panics
/// If the parser does: that is what is looked for.
pub fn run(name: &str, bytes: &[u8]) {
    quiet_caught_panics();
    (parsers::by_name(name).run)(bytes);
}

/// The fuzzer's hook ends the process at any panic, also at one that the Parquet reader's caller catches on purpose; such a
/// panic unwinds instead. One that nobody catches still ends the process, in the fuzzer's own frame.
fn quiet_caught_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let inside = panic.location().is_some_and(|l| l.file().contains("parquet"));
            if !inside {
                report(panic);
            }
        }));
    });
}
