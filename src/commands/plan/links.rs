//! What collectives take on a ring or a tree of GPUs, after NCCL's own model of them.
//!
//! A ring moves 2(w-1)/w of the bytes over every rank's link in an all-reduce, half of it in a reduce-scatter or an all-gather (Patarasuk and
//! Yuan, J. Parallel Distrib. Comput. 69, 2009). Latencies are the table of NCCL's `src/graph/tuning.cc`.

/// What a link of a machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// NVLink, through switches.
    NvLink,
    /// PCI Express.
    Pcie,
}

/// Microseconds to start: ring with the simple protocol, tree with the low-latency one.
const BASE: (f64, f64) = (8.4, 4.4);
/// Microseconds of a step between machines: the same two.
const NETWORK_HOP: (f64, f64) = (9.6, 5.0);
/// The low-latency protocol sends a flag beside every word.
const LOW_LATENCY_SHARE: f64 = 0.5;

impl Link {
    /// Microseconds of a step inside a machine: ring, tree.
    fn hop(self) -> (f64, f64) {
        match self {
            Link::NvLink => (3.4, 0.52),
            Link::Pcie => (5.7, 1.0),
        }
    }
}

/// GPUs and what joins them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ring {
    /// GPUs.
    pub world: usize,
    /// Machines.
    pub hosts: usize,
    /// What joins the GPUs of a machine.
    pub link: Link,
    /// Bytes a second that a collective moves over every GPU's link: bus bandwidth in nccl-tests' sense.
    pub bus: f64,
}

impl Ring {
    /// Seconds of a ring's steps without any bytes; `around`: how often it is passed, 2 for an all-reduce.
    fn latency(&self, around: f64) -> f64 {
        let steps = around * (self.world as f64 - 1.0);
        let between = around * (self.hosts as f64 - 1.0);
        (BASE.0 + (steps - between) * self.link.hop().0 + between * NETWORK_HOP.0) * 1e-6
    }

    /// Seconds of an all-reduce of so many bytes: by the ring, or by the tree where that is sooner.
    pub fn all_reduce(&self, bytes: f64) -> f64 {
        if self.world < 2 {
            return 0.0;
        }
        let (w, n) = (self.world as f64, self.hosts as f64);
        let ring = self.latency(2.0) + 2.0 * (w - 1.0) / w * bytes / self.bus;
        let hops = (w / n - 1.0) * self.link.hop().1 + n.log2() * NETWORK_HOP.1;
        let tree = (BASE.1 + 2.0 * hops) * 1e-6 + 2.0 * bytes / (LOW_LATENCY_SHARE * self.bus);
        ring.min(tree)
    }

    /// Seconds of a reduce-scatter, or an all-gather, of so many bytes over all ranks.
    pub fn half(&self, bytes: f64) -> f64 {
        if self.world < 2 {
            return 0.0;
        }
        let w = self.world as f64;
        self.latency(1.0) + (w - 1.0) / w * bytes / self.bus
    }
}

impl Ring {
    /// Seconds in which every rank sends each other one its share of so many bytes, point to point, as an ordered fold does: what goes to
    /// other machines crosses the network of a machine once for each of its ranks, which a ring spares. A step for each other rank.
    pub fn exchange(&self, bytes: f64) -> f64 {
        if self.world < 2 {
            return 0.0;
        }
        let (w, here) = (self.world as f64, self.world as f64 / self.hosts as f64);
        let latency = BASE.0 + (here - 1.0) * self.link.hop().0 + (w - here) * NETWORK_HOP.0;
        let crossing = if self.hosts > 1 { here * (w - here) / w } else { (w - 1.0) / w };
        latency * 1e-6 + crossing * bytes / self.bus
    }
}

/// Seconds by which a forward pass waits for weights that are gathered beside it: part i's take `parts[i].0` seconds of the stream, and its
/// products `parts[i].1` once they are there.
pub fn awaited(parts: &[(f64, f64)]) -> f64 {
    let (mut gathered, mut computed) = (0.0f64, 0.0f64);
    for (gather, compute) in parts {
        gathered += gather;
        computed = computed.max(gathered) + compute;
    }
    computed - parts.iter().map(|p| p.1).sum::<f64>()
}

/// A bucket that is folded in order after every micro-batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Folded {
    /// Seconds of backward until it is final.
    pub compute: f64,
    /// Parts in which it goes through the stages.
    pub chunks: usize,
    /// Seconds of the computing stream for a part: it is copied, and set to zero.
    pub pack: f64,
    /// Seconds of the other stream for a part: exchange and sums.
    pub send: f64,
}

/// Micro-batches after which one more takes as long as the one before it.
const STEADY: usize = 16;

/// Seconds that ordered folds add to `n` micro-batches, each with a forward pass of `forward` seconds: copies, waits for one of the two
/// stages, and what outlasts the last backward pass.
pub fn folded(forward: f64, buckets: &[Folded], n: usize) -> f64 {
    let (mut computed, mut sent, mut stages, mut turn) = (0.0f64, 0.0f64, [0.0f64; 2], 0);
    let mut last = 0.0;
    for _ in 0..n.min(STEADY) {
        last = computed;
        computed += forward;
        for b in buckets {
            computed += b.compute;
            for _ in 0..b.chunks {
                computed = computed.max(stages[turn]) + b.pack;
                sent = sent.max(computed) + b.send;
                stages[turn] = sent;
                turn ^= 1;
            }
        }
    }
    let compute = forward + buckets.iter().map(|b| b.compute).sum::<f64>();
    let more = n.saturating_sub(STEADY) as f64 * (computed - last - compute);
    computed.max(sent) - n.min(STEADY) as f64 * compute + more
}

