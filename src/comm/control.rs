//! The control channel of a rank: small values, heartbeats, the first cause; its thread ends the process when the run has failed.
//!
//! A rank ends by this thread calling `_exit`, whatever the others are blocked in.

use std::cell::Cell;
use std::net::TcpStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use launcher::beacon::{Beacon, Position};
use launcher::cause::{BYSTANDER, Cause};
use launcher::hub::Hub;
use launcher::protocol::{LIMIT, Message};

use super::fault::Fault;
use crate::error::{Error, Kind, Result};
use crate::files::remove_pending;
use crate::{machine, panics, say};

/// What the collectives ask of whatever joins the ranks.
pub trait Control {
    /// Everyone's bytes, by rank.
    ///
    /// # Errors
    /// If a peer is gone.
    fn gather(&self, what: &str, own: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// A connection to a peer is lost: waits for the one who knows why, and gives the error back where nobody does.
    fn lost(&self, e: Error) -> Error {
        e
    }

    /// See [`super::Communicator::at`].
    fn at(&self, _position: Position) {}

    /// Sums or weights are asked for now, as on every other rank at this place between two exchanges.
    fn asks(&self) {}

    /// See [`super::Communicator::gain`].
    fn gain(&self) -> f32 {
        1.0
    }

    /// See [`super::Communicator::aside`].
    fn aside(&self) -> Option<Arc<dyn Aside>> {
        None
    }
}

/// Exchanges between threads that write, one on each rank, beside those of the main threads and in an order of their own.
pub trait Aside: Send + Sync {
    /// Everyone's bytes, by rank.
    ///
    /// # Errors
    /// If a peer is gone, or this rank gave up meanwhile.
    fn gather(&self, what: &str, own: &[u8], given_up: &AtomicBool) -> Result<Vec<Vec<u8>>>;
}

/// How often a rank shows that it lives.
const BEAT: Duration = Duration::from_secs(1);
/// How long whoever lost a peer waits to hear why.
const EXPLANATION: Duration = Duration::from_secs(10);
/// How long a failed run lets a checkpoint be finished.
const LAST_WRITE: Duration = Duration::from_secs(60);

/// Held, shared, by who writes a checkpoint.
static WRITING: RwLock<()> = RwLock::new(());

/// While it is held, a run that fails elsewhere waits with this rank's end: a checkpoint that is being written is finished.
pub fn finish_writing() -> RwLockReadGuard<'static, ()> {
    WRITING.read().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the hub that the checkpoint of a step is complete: a run that makes progress may be started again as often as it fails.
pub fn saved(step: u64) {
    if let Some(own) = OWN.get() {
        let _ = own.send(&Message::Saved(step)); // Without a hub nobody counts.
    }
}

type Suspicion = Box<dyn Fn() -> bool + Send + Sync>;

/// See [`suspect`].
static SUSPICION: OnceLock<Suspicion> = OnceLock::new();

/// From now on an error of this rank is first taken for the trace of another one's end where `lost` says so: whoever knows that ends this
/// process within ten seconds.
pub fn suspect(lost: impl Fn() -> bool + Send + Sync + 'static) {
    let _ = SUSPICION.set(Box::new(lost)); // A process has one communicator.
}

/// Whether this rank has said goodbye or why it ends, or is being ended: another thread sees to the rest.
pub fn is_ending() -> bool {
    OWN.get().is_some_and(|own| own.ended.load(SeqCst))
}

/// Ends the run from a thread that cannot give its error back: says what went wrong here and ends this process.
pub fn end_here(text: &str) -> ! {
    while is_ending() {
        std::thread::park(); // The control thread is about to end this process.
    }
    say::error(text);
    if let Some(own) = OWN.get() {
        own.fail(text.into(), 1);
        own.leave_last();
    }
    wait_for_writer();
    remove_pending();
    // SAFETY: ends the process without running anything else of it, which is the point.
    unsafe { libc::_exit(1) }
}

/// Exchanges beside those of the main thread have numbers from here on.
const ASIDE: u64 = 1 << 63;
/// How often a thread that waits for other ranks looks whether it still has to.
const LOOK: Duration = Duration::from_millis(20);

/// What the threads of a rank share.
struct Shared {
    rank: usize,
    out: Mutex<TcpStream>,
    beacon: Beacon,
    /// Where it was when it last said so, packed.
    said: AtomicU64,
    /// The next exchange, in the upper half, and how often sums or weights were asked for since the one before.
    order: AtomicU64,
    /// It has said goodbye or why it ends: what the hub says does not matter any more.
    ended: AtomicBool,
    /// The hub, where this rank holds it.
    hub: Option<Hub>,
    /// Whether the launcher says causes itself.
    launcher_speaks: bool,
}

/// A rank's end of the channel.
pub struct Channel {
    shared: Arc<Shared>,
    gathered: Receiver<(u64, Vec<Vec<u8>>)>,
    sequence: Cell<u64>,
    fault: Option<Fault>,
    /// It has come: a process that is stopped and continued is not stopped again.
    acted: Cell<bool>,
    aside: Arc<Beside>,
}

/// The exchanges of the threads that write.
struct Beside {
    shared: Arc<Shared>,
    gathered: Receiver<(u64, Vec<Vec<u8>>)>,
    sequence: AtomicU64,
}

impl Aside for Beside {
    fn gather(&self, what: &str, own: &[u8], given_up: &AtomicBool) -> Result<Vec<Vec<u8>>> {
        let seq = ASIDE | self.sequence.fetch_add(1, SeqCst);
        let message = Message::Gather { seq, what: what.into(), asked: 0, own: own.to_vec() };
        let gone = || Error::new(format!("the control channel is lost in \"{what}\""));
        self.shared.send(&message).map_err(|_| gone())?;
        loop {
            match self.gathered.recv_timeout(LOOK) {
                Ok((found, all)) if found == seq => return Ok(all),
                // Of an exchange that was given up.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) if !given_up.load(SeqCst) && !self.shared.ended.load(SeqCst) => {}
                Err(_) => return Err(gone()),
            }
        }
    }
}

/// Of the process, for its panic hook.
static OWN: OnceLock<Arc<Shared>> = OnceLock::new();

impl Channel {
    /// Takes over a connection on which all ranks were welcomed.
    ///
    /// # Errors
    /// If no thread can be started, or the fault that is asked for makes no sense.
    pub fn start(
        rank: usize,
        stream: TcpStream,
        beacon: Beacon,
        hub: Option<Hub>,
        launcher_speaks: bool,
    ) -> Result<Self> {
        let fault = Fault::of(rank)?;
        let (from, out) = (stream.try_clone()?, Mutex::new(stream));
        let shared = Arc::new(Shared {
            rank,
            out,
            beacon,
            said: AtomicU64::new(0),
            order: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            hub,
            launcher_speaks,
        });
        let ((to, gathered), (to_aside, beside)) = (unbounded(), unbounded());
        let named = |name: &str| std::thread::Builder::new().name(name.into());
        let listener = Arc::clone(&shared);
        named("control").spawn(move || listen(&listener, from, &to, &to_aside))?;
        let beating = Arc::clone(&shared);
        named("heartbeat").spawn(move || {
            while beating.send(&beating.beat()).is_ok() {
                std::thread::sleep(BEAT);
            }
        })?;
        if OWN.set(Arc::clone(&shared)).is_ok() {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                if let Some(own) = OWN.get().filter(|_| !panics::is_caught()) {
                    let what = info.payload_as_str().unwrap_or("a panic");
                    let place = info.location().map_or(String::new(), |l| format!(" at {}:{}", l.file(), l.line()));
                    own.fail(format!("panicked{place}: {what}"), 1);
                }
                before(info);
            }));
        }
        let aside = Beside { shared: Arc::clone(&shared), gathered: beside, sequence: AtomicU64::new(0) };
        let (sequence, acted) = (Cell::new(0), Cell::new(false));
        Ok(Self { shared, gathered, sequence, fault, acted, aside: Arc::new(aside) })
    }

    /// The run has ended here; the others are told why, or that all is well.
    pub fn finish<T>(&self, result: &Result<T>) {
        match result {
            Ok(_) => self.shared.goodbye(0),
            Err(e) if e.kind() == Kind::Interrupted => self.shared.goodbye(e.exit_code()),
            // Who knows the cause ends this process soon.
            Err(e) if e.kind() == Kind::Bystander => std::thread::sleep(EXPLANATION),
            Err(e) => {
                if SUSPICION.get().is_some_and(|lost| lost()) {
                    std::thread::sleep(EXPLANATION);
                }
                self.shared.fail(e.to_string(), e.exit_code());
            }
        }
        self.shared.leave_last();
    }
}

