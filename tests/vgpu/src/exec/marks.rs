//! Registers that hold a value which nobody wrote.
//!
//! A load of memory that nobody wrote is no mistake as long as its value is dropped: the last prefetch of a software pipeline, for
//! one. The register it fills is marked, lane by lane; arithmetic and moves hand marks on, a write without any clears them. Using a
//! marked value is the mistake (`checked` says what counts as a use). While no register of a warp is marked, which is nearly always,
//! nothing here runs.

use super::mem::{Space, lanes};
use super::{File, LANES};

/// A row of one of the files.
pub type Place = (File, u16);

/// The load that brought a value which nobody wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Position in the program.
    pub pc: usize,
    /// Thread of the block.
    pub thread: usize,
    /// Where it read.
    pub space: Space,
    /// The address there.
    pub address: u64,
    /// Bytes of the element.
    pub bytes: u64,
    /// Whether asynchronous copies to shared memory were in flight.
    pub copies: bool,
}

/// One marked row: its lanes, and where the value of each comes from.
#[derive(Clone, Debug)]
struct Row {
    place: Place,
    lanes: u32,
    from: Box<[Option<Origin>; LANES]>,
}

/// The marked rows of a warp.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    rows: Vec<Row>,
}

impl Marks {
    /// Whether any register is marked.
    #[inline(always)]
    pub fn any(&self) -> bool {
        !self.rows.is_empty()
    }

    fn find(&self, place: Place) -> Option<&Row> {
        self.rows.iter().find(|r| r.place == place)
    }

    /// Marked lanes of a row.
    pub fn lanes(&self, place: Place) -> u32 {
        self.find(place).map_or(0, |r| r.lanes)
    }

    /// Where the value of a lane comes from, if it is marked.
    pub fn origin(&self, place: Place, lane: usize) -> Option<Origin> {
        self.find(place).filter(|r| r.lanes >> lane & 1 == 1).and_then(|r| r.from[lane])
    }

    /// The first marked lane of `mask` in any of the rows.
    pub fn first(&self, places: &[Place], mask: u32) -> Option<(usize, Origin)> {
        let hit = |p: &Place| self.find(*p).filter(|r| r.lanes & mask != 0);
        let found = places.iter().filter_map(hit).min_by_key(|r| (r.lanes & mask).trailing_zeros())?;
        let lane = (found.lanes & mask).trailing_zeros() as usize;
        Some((lane, found.from[lane]?))
    }

    /// Marks one lane of a row.
    pub fn set(&mut self, place: Place, lane: usize, origin: Origin) {
        let mut from = [None; LANES];
        from[lane] = Some(origin);
        self.put(place, 1 << lane, 1 << lane, &from);
    }

    /// The lanes of `mask` of a row are written; of those, `marked` are marked.
    pub fn put(&mut self, place: Place, mask: u32, marked: u32, from: &[Option<Origin>; LANES]) {
        let marked = marked & mask;
        let at = self.rows.iter().position(|r| r.place == place);
        let at = match at {
            Some(at) => at,
            None if marked == 0 => return,
            None => {
                self.rows.push(Row { place, lanes: 0, from: Box::new([None; LANES]) });
                self.rows.len() - 1
            }
        };
        let row = &mut self.rows[at];
        row.lanes = row.lanes & !mask | marked;
        lanes(marked).for_each(|l| row.from[l] = from[l]);
        if row.lanes == 0 {
            self.rows.swap_remove(at);
        }
    }

    /// The lanes of `mask` of a row are written with values that somebody wrote.
    pub fn clear(&mut self, place: Place, mask: u32) {
        self.put(place, mask, 0, &[None; LANES]);
    }

    /// Adds the marks of one row to those of another.
    pub fn join(&mut self, to: Place, from: Place) {
        let Some(row) = self.find(from) else { return };
        let (marked, origins) = (row.lanes, row.from.clone());
        self.put(to, marked, marked, &origins);
    }

    /// Lane by lane the results are marked where any source is.
    pub fn spread(&mut self, uses: &[Place], defs: &[Place], mask: u32) {
        let (mut marked, mut from) = (0, [None; LANES]);
        for row in uses.iter().filter_map(|p| self.find(*p)) {
            let new = row.lanes & mask & !marked;
            lanes(new).for_each(|l| from[l] = row.from[l]);
            marked |= new;
        }
        defs.iter().for_each(|d| self.put(*d, mask, marked, &from));
    }

    /// Forgets, in the lanes of `mask`, the rows of which nobody reads the value any more.
    pub fn keep(&mut self, mask: u32, live: impl Fn(Place) -> bool) {
        for row in self.rows.iter_mut().filter(|r| !live(r.place)) {
            row.lanes &= !mask;
        }
        self.rows.retain(|r| r.lanes != 0);
    }

    /// As a warp starts.
    pub fn reset(&mut self) {
        self.rows.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Place = (File::W, 1);
    const B: Place = (File::W, 2);
    const C: Place = (File::P, 1);

    fn origin(pc: usize) -> Origin {
        Origin { pc, thread: 0, space: Space::Global, address: 0, bytes: 4, copies: false }
    }

    #[test]
    fn marks_go_with_values_lane_by_lane() {
        let mut m = Marks::default();
        m.set(A, 3, origin(10));
        m.set(B, 5, origin(11));
        m.spread(&[A, B], &[C], 0xff);
        assert_eq!((m.lanes(C), m.origin(C, 3), m.origin(C, 5)), (0x28, Some(origin(10)), Some(origin(11))));
        // Only active lanes are written.
        m.spread(&[A], &[C], 1 << 5);
        assert_eq!(m.lanes(C), 0x08);
        // The same row as source and result.
        m.spread(&[A, B], &[A], u32::MAX);
        assert_eq!((m.lanes(A), m.first(&[B, A], u32::MAX)), (0x28, Some((3, origin(10)))));
        m.clear(A, 1 << 3);
        m.join(C, B);
        assert_eq!((m.lanes(A), m.lanes(C)), (0x20, 0x28));
        m.keep(!(1 << 5), |p| p == A);
        assert_eq!((m.lanes(A), m.lanes(B), m.lanes(C)), (0x20, 0x20, 0x20));
        [A, B, C].iter().for_each(|p| m.clear(*p, u32::MAX));
        assert!(!m.any());
    }
}
