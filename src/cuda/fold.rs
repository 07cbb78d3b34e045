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

use super::collectives::{Collectives, Piece};
use super::compile::{Defines, Source, source};
use super::device::Cuda;
use super::error::DriverResult;
use super::kernels::Param::{In, Out, U32, U64};
use super::kernels::{Configuration, Kernel, THREADS};
use super::launch::Launch;
use super::nccl::{Message, Way};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

/// The source of its kernel.
pub const SOURCE: Source = source!("kernels/fold.cu");

/// Elements that a thread adds.
const QUAD: usize = 4;

/// Elements that a stage holds: what is sent to all ranks, or received from them, at once.
pub(super) const STAGE: usize = 1 << 24;

/// The terms of all ranks, added to the sums of one.
pub fn kernel() -> Kernel {
    let params = &[Out, In, In, U32, U32, U64, U64, U32];
    Kernel { source: SOURCE, entry: "fold", defines: Defines::new(&[]), params, threads: THREADS }
}

/// Every configuration there is.
pub fn all() -> Vec<Configuration> {
    vec![(kernel(), 0)]
}

/// What a rank holds of the sums, and what goes to the others.
#[derive(Default)]
pub(super) struct Folding {
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

/// `len` elements of a slot from element `from` on, as far as it goes.
fn window(slot: &[Piece], from: usize, len: usize) -> Vec<Piece> {
    let (mut at, begin, end) = (0, from * size_of::<f32>(), (from + len) * size_of::<f32>());
    let part = |piece: &Piece| {
        let (first, last) = (begin.clamp(at, at + piece.bytes()) - at, end.clamp(at, at + piece.bytes()) - at);
        at += piece.bytes();
        (first < last).then(|| piece.part(first, last - first))
    };
    slot.iter().filter_map(part).collect()
}

impl Collectives {
    /// Elements of each slot of a bucket that go at once, the longest having so many.
    fn at_once(&self, longest: usize) -> usize {
        longest.min((self.stage / self.size).max(1)).next_multiple_of(QUAD)
    }

    /// Takes the memory that folds will need, and writes down their kernel: `buckets` has for each the elements that every rank owns.
    ///
    /// # Errors
    /// If the device has not enough memory.
    pub fn prepare_folds(&self, dev: &Cuda, buckets: &[Vec<usize>]) -> Result<()> {
        let mut folding = self.folding.borrow_mut();
        let longest = buckets.iter().flatten().copied().max().unwrap_or(0);
        let room = self.at_once(longest) * self.size;
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
    pub fn add(&self, dev: &Cuda, bucket: usize, slots: &[Vec<Piece>]) -> Result<()> {
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
        let chunk = self.at_once(longest);
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
                Self::copy_on(&self.compute, &window(slot, from, chunk), slot_of(sent, r), true)?;
            }
            self.transfer.join(&self.compute).doing(|| "waiting for gradients".into())?;
            let n = |r: usize| lens[r].saturating_sub(from).min(chunk);
            let others = (0..self.size).filter(|&r| r != self.rank);
            let to = |r| Message { way: Way::To, peer: r, values: slot_of(sent, r), n: n(r) };
            let back = |r| Message { way: Way::From, peer: r, values: slot_of(received, r), n: n(self.rank) };
            let messages: Vec<Message> = others.flat_map(|r| [to(r), back(r)]).filter(|m| m.n > 0).collect();
            // SAFETY: the stage and what is received have a slot for each rank and are kept; this stream alone uses what is received, and
            // the stage is not filled again before the event below.
            unsafe { self.comm.exchange(&messages, self.transfer.cu_stream().cast())? };
            let (kernel, quads) = (kernel(), n(self.rank).div_ceil(QUAD));
            let launch = Launch::new(dev, &kernel, quads.div_ceil(THREADS), 0).on(&self.transfer);
            let launch = launch.write_from(sum, from).read_from(sent, self.rank * chunk).read(received);
            launch.u32(self.size).u32(self.rank).u64(chunk).u64(quads).flag(!*begun).run()?;
            *read = Some(self.mark()?);
        }
        *begun = true;
        Ok(())
    }

    /// Queues that the sums of a bucket go where `slots` says: all of them, or those that this rank owns. The next term begins them anew.
    ///
    /// # Errors
    /// If the device or NCCL refuses.
    pub fn collect(&self, dev: &Cuda, bucket: usize, slots: &[Vec<Piece>], whole: bool) -> Result<()> {
        let lens: Vec<usize> = slots.iter().map(|slot| elements(slot)).collect();
        self.bind()?;
        // The gradients were set to zero in the stream that computes.
        self.transfer.join(&self.compute).doing(|| "waiting for gradients".into())?;
        let mut folding = self.folding.borrow_mut();
        let Folding { received, sums, .. } = &mut *folding;
        let Sum { values, begun } = &mut sums[bucket];
        assert!(std::mem::take(begun), "bucket {bucket} has no term");
        let sum = values.as_ref().expect("it has a term");
        let own = |from: usize, len: usize| Piece::of(sum, from, len);
        if whole {
            let longest = lens.iter().copied().max().unwrap_or(0);
            let chunk = self.at_once(longest);
            let gathered = &*at_least(dev, received, chunk * self.size)?;
            let slot_of = |r: usize| Piece::of(gathered, r * chunk, 0).address();
            for from in (0..longest).step_by(chunk) {
                let n = lens[self.rank].saturating_sub(from).min(chunk);
                if n > 0 {
                    Self::copy_on(&self.transfer, &[own(from, n)], slot_of(self.rank), true)?;
                }
                let (bytes, stream) = (chunk * size_of::<f32>(), self.transfer.cu_stream().cast());
                // SAFETY: as in `add`.
                unsafe { self.comm.all_gather(slot_of(0), bytes, self.rank, stream)? };
                for (r, slot) in slots.iter().enumerate() {
                    Self::copy_on(&self.transfer, &window(slot, from, chunk), slot_of(r), false)?;
                }
            }
        } else {
            Self::copy_on(&self.transfer, &slots[self.rank], own(0, 0).address(), false)?;
        }
        *self.last.borrow_mut() = Some(self.mark()?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_the_elements_of_a_slot_in_order() {
        let slot = [Piece::at(1000, 40), Piece::at(2000, 8), Piece::at(3000, 20)];
        assert_eq!(elements(&slot), 17);
        assert_eq!(window(&slot, 0, 17), slot);
        assert_eq!(window(&slot, 3, 8), [Piece::at(1012, 28), Piece::at(2000, 4)]);
        assert_eq!(window(&slot, 10, 4), [Piece::at(2000, 8), Piece::at(3000, 8)]);
        assert_eq!(window(&slot, 16, 9), [Piece::at(3016, 4)]);
        assert_eq!(window(&slot, 17, 4), []);
    }
}
