//! Several ranks: the ordered fold of gradients, and small values over the control channel.
//!
//! ```text
//! micro-batch k = i·w + r on rank r:   copy m_k, set it to zero, go on computing
//!     thread: exchange blocks with their owners;  owner: for r in 0..w: acc += block of rank r        in order of k
//! end of the step:                     every owner sends its blocks to all
//! ```
//! One order of sums defines a step, `((0 + m₀) + m₁) + …` with each term formed from zero, so that only the product of ranks and
//! accumulation matters: 1 × 4, 2 × 2 and 4 × 1 give the same bits.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};

use super::bucket::cuts;
use super::control::Control;
use super::transport::{Incoming, Outgoing, Transport};
use super::{Communicator, Fold, Position, World};
use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// One rank of several.
pub struct Ranks {
    world: World,
    control: Box<dyn Control>,
    worker: Option<Worker>,
}

/// What the thread of the collectives is asked to do.
enum Job {
    /// Adds this rank's values of a bucket, or nothing, and what the others send.
    Add { bucket: usize, lengths: Vec<usize>, values: Option<Vec<f32>> },
    /// Gives the sums of a bucket to everyone.
    Collect { bucket: usize, lengths: Vec<usize> },
    /// Ends the transport, and the thread with it.
    End,
}

struct Worker {
    jobs: Sender<Job>,
    sums: Receiver<Vec<f32>>,
    /// Buffers that were read and can be filled again.
    free: (Sender<Vec<f32>>, Receiver<Vec<f32>>),
    /// Why the thread ended.
    failed: Arc<Mutex<Option<Error>>>,
    thread: Option<JoinHandle<()>>,
}

/// Buckets that may wait for the transport: more would only take memory.
const AHEAD: usize = 4;

impl Ranks {
    /// Ranks that move gradients over a transport; a single one has none.
    ///
    /// # Errors
    /// If no thread can be started, or the transport cannot be opened.
    pub fn new(world: World, control: Box<dyn Control>, transport: Option<Box<dyn Transport>>) -> Result<Self> {
        let (rank, size) = (world.rank, world.size);
        let worker =
            transport.map(|t| Worker::start(Owner { rank, size, sums: Vec::new(), transport: t })).transpose()?;
        Ok(Self { world, control, worker })
    }

    /// Which rank this is, whatever the backend.
    pub fn own_world(&self) -> &World {
        &self.world
    }

    fn job(&self, job: Job) -> Result<()> {
        let Some(worker) = &self.worker else { return Ok(()) };
        worker.jobs.send(job).map_err(|_| self.why(worker))
    }

    /// The error of the thread of the collectives; who is really to blame the control channel may know better.
    fn why(&self, worker: &Worker) -> Error {
        let failed = worker.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.control.lost(failed.unwrap_or_else(|| Error::new("the collectives ended early")))
    }
}

impl<B: Backend> Communicator<B> for Ranks {
    fn world(&self) -> &World {
        &self.world
    }

    fn fold(&self) -> Fold {
        if self.worker.is_some() { Fold::MicroBatch } else { Fold::Step }
    }

    fn reduce_start(&self, dev: &B, bucket: usize, tensors: &[&Tensor<B>]) -> Result<()> {
        let Some(worker) = &self.worker else { return Ok(()) };
        let lengths: Vec<usize> = tensors.iter().map(|t| t.len()).collect();
        let mut values = worker.free.1.try_recv().unwrap_or_default();
        values.resize(lengths.iter().sum(), 0.0);
        let mut rest = &mut values[..];
        for t in tensors {
            let (own, more) = rest.split_at_mut(t.len());
            dev.download(own, t)?;
            rest = more;
        }
        self.job(Job::Add { bucket, lengths, values: Some(values) })
    }

    fn reduce_skip(&self, bucket: usize, tensors: &[&Tensor<B>]) -> Result<()> {
        let lengths = tensors.iter().map(|t| t.len()).collect();
        self.job(Job::Add { bucket, lengths, values: None })
    }

    fn reduce_finish(&self, dev: &B, bucket: usize, tensors: &mut [&mut Tensor<B>]) -> Result<()> {
        let Some(worker) = &self.worker else { return Ok(()) };
        let lengths = tensors.iter().map(|t| t.len()).collect();
        self.job(Job::Collect { bucket, lengths })?;
        let sums = worker.sums.recv().map_err(|_| self.why(worker))?;
        let mut rest = &sums[..];
        for t in tensors {
            let (own, more) = rest.split_at(t.len());
            dev.upload(t, own)?;
            rest = more;
        }
        // Nobody waits for it.
        let _ = worker.free.0.try_send(sums);
        Ok(())
    }

    fn gather(&self, what: &str, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.control.gather(what, own)
    }

    fn end_reductions(&self) -> Result<()> {
        let Some(worker) = &self.worker else { return Ok(()) };
        self.job(Job::End)?;
        // The thread hangs up when it has ended; it sends nothing any more.
        let _ = worker.sums.recv();
        match worker.failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(e) => Err(self.control.lost(e)),
            None => Ok(()),
        }
    }

    fn at(&self, position: Position) {
        self.control.at(position);
    }

    fn gain(&self) -> f32 {
        self.control.gain()
    }
}