impl Control for Rc<Channel> {
    fn gather(&self, what: &str, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let seq = self.sequence.get();
        self.sequence.set(seq + 1);
        let (_, asked) = order(self.shared.order.swap((seq + 1) << 32, SeqCst));
        let message = Message::Gather { seq, what: what.into(), asked, own: own.to_vec() };
        let gone = || self.lost(Error::new(format!("the control channel is lost in \"{what}\"")));
        // The hub may have to say where this rank was: here, not where its last heartbeat was.
        let at = self.shared.beacon.position().pack();
        if self.shared.said.swap(at, SeqCst) != at {
            self.shared.send(&self.shared.beat()).map_err(|_| gone())?;
        }
        self.shared.send(&message).map_err(|_| gone())?;
        let (found, all) = self.gathered.recv().map_err(|_| gone())?;
        assert_eq!(found, seq, "exchanges come in their order");
        Ok(all)
    }

    fn lost(&self, e: Error) -> Error {
        std::thread::sleep(EXPLANATION);
        e
    }

    fn at(&self, position: Position) {
        self.shared.beacon.set(position);
        if let Some(fault) = self.fault.filter(|fault| !self.acted.get() && fault.is_at(position)) {
            self.acted.set(true);
            fault.act();
            if fault.strays() {
                // The others do not call it: the hub says so, and this process ends in here.
                let _ = self.gather("an exchange that RINGTUNE_FAULT asked for", &[]);
            }
        }
    }

