//! A launch: its shape and limits, the CTAs on each host thread, and who takes which.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use super::barrier::Barriers;
use super::counters::Counters;
use super::decode::Program;
use super::races::Races;
use super::region::Region;
use super::schedule::Host;
use super::site::Site;
use super::tensor::Widened;
use crate::error::{Error, Fault, Result};
use crate::memory::Memory;
use crate::output::Output;

/// Shape of a launch and its limits.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads.
    pub block: [u32; 3],
    /// Blocks of a cluster.
    pub cluster: [u32; 3],
    /// Dynamic shared bytes.
    pub dynamic_shared: usize,
    /// Host threads.
    pub threads: usize,
    /// Warp instructions of the whole launch before the watchdog stops it.
    pub budget: u64,
    /// Whether all blocks run at the same time.
    pub cooperative: bool,
    /// Most blocks that are resident at the same time.
    pub resident: Option<usize>,
    /// How matrix products round.
    pub products: super::rounding::Products,
    /// Whether races are looked for.
    pub races: bool,
    /// Order of blocks and warps; `None` is first to last.
    pub seed: Option<u64>,
}

impl Shape {
    /// Blocks of the grid.
    pub fn blocks(&self) -> usize {
        self.grid.iter().map(|x| *x as usize).product()
    }

    /// Blocks of a cluster.
    pub fn cluster_size(&self) -> usize {
        self.cluster.iter().map(|x| *x as usize).product()
    }

    /// The blocks of the `n`-th cluster, in the order of their ranks.
    pub fn cluster_blocks(&self, n: usize) -> Vec<[u32; 3]> {
        let clusters: [u32; 3] = std::array::from_fn(|d| self.grid[d] / self.cluster[d]);
        let (cx, cy) = (clusters[0] as usize, clusters[1] as usize);
        let first = [n % cx, n / cx % cy, n / (cx * cy)];
        let [w, h, _] = self.cluster.map(|x| x as usize);
        (0..self.cluster_size())
            .map(|rank| {
                let inside = [rank % w, rank / w % h, rank / (w * h)];
                std::array::from_fn(|d| first[d] as u32 * self.cluster[d] + inside[d] as u32)
            })
            .collect()
    }

    /// Threads of a block.
    pub fn block_threads(&self) -> usize {
        self.block.iter().map(|x| *x as usize).product()
    }
}

/// A CTA on a host thread: what belongs to it alone.
pub struct Resident {
    /// Block index.
    pub index: [u32; 3],
    /// Rank in its cluster; the CTA of rank 0 stands this many places before it.
    pub cluster_rank: usize,
    /// Shared memory, from address 0 on.
    pub shared: Region,
    /// Local memory of all threads, one after the other.
    pub local: Region,
    /// Barriers.
    pub barriers: Barriers,
    /// Warps that have not returned.
    pub live: usize,
    /// Asynchronous copies to shared memory that nobody has waited for.
    pub copies_in_flight: usize,
    /// What is asynchronous in the sm_90a set.
    pub hopper: super::hopper::state::State,
}

/// What a warp reaches while it runs: the device, the CTAs on this host thread, and the counters of the thread.
pub struct Cta<'a> {
    /// Device memory.
    pub memory: &'a Memory,
    /// Kernel parameters, from address 0 on.
    pub params: &'a Region,
    /// Shape of the launch.
    pub shape: &'a Shape,
    /// Where the kernel prints.
    pub output: &'a Output,
    /// CTAs on this host thread.
    pub resident: Vec<Resident>,
    /// Which of them the running warp belongs to.
    pub at: usize,
    /// Local bytes of a thread.
    pub local_size: usize,
    /// What each memory instruction remembers.
    pub sites: Vec<Site>,
    /// Counters of this host thread, without instructions and lanes.
    pub counters: Counters,
    /// Stretches of instructions that ran: `runs[pc]` grows by one and the active lanes where a stretch begins and
    /// shrinks by as much where it ends, so that the sum up to an instruction is how often it ran and in how many lanes.
    pub runs: Vec<[u64; 2]>,
    /// Bytes of the CTAs' memories that hold a value which nobody wrote, by region and offset: the load that brought it.
    pub carried: std::collections::HashMap<(usize, u64), super::marks::Origin>,
    /// Lanes that a guard left out.
    pub guarded: u64,
    /// Warp instructions so far.
    pub issued: u64,
    /// Stores, and atomics that changed something, so far.
    pub changes: u64,
    /// The A of the last product, and its slot, warp and instruction.
    pub widened: Box<(Widened, [usize; 3])>,
    /// The running instruction.
    pub pc: usize,
    /// Race detection, when it is on.
    pub races: Option<Races>,
    /// The kernel.
    pub program: &'a Program,
    /// What the sm_90a set keeps for all CTAs of the thread.
    pub hopper: super::hopper::state::Shared,
}

