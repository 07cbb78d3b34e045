//! What is trained and evaluated on: pieces of documents in data sets, and the rows an epoch makes of them.

use std::sync::{Arc, Mutex, PoisonError};

use crate::batch::{IGNORE, MicroBatch};
use crate::data::encode::Encoded;
use crate::data::mix::{Mix, MixRow, SetSize, WeightUnit, mix_report};
use crate::data::pack::{PackedRow, best_fit_decreasing};
use crate::data::raw_tokens::RawTokens;
use crate::data::token_file::TokenFile;
use crate::ensure;
use crate::error::Result;
use crate::rng::Stream;

const STREAM_ORDER: u64 = 0x6f72_6401;
const STREAM_ROWS: u64 = 0x6f72_6402;

/// Where documents come from.
#[derive(Debug)]
pub enum Tokens {
    /// A token file of ours.
    File(Box<TokenFile>),
    /// A flat file of ids, every one supervised.
    Raw(RawTokens),
}

impl Tokens {
    /// Calls `each(token, supervised)` for a part of a document.
    pub fn visit(&self, doc: usize, start: usize, len: usize, each: impl FnMut(u32, bool)) {
        match self {
            Self::File(f) => f.visit(doc, start, len, each),
            Self::Raw(r) => r.visit(doc, start, len, each),
        }
    }

    /// Whether what was read so far came from the file as it was opened: asked after reading, before it is used.
    ///
    /// # Errors
    /// If another program cut it.
    pub fn check_whole(&self) -> Result<()> {
        match self {
            Self::File(f) => f.check_whole(),
            Self::Raw(r) => r.check_whole(),
        }
    }

    /// Number of documents.
    pub fn n_docs(&self) -> usize {
        match self {
            Self::File(f) => f.n_docs(),
            Self::Raw(r) => r.n_docs(),
        }
    }

    /// Tokens of a document.
    pub fn doc_len(&self, doc: usize) -> usize {
        match self {
            Self::File(f) => f.doc_len(doc),
            Self::Raw(r) => r.doc_len(doc),
        }
    }

    /// Line of the document in its source, from 1, where lines are known; else its number, from 1.
    pub fn line(&self, doc: usize) -> u32 {
        match self {
            Self::File(f) => f.info(doc).line,
            Self::Raw(_) => doc as u32 + 1,
        }
    }

    /// Hash of the tokens, hex.
    pub fn content_hash(&self) -> String {
        match self {
            Self::File(f) => f.content_hash(),
            Self::Raw(r) => r.checksum().to_string(),
        }
    }
}

/// A stretch of a document that is trained on as a document of its own: all of a row, or a part of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Document.
    pub doc: u32,
    /// First token.
    pub start: u64,
    /// Tokens.
    pub len: u32,
    /// Of these, targets.
    pub n_targets: u32,
}

/// A data set, or one side of its split.
#[derive(Clone, Debug)]
pub struct PieceSet {
    /// The data set's path as given.
    pub name: String,
    /// The tokens.
    pub tokens: Arc<Tokens>,
    /// Its pieces.
    pub pieces: Vec<Piece>,
}

impl PieceSet {
    /// Adds what decides the content and order of its pieces.
    pub fn add_to(&self, h: &mut blake3::Hasher) {
        h.update(self.tokens.content_hash().as_bytes());
        h.update(&(self.pieces.len() as u64).to_le_bytes());
        for p in &self.pieces {
            h.update(&p.doc.to_le_bytes()).update(&p.start.to_le_bytes()).update(&p.len.to_le_bytes());
        }
    }

    /// A piece's ids and loss bits.
    pub fn encoded(&self, piece: usize) -> Encoded {
        let p = self.pieces[piece];
        let mut out = Encoded::default();
        self.tokens.visit(p.doc as usize, p.start as usize, p.len as usize, |token, supervised| {
            out.tokens.push(token);
            out.supervised.push(supervised);
        });
        out
    }

    /// Size in all units.
    pub fn size(&self) -> SetSize {
        let mut size = SetSize::default();
        self.pieces.iter().for_each(|p| size.add(u64::from(p.len), u64::from(p.n_targets)));
        size
    }

