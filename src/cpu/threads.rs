//! A persistent pool of threads for short parallel loops, and safe ways to share a slice between them.
//!
//! The work is cut into tasks by its shape, never by the number of threads, and each task writes its own part: the result
//! does not depend on which thread ran which task. Workers spin for a short while between jobs, because a training step
//! has thousands of them a few microseconds apart, and then park.

use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Rounds of spinning before a worker parks: about 50 us.
const SPINS: u32 = 2_000;

/// `state` = sequence number of the job (high half), open bit, number of workers inside the job (low bits).
const OPEN: u64 = 1 << 31;
const ACTIVE: u64 = OPEN - 1;

type Task<'a> = dyn Fn(usize) + Sync + 'a;

struct Job {
    /// The closure of the open job; its lifetime is erased, see `Pool::run`.
    task: *const Task<'static>,
    n_tasks: usize,
}

struct Shared {
    state: AtomicU64,
    job: Mutex<Job>,
    next: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    /// Number of parked workers, under the lock that guards parking.
    parked: Mutex<usize>,
    wake: Condvar,
    n_parked: AtomicUsize,
}

// SAFETY: `Job::task` is a pointer to a `Sync` closure, used by other threads only while `Pool::run` keeps it alive.
unsafe impl Send for Shared {}
// SAFETY: as above; every other field is `Sync`.
unsafe impl Sync for Shared {}

/// A fixed set of threads; the caller of [`Pool::run`] is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One job at a time.
    running: Mutex<()>,
    /// Workers that are awake at once: what is more than the cores can run only takes turns with the others, and each job would wake them all.
    most_awake: usize,
}

/// Workers that a job wakes for each core, at most.
const AWAKE: usize = 2;

thread_local! {
    /// Set while this thread runs a task: a nested job runs inline.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in a task is re-raised by `run`; the guarded values stay meaningful.
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let no_job: &'static Task<'static> = &|_| {};
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: Mutex::new(Job { task: no_job, n_tasks: 0 }),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            parked: Mutex::new(0),
            wake: Condvar::new(),
            n_parked: AtomicUsize::new(0),
        });
        let mut workers = Vec::new();
        for i in 1..threads.max(1) {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("cpu-{i}"));
            workers.push(builder.spawn(move || worker(&shared))?);
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let most_awake = workers.len().min(AWAKE * cores);
        Ok(Self { shared, workers, running: Mutex::new(()), most_awake })
    }

    /// Number of threads, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0)` to `task(n_tasks - 1)`, each once, on all threads, and returns when all have returned.
    ///
    /// # Panics
    /// If a task panics.
    pub fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        if n_tasks <= 1 || self.workers.is_empty() || INSIDE.get() {
            return (0..n_tasks).for_each(task);
        }
        let _running = lock(&self.running);
        let s = &*self.shared;
        {
            let mut job = lock(&s.job);
            // SAFETY: only the lifetime changes. The pointer is used by workers that joined the open job, and this function
            // closes the job and waits for them before it returns, so the closure outlives every use.
            job.task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
            job.n_tasks = n_tasks;
        }
        s.next.store(0, Ordering::Relaxed);
        let sequence = (s.state.load(Ordering::Relaxed) >> 32).wrapping_add(1) << 32;
        s.state.store(sequence | OPEN, Ordering::SeqCst);
        if s.n_parked.load(Ordering::SeqCst) > 0 {
            let parked = lock(&s.parked);
            let wanted = self.most_awake.min(n_tasks - 1).saturating_sub(self.workers.len() - *parked);
            (0..wanted.min(*parked)).for_each(|_| s.wake.notify_one());
        }
        INSIDE.set(true);
        // The job must be closed and left by all workers before a panic may unwind through this frame.
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drain(s, task, n_tasks)));
        INSIDE.set(false);
        if result.is_err() {
            s.next.store(n_tasks, Ordering::Relaxed);
        }
        s.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while s.state.load(Ordering::Acquire) & ACTIVE != 0 {
            spins += 1;
            if spins > SPINS {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        if let Err(panic) = result {
            s.panicked.store(false, Ordering::Relaxed);
            std::panic::resume_unwind(panic);
        }
        assert!(!s.panicked.swap(false, Ordering::Relaxed), "a task of the thread pool panicked, see above");
    }

    /// Calls `f(i, part i)` for every part of `split`, in parallel.
    pub fn split<S: Split>(&self, split: S, f: impl Fn(usize, S::Part) + Sync) {
        // SAFETY: `run` calls each index once.
        self.run(split.parts(), &|i| f(i, unsafe { split.part(i) }));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _parked = lock(&self.shared.parked);
            self.shared.wake.notify_all();
        }
        for w in self.workers.drain(..) {
            // A worker catches the panics of its tasks, so joining cannot fail for a reason worth a second panic.
            let _ = w.join();
        }
    }
}

