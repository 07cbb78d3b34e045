//! The exported functions, grouped as the documentation of the driver API groups them.

pub mod context;
pub mod device;
pub mod entry;
pub mod error;
pub mod event;
pub mod graph;
pub mod launch;
pub mod library;
pub mod memory;
pub mod module;
pub mod occupancy;
pub mod pointer;
pub mod pool;
pub mod private;
pub mod stream;
pub mod transfer;
pub mod unsupported;

use crate::ffi::Symbol;

/// Every exported function.
pub fn symbols() -> impl Iterator<Item = &'static Symbol> {
    let all = [
        context::SYMBOLS,
        device::SYMBOLS,
        entry::SYMBOLS,
        error::SYMBOLS,
        event::SYMBOLS,
        graph::SYMBOLS,
        launch::SYMBOLS,
        library::SYMBOLS,
        memory::SYMBOLS,
        module::SYMBOLS,
        occupancy::SYMBOLS,
        pointer::SYMBOLS,
        pool::SYMBOLS,
        private::SYMBOLS,
        stream::SYMBOLS,
        transfer::SYMBOLS,
        unsupported::SYMBOLS,
    ];
    all.into_iter().flatten()
}