    /// Line of a piece's row in its source.
    pub fn line(&self, piece: usize) -> u32 {
        self.tokens.line(self.pieces[piece].doc as usize)
    }

    /// Appends a piece to a micro-batch as a document of its own; `sample` names it in messages.
    pub fn append(&self, piece: usize, sample: u32, batch: &mut MicroBatch) {
        let p = self.pieces[piece];
        let start = batch.tokens.len();
        self.tokens.visit(p.doc as usize, p.start as usize, p.len as usize, |token, supervised| {
            // What precedes in this document predicts this token; the first one has no predecessor.
            if batch.tokens.len() > start && supervised {
                *batch.targets.last_mut().expect("a predecessor") = token as i32;
                batch.n_valid += 1;
            }
            batch.tokens.push(token as i32);
            batch.targets.push(IGNORE);
            batch.doc_start.push(start as i32);
        });
        batch.samples.push(sample);
    }
}

/// The rows of one epoch, in the global order that no number of ranks changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EpochPlan {
    /// The epoch, from 0.
    pub epoch: u64,
    samples: Vec<u32>,
    /// Where each row's samples start, and their number.
    row_starts: Vec<u32>,
}

impl EpochPlan {
    /// Number of rows.
    pub fn n_rows(&self) -> usize {
        self.row_starts.len() - 1
    }

    /// The samples of a row: indices over all data sets of a [`TrainSet`].
    pub fn row(&self, row: usize) -> &[u32] {
        &self.samples[self.row_starts[row] as usize..self.row_starts[row + 1] as usize]
    }

    /// All samples in the order they are trained on.
    pub fn samples(&self) -> &[u32] {
        &self.samples
    }
}

/// Where a run stands in its data, independent of ranks and accumulation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// The epoch, from 0.
    pub epoch: u64,
    /// Rows of its global order consumed.
    pub rows: u64,
}

/// The training side of all data sets with their mix.
#[derive(Debug)]
pub struct TrainSet {
    sets: Vec<PieceSet>,
    mix: Mix,
    offsets: Vec<u32>,
    max_seq_len: usize,
    packing: bool,
    seed: u64,
    /// The plan that was asked for last: who starts a run asks for its first several times.
    planned: Mutex<Option<Arc<EpochPlan>>>,
}

impl TrainSet {
    /// Joins data sets.
    ///
    /// # Errors
    /// If there are no pieces, more than 2^32, or one longer than a row.
    pub fn new(sets: Vec<PieceSet>, mix: Mix, max_seq_len: usize, packing: bool, seed: u64) -> Result<Self> {
        let mut offsets = vec![0u32];
        for set in &sets {
            let end = u64::from(*offsets.last().expect("starts with 0")) + set.pieces.len() as u64;
            ensure!(u32::try_from(end).is_ok(), "{end} training rows, expected fewer than 2^32");
            offsets.push(end as u32);
            if let Some(p) = set.pieces.iter().find(|p| p.len as usize > max_seq_len || p.len == 0) {
                let line = set.tokens.line(p.doc as usize);
                crate::bail!("{}:{line}: a row of {} tokens, expected 1 to {max_seq_len}", set.name, p.len);
            }
        }
        Ok(Self { sets, mix, offsets, max_seq_len, packing, seed, planned: Mutex::default() })
    }

    /// The data sets.
    pub fn sets(&self) -> &[PieceSet] {
        &self.sets
    }

    /// The mix.
    pub fn mix(&self) -> &Mix {
        &self.mix
    }

    /// Tokens of a full row.
    pub fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    /// The data set of a sample and its piece there.
    pub fn locate(&self, sample: u32) -> (usize, usize) {
        let set = self.offsets.partition_point(|&o| o <= sample) - 1;
        (set, (sample - self.offsets[set]) as usize)
    }

    /// Where a sample came from, as `file:line`.
    pub fn sample_name(&self, sample: u32) -> String {
        let (set, piece) = self.locate(sample);
        format!("{}:{}", self.sets[set].name, self.sets[set].line(piece))
    }