impl Cta<'_> {
    /// The CTA of the running warp.
    #[inline(always)]
    pub fn own(&mut self) -> &mut Resident {
        &mut self.resident[self.at]
    }

    /// Counts the instructions from `from` up to before `to` as run once by the lanes of `mask`.
    #[inline(always)]
    pub(super) fn count_run(&mut self, from: usize, to: usize, mask: u32) {
        let lanes = u64::from(mask.count_ones());
        let [times, sum] = &mut self.runs[from];
        (*times, *sum) = (times.wrapping_add(1), sum.wrapping_add(lanes));
        let [times, sum] = &mut self.runs[to];
        (*times, *sum) = (times.wrapping_sub(1), sum.wrapping_sub(lanes));
        self.issued += (to - from) as u64;
    }

    /// The counters of this host thread with instructions and lanes.
    fn finish(&self, p: &Program) -> Counters {
        let mut c = self.counters.clone();
        let (mut times, mut lanes) = (0u64, 0u64);
        for (i, run) in p.code.iter().zip(&self.runs) {
            times = times.wrapping_add(run[0]);
            lanes = lanes.wrapping_add(run[1]);
            c.instructions[i.class as usize] += times;
            c.lanes += lanes;
        }
        // A warp that stopped at a fault has not counted its last stretch, but the lanes its guards left out.
        c.lanes = c.lanes.saturating_sub(self.guarded);
        c
    }
}

/// Work for the host threads: clusters of CTAs, in the order of the launch.
pub struct Queue {
    order: Option<Vec<u32>>,
    next: AtomicUsize,
    total: usize,
}

impl Queue {
    fn new(shape: &Shape) -> Queue {
        let total = shape.blocks() / shape.cluster_size();
        let order = shape.seed.map(|seed| {
            let (mut list, mut random) = ((0..total as u32).collect::<Vec<_>>(), Random(seed));
            for i in (1..total).rev() {
                list.swap(i, random.below(i + 1));
            }
            list
        });
        Queue { order, next: AtomicUsize::new(0), total }
    }

    /// The next cluster: its place in the order and its number.
    pub fn take(&self) -> Option<(usize, usize)> {
        let n = self.next.fetch_add(1, Relaxed);
        (n < self.total).then(|| (n, self.order.as_ref().map_or(n, |o| o[n] as usize)))
    }

    /// Clusters that nobody has taken.
    pub fn left(&self) -> usize {
        self.total.saturating_sub(self.next.load(Relaxed))
    }

    /// Clusters of the launch.
    pub fn total(&self) -> usize {
        self.total
    }

    fn stop(&self) {
        self.next.store(self.total, Relaxed);
    }
}

/// Numbers from a seed (splitmix64).
pub struct Random(pub u64);

impl Random {
    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) % n.max(1) as u64) as usize
    }
}

/// Runs a kernel; `params` is the parameter block.
pub fn launch(p: &Program, memory: &Memory, params: &Region, shape: &Shape, output: &Output) -> Result<Counters> {
    let (queue, spent) = (Queue::new(shape), AtomicU64::new(0));
    // Race detection sees every access in one order: it needs one host thread. So does counting the resident blocks.
    let threads = if shape.races || shape.resident.is_some() && !shape.cooperative {
        1
    } else {
        shape.threads.clamp(1, queue.total.max(1))
    };
    let result: Mutex<(Counters, Option<(usize, Fault)>)> = Mutex::default();
    let work = |index: usize| {
        let mut host = Host::new(p, memory, params, shape, output);
        let fault = host.run(&queue, &spent, index, threads).err();
        if fault.is_some() {
            // Later blocks are not started; the earliest fault is the one reported.
            queue.stop();
        }
        let counters = host.cta.finish(p);
        host.retire();
        let mut r = result.lock().unwrap_or_else(|e| e.into_inner());
        r.0.add(&counters);
        if let Some((n, fault)) = fault
            && r.1.as_ref().is_none_or(|(m, _)| n < *m)
        {
            r.1 = Some((n, fault));
        }
    };
    std::thread::scope(|s| {
        for index in 1..threads {
            let work = &work;
            s.spawn(move || work(index));
        }
        work(0);
    });
    let (counters, fault) = result.into_inner().unwrap_or_else(|e| e.into_inner());
    match fault {
        Some((_, f)) => Err(Error::Fault(Box::new(f))),
        None => Ok(counters),
    }
}
