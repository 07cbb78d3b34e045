//! The ordered fold between GPUs: after every micro-batch the owner of an element gets the terms of all ranks and adds them in the order of
//! ranks, `kernels/fold.cu`; at the end of a step owners give their sums to all, or keep them.
//!
//! ```text
//! compute   backward … ─ pack ─┐ … next layer … ─ pack ─┐        (two stages, one after the other; then the gradients are set to zero)
//! transfer                     └─ send, receive ─ fold ─ └─ send, receive ─ fold … ─ gather ─ event
//! ```
//! A long bucket goes through the stages in parts, so that they stay short; a rank without a term sends the zeros that it has, and adding
//! them changes no bit, since no sum that begins at +0 is ever -0.

use cudarc::driver::CudaEvent;

use super::super::device::Cuda;
use super::super::error::DriverResult;
use super::super::fold::{QUAD, kernel};
use super::super::kernels::THREADS;
use super::super::launch::Launch;
use super::super::nccl::{Collective, Message, Way};
use super::super::pieces::window;
use super::{Collectives, Piece, Slots};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

/// What a rank holds of the sums, and what goes to the others.
#[derive(Default)]
pub(in crate::cuda) struct Folding {
    /// Filled by the computing stream and read by the other one, in turn.
    stages: [Stage; 2],
    turn: usize,
    /// What others sent, as a slot for each rank; or the sums of all, on their way to the gradients.
    received: Option<Tensor<Cuda>>,
    /// By bucket.
    sums: Vec<Sum>,
}

#[derive(Default)]
struct Stage {
    values: Option<Tensor<Cuda>>,
    /// After it was read last.
    read: Option<CudaEvent>,
}

/// The sums of the elements of a bucket that this rank owns.
#[derive(Default)]
struct Sum {
    values: Option<Tensor<Cuda>>,
    /// Whether a term of this step is in it.
    begun: bool,
}

/// A tensor of at least so many values.
fn at_least<'a>(dev: &Cuda, kept: &'a mut Option<Tensor<Cuda>>, len: usize) -> Result<&'a mut Tensor<Cuda>> {
    if kept.as_ref().is_none_or(|t| t.len() < len) {
        // What is too short goes back before more is asked for.
        *kept = None;
        *kept = Some(dev.alloc(1, len.next_multiple_of(QUAD), DType::F32)?);
    }
    Ok(kept.as_mut().expect("made above"))
}

/// Elements of a slot.
fn elements(slot: &[Piece]) -> usize {
    slot.iter().map(Piece::bytes).sum::<usize>() / size_of::<f32>()
}

impl Collectives {
    /// Elements of each slot of a bucket that go at once, the longest having so many: the kernel takes several together.
    fn chunk(&self, longest: usize) -> usize {
        (self.at_once)(longest, self.size).next_multiple_of(QUAD)
    }

