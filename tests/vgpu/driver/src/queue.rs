//! Queued operations as a graph: what each one waits for, which are ready, and which to run next.
//!
//! An operation waits for operations only, never for a stream: the order of a stream, events and the rules of the legacy
//! stream all become edges when it is queued. So every order that this module draws is one that a device may choose.

use std::collections::{BTreeMap, BTreeSet};

use crate::ffi::Handle;
use crate::op::Op;

/// Number of an operation, in the order of queueing over all streams.
pub type OpId = u64;

/// An operation that has not ended.
pub struct Pending {
    /// What to do.
    pub op: Op,
    /// The stream it was queued on.
    pub stream: Handle,
    /// The context whose errors it shares.
    pub context: Handle,
    /// Operations that must end first and have not.
    unmet: usize,
    /// Operations that wait for this one.
    dependents: Vec<OpId>,
    /// Operations this one waited for when it was queued.
    deps: Vec<OpId>,
    /// Some thread executes it now.
    pub running: bool,
}

/// What is done about operations that nobody waits for while something else is forced. One seed in three has each habit, so that
/// both kinds of missing order show: work that was taken to be done, and work that was taken to be still to come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Habit {
    /// They wait.
    Late,
    /// They run first.
    Early,
    /// Now this, now that.
    Mixed,
}

/// Every operation that has not ended.
pub struct Queue {
    pending: BTreeMap<OpId, Pending>,
    ready: BTreeSet<OpId>,
    next: OpId,
    habit: Habit,
    random: u64,
}

impl Queue {
    /// An empty queue that draws from `seed`.
    pub fn new(seed: u64) -> Queue {
        Queue {
            pending: BTreeMap::new(),
            ready: BTreeSet::new(),
            next: 0,
            habit: [Habit::Late, Habit::Early, Habit::Mixed][(seed % 3) as usize],
            random: seed,
        }
    }

    /// Whether something that nobody waits for goes before what is forced.
    pub fn digress(&mut self) -> bool {
        match self.habit {
            Habit::Late => false,
            Habit::Early => true,
            Habit::Mixed => self.draw(4) == 0,
        }
    }

    /// Queues an operation behind `deps`.
    pub fn push(&mut self, op: Op, stream: Handle, context: Handle, deps: impl IntoIterator<Item = OpId>) -> OpId {
        self.next += 1;
        let id = self.next;
        let mut open: Vec<OpId> = deps.into_iter().filter(|d| self.pending.contains_key(d)).collect();
        open.sort_unstable();
        open.dedup();
        for d in &open {
            if let Some(p) = self.pending.get_mut(d) {
                p.dependents.push(id);
            }
        }
        if open.is_empty() {
            self.ready.insert(id);
        }
        let pending =
            Pending { op, stream, context, unmet: open.len(), dependents: Vec::new(), deps: open, running: false };
        self.pending.insert(id, pending);
        id
    }

    /// Whether an operation has ended.
    pub fn done(&self, id: OpId) -> bool {
        !self.pending.contains_key(&id)
    }

    /// An operation that has not ended.
    pub fn get(&self, id: OpId) -> Option<&Pending> {
        self.pending.get(&id)
    }

    /// Every operation that has not ended.
    pub fn iter(&self) -> impl Iterator<Item = (OpId, &Pending)> {
        self.pending.iter().map(|(id, p)| (*id, p))
    }

    /// The operations of `targets` that have not ended, and all that must end before them.
    pub fn closure(&self, targets: &[OpId]) -> BTreeSet<OpId> {
        let (mut found, mut open) = (BTreeSet::new(), targets.to_vec());
        while let Some(id) = open.pop() {
            if let Some(p) = self.pending.get(&id)
                && found.insert(id)
            {
                open.extend(&p.deps);
            }
        }
        found
    }

    /// Operations that wait for nothing and that no thread runs.
    pub fn ready(&self) -> &BTreeSet<OpId> {
        &self.ready
    }

    /// Takes a ready operation to run it.
    pub fn begin(&mut self, id: OpId) -> Option<(Op, Handle)> {
        self.ready.remove(&id).then_some(())?;
        let p = self.pending.get_mut(&id)?;
        p.running = true;
        Some((p.op.clone(), p.context))
    }

    /// Gives an operation back that could not end yet.
    pub fn put_back(&mut self, id: OpId) {
        if let Some(p) = self.pending.get_mut(&id) {
            p.running = false;
            self.ready.insert(id);
        }
    }

    /// An operation has ended: those that waited for it alone become ready. Gives it back to be dropped without a lock.
    pub fn finish(&mut self, id: OpId) -> Option<Op> {
        self.ready.remove(&id);
        let done = self.pending.remove(&id)?;
        for d in done.dependents {
            if let Some(p) = self.pending.get_mut(&d) {
                p.unmet -= 1;
                if p.unmet == 0 {
                    self.ready.insert(d);
                }
            }
        }
        Some(done.op)
    }

    /// A number below `n`, drawn from the seed.
    pub fn draw(&mut self, n: usize) -> usize {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }
}
