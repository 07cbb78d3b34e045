//! Tests that need something of the machine which it may lack.

use std::io::Write;

/// Says why a test is skipped, on stderr and in the file of `RINGTUNE_SKIP_LOG`.
///
/// # Panics
/// With `RINGTUNE_NO_SKIP=1`, where what is missing `could` have been there.
pub fn skipped(why: &str, could: bool) {
    let name = std::thread::current().name().unwrap_or("a test").to_string();
    let line = format!("skipped: {name}: {why}");
    assert!(!could || !std::env::var("RINGTUNE_NO_SKIP").is_ok_and(|v| v == "1"), "RINGTUNE_NO_SKIP=1 and {line}");
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("RINGTUNE_SKIP_LOG") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        file.unwrap().write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}
