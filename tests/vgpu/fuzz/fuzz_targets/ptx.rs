//! Fuzz target: any bytes, read as PTX and loaded. A panic, a hang or absurd memory is what is looked for.
#![no_main]

use vgpu::{Memory, Module};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    if let Err(e) = Module::load(&text, &mut Memory::new()) {
        assert!(!e.to_string().is_empty(), "an error without a message");
    }
});
