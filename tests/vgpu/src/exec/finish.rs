//! What is worked out over a decoded kernel as a whole: stretches, numbers of memory instructions, loops that poll.

use super::{Act, Inst};

/// For each instruction the end of the stretch it is in: no instruction before it jumps, and no jump leads to one after
/// the first.
pub(super) fn ends(code: &[Inst]) -> Vec<u32> {
    let mut starts = vec![false; code.len() + 1];
    for (n, i) in code.iter().enumerate() {
        match i.act {
            Act::Branch => {
                for at in [i.x as usize, i.y as usize, n + 1] {
                    if let Some(s) = starts.get_mut(at) {
                        *s = true;
                    }
                }
            }
            Act::Exit | Act::Trap => starts[n + 1] = true,
            _ => {}
        }
    }
    let mut out = vec![0; code.len()];
    let mut end = code.len();
    for n in (0..code.len()).rev() {
        out[n] = end as u32;
        if starts[n] {
            end = n;
        }
    }
    out
}

/// Numbers the memory instructions; an asynchronous copy has two, its source and its destination. Returns how many.
pub(super) fn sites(code: &mut [Inst]) -> usize {
    let mut next = 0;
    for i in code {
        i.site = next;
        next += match i.act {
            Act::Load(_) | Act::Store(_) | Act::Atomic(_) | Act::LoadMatrix(_) => 1,
            Act::CopyAsync(_) => 2,
            _ => 0,
        };
    }
    next as usize
}

/// Whether an instruction looks at what other threads may be about to write.
fn looks(opcode: &str) -> bool {
    // Waits on barrier objects let others run by themselves.
    if opcode.starts_with("mbarrier.") {
        return false;
    }
    const POLLS: [&str; 5] = [".volatile", ".relaxed", ".acquire", "nanosleep", "atom."];
    POLLS.iter().any(|p| opcode.contains(p))
}

/// Marks the backward branches of loops that poll.
pub(super) fn polls<'a>(code: &mut [Inst], opcodes: impl Iterator<Item = &'a str>) {
    // Number of polling instructions before each place.
    let mut before = vec![0u32];
    for opcode in opcodes {
        before.push(before[before.len() - 1] + u32::from(looks(opcode)));
    }
    for (n, i) in code.iter_mut().enumerate() {
        let target = i.x as usize;
        i.polls = matches!(i.act, Act::Branch) && target <= n && before[n] > before[target];
    }
}
