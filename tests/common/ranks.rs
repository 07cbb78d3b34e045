//! Ranks as threads of this process: collectives through memory, sums in rank order.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Barrier, Mutex};

use ringtune::comm::Communicator;
use ringtune::cpu::Cpu;
use ringtune::error::Result;
use ringtune::tensor::{Device, Tensor};

/// What the ranks meet at.
struct Meeting {
    barrier: Barrier,
    values: Mutex<Vec<Vec<f64>>>,
}

/// One of them.
pub struct Rank<'a> {
    meeting: &'a Meeting,
    rank: usize,
    size: usize,
    /// What was read at the start of each reduction under way.
    under_way: RefCell<VecDeque<Vec<f64>>>,
}

/// Runs `f` on `size` ranks and returns what each gave.
pub fn on_ranks<T: Send>(size: usize, f: impl Fn(&Rank) -> T + Sync) -> Vec<T> {
    let meeting = Meeting { barrier: Barrier::new(size), values: Mutex::new(vec![Vec::new(); size]) };
    std::thread::scope(|scope| {
        let (meeting, f) = (&meeting, &f);
        let start = |rank| scope.spawn(move || f(&Rank { meeting, rank, size, under_way: RefCell::default() }));
        let threads: Vec<_> = (0..size).map(start).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

impl Rank<'_> {
    /// Everyone's values, by rank.
    fn gather(&self, own: Vec<f64>) -> Vec<Vec<f64>> {
        self.meeting.values.lock().unwrap()[self.rank] = own;
        self.meeting.barrier.wait();
        let all = self.meeting.values.lock().unwrap().clone();
        self.meeting.barrier.wait();
        all
    }
}

impl Communicator<Cpu> for Rank<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.size
    }

    fn reduce_start(&self, dev: &Cpu, tensors: &[&Tensor<Cpu>]) -> Result<()> {
        let mut read = Vec::new();
        for t in tensors {
            let mut host = vec![0.0; t.len()];
            dev.download(&mut host, t)?;
            read.extend(host.into_iter().map(f64::from));
        }
        self.under_way.borrow_mut().push_back(read);
        Ok(())
    }

    fn reduce_finish(&self, dev: &Cpu, tensors: &mut [&mut Tensor<Cpu>]) -> Result<()> {
        let own = self.under_way.borrow_mut().pop_front().expect("a reduction is under way");
        let all = self.gather(own);
        let mut first = 0;
        for t in tensors {
            let sum = |i: usize| all.iter().fold(0.0f32, |sum, rank| sum + rank[i] as f32);
            let host: Vec<f32> = (first..first + t.len()).map(sum).collect();
            dev.upload(t, &host)?;
            first += t.len();
        }
        assert!(all.iter().all(|rank| rank.len() == first), "the ranks reduce other tensors");
        Ok(())
    }

    fn sum_host(&self, values: &mut [f64]) -> Result<()> {
        let all = self.gather(values.to_vec());
        assert!(all.iter().all(|rank| rank.len() == values.len()), "the ranks sum other values");
        for (i, v) in values.iter_mut().enumerate() {
            *v = all.iter().fold(0.0, |sum, rank| sum + rank[i]);
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        self.meeting.barrier.wait();
        Ok(())
    }
}