    fn asks(&self) {
        self.shared.order.fetch_add(1, SeqCst);
    }

    fn aside(&self) -> Option<Arc<dyn Aside>> {
        Some(Arc::clone(&self.aside) as Arc<dyn Aside>)
    }

    fn gain(&self) -> f32 {
        self.fault.map_or(1.0, |fault| fault.gain(self.shared.beacon.position().step))
    }
}

/// The next exchange, and how often sums or weights were asked for since the one before.
fn order(packed: u64) -> (u64, u64) {
    (packed >> 32, packed & u64::from(u32::MAX))
}

impl Shared {
    fn send(&self, message: &Message) -> std::io::Result<()> {
        message.write(&mut *self.out.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn beat(&self) -> Message {
        let (next, asked) = order(self.order.load(SeqCst));
        Message::Beat { position: self.beacon.position().pack(), moves: self.beacon.moves(), next, asked }
    }

    /// Says what went wrong here, once.
    fn fail(&self, text: String, code: u8) {
        if self.ended.swap(true, SeqCst) {
            return;
        }
        let position = Some(self.beacon.position());
        let cause = Cause { rank: self.rank, host: machine::host(), position, text, code };
        let _ = self.send(&Message::Failed(cause)); // Without a hub nobody is left to be told.
    }

    fn goodbye(&self, code: u8) {
        self.ended.store(true, SeqCst);
        // Where it was last is said too; a hub that is gone needs no goodbye.
        let _ = self.send(&self.beat()).and_then(|()| self.send(&Message::Goodbye(code)));
    }

    /// Who holds the hub lets the others read what it said.
    fn leave_last(&self) {
        if let Some(hub) = &self.hub {
            hub.leave_after(self.rank, EXPLANATION);
        }
    }
}

/// Reads what the hub says, to the end.
fn listen(shared: &Shared, mut from: TcpStream, to: &Sender<(u64, Vec<Vec<u8>>)>, aside: &Sender<(u64, Vec<Vec<u8>>)>) {
    loop {
        match Message::read(&mut from, LIMIT) {
            // Nobody waits for it once the main thread has ended.
            Ok(Some(Message::Gathered { seq, all })) => drop(if seq < ASIDE { to } else { aside }.send((seq, all))),
            // Who holds the hub has said it there.
            Ok(Some(Message::Failed(cause))) => {
                end(shared, &cause.line(), !shared.launcher_speaks && shared.hub.is_none());
            }
            // SAFETY: a signal to this very process, whose handlers it meets as if somebody had sent it.
            Ok(Some(Message::Stop(signal))) => drop(unsafe { libc::kill(libc::getpid(), signal) }),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                let gone =
                    if shared.launcher_speaks { "the launcher is gone" } else { "rank 0 is gone: connection closed" };
                return end(shared, gone, true);
            }
        }
    }
}

/// Ends this process because of another one.
fn end(shared: &Shared, why: &str, show: bool) {
    if shared.ended.swap(true, SeqCst) {
        return;
    }
    if show {
        say::error(why);
    }
    if let Some(hub) = &shared.hub {
        hub.leave_after(shared.rank, Duration::from_secs(1));
    } else if !shared.launcher_speaks {
        // Leaving at once, other launchers blame whoever left first.
        std::thread::sleep(Duration::from_secs(1));
    }
    wait_for_writer();
    remove_pending();
    // SAFETY: ends the process without running anything else of it, which is the point.
    unsafe { libc::_exit(BYSTANDER.into()) }
}

/// Lets a checkpoint be finished that is being written.
fn wait_for_writer() {
    let until = Instant::now() + LAST_WRITE;
    let mut said = false;
    while Instant::now() < until && WRITING.try_write().is_err() {
        if !said {
            say::note("a checkpoint is being written: it is finished first");
            said = true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