/// Seconds by which sums outlast the backward pass that announces them: part i is ready `parts[i].0` seconds after the one before it, and
/// its sum takes `parts[i].1`; sums follow each other in one stream.
pub fn exposed(parts: &[(f64, f64)]) -> f64 {
    let (mut computed, mut summed) = (0.0, 0.0f64);
    for (compute, sum) in parts {
        computed += compute;
        summed = summed.max(computed) + sum;
    }
    summed - computed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(world: usize, hosts: usize, bus: f64) -> Ring {
        Ring { world, hosts, link: Link::NvLink, bus: bus * 1e9 }
    }

    /// Tang et al., 1-bit Adam, arXiv:2102.02888, table 1: all-reduce of BERT-Large's 680 MB of f16, not overlapped, milliseconds.
    #[test]
    fn one_bandwidth_explains_ethernet_at_any_size() {
        for (hosts, measured) in [(2, 1897.0), (4, 2133.0), (8, 2173.0), (16, 2206.0)] {
            let ms = 1e3 * ring(4 * hosts, hosts, 0.607).all_reduce(680e6);
            assert!((ms / measured - 1.0).abs() < 0.036, "{hosts} hosts: {ms:.0} ms, measured {measured}");
        }
    }

    /// The same over InfiniBand of 100 Gb/s: a third of the line's rate, right from 4 machines on; on 2 the model is too slow by 64 %.
    #[test]
    fn infiniband_reaches_a_third_of_its_line() {
        let line = 12.5;
        let off = |hosts, measured: f64| 1e3 * ring(8 * hosts, hosts, 0.338 * line).all_reduce(680e6) / measured - 1.0;
        assert!((0.55..0.70).contains(&off(2, 184.0)), "{}", off(2, 184.0));
        assert!(off(4, 297.0).abs() < 0.06 && off(8, 316.0).abs() < 0.06, "{} {}", off(4, 297.0), off(8, 316.0));
        let at_line = 1e3 * ring(64, 8, line).all_reduce(680e6);
        assert!((2.8..3.2).contains(&(316.0 / at_line)), "the line's rate alone is three times too optimistic");
    }

    #[test]
    fn small_sums_take_the_tree_and_halves_are_halves() {
        let r = ring(64, 8, 100.0);
        // 2 · (56 · 3.4 + 7 · 9.6) + 8.4 us on the ring.
        assert!(r.all_reduce(8.0) < r.latency(2.0) && (r.latency(2.0) * 1e6 - 523.6).abs() < 0.1, "{}", r.latency(2.0));
        assert!((2.0 * r.half(1e9) / r.all_reduce(1e9) - 1.0).abs() < 1e-3);
        assert_eq!((ring(1, 1, 1.0).all_reduce(1e9), ring(1, 1, 1.0).half(1e9)), (0.0, 0.0));
    }

    /// What an all-to-all has to carry over the network of 8 machines with 8 GPUs is 7 times what the ring has.
    #[test]
    fn an_exchange_is_half_an_all_reduce_on_one_machine_and_crosses_the_network_for_each_rank() {
        assert!((ring(8, 1, 300.0).exchange(1e10) / ring(8, 1, 300.0).half(1e10) - 1.0).abs() < 1e-9);
        let (far, around) = (ring(64, 8, 50.0).exchange(1e11), ring(64, 8, 50.0).half(1e11));
        assert!((far / around - 8.0 * 56.0 / 63.0).abs() < 0.01, "{far} {around}");
        assert_eq!(ring(1, 1, 1.0).exchange(1e9), 0.0);
    }

    #[test]
    fn a_forward_pass_waits_for_the_first_weights_alone_where_the_links_keep_up() {
        assert_eq!(awaited(&[(0.5, 1.0), (0.5, 1.0), (1.0, 1.0)]), 0.5);
        assert_eq!(awaited(&[(2.0, 1.0), (2.0, 1.0)]), 3.0, "the stream is behind");
        assert_eq!(awaited(&[]), 0.0);
    }

    #[test]
    fn folds_hide_behind_the_next_micro_batch_and_wait_for_their_stages() {
        let bucket = Folded { compute: 1.0, chunks: 1, pack: 0.0, send: 1.0 };
        assert_eq!(folded(1.0, &[bucket; 2], 1), 1.0, "all but the last");
        assert_eq!(folded(1.0, &[bucket; 2], 5), 1.0);
        assert_eq!(
            folded(1.0, &[Folded { pack: 0.25, ..bucket }; 2], 5),
            5.0 * 2.0 * 0.25 + 1.0,
            "copies are never hidden"
        );
        // Of three seconds of sends a micro-batch computes two: it waits for the stages, and more of them change nothing.
        let slow = [Folded { compute: 0.5, send: 1.5, ..bucket }; 2];
        let each = folded(1.0, &slow, 30) - folded(1.0, &slow, 29);
        assert!((each - 1.0).abs() < 1e-9, "{each}");
        assert!((folded(1.0, &slow, 100) - folded(1.0, &slow, 50) - 50.0).abs() < 1e-9);
        // One that is longer than the stages waits for them within itself.
        assert_eq!(folded(0.0, &[Folded { compute: 1.0, chunks: 4, pack: 0.5, send: 2.0 }], 1), 0.5 + 4.0 * 2.0);
        assert_eq!(folded(1.0, &[], 3), 0.0);
    }

    #[test]
    fn what_is_not_hidden_is_what_outlasts_backward() {
        assert_eq!(exposed(&[(1.0, 0.5), (1.0, 0.5), (1.0, 0.25)]), 0.25, "all hidden but the last");
        assert_eq!(exposed(&[(1.0, 2.0), (1.0, 2.0)]), 3.0, "the stream is behind");
        assert_eq!(exposed(&[]), 0.0);
    }
}