fn drain(s: &Shared, task: &Task<'_>, n_tasks: usize) {
    loop {
        let i = s.next.fetch_add(1, Ordering::Relaxed);
        if i >= n_tasks {
            return;
        }
        task(i);
    }
}

fn worker(s: &Shared) {
    INSIDE.set(true);
    let mut seen = 0;
    loop {
        // Wait for an open job with a new sequence number: spin, then park.
        let mut spins = 0;
        let state = loop {
            let state = s.state.load(Ordering::Acquire);
            if state & OPEN != 0 && state >> 32 != seen {
                break state;
            }
            if s.stop.load(Ordering::Relaxed) {
                return;
            }
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
                continue;
            }
            let mut parked = lock(&s.parked);
            *parked += 1;
            s.n_parked.store(*parked, Ordering::SeqCst);
            let idle = || {
                let state = s.state.load(Ordering::SeqCst);
                (state & OPEN == 0 || state >> 32 == seen) && !s.stop.load(Ordering::SeqCst)
            };
            while idle() {
                parked = s.wake.wait(parked).unwrap_or_else(PoisonError::into_inner);
            }
            *parked -= 1;
            s.n_parked.store(*parked, Ordering::SeqCst);
            spins = 0;
        };
        // Join, unless the job was closed in between.
        if s.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            continue;
        }
        seen = state >> 32;
        let (task, n_tasks) = {
            let job = lock(&s.job);
            (job.task, job.n_tasks)
        };
        let run = std::panic::AssertUnwindSafe(|| {
            // SAFETY: this worker is counted in `state`, and `Pool::run` keeps the closure until the count is zero.
            drain(s, unsafe { &*task }, n_tasks);
        });
        if std::panic::catch_unwind(run).is_err() {
            s.panicked.store(true, Ordering::Relaxed);
            s.next.store(n_tasks, Ordering::Relaxed);
        }
        s.state.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Something mutable cut into parts that do not overlap.
pub trait Split: Sync {
    /// One part.
    type Part;

    /// Number of parts.
    fn parts(&self) -> usize;

    /// Part `i`.
    ///
    /// # Safety
    /// Each index is taken at most once.
    unsafe fn part(&self, i: usize) -> Self::Part;
}