    /// Takes the memory that folds will need, and writes down their kernel: `buckets` has for each what every rank owns.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn prepare_folds(&self, dev: &Cuda, buckets: &[Slots]) -> Result<()> {
        let mut folding = self.folding.borrow_mut();
        let lens = |slots: &Slots| slots.joined().iter().map(|slot| elements(slot)).collect();
        let buckets: Vec<Vec<usize>> = buckets.iter().map(lens).collect();
        let longest = buckets.iter().flatten().copied().max().unwrap_or(0);
        let room = self.chunk(longest) * self.size;
        folding.sums.resize_with(buckets.len(), Sum::default);
        let Folding { stages, received, sums, .. } = &mut *folding;
        for (own, sum) in buckets.iter().map(|lens| lens[self.rank]).zip(sums) {
            at_least(dev, &mut sum.values, own)?;
        }
        for stage in &mut *stages {
            at_least(dev, &mut stage.values, room)?;
        }
        let to = at_least(dev, received, room)?;
        let from = stages[0].values.as_ref().expect("made above");
        let kernel = kernel();
        let launch = Launch::new(dev, &kernel, 1, 0).write(to).read(from).read(from);
        launch.u32(self.size).u32(self.rank).u64(0).u64(0).flag(true).run()
    }

    /// Queues that this rank's values of a bucket go to their owners, `slots[r]` to rank r, and that what all ranks send is added to the
    /// sums of this one. What the computing stream does with the values afterwards does not matter.
    ///
    /// # Errors
    /// If the device or NCCL refuses, or has not enough memory.
    pub fn add(&self, dev: &Cuda, bucket: usize, slots: &Slots) -> Result<()> {
        let slots = slots.joined();
        assert_eq!(slots.len(), self.size, "a slot for each rank");
        let lens: Vec<usize> = slots.iter().map(|slot| elements(slot)).collect();
        let longest = lens.iter().copied().max().unwrap_or(0);
        self.bind()?;
        let mut folding = self.folding.borrow_mut();
        let Folding { stages, turn, received, sums } = &mut *folding;
        if sums.len() <= bucket {
            sums.resize_with(bucket + 1, Sum::default);
        }
        let Sum { values, begun } = &mut sums[bucket];
        let sum = at_least(dev, values, lens[self.rank])?;
        let chunk = self.chunk(longest);
        for from in (0..longest).step_by(chunk) {
            let Stage { values, read } = &mut stages[*turn];
            *turn ^= 1;
            let sent = &*at_least(dev, values, chunk * self.size)?;
            let received = &*at_least(dev, received, chunk * self.size)?;
            if let Some(event) = read.take() {
                self.compute.wait(&event).doing(|| "waiting for a stage of the fold".into())?;
            }
            let slot_of = |t: &Tensor<Cuda>, r: usize| Piece::of(t, r * chunk, 0).address();
            for (r, slot) in slots.iter().enumerate() {
                Self::copy_on(
                    &self.compute,
                    &window(slot, from * size_of::<f32>(), chunk * size_of::<f32>()),
                    slot_of(sent, r),
                    true,
                )?;
            }
            self.transfer.join(&self.compute).doing(|| "waiting for gradients".into())?;
            let n = |r: usize| lens[r].saturating_sub(from).min(chunk);
            let others = (0..self.size).filter(|&r| r != self.rank);
            let to = |r| Message { way: Way::To, peer: r, values: slot_of(sent, r), n: n(r) };
            let back = |r| Message { way: Way::From, peer: r, values: slot_of(received, r), n: n(self.rank) };
            let messages: Vec<Message> = others.flat_map(|r| [to(r), back(r)]).filter(|m| m.n > 0).collect();
            let started = self.begins()?;
            // SAFETY: the stage and what is received have a slot for each rank and are kept; this stream alone uses what is received, and
            // the stage is not filled again before the event below.
            unsafe { self.comm.exchange(&messages, self.transfer.cu_stream().cast())? };
            let (kernel, quads) = (kernel(), n(self.rank).div_ceil(QUAD));
            let launch = Launch::new(dev, &kernel, quads.div_ceil(THREADS), 0).on(&self.transfer);
            let launch = launch.write_from(sum, from).read_from(sent, self.rank * chunk).read(received);
            launch.u32(self.size).u32(self.rank).u64(chunk).u64(quads).flag(!*begun).run()?;
            self.ends(started, "reduce", Some(bucket))?;
            *read = Some(self.mark()?);
        }
        *begun = true;
        Ok(())
    }

    /// Queues that the sums of a bucket go where `slots` says: all of them, or those that this rank owns. The next term begins them anew.
    ///
    /// # Errors
    /// If the device or NCCL refuses.
    pub fn collect(&self, dev: &Cuda, bucket: usize, slots: &Slots, whole: bool) -> Result<()> {
        let pieces = slots.joined();
        let lens: Vec<usize> = pieces.iter().map(|slot| elements(slot)).collect();
        self.bind()?;
        // The gradients were set to zero in the stream that computes.
        self.transfer.join(&self.compute).doing(|| "waiting for gradients".into())?;
        let started = self.begins()?;
        let mut folding = self.folding.borrow_mut();
        let Folding { received, sums, .. } = &mut *folding;
        let Sum { values, begun } = &mut sums[bucket];
        assert!(std::mem::take(begun), "bucket {bucket} has no term");
        let sum = values.as_ref().expect("it has a term");
        let own = |from: usize, len: usize| Piece::of(sum, from, len);
        let stream = self.transfer.cu_stream().cast();
        match slots.whole().filter(|_| whole) {
            Some(range) => {
                Self::copy_on(&self.transfer, &pieces[self.rank], own(0, 0).address(), false)?;
                // SAFETY: the range holds the bucket and what is nobody's; the computing stream waits for the event below.
                unsafe { self.comm.collective(Collective::Gather { bytes: range.share }, range.base, stream)? };
            }
            None if whole => {
                let longest = lens.iter().copied().max().unwrap_or(0);
                let chunk = self.chunk(longest);
                let gathered = &*at_least(dev, received, chunk * self.size)?;
                let slot_of = |r: usize| Piece::of(gathered, r * chunk, 0).address();
                for from in (0..longest).step_by(chunk) {
                    let n = lens[self.rank].saturating_sub(from).min(chunk);
                    if n > 0 {
                        Self::copy_on(&self.transfer, &[own(from, n)], slot_of(self.rank), true)?;
                    }
                    let bytes = chunk * size_of::<f32>();
                    // SAFETY: as in `add`.
                    unsafe { self.comm.collective(Collective::Gather { bytes }, slot_of(0), stream)? };
                    for (r, slot) in pieces.iter().enumerate() {
                        let part = window(slot, from * size_of::<f32>(), bytes);
                        Self::copy_on(&self.transfer, &part, slot_of(r), false)?;
                    }
                }
            }
            None => Self::copy_on(&self.transfer, &pieces[self.rank], own(0, 0).address(), false)?,
        }
        self.ends(started, "collect", Some(bucket))?;
        *self.last.borrow_mut() = Some(self.mark()?);
        Ok(())
    }
}
