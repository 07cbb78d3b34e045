//! Ranks as threads of this process: the collectives of the program over pairs of sockets, small values through memory.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Mutex};

use ringtune::comm::control::Control;
use ringtune::comm::transport::{Sockets, Stream, Transport};
use ringtune::comm::{Communicator, Phase, Position, Ranks, World};
use ringtune::cpu::Cpu;
use ringtune::error::Result;

/// What the ranks meet at.
struct Meeting {
    barrier: Barrier,
    values: Mutex<Vec<(String, Vec<u8>)>>,
}

/// The layer that a rank began last in a forward pass, as a packed position: for a transport that waits for its main thread.
pub type Place = Arc<AtomicU64>;

/// One of them.
struct Rank {
    meeting: &'static Meeting,
    rank: usize,
    place: Place,
}

impl Control for Rank {
    fn gather(&self, what: &str, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.meeting.values.lock().unwrap()[self.rank] = (what.into(), own.to_vec());
        self.meeting.barrier.wait();
        let all = self.meeting.values.lock().unwrap().clone();
        self.meeting.barrier.wait();
        assert!(all.iter().all(|(name, _)| name == what), "the ranks have lost each other: {all:?}");
        Ok(all.into_iter().map(|(_, bytes)| bytes).collect())
    }

    fn at(&self, position: Position) {
        if position.phase == Phase::Forward && position.layer.is_some() {
            self.place.store(position.pack(), SeqCst);
        }
    }
}

/// For each rank its sockets to the others.
fn mesh(size: usize) -> Vec<Vec<Option<Box<dyn Stream>>>> {
    let mut all: Vec<Vec<Option<Box<dyn Stream>>>> = Vec::new();
    for _ in 0..size {
        let mut own: Vec<Option<Box<dyn Stream>>> = Vec::new();
        for below in &mut all {
            let (x, y) = UnixStream::pair().unwrap();
            [&x, &y].iter().for_each(|s| s.set_nonblocking(true).unwrap());
            own.push(Some(Box::new(x)));
            below.push(Some(Box::new(y)));
        }
        own.push(None);
        all.push(own);
    }
    all
}

/// Runs `f` on `size` ranks and returns what each gave.
pub fn on_ranks<T: Send>(size: usize, f: impl Fn(&dyn Communicator<Cpu>) -> T + Sync) -> Vec<T> {
    on_ranks_with(size, ringtune::comm::ranks::BUCKET, f)
}

/// As [`on_ranks`], with buckets of so many elements.
pub fn on_ranks_with<T: Send>(size: usize, bucket: usize, f: impl Fn(&dyn Communicator<Cpu>) -> T + Sync) -> Vec<T> {
    on_ranks_through(size, bucket, |sockets, _| Box::new(sockets), f)
}

/// As [`on_ranks_with`], over what `wrap` makes of a rank's sockets and its place.
pub fn on_ranks_through<T: Send>(
    size: usize,
    bucket: usize,
    wrap: impl Fn(Sockets, Place) -> Box<dyn Transport> + Sync,
    f: impl Fn(&dyn Communicator<Cpu>) -> T + Sync,
) -> Vec<T> {
    // It lives as long as the process, for the collectives own what they meet at.
    let meeting: &Meeting = Box::leak(Box::new(Meeting {
        barrier: Barrier::new(size),
        values: Mutex::new(vec![Default::default(); size]),
    }));
    let start = |(rank, peers): (usize, Vec<Option<Box<dyn Stream>>>)| {
        let world = World { rank, size, local_rank: rank, local_size: size };
        let place = Place::default();
        let transport = (size > 1).then(|| wrap(Sockets::new(peers), Arc::clone(&place)));
        f(&Ranks::new(world, Box::new(Rank { meeting, rank, place }), transport).unwrap().with_buckets(bucket))
    };
    std::thread::scope(|scope| {
        let start = &start;
        let spawn = |own| scope.spawn(move || start(own));
        let threads: Vec<_> = mesh(size).into_iter().enumerate().map(spawn).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}
