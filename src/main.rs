//! The `ringtune` program.

fn main() {}
