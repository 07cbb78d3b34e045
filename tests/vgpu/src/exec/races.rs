//! Race detection, on demand: which accesses nothing orders, in shared memory between the warps of a CTA and in global
//! memory between the CTAs of a launch.
//!
//! Every agent (a warp, or a CTA) has a vector clock. Barriers, and atomics or strong accesses to one address, hand clocks
//! on from those that release to those that acquire. An access is ordered before a later one by another agent if that
//! agent's clock has reached the time of the access; two accesses of one byte of which at least one writes, and not both
//! are atomic or strong, have to be ordered. After Flanagan and Freund, "FastTrack" (2009), with accesses kept by bytes.
//!
//! An atomic or strong access releases what came before a fence in its CTA, or what its own `.release` covers, and always
//! acquires. Instructions of the sm_90a set count as release and acquire of one object of the host thread, so that races
//! around them may be missed but never made up. Threads of one warp are not compared.

use std::collections::HashMap;

use super::launch::Cta;
use super::mem::{LaneFault, Space};
use crate::error::FaultKind;

/// Bits of [`super::Inst::order`]: an atomic or an access that other threads may watch.
pub const STRONG: u8 = 1;
/// It releases by itself.
pub const RELEASE: u8 = 2;
/// A fence.
pub const FENCE: u8 = 4;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Reads and writes at once.
    Atomic,
}

#[derive(Clone, Copy, Debug)]
struct Access {
    agent: u32,
    time: u32,
    pc: u32,
    block: u32,
    thread: u32,
    bytes: u8,
    kind: Kind,
    strong: bool,
}

/// Four bytes and the accesses of them that later ones may race with.
#[derive(Clone, Debug, Default)]
struct Word {
    reads: Vec<Access>,
    writes: Vec<Access>,
}

type Clock = HashMap<u32, u32>;

fn join(into: &mut Clock, from: &Clock) {
    for (agent, time) in from {
        let t = into.entry(*agent).or_default();
        *t = (*t).max(*time);
    }
}

/// Words to a page of the shadow.
const PAGE: u64 = 256;

/// Agents of one kind and the memory they share.
#[derive(Debug, Default)]
struct Domain {
    clocks: HashMap<u32, Clock>,
    objects: HashMap<u64, Clock>,
    pages: HashMap<(usize, u64), Vec<Word>>,
}

impl Domain {
    fn clock(&mut self, agent: u32) -> &mut Clock {
        // An agent's own time starts at one: nobody has reached it before the first release.
        self.clocks.entry(agent).or_insert_with(|| Clock::from([(agent, 1)]))
    }

    fn release(&mut self, agent: u32, object: u64) {
        let clock = self.clock(agent).clone();
        join(self.objects.entry(object).or_default(), &clock);
        *self.clock(agent).entry(agent).or_default() += 1;
    }

    fn acquire(&mut self, agent: u32, object: u64) {
        if let Some(o) = self.objects.get(&object) {
            let clock = self.clocks.entry(agent).or_insert_with(|| Clock::from([(agent, 1)]));
            let own = clock.get(&agent).copied();
            join(clock, o);
            // Its own time is its own: what it released before is in the past anyway.
            clock.extend(own.map(|t| (agent, t)));
        }
    }

    /// Adds an access to `len` bytes; gives an earlier one that nothing orders before it.
    fn access(&mut self, memory: usize, at: u64, len: u64, mut a: Access) -> Option<Access> {
        a.time = self.clock(a.agent).get(&a.agent).copied().unwrap_or(1);
        let clock = self.clocks.get(&a.agent)?;
        let before = |o: &Access| o.agent == a.agent || clock.get(&o.agent).is_some_and(|t| o.time <= *t);
        for word in at / 4..=(at + len - 1) / 4 {
            let first = at.max(word * 4) - word * 4;
            let end = (at + len).min(word * 4 + 4) - word * 4;
            a.bytes = ((1u8 << end) - 1) & !((1u8 << first) - 1);
            let page = self.pages.entry((memory, word / PAGE));
            let w = &mut page.or_insert_with(|| vec![Word::default(); PAGE as usize])[(word % PAGE) as usize];
            let apart = |o: &&Access| o.bytes & a.bytes != 0 && !(o.strong && a.strong) && !before(o);
            let other = w.writes.iter().find(apart);
            let other = other.or_else(|| if a.kind == Kind::Read { None } else { w.reads.iter().find(apart) });
            if let Some(other) = other {
                return Some(*other);
            }
            // What the new access covers and comes after cannot race with anything that does not race with the new one;
            // strong accesses may not cover weak ones, as they are let through where those are not.
            let covered = |o: &Access| o.bytes & !a.bytes == 0 && before(o) && (o.strong || !a.strong);
            w.reads.retain(|o| !covered(o));
            if a.kind == Kind::Read {
                w.reads.push(a);
            } else {
                w.writes.retain(|o| !covered(o));
                w.writes.push(a);
            }
        }
        None
    }
}

