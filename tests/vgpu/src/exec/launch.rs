//! A launch: CTAs over host threads, warps of a CTA in turn, barriers, counters and the watchdog.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use super::decode::{Program, RowInit};
use super::mem::{LaneFault, Space, lanes};
use super::warp::{At, Reduce, Stop, Warp};
use super::{LANES, Lane};
use crate::error::{Error, Fault, FaultKind, Result};
use crate::memory::{FILL, Memory};

/// Instructions one warp runs before the next one gets its turn.
const SLICE: u64 = 100_000;

/// What a launch did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Warp instructions by [`super::Class`].
    pub instructions: [u64; 9],
    /// Lane instructions.
    pub lanes: u64,
    /// Floating-point operations of matrix instructions.
    pub tensor_flops: u64,
    /// Warp requests to global memory.
    pub global_requests: u64,
    /// 32-byte sectors of these requests.
    pub global_sectors: u64,
    /// Passes over shared memory.
    pub shared_wavefronts: u64,
    /// Passes more than a conflict-free access needs.
    pub bank_conflicts: u64,
    /// Barriers, per warp.
    pub barriers: u64,
}

impl Counters {
    fn add(&mut self, o: &Counters) {
        for (a, b) in self.instructions.iter_mut().zip(o.instructions) {
            *a += b;
        }
        self.lanes += o.lanes;
        self.tensor_flops += o.tensor_flops;
        self.global_requests += o.global_requests;
        self.global_sectors += o.global_sectors;
        self.shared_wavefronts += o.shared_wavefronts;
        self.bank_conflicts += o.bank_conflicts;
        self.barriers += o.barriers;
    }
}

/// Shape of a launch and its limits.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads.
    pub block: [u32; 3],
    /// Dynamic shared bytes.
    pub dynamic_shared: usize,
    /// Host threads.
    pub threads: usize,
    /// Warp instructions of the whole launch before the watchdog stops it.
    pub budget: u64,
}

/// Memory and counters of the CTA that a host thread runs.
pub struct Cta<'a> {
    /// Device memory.
    pub memory: &'a Memory,
    /// Kernel parameters.
    pub params: &'a [u8],
    /// Shared memory and which bytes were written.
    pub shared: Vec<u8>,
    /// One where written.
    pub shared_written: Vec<u8>,
    /// Local memory of all threads.
    pub local: Vec<u8>,
    /// One where written.
    pub local_written: Vec<u8>,
    /// Local bytes of a thread.
    pub local_size: usize,
    /// Start, length and index of the allocation used last.
    pub last_block: (u64, u64, usize),
    /// Counters of this host thread.
    pub counters: Counters,
}

impl Cta<'_> {
    /// Counts sectors or bank passes of one warp access.
    pub fn count_access(&mut self, space: Space, at: &[u64; LANES], bytes: usize, mask: u32) {
        match space {
            Space::Global => {
                let (mut n, mut last, mut sorted) = (0, u64::MAX, true);
                for l in lanes(mask) {
                    let (first, end) = (at[l] >> 5, (at[l] + bytes as u64 - 1) >> 5);
                    sorted &= last == u64::MAX || first >= last;
                    n += end - first + u64::from(last != first);
                    last = end;
                }
                if !sorted {
                    let mut all: Vec<u64> = lanes(mask)
                        .flat_map(|l| at[l] >> 5..=(at[l] + bytes as u64 - 1) >> 5)
                        .collect();
                    all.sort_unstable();
                    all.dedup();
                    n = all.len() as u64;
                }
                self.counters.global_requests += 1;
                self.counters.global_sectors += n;
            }
            Space::Shared => {
                // Wide accesses are served in groups of lanes that move 128 bytes.
                let group = 128 / bytes.clamp(4, 128);
                for first in (0..LANES).step_by(group) {
                    let part = mask & ((((1u64 << group) - 1) << first) as u32);
                    if part == 0 {
                        continue;
                    }
                    let passes = passes(at, bytes, part);
                    self.counters.shared_wavefronts += passes;
                    self.counters.bank_conflicts += passes - 1;
                }
            }
            _ => {}
        }
    }
}

/// Largest number of different words that lanes want from one bank.
fn passes(at: &[u64; LANES], bytes: usize, mask: u32) -> u64 {
    let touched = |l: usize| at[l] >> 2..(at[l] + bytes as u64).div_ceil(4);
    let (mut seen, mut clash) = ([u64::MAX; 32], false);
    for w in lanes(mask).flat_map(touched) {
        let s = &mut seen[w as usize & 31];
        clash |= *s != u64::MAX && *s != w;
        *s = w;
    }
    if !clash {
        return 1;
    }
    let mut words: Vec<u64> = lanes(mask).flat_map(touched).collect();
    words.sort_unstable();
    words.dedup();
    let mut count = [0; 32];
    for w in words {
        count[w as usize & 31] += 1;
    }
    count.into_iter().max().unwrap_or(1)
}

