//! What is worked out over a decoded kernel as a whole: stretches, numbers of memory instructions, loops that poll.

use super::races::{FENCE, RELEASE, STRONG};
use super::tensor::Element;
use super::{Act, Inst, NONE};

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
            Act::Load(_) | Act::Store(_) | Act::Atomic(_) | Act::LoadMatrix(_) | Act::Wmma(_) => 1,
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

/// Marks bf16 products (in `k`) whose A is that of the instruction before, which stands in the same stretch.
pub(super) fn chains(code: &mut [Inst], ends: &[u32]) {
    for n in 1..code.len() {
        let (Act::Mma(last), Act::Mma(now)) = (&code[n - 1].act, &code[n].act) else {
            continue;
        };
        let same = now.element == Element::Bf16 && last.element == now.element && last.k == now.k && last.a == now.a;
        let kept = !last.d.iter().any(|d| now.a.contains(d));
        let free = code[n - 1].guard == NONE && code[n].guard == NONE && ends[n - 1] == ends[n];
        code[n].k = u8::from(same && kept && free);
    }
}

/// Says of every instruction how it orders memory.
pub(super) fn orders<'a>(code: &mut [Inst], opcodes: impl Iterator<Item = &'a str>) {
    for (i, opcode) in code.iter_mut().zip(opcodes) {
        let has = |names: &[&str]| names.iter().any(|n| opcode.split('.').any(|part| part == *n));
        let base = opcode.split('.').next().unwrap_or("");
        let mut order = 0;
        if matches!(base, "atom" | "red") || has(&["volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"]) {
            order |= STRONG;
        }
        if has(&["release", "acq_rel"]) {
            order |= RELEASE;
        }
        if matches!(base, "membar" | "fence") {
            order = FENCE;
        }
        i.order = order;
        // What the access itself does is looked up in the instruction inside.
        if let Act::Touching(t) = &mut i.act {
            t.inner.order = order;
        }
    }
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
