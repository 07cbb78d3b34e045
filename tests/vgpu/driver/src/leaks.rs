//! What a program left behind: with `VGPU_LEAKS=1`, objects that it made and never gave back are named when their context ends and
//! when the process ends.

use crate::driver::{State, driver};
use crate::ffi::Handle;
use crate::report::{append, say};

fn wanted() -> bool {
    std::env::var_os("VGPU_LEAKS").is_some_and(|v| v != "0")
}

/// Names what is left in a context.
pub fn report(st: &State, context: Handle) {
    if !wanted() {
        return;
    }
    let Ok(c) = st.contexts.get(context) else {
        return;
    };
    let mine = |h: &Handle| *h == context;
    let bytes: Vec<usize> = st.allocations.values().filter(|a| mine(&a.context)).map(|a| a.len).collect();
    let own: Vec<Handle> = st.thread_streams.get(&context).into_iter().flatten().map(|(_, h)| *h).collect();
    let streams =
        st.streams.iter().filter(|(h, s)| mine(&s.context) && *h != c.null_stream && !own.contains(h)).count();
    let counts = [
        ("allocations", bytes.len()),
        ("pinned", st.pinned.values().filter(|p| mine(&p.context)).count()),
        ("streams", streams),
        ("events", st.events.iter().filter(|(_, e)| mine(&e.context)).count()),
        ("modules", st.modules.iter().filter(|(_, m)| mine(&m.context)).count()),
        ("graphs", st.graphs.iter().filter(|(_, g)| mine(&g.context)).count()),
        ("executables", st.executables.iter().filter(|(_, e)| mine(&e.context)).count()),
    ];
    let left: Vec<String> = counts.iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{n} {what}")).collect();
    if left.is_empty() {
        return;
    }
    let total = bytes.iter().sum::<usize>();
    say(&format!("left on device {}: {} ({total} bytes of device memory)", c.device, left.join(", ")));
    for (address, a) in st.allocations.iter().filter(|(_, a)| mine(&a.context)).take(16) {
        say(&format!("  {} bytes at {address:#x}", a.len));
    }
    let fields: String = counts.iter().map(|(what, n)| format!(",\"{what}\":{n}")).collect();
    append(&format!("{{\"leaks\":true,\"device\":{},\"bytes\":{total}{fields}}}", c.device));
}

extern "C" fn at_exit() {
    // Whatever fails here must not disturb the end of the process.
    let _ = std::panic::catch_unwind(|| {
        let st = driver().state();
        for (context, _) in st.contexts.iter() {
            report(&st, context);
        }
    });
}

/// Asks to be called at the end of the process.
pub fn watch() {
    unsafe extern "C" {
        fn atexit(f: extern "C" fn()) -> i32;
    }
    if wanted() {
        // SAFETY: the C library promises to call the function once; this library is not unloaded before.
        unsafe { atexit(at_exit) };
    }
}