/// Runs a kernel; `params` is the parameter block.
pub fn launch(p: &Program, memory: &Memory, params: &[u8], shape: &Shape) -> Result<Counters> {
    let blocks = shape.grid.iter().map(|x| *x as usize).product::<usize>();
    let (next, spent) = (AtomicUsize::new(0), AtomicU64::new(0));
    let result: Mutex<(Counters, Option<(usize, Fault)>)> = Mutex::default();
    let work = || {
        let mut run = Run::new(p, memory, params, shape);
        loop {
            let n = next.fetch_add(1, Relaxed);
            if n >= blocks {
                break;
            }
            if let Err(fault) = run.block(n, &spent) {
                // Later blocks are not started; the earliest fault is the one reported.
                next.store(blocks, Relaxed);
                let mut r = result.lock().unwrap_or_else(|e| e.into_inner());
                if r.1.as_ref().is_none_or(|(m, _)| n < *m) {
                    r.1 = Some((n, fault));
                }
                break;
            }
        }
        result
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .0
            .add(&run.cta.counters);
    };
    let threads = shape.threads.clamp(1, blocks.max(1));
    std::thread::scope(|s| {
        for _ in 1..threads {
            s.spawn(work);
        }
        work();
    });
    let (counters, fault) = result.into_inner().unwrap_or_else(|e| e.into_inner());
    match fault {
        Some((_, f)) => Err(Error::Fault(Box::new(f))),
        None => Ok(counters),
    }
}

struct Run<'a> {
    p: &'a Program,
    shape: &'a Shape,
    cta: Cta<'a>,
    warps: Vec<Warp>,
}