    /// The rows of an epoch: a pure function of the seed, the epoch, and the lengths.
    pub fn plan(&self, epoch: u64) -> Arc<EpochPlan> {
        let mut planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        match &*planned {
            Some(plan) if plan.epoch == epoch => Arc::clone(plan),
            _ => {
                // The one before may go first.
                *planned = None;
                Arc::clone(planned.insert(Arc::new(self.new_plan(epoch))))
            }
        }
    }

    fn new_plan(&self, epoch: u64) -> EpochPlan {
        let mut chosen: Vec<u32> = Vec::new();
        for set in 0..self.sets.len() {
            chosen.extend(self.mix.rows(set, epoch).into_iter().map(|piece| self.offsets[set] + piece));
        }
        let order = Stream::new(&[self.seed, STREAM_ORDER, epoch]).permutation(chosen.len());
        let shuffled: Vec<u32> = order.iter().map(|&i| chosen[i as usize]).collect();
        if !self.packing {
            let row_starts = (0..=shuffled.len() as u32).collect();
            return EpochPlan { epoch, samples: shuffled, row_starts };
        }
        let lengths: Vec<u32> = shuffled
            .iter()
            .map(|&s| {
                let (set, piece) = self.locate(s);
                self.sets[set].pieces[piece].len
            })
            .collect();
        let rows = best_fit_decreasing(&lengths, self.max_seq_len as u32);
        let mut plan = EpochPlan { epoch, samples: Vec::with_capacity(shuffled.len()), row_starts: vec![0] };
        for row in Stream::new(&[self.seed, STREAM_ROWS, epoch]).permutation(rows.len()) {
            plan.samples.extend(rows[row as usize].iter().map(|&d| shuffled[d as usize]));
            plan.row_starts.push(plan.samples.len() as u32);
        }
        plan
    }

    /// Rows of every epoch where they are not packed.
    pub fn unpacked_rows(&self) -> Option<u64> {
        (!self.packing).then(|| self.mix.counts.iter().sum())
    }

    /// A row of a plan as other trainers lay it out.
    pub fn packed_row(&self, plan: &EpochPlan, row: usize, pad: u32) -> PackedRow {
        let docs: Vec<Encoded> = plan
            .row(row)
            .iter()
            .map(|&s| {
                let (set, piece) = self.locate(s);
                self.sets[set].encoded(piece)
            })
            .collect();
        PackedRow::new(&docs, self.max_seq_len, pad)
    }

    /// Appends a row of a plan to a micro-batch.
    pub fn append_row(&self, plan: &EpochPlan, row: usize, batch: &mut MicroBatch) {
        for &sample in plan.row(row) {
            let (set, piece) = self.locate(sample);
            self.sets[set].append(piece, sample, batch);
        }
    }

    /// Requested and achieved share of each data set in an epoch.
    pub fn mix_report(&self, epoch: u64) -> Vec<MixRow> {
        let names: Vec<String> = self.sets.iter().map(|s| s.name.clone()).collect();
        let sizes: Vec<SetSize> = self.sets.iter().map(PieceSet::size).collect();
        let achieved: Vec<SetSize> = (0..self.sets.len())
            .map(|set| {
                let mut size = SetSize::default();
                for piece in self.mix.rows(set, epoch) {
                    let p = self.sets[set].pieces[piece as usize];
                    size.add(u64::from(p.len), u64::from(p.n_targets));
                }
                size
            })
            .collect();
        mix_report(&self.mix, &names, &sizes, &achieved)
    }

    /// Hash of everything that decides the order and content of the rows, hex: a resumed run compares it.
    pub fn fingerprint(&self) -> String {
        let mut h = blake3::Hasher::new();
        self.sets.iter().for_each(|set| set.add_to(&mut h));
        self.mix.counts.iter().for_each(|c| {
            h.update(&c.to_le_bytes());
        });
        h.update(&[u8::from(self.packing)])
            .update(&(self.max_seq_len as u64).to_le_bytes())
            .update(&self.seed.to_le_bytes());
        h.finalize().to_hex().to_string()
    }

    /// The unit of the weights.
    pub fn weight_unit(&self) -> WeightUnit {
        self.mix.unit
    }
}