/// The state of race detection on a host thread.
#[derive(Debug, Default)]
pub struct Races {
    warps: Domain,
    blocks: Domain,
    /// Blocks in which a fence has been executed.
    fenced: HashMap<u32, bool>,
}

const BARRIER: u64 = 1 << 60;
const ADDRESS: u64 = 2 << 60;
const HOPPER: u64 = 3 << 60;

fn warp_agent(slot: usize, warp: usize) -> u32 {
    (slot * 32 + warp) as u32
}

impl Races {
    /// A CTA starts in `slot`: nothing in its shared memory has been touched.
    pub fn start(&mut self, slot: usize) {
        let mine = |agent: u32| agent as usize / 32 == slot;
        self.warps.pages.retain(|(memory, _), _| *memory != slot);
        self.warps.clocks.retain(|agent, _| !mine(*agent));
        for clock in self.warps.clocks.values_mut().chain(self.warps.objects.values_mut()) {
            clock.retain(|agent, _| !mine(*agent));
        }
        self.warps.objects.retain(|key, _| key & (15 << 60) == HOPPER || (key >> 32 & 0xff_ffff) as usize != slot);
    }

    /// A warp arrives at a CTA barrier.
    pub fn arrive(&mut self, slot: usize, id: u32, warp: usize) {
        self.warps.release(warp_agent(slot, warp), BARRIER | (slot as u64) << 32 | u64::from(id));
    }

    /// A CTA barrier lets warps go.
    pub fn depart(&mut self, slot: usize, id: u32, warps: u32) {
        let key = BARRIER | (slot as u64) << 32 | u64::from(id);
        for warp in super::mem::lanes(warps) {
            self.warps.acquire(warp_agent(slot, warp), key);
        }
        self.warps.objects.remove(&key);
    }
}

impl Cta<'_> {
    /// The linear number of the running block.
    fn block_number(&self) -> u32 {
        let ([x, y, z], [gx, gy, _]) = (self.resident[self.at].index, self.shape.grid);
        x + gx * (y + gy * z)
    }

    /// A fence, for race detection and for barrier objects.
    pub(super) fn fence(&mut self, warp: usize) {
        self.fence_objects(warp);
        let block = self.block_number();
        if let Some(r) = &mut self.races {
            r.fenced.insert(block, true);
        }
    }

    /// An instruction of the sm_90a set, for race detection.
    pub(super) fn meeting(&mut self, warp: usize) {
        let (agent, block) = (warp_agent(self.at, warp), self.block_number());
        if let Some(r) = &mut self.races {
            r.warps.release(agent, HOPPER);
            r.warps.acquire(agent, HOPPER);
            r.blocks.release(block, HOPPER);
            r.blocks.acquire(block, HOPPER);
        }
    }

    /// Tells race detection, if it is on, of an access: `at` is an offset in shared memory of the CTA in `slot`, or an
    /// address in global memory; `order` is the instruction's.
    pub(super) fn record(
        &mut self,
        (warp, lane): (usize, usize),
        space: Space,
        slot: usize,
        (at, bytes): (u64, u64),
        kind: Kind,
        order: u8,
    ) -> Result<(), LaneFault> {
        if self.races.is_none() || !matches!(space, Space::Global | Space::Shared) {
            return Ok(());
        }
        let (block, pc, own) = (self.block_number(), self.pc, self.at);
        let Some(r) = &mut self.races else { return Ok(()) };
        let strong = order & STRONG != 0;
        let releases = strong && kind != Kind::Read && (order & RELEASE != 0 || r.fenced.contains_key(&block));
        let (domain, agent, memory) = match space {
            Space::Shared => (&mut r.warps, warp_agent(own, warp), slot),
            _ => (&mut r.blocks, block, usize::MAX),
        };
        // A strong access of shared memory orders its warp whether or not there was a fence: the CTA's own memory is
        // in order here, and a kernel that relies on it is at worst not reported.
        let object = ADDRESS | if space == Space::Shared { (slot as u64) << 32 | at } else { at };
        if strong && kind != Kind::Write {
            domain.acquire(agent, object);
        }
        let thread = (warp * super::LANES + lane) as u32;
        let access = Access { agent, time: 0, pc: pc as u32, block, thread, bytes: 0, kind, strong };
        let other = domain.access(memory, at, bytes, access);
        if strong && kind != Kind::Read && (releases || space == Space::Shared) {
            domain.release(agent, object);
        }
        let Some(o) = other else { return Ok(()) };
        let said = |k: Kind| match k {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Atomic => "atomic",
        };
        let source = self.program.source.get(o.pc as usize);
        let line = source.map_or(String::new(), |s| format!("PTX line {}: `{}`", s.line, s.text));
        let cuda = source.and_then(|s| s.source_line).map_or(String::new(), |l| format!(" (CUDA line {l})"));
        let m = format!(
            "{} of {bytes} bytes at {at:#x} of {space:?} memory; nothing orders it after the {} by thread {} of block {}, {line}{cuda}",
            said(kind),
            said(o.kind),
            o.thread,
            o.block
        );
        Err((lane, FaultKind::Race, m))
    }
}
