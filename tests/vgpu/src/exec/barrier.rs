//! The sixteen barriers of a CTA: `bar.sync`, `bar.red` and `bar.arrive`, with or without a thread count.

use super::LANES;

/// What `bar.red` computes over the threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Number of true predicates.
    Count,
    /// Whether all are true.
    And,
    /// Whether any is true.
    Or,
}

/// A warp that arrives at a barrier.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// Barrier number.
    pub id: u32,
    /// Threads that take part; `None` for all of the CTA.
    pub threads: Option<u32>,
    /// Reduction and its destination row, own true predicates and own threads.
    pub reduce: Option<(Reduce, u16, u32, u32)>,
}

/// One barrier in its present phase.
#[derive(Clone, Copy, Debug, Default)]
pub struct Barrier {
    /// Threads that have arrived, by whole warps.
    pub arrived: u32,
    /// Warps that wait, as bits.
    pub waiting: u32,
    /// Warps that have arrived, as bits.
    pub warps: u32,
    threads: Option<u32>,
    yes: u32,
    of: u32,
}

/// The barriers of a CTA.
#[derive(Clone, Debug, Default)]
pub struct Barriers([Barrier; 16]);

/// A completed phase: the warps that waited, and true predicates and threads of a reduction.
#[derive(Clone, Copy, Debug)]
pub struct Release {
    /// Warps to let go, as bits.
    pub warps: u32,
    /// Warps that took part, as bits.
    pub all: u32,
    /// True predicates.
    pub yes: u32,
    /// Threads that gave one.
    pub of: u32,
}

impl Barriers {
    /// Counts a warp in; `waits` says whether it stops here. The error says how it contradicts the others.
    pub fn arrive(&mut self, warp: usize, a: &Arrival, waits: bool) -> Result<(), String> {
        let Some(b) = self.0.get_mut(a.id as usize) else {
            return Err(format!("barrier {} of 0 to 15", a.id));
        };
        if let Some(n) = a.threads
            && (n == 0 || !(n as usize).is_multiple_of(LANES))
        {
            return Err(format!("barrier {} for {n} threads, not a multiple of {LANES}", a.id));
        }
        if b.arrived > 0 && b.threads != a.threads {
            let say = |t: Option<u32>| t.map_or("all threads".to_string(), |n| format!("{n} threads"));
            let (mine, theirs) = (say(a.threads), say(b.threads));
            return Err(format!("barrier {} for {mine}, which others reached for {theirs}", a.id));
        }
        b.threads = a.threads;
        b.arrived += LANES as u32;
        b.warps |= 1 << warp;
        if waits {
            b.waiting |= 1 << warp;
        }
        if let Some((_, _, yes, of)) = a.reduce {
            (b.yes, b.of) = (b.yes + yes, b.of + of);
        }
        match b.threads {
            Some(n) if b.arrived > n => Err(format!("barrier {}: {} threads for {n}", a.id, b.arrived)),
            _ => Ok(()),
        }
    }

    /// Ends the phase of barrier `id` if all of its threads are here; `live` warps of the CTA have not returned.
    pub fn complete(&mut self, id: u32, live: usize) -> Option<Release> {
        let b = self.0.get_mut(id as usize)?;
        let wanted = b.threads.unwrap_or((live * LANES) as u32);
        if b.arrived == 0 || b.arrived < wanted {
            return None;
        }
        let done = std::mem::take(b);
        Some(Release { warps: done.waiting, all: done.warps, yes: done.yes, of: done.of })
    }

    /// What a barrier waits for, for messages.
    pub fn describe(&self, id: u32, live: usize) -> String {
        let b = self.0.get(id as usize).copied().unwrap_or_default();
        let wanted = b.threads.unwrap_or((live * LANES) as u32);
        format!("barrier {id} ({} of {wanted} threads arrived)", b.arrived)
    }
}