impl<'a> Run<'a> {
    fn new(p: &'a Program, memory: &'a Memory, params: &'a [u8], shape: &'a Shape) -> Run<'a> {
        let threads = shape.block.iter().product::<u32>() as usize;
        let warps = threads.div_ceil(LANES);
        let shared = p.dynamic_offset + shape.dynamic_shared;
        let cta = Cta {
            memory,
            params,
            shared: vec![0; shared],
            shared_written: vec![0; shared],
            local: vec![0; warps * LANES * p.local_size],
            local_written: vec![0; warps * LANES * p.local_size],
            local_size: p.local_size,
            last_block: (0, 0, 0),
            counters: Counters::default(),
        };
        Run {
            p,
            shape,
            cta,
            warps: (0..warps).map(|_| Warp::default()).collect(),
        }
    }

    fn fault(&self, block: [u32; 3], warp: usize, (pc, (lane, kind, message)): At) -> Fault {
        let at = self.p.source.get(pc).or(self.p.source.last());
        Fault {
            kind,
            message,
            kernel: self.p.name.clone(),
            line: at.map_or(0, |s| s.line),
            source_line: at.and_then(|s| s.source_line),
            text: at.map_or(String::new(), |s| s.text.clone()),
            block,
            thread: (warp * LANES + lane) as u32,
        }
    }

    fn start(&mut self, block: [u32; 3]) {
        let threads = self.shape.block.iter().product::<u32>() as usize;
        self.cta.shared.fill(FILL);
        self.cta.shared_written.fill(0);
        self.cta.local.fill(FILL);
        self.cta.local_written.fill(0);
        let [bx, by, _] = self.shape.block;
        for (index, warp) in self.warps.iter_mut().enumerate() {
            let r = &mut warp.regs;
            r.w.resize(self.p.rows[0], [0; LANES]);
            r.q.resize(self.p.rows[1], [0; LANES]);
            r.p.resize(self.p.rows[2], 0);
            for (row, init) in &self.p.init {
                let thread = |l: usize| (index * LANES + l) as u32;
                let each = |f: &dyn Fn(usize) -> u32| -> [u32; LANES] { std::array::from_fn(f) };
                let v = match init {
                    RowInit::Word(x) => [*x; LANES],
                    RowInit::Long(x) => {
                        r.q[*row as usize] = [*x; LANES];
                        continue;
                    }
                    RowInit::Pred(x) => {
                        r.p[*row as usize] = if *x { !0 } else { 0 };
                        continue;
                    }
                    RowInit::Tid(0) => each(&|l| thread(l) % bx),
                    RowInit::Tid(1) => each(&|l| thread(l) / bx % by),
                    RowInit::Tid(_) => each(&|l| thread(l) / (bx * by)),
                    RowInit::Block(d) => [block[*d]; LANES],
                    RowInit::BlockDim(d) => [self.shape.block[*d]; LANES],
                    RowInit::GridDim(d) => [self.shape.grid[*d]; LANES],
                    RowInit::LaneId => each(&|l| l as u32),
                    RowInit::WarpId => [index as u32; LANES],
                    RowInit::Warps => [threads.div_ceil(LANES) as u32; LANES],
                    RowInit::LaneMask(0) => each(&|l| 1 << l),
                    RowInit::LaneMask(1) => each(&|l| ((2u64 << l) - 1) as u32),
                    RowInit::LaneMask(2) => each(&|l| (1 << l) - 1),
                    RowInit::LaneMask(3) => each(&|l| !((1 << l) - 1)),
                    RowInit::LaneMask(_) => each(&|l| !(((2u64 << l) - 1) as u32)),
                    RowInit::DynamicShared => [self.shape.dynamic_shared as u32; LANES],
                };
                r.w[*row as usize] = v;
            }
            let here = (threads - index * LANES).min(LANES);
            warp.start(if here == LANES { u32::MAX } else { (1 << here) - 1 });
        }
    }

    fn block(&mut self, n: usize, spent: &AtomicU64) -> std::result::Result<(), Fault> {
        let [gx, gy, _] = self.shape.grid.map(|x| x as usize);
        let block = [(n % gx) as u32, (n / gx % gy) as u32, (n / (gx * gy)) as u32];
        self.start(block);
        let mut done = vec![false; self.warps.len()];
        loop {
            let mut moved = false;
            for (index, done) in done.iter_mut().enumerate() {
                if *done || self.warps[index].waiting.is_some() {
                    continue;
                }
                moved = true;
                let before: u64 = self.cta.counters.instructions.iter().sum();
                let stop = self.warps[index].run(self.p, &mut self.cta, index, SLICE);
                let stop = stop.map_err(|e| self.fault(block, index, e))?;
                *done = stop == Stop::Done;
                let now: u64 = self.cta.counters.instructions.iter().sum();
                if spent.fetch_add(now - before, Relaxed) > self.shape.budget {
                    let (w, text) = (
                        &self.warps[index],
                        format!("more than {} warp instructions", self.shape.budget),
                    );
                    let e: LaneFault = (w.first_lane(), FaultKind::Watchdog, text);
                    return Err(self.fault(block, index, (w.pc(), e)));
                }
            }
            if done.iter().all(|d| *d) {
                return Ok(());
            }
            if !self.release(&done) && !moved {
                let index = (0..self.warps.len()).find(|i| !done[*i]).unwrap_or(0);
                let w = &self.warps[index];
                let e = (
                    w.first_lane(),
                    FaultKind::Deadlock,
                    "every warp waits at a barrier".to_string(),
                );
                return Err(self.fault(block, index, (w.pc().saturating_sub(1), e)));
            }
        }
    }

    /// Lets warps through the barriers that are complete.
    fn release(&mut self, done: &[bool]) -> bool {
        let mut any = false;
        for id in 0..16 {
            let here: Vec<usize> = (0..self.warps.len())
                .filter(|i| self.warps[*i].waiting.is_some_and(|w| w.id == id))
                .collect();
            let Some(first) = here.first().and_then(|i| self.warps[*i].waiting) else {
                continue;
            };
            let full = done.iter().filter(|d| !**d).count() * LANES;
            let wanted = first.threads.map_or(full, |t| (t as usize).next_multiple_of(LANES));
            if here.len() * LANES < wanted {
                continue;
            }
            let mine = |w: &Warp| {
                w.waiting
                    .and_then(|x| x.reduce)
                    .map_or((0, 0), |(_, _, p)| (p.count_ones(), w.live.count_ones()))
            };
            let (yes, of) = here
                .iter()
                .map(|i| mine(&self.warps[*i]))
                .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
            for i in here {
                let w = &mut self.warps[i];
                if let Some((kind, d, _)) = w.waiting.take().and_then(|x| x.reduce) {
                    let bits = |b: bool| if b { !0 } else { 0 };
                    match kind {
                        Reduce::Count => u32::put(&mut w.regs, d, [yes; LANES], w.live),
                        Reduce::And => super::alu::write_pred(&mut w.regs, d, bits(yes == of), w.live),
                        Reduce::Or => super::alu::write_pred(&mut w.regs, d, bits(yes > 0), w.live),
                    }
                }
            }
            any = true;
        }
        any
    }
}