/// A mutable slice cut into pieces of equal length; the last one may be shorter.
pub struct Chunked<'a, T> {
    start: *mut T,
    len: usize,
    size: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]` whose parts go to different threads, each to one.
unsafe impl<T: Send> Sync for Chunked<'_, T> {}

/// `slice` in pieces of `size` elements.
pub fn chunked<T>(slice: &mut [T], size: usize) -> Chunked<'_, T> {
    assert!(size > 0, "chunked: pieces of no element");
    Chunked { start: slice.as_mut_ptr(), len: slice.len(), size, slice: PhantomData }
}

impl<'a, T: Send> Split for Chunked<'a, T> {
    type Part = &'a mut [T];

    fn parts(&self) -> usize {
        self.len.div_ceil(self.size)
    }

    unsafe fn part(&self, i: usize) -> Self::Part {
        let first = i * self.size;
        assert!(first < self.len, "part {i} of {}", self.parts());
        // SAFETY: `first < len`, the length is cut at the end, and the pieces of different indices do not overlap.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), self.size.min(self.len - first)) }
    }
}

macro_rules! split_tuple {
    ($($name:ident $at:tt),+) => {
        impl<$($name: Split),+> Split for ($($name,)+) {
            type Part = ($($name::Part,)+);

            fn parts(&self) -> usize {
                let parts = self.0.parts();
                $(assert_eq!(parts, self.$at.parts(), "slices cut into different numbers of parts");)+
                parts
            }

            unsafe fn part(&self, i: usize) -> Self::Part {
                // SAFETY: the caller's promise holds for each member.
                unsafe { ($(self.$at.part(i),)+) }
            }
        }
    };
}
split_tuple!(A 0, B 1);
split_tuple!(A 0, B 1, C 2);
split_tuple!(A 0, B 1, C 2, D 3);

/// A pointer that several tasks write through, each to elements of its own.
#[derive(Clone, Copy)]
pub struct SharedMut<T>(*mut T);

// SAFETY: whoever dereferences the pointer promises that no other task touches the same elements.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    /// The start of `slice`.
    pub fn new(slice: &mut [T]) -> Self {
        Self(slice.as_mut_ptr())
    }

    /// The pointer.
    pub fn get(self) -> *mut T {
        self.0
    }

    /// `len` elements from `first`.
    ///
    /// # Safety
    /// They lie inside the slice this was made from, which outlives `'a`, and no other task uses them meanwhile.
    pub unsafe fn slice<'a>(self, first: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(first), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            for n in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                pool.run(n, &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads, {n} tasks");
            }
        }
    }

    #[test]
    fn parked_workers_wake_up_and_nested_jobs_run_inline() {
        let pool = Pool::new(3).unwrap();
        let mut x = vec![0u32; 1000];
        for round in 1..=20 {
            if round % 5 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            pool.split(chunked(&mut x, 10), |_, part| {
                let sum = AtomicUsize::new(0);
                pool.run(3, &|i| {
                    sum.fetch_add(i, Ordering::Relaxed);
                });
                assert_eq!(sum.load(Ordering::Relaxed), 3);
                part.iter_mut().for_each(|v| *v += 1);
            });
            assert!(x.iter().all(|&v| v == round));
        }
    }

    /// Threads beyond what the cores run sleep on: a job does not wake them.
    #[test]
    fn a_job_wakes_no_more_workers_than_cores_can_run() {
        for n_tasks in [2, 3, 4000] {
            // Who was woken for one job may come to the next one besides: a pool for each.
            let pool = Pool::new(100).unwrap();
            while pool.shared.n_parked.load(Ordering::SeqCst) < 99 {
                std::thread::yield_now();
            }
            let ran = Mutex::new(std::collections::HashSet::new());
            pool.run(n_tasks, &|_| {
                std::thread::yield_now();
                lock(&ran).insert(std::thread::current().id());
            });
            // One worker may have counted itself as asleep and find the job before it is.
            let (ran, most) = (lock(&ran).len(), 2 + pool.most_awake.min(n_tasks - 1));
            assert!((1..=most).contains(&ran), "{ran} threads ran {n_tasks} tasks, expected {most} at most");
        }
    }

    #[test]
    fn a_panic_in_a_task_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(2).unwrap();
        let panicking = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(64, &|i| assert!(i != 17, "the panic this test asks for"));
        }));
        assert!(panicking.is_err());
        let n = AtomicUsize::new(0);
        pool.run(64, &|_| {
            n.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(n.load(Ordering::Relaxed), 64);
    }
}
