//! Where buffers lie: pieces of a few large mappings, so that many small tensors share pages of 2 MiB, or pages of 4 KiB where a part of each may
//! never be used.
//!
//! A run touches gigabytes before its first step ends. In pages of 4 KiB that is a fault each; in large ones it is five hundred times fewer, and
//! the page table is walked less later. A piece that is given back is used again, whatever it holds; large pages that
//! no piece has a byte of go back to the system, and so does a mapping without pieces.

use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::machine::page;

/// A large page: of x86, and of aarch64 where a small one has 4 KiB. Elsewhere it is a multiple of those that there are (Linux: 64 KiB at most,
/// with large ones of 32 or 512 MiB), and what is asked and given back by it is still whole pages.
pub const HUGE: usize = 2 << 20;

/// Where pieces begin: lines of the cache, so that no two share one.
const LINE: usize = 64;

/// Bytes of the first mapping. Each is as large as all before it together, up to [`LARGEST`]: a small program takes little.
const SMALLEST: usize = 256 << 10;

/// Bytes of a mapping, unless one piece is larger.
const LARGEST: usize = 64 << 20;

/// Pages that a piece lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    /// 2 MiB, where the system has them: for what is used whole.
    Large,
    /// The system's smallest (4 KiB, on aarch64 up to 64): only those that are used take memory.
    Small,
}

/// Bytes that belong to one owner.
pub struct Piece {
    start: NonNull<u8>,
    len: usize,
    fresh: bool,
    pages: Pages,
}

// SAFETY: the bytes belong to the piece alone, as those of a `Box<[u8]>` do.
unsafe impl Send for Piece {}
// SAFETY: as above.
unsafe impl Sync for Piece {}

impl Piece {
    /// `len` bytes, from a line of the cache on.
    ///
    /// # Errors
    /// If the system has not enough address space.
    pub fn new(len: usize, pages: Pages) -> io::Result<Self> {
        let room = room(len).ok_or(io::ErrorKind::OutOfMemory)?;
        let (start, fresh) = heap(pages).take(room)?;
        Ok(Self { start, len, fresh, pages })
    }

    /// Whether nobody had these bytes before: they are zero.
    pub fn is_fresh(&self) -> bool {
        self.fresh
    }
}

impl Deref for Piece {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes are mapped and initialised, by the system or an earlier owner, until the piece is dropped.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        heap(self.pages).give_back(self.start, room(self.len).expect("it was granted"));
    }
}

/// Bytes that a piece of `len` takes; even one without bytes has an address of its own.
fn room(len: usize) -> Option<usize> {
    len.max(1).checked_next_multiple_of(LINE)
}

/// A mapping of the system.
struct Region {
    start: NonNull<u8>,
    len: usize,
    /// What belongs to no piece, in order, never two beside each other.
    free: Vec<Range<usize>>,
    /// Nobody had anything from here on.
    fresh: usize,
}

// SAFETY: whoever has the region unmaps it, and nobody reads or writes through it.
unsafe impl Send for Region {}