impl Worker {
    fn start(mut owner: Owner) -> Result<Self> {
        let (jobs, todo) = bounded::<Job>(AHEAD);
        let (done, sums) = unbounded();
        let free = bounded(AHEAD);
        let failed = Arc::new(Mutex::new(None));
        let (back, why) = (free.0.clone(), Arc::clone(&failed));
        let (opened, is_open) = bounded(1);
        let work = move || {
            let open = owner.transport.open();
            let failed = open.is_err();
            if opened.send(open).is_err() || failed {
                return;
            }
            for job in todo {
                let result = match job {
                    Job::Add { bucket, lengths, values } => {
                        let result = owner.add(bucket, &lengths, values.as_deref());
                        // A full channel holds enough of them.
                        let _ = values.map(|v| back.try_send(v));
                        result
                    }
                    Job::Collect { bucket, lengths } => {
                        owner.collect(bucket, &lengths).map(|sums| drop(done.send(sums)))
                    }
                    Job::End => {
                        let ended = owner.transport.close();
                        *why.lock().unwrap_or_else(PoisonError::into_inner) = ended.err();
                        return;
                    }
                };
                if let Err(e) = result {
                    *why.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("collectives".into()).spawn(work);
        let thread = Some(thread.map_err(|e| Error::new(format!("cannot start the thread of the collectives: {e}")))?);
        is_open.recv().map_err(|_| Error::new("the thread of the collectives ended early"))??;
        Ok(Self { jobs, sums, free, failed, thread })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The thread ends when nobody can ask it any more.
        self.jobs = bounded(0).0;
        if let Some(thread) = self.thread.take().filter(JoinHandle::is_finished) {
            let _ = thread.join();
        }
    }
}

/// The sums that this rank owns.
struct Owner {
    rank: usize,
    size: usize,
    /// By bucket; whether it was collected, so that the next term begins it anew.
    sums: Vec<(bool, Vec<f32>)>,
    transport: Box<dyn Transport>,
}

impl Owner {
    /// The sum of a bucket of which this rank owns `own` elements.
    fn sum(&mut self, bucket: usize, own: usize) -> &mut (bool, Vec<f32>) {
        if self.sums.len() <= bucket {
            self.sums.resize_with(bucket + 1, Default::default);
        }
        let sum = &mut self.sums[bucket];
        sum.1.resize(own, 0.0);
        sum
    }

    fn add(&mut self, bucket: usize, lengths: &[usize], values: Option<&[f32]>) -> Result<()> {
        let (rank, size, cuts) = (self.rank, self.size, cuts(lengths, self.size));
        let own = cuts[rank]..cuts[rank + 1];
        let to: Vec<Outgoing> = (0..size)
            .map(|r| match values {
                _ if r == rank || cuts[r] == cuts[r + 1] => Outgoing::Nothing,
                None => Outgoing::Skip,
                Some(values) => Outgoing::Data(&values[cuts[r]..cuts[r + 1]]),
            })
            .collect();
        let expected = |r: usize| if r == rank { 0 } else { own.len() };
        let mut from: Vec<Incoming> = (0..size).map(|r| Incoming { len: expected(r), data: Vec::new() }).collect();
        self.transport.exchange(bucket as u32, &to, &mut from)?;
        let (collected, sum) = self.sum(bucket, own.len());
        if std::mem::take(collected) {
            sum.fill(0.0);
        }
        for (r, theirs) in from.iter().enumerate() {
            let term = if r == rank { values.map_or(&[][..], |v| &v[own.clone()]) } else { &theirs.data };
            sum.iter_mut().zip(term).for_each(|(sum, x)| *sum += x);
        }
        Ok(())
    }

    fn collect(&mut self, bucket: usize, lengths: &[usize]) -> Result<Vec<f32>> {
        let (rank, size, cuts) = (self.rank, self.size, cuts(lengths, self.size));
        let share = |r: usize| cuts[r + 1] - cuts[r];
        let (collected, own) = std::mem::take(self.sum(bucket, share(rank)));
        // Without a term since it was collected last it is zero.
        let own = if collected { vec![0.0; own.len()] } else { own };
        let data = |r: usize| if r == rank || own.is_empty() { Outgoing::Nothing } else { Outgoing::Data(&own) };
        let to: Vec<Outgoing> = (0..size).map(data).collect();
        let expected = |r: usize| if r == rank { 0 } else { share(r) };
        let mut from: Vec<Incoming> = (0..size).map(|r| Incoming { len: expected(r), data: Vec::new() }).collect();
        self.transport.exchange(u32::MAX - bucket as u32, &to, &mut from)?;
        let mut all = Vec::with_capacity(cuts[size]);
        for (r, theirs) in from.iter().enumerate() {
            all.extend_from_slice(if r == rank { &own } else { &theirs.data });
        }
        let (sum, share) = ((true, own), share(rank));
        *self.sum(bucket, share) = sum;
        Ok(all)
    }
}
