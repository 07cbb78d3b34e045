//! Control flow of a kernel: where divergent lanes meet again, and which registers can share a row.

/// What one instruction does to control flow and registers.
#[derive(Clone, Debug, Default)]
pub struct Flow {
    /// Branch target.
    pub target: Option<usize>,
    /// Whether the next instruction can follow.
    pub falls: bool,
    /// Registers read.
    pub uses: Vec<u32>,
    /// Registers written in every lane (guarded writes are reads as well).
    pub defs: Vec<u32>,
}

fn successors(flow: &[Flow], i: usize) -> impl Iterator<Item = usize> + '_ {
    let n = flow.len();
    let next = (flow[i].falls && i < n).then_some(i + 1);
    next.into_iter().chain(flow[i].target)
}

/// For each instruction with two successors, the first one that every path from it passes; `flow.len()` is the exit.
pub fn reconvergence(flow: &[Flow]) -> Vec<usize> {
    let n = flow.len();
    // Blocks start at targets and after branches.
    let mut starts = vec![false; n + 1];
    starts[0] = true;
    starts[n] = true;
    for (i, f) in flow.iter().enumerate() {
        if let Some(t) = f.target {
            starts[t] = true;
            starts[i + 1] = true;
        } else if !f.falls {
            starts[i + 1] = true;
        }
    }
    let firsts: Vec<usize> = (0..=n).filter(|i| starts[*i]).collect();
    let mut block_of = vec![0; n + 1];
    for (b, w) in firsts.windows(2).enumerate() {
        block_of[w[0]..w[1]].fill(b);
    }
    let exit = firsts.len() - 1;
    block_of[n] = exit;
    let mut succ: Vec<Vec<usize>> = vec![Vec::new(); exit + 1];
    let mut pred: Vec<Vec<usize>> = vec![Vec::new(); exit + 1];
    for b in 0..exit {
        let last = firsts[b + 1] - 1;
        let mut list: Vec<usize> = successors(flow, last).map(|s| block_of[s]).collect();
        if list.is_empty() {
            list.push(exit);
        }
        for s in &list {
            pred[*s].push(b);
        }
        succ[b] = list;
    }
    // Post-order of the reversed graph from the exit, then the iteration of Cooper, Harvey and Kennedy (2001).
    let mut order = vec![usize::MAX; exit + 1];
    let (mut list, mut stack, mut seen) = (Vec::new(), vec![(exit, 0)], vec![false; exit + 1]);
    seen[exit] = true;
    while let Some((b, k)) = stack.pop() {
        if let Some(&p) = pred[b].get(k) {
            stack.push((b, k + 1));
            if !seen[p] {
                seen[p] = true;
                stack.push((p, 0));
            }
        } else {
            order[b] = list.len();
            list.push(b);
        }
    }
    let mut dom = vec![usize::MAX; exit + 1];
    dom[exit] = exit;
    let mut changed = true;
    while changed {
        changed = false;
        for &b in list.iter().rev().skip(1) {
            let mut new = usize::MAX;
            for &s in &succ[b] {
                if dom[s] == usize::MAX {
                    continue;
                }
                new = if new == usize::MAX { s } else { meet(new, s, &dom, &order) };
            }
            if new != usize::MAX && dom[b] != new {
                dom[b] = new;
                changed = true;
            }
        }
    }
    (0..n)
        .map(|i| match dom[block_of[i]] {
            usize::MAX => n,
            b => firsts[b],
        })
        .collect()
}

fn meet(mut a: usize, mut b: usize, dom: &[usize], order: &[usize]) -> usize {
    while a != b {
        while order[a] < order[b] {
            a = dom[a];
        }
        while order[b] < order[a] {
            b = dom[b];
        }
    }
    a
}

/// For each position (and the end) the registers whose value may be read from there on, one bit each.
pub fn liveness(flow: &[Flow], regs: usize) -> Vec<Vec<u64>> {
    let (n, words) = (flow.len(), regs.div_ceil(64).max(1));
    let mut live = vec![vec![0u64; words]; n + 1];
    let mut changed = true;
    while changed {
        changed = false;
        for i in (0..n).rev() {
            let mut set = vec![0u64; words];
            for s in successors(flow, i) {
                for (a, b) in set.iter_mut().zip(&live[s]) {
                    *a |= *b;
                }
            }
            for d in &flow[i].defs {
                set[*d as usize / 64] &= !(1 << (d % 64));
            }
            for u in &flow[i].uses {
                set[*u as usize / 64] |= 1 << (u % 64);
            }
            if set != live[i] {
                live[i] = set;
                changed = true;
            }
        }
    }
    live
}

/// First and last position at which each register is live; `None` for registers that never appear.
pub fn intervals(flow: &[Flow], regs: usize, live: &[Vec<u64>]) -> Vec<Option<(usize, usize)>> {
    let mut out: Vec<Option<(usize, usize)>> = vec![None; regs];
    let mut touch = |r: usize, at: usize| {
        let e = out[r].get_or_insert((at, at));
        *e = (e.0.min(at), e.1.max(at));
    };
    for i in 0..flow.len() {
        for (w, bits) in live[i].iter().enumerate() {
            let mut bits = *bits;
            while bits != 0 {
                touch(w * 64 + bits.trailing_zeros() as usize, i);
                bits &= bits - 1;
            }
        }
        for r in flow[i].defs.iter().chain(&flow[i].uses) {
            touch(*r as usize, i);
        }
    }
    out
}

/// Gives each interval a row from `base` on; rows are used again once an interval has ended. Returns the rows used.
pub fn allocate(list: &[(u32, (usize, usize))], base: usize, rows: &mut [usize]) -> usize {
    let mut sorted = list.to_vec();
    sorted.sort_by_key(|(r, (start, _))| (*start, *r));
    let mut active: std::collections::BTreeSet<(usize, usize)> = Default::default();
    let (mut free, mut used): (Vec<usize>, usize) = (Vec::new(), 0);
    for (r, (start, end)) in sorted {
        // An instruction may still read a register that ends where another begins; keep those apart.
        while let Some(&(e, row)) = active.first() {
            if e >= start {
                break;
            }
            active.remove(&(e, row));
            free.push(row);
        }
        let row = free.pop().unwrap_or_else(|| {
            used += 1;
            base + used - 1
        });
        rows[r as usize] = row;
        active.insert((end, row));
    }
    used
}