impl Region {
    fn map(len: usize, pages: Pages) -> io::Result<Self> {
        // Pages of 2 MiB begin at their multiples: what is beside them is given back at once.
        let beside = if pages == Pages::Large && len >= 2 * HUGE { HUGE } else { 0 };
        let whole = len.checked_add(beside).ok_or(io::ErrorKind::OutOfMemory)?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the system's choice.
        let found = unsafe { libc::mmap(std::ptr::null_mut(), whole, protection, flags, -1, 0) };
        if found == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = if beside > 0 { (found as usize).next_multiple_of(HUGE) - found as usize } else { 0 };
        // SAFETY: all of it lies inside the new mapping, which nobody uses yet.
        let start = unsafe {
            let start = found.cast::<u8>().add(before);
            for (at, n) in [(found.cast::<u8>(), before), (start.add(len), beside - before)] {
                if n > 0 {
                    libc::munmap(at.cast(), n);
                }
            }
            // A kernel that has no large pages says no, and nothing is lost.
            #[cfg(target_os = "linux")]
            if beside > 0 {
                libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE);
            }
            NonNull::new_unchecked(start)
        };
        #[allow(clippy::single_range_in_vec_init, reason = "one free range, not its numbers")]
        Ok(Self { start, len, free: vec![0..len], fresh: 0 })
    }

    /// The smallest free range of at least so many bytes: its place among the free ones, and its length.
    fn best(&self, len: usize) -> Option<(usize, usize)> {
        let enough = self.free.iter().map(Range::len).enumerate().filter(|(_, n)| *n >= len);
        enough.min_by_key(|(_, n)| *n)
    }

    fn take(&mut self, at: usize, len: usize) -> (NonNull<u8>, bool) {
        let first = self.free[at].start;
        self.free[at].start += len;
        if self.free[at].is_empty() {
            self.free.remove(at);
        }
        let fresh = first >= self.fresh;
        self.fresh = self.fresh.max(first + len);
        // SAFETY: inside the mapping.
        (unsafe { self.start.add(first) }, fresh)
    }

    fn holds(&self, at: NonNull<u8>) -> bool {
        (self.start.as_ptr() as usize..self.start.as_ptr() as usize + self.len).contains(&(at.as_ptr() as usize))
    }

    fn give_back(&mut self, at: NonNull<u8>, len: usize) {
        let first = at.as_ptr() as usize - self.start.as_ptr() as usize;
        let mut i = self.free.partition_point(|free| free.start < first);
        self.free.insert(i, first..first + len);
        if self.free.get(i + 1).is_some_and(|next| next.start == first + len) {
            self.free[i].end = self.free.remove(i + 1).end;
        }
        if i > 0 && self.free[i - 1].end == first {
            self.free[i - 1].end = self.free.remove(i).end;
            i -= 1;
        }
        self.let_go(first..first + len, self.free[i].clone());
    }

    /// Gives the system the large pages that a piece touched and nobody has any more: `free` is the range around it. They are zero when they
    /// are next read.
    fn let_go(&self, piece: Range<usize>, free: Range<usize>) {
        let start = self.start.as_ptr() as usize;
        let first = (start + free.start).next_multiple_of(HUGE).max((start + piece.start) / HUGE * HUGE);
        let end = ((start + free.end) / HUGE * HUGE).min((start + piece.end).next_multiple_of(HUGE));
        if first < end {
            // SAFETY: whole pages inside the mapping, of which no piece has a byte.
            unsafe { libc::madvise(self.start.as_ptr().add(first - start).cast(), end - first, libc::MADV_DONTNEED) };
        }
    }

    fn is_free(&self) -> bool {
        self.free.first().is_some_and(|free| free.len() == self.len)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: no piece of it is left.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// All mappings of one kind.
struct Heap {
    pages: Pages,
    regions: Vec<Region>,
}

fn heap(pages: Pages) -> MutexGuard<'static, Heap> {
    static LARGE: Mutex<Heap> = Mutex::new(Heap::new(Pages::Large));
    static SMALL: Mutex<Heap> = Mutex::new(Heap::new(Pages::Small));
    let heap = if pages == Pages::Large { &LARGE } else { &SMALL };
    // Nothing in here panics half way.
    heap.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Heap {
    const fn new(pages: Pages) -> Self {
        Self { pages, regions: Vec::new() }
    }

    fn take(&mut self, len: usize) -> io::Result<(NonNull<u8>, bool)> {
        let found = self.regions.iter_mut().filter_map(|r| r.best(len).map(|(at, n)| (n, at, r)));
        if let Some((_, at, region)) = found.min_by_key(|(n, ..)| *n) {
            return Ok(region.take(at, len));
        }
        let all: usize = self.regions.iter().map(|r| r.len).sum();
        let usual = len.max(all.clamp(SMALLEST, LARGEST));
        let unit = if usual >= 2 * HUGE { HUGE } else { page() };
        let usual = usual.checked_next_multiple_of(unit).ok_or(io::ErrorKind::OutOfMemory)?;
        // Where so much is refused, there may be room for what is needed.
        let mut region =
            Region::map(usual, self.pages).or_else(|_| Region::map(len.next_multiple_of(page()), self.pages))?;
        let taken = region.take(0, len);
        self.regions.push(region);
        Ok(taken)
    }

    fn give_back(&mut self, at: NonNull<u8>, len: usize) {
        let i = self.regions.iter().position(|r| r.holds(at)).expect("a piece lies in a mapping");
        self.regions[i].give_back(at, len);
        if self.regions[i].is_free() {
            self.regions.swap_remove(i);
        }
    }
}

/// The first byte of each large page that fresh pieces in such touch, one for each page: who writes a zero to it has the page cleared. Several
/// threads that write to one large page for the first time would all clear it.
pub fn firsts<'a>(pieces: impl Iterator<Item = &'a mut Piece>) -> Vec<First> {
    let mut all: Vec<usize> = Vec::new();
    for piece in pieces.filter(|p| p.fresh && p.pages == Pages::Large) {
        let start = piece.start.as_ptr() as usize;
        let pages = start / HUGE + 1..(start + piece.len).div_ceil(HUGE);
        all.extend([start].into_iter().chain(pages.map(|page| page * HUGE)));
    }
    all.sort_unstable();
    all.dedup_by_key(|at| *at / HUGE);
    all.into_iter().map(First).collect()
}

/// A byte of a fresh piece.
pub struct First(usize);

impl First {
    /// Writes a zero.
    ///
    /// # Safety
    /// The piece is alive, and nobody reads or writes it meanwhile.
    pub unsafe fn touch(&self) {
        // SAFETY: the caller's promise. The byte was zero.
        unsafe { std::ptr::write_volatile(self.0 as *mut u8, 0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a piece.
    fn bytes<'a>(at: NonNull<u8>, len: usize) -> &'a mut [u8] {
        // SAFETY: of pieces that the test has.
        unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), len) }
    }

    #[test]
    fn pieces_do_not_overlap_are_used_again_and_go_back() {
        let mut heap = Heap::new(Pages::Large);
        // What has a mapping of its own has whole pages, of whatever size: nothing is left of them for others.
        let lens: Vec<usize> =
            [0, 1, 63, 64, 65, 5000, 320 << 10, 3 << 20, 9 << 20, 1000].map(|n| room(n).unwrap()).into();
        for round in 0..2 {
            let pieces: Vec<_> = lens.iter().map(|&n| heap.take(n).unwrap()).collect();
            for (i, ((at, fresh), &n)) in pieces.iter().zip(&lens).enumerate() {
                let bytes = bytes(*at, n);
                assert!((at.as_ptr() as usize).is_multiple_of(LINE));
                assert!(*fresh && bytes.iter().all(|&x| x == 0), "round {round}, {i}");
                bytes.fill(i as u8 + 1);
            }
            let intact = |i: usize| bytes(pieces[i].0, lens[i]).iter().all(|&x| x == i as u8 + 1);
            assert!((0..lens.len()).all(intact));
            // Every second one goes; its place is taken by what fits there, as it was left.
            (1..lens.len()).step_by(2).for_each(|i| heap.give_back(pieces[i].0, lens[i]));
            let (at, fresh) = heap.take(lens[5]).unwrap();
            assert!(at == pieces[5].0 && !fresh && bytes(at, 6)[5] == 6, "round {round}");
            heap.give_back(at, lens[5]);
            assert!((0..lens.len()).step_by(2).all(intact));
            (0..lens.len()).step_by(2).for_each(|i| heap.give_back(pieces[i].0, lens[i]));
            assert!(heap.regions.is_empty(), "round {round}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn whole_pages_that_nobody_has_go_back_while_others_stay() {
        let mut heap = Heap { pages: Pages::Large, regions: Vec::new() };
        // A mapping of its own, cut into pieces that share large pages with their neighbours.
        let all = room(24 << 20).unwrap();
        let lens = [1000, 5 << 20, 700_000, 9 << 20, 64, 6 << 20].map(|n| room(n).unwrap());
        heap.regions.push(Region::map(all, Pages::Large).unwrap());
        let pieces: Vec<_> = lens.iter().map(|&n| heap.take(n).unwrap().0).collect();
        assert_eq!(heap.regions.len(), 1);
        (0..lens.len()).for_each(|i| bytes(pieces[i], lens[i]).fill(i as u8 + 1));
        for gone in [3, 1] {
            heap.give_back(pieces[gone], lens[gone]);
            let piece = bytes(pieces[gone], lens[gone]);
            // Most of it is zero now; at its ends are pages that others have too.
            assert!(piece.iter().filter(|&&x| x == 0).count() >= lens[gone] - 2 * HUGE);
            assert!(
                [0, 2, 4, 5].iter().all(|&i| bytes(pieces[i], lens[i]).iter().all(|&x| x == i as u8 + 1)),
                "{gone}"
            );
        }
        [0, 2, 4, 5].iter().for_each(|&i| heap.give_back(pieces[i], lens[i]));
        assert!(heap.regions.is_empty());
    }

    #[test]
    fn many_small_pieces_lie_in_few_mappings_and_absurd_ones_nowhere() {
        let mut heap = Heap::new(Pages::Large);
        let pieces: Vec<_> = (0..400).map(|_| heap.take(room(1_000_000).unwrap()).unwrap().0).collect();
        assert!(heap.regions.len() < 20, "{}", heap.regions.len());
        pieces.into_iter().for_each(|at| heap.give_back(at, room(1_000_000).unwrap()));
        assert!(heap.regions.is_empty());
        assert!([usize::MAX - 5, usize::MAX / 2].iter().all(|&n| Piece::new(n, Pages::Small).is_err()));
    }

    #[test]
    fn each_large_page_is_touched_once() {
        let mut pieces: Vec<Piece> = [3 << 20, 100, 5 << 20, 64].map(|n| Piece::new(n, Pages::Large).unwrap()).into();
        pieces.retain(Piece::is_fresh);
        let found = firsts(pieces.iter_mut());
        let pages: Vec<usize> = found.iter().map(|f| f.0 / HUGE).collect();
        let mut expected: Vec<usize> = Vec::new();
        for p in &pieces {
            let start = p.as_ptr() as usize;
            expected.extend(start / HUGE..=(start + p.len() - 1) / HUGE);
        }
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(pages, expected);
        let inside = |at: usize| pieces.iter().any(|p| p.as_ptr_range().contains(&(at as *const u8)));
        assert!(found.iter().all(|f| inside(f.0)));
        assert!(firsts([&mut Piece::new(5 << 20, Pages::Small).unwrap()].into_iter()).is_empty());
    }
}
