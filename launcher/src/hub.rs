//! The hub of the control channel: ranks meet here, exchange small values, show that they live, and learn why a run ends.
//!
//! It stands in ringrun, or in rank 0 where another launcher started the ranks. It judges nothing: what happens is told to its owner
//! as an [`Event`], who says what becomes of it ([`Hub::fail`], [`Hub::stop`]).

mod watch;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::beacon::Position;
use crate::cause::Cause;
use crate::protocol::{Hello, LIMIT, Message};
use crate::secret::{PATIENCE, Secret};
use watch::{lost_each_other, watch_over};

/// Without a sign of life for so long, a rank counts as dead.
pub const SILENCE: Duration = Duration::from_secs(5);
/// How long ranks may take to come.
const MEETING: Duration = Duration::from_secs(300);
/// How often the owner is told of who is missing, and of strangers.
const REMINDER: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_millis(250);
/// A stranger that calls again and again for so long is a rank of ours with another secret: that of another run has found its own hub by then.
const PERSISTENT: Duration = Duration::from_secs(8);
/// Between two of its calls at most.
const OFTEN: Duration = Duration::from_secs(4);

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A rank came.
    Joined(usize),
    /// These have not come yet.
    Missing(Vec<usize>),
    /// From this address something called that speaks as a rank does, and does not know the secret.
    Stranger(String),
    /// A rank's connection ended; with the exit code that it announced, if it said goodbye.
    Closed(usize, Option<u8>),
    /// Something went wrong, as a rank says or as the hub sees.
    Failed(Cause),
    /// A rank gave no sign of life for [`SILENCE`].
    Silent(usize),
    /// A checkpoint of this step is complete.
    Saved(u64),
}

/// What people are told of a stranger.
pub fn a_stranger(from: &str) -> String {
    format!(
        "a rank at {from} does not know the secret of this run: RINGTUNE_SECRET has to be the same on all machines, and two runs on one machine \
         need a MASTER_PORT each"
    )
}

struct Member {
    out: TcpStream,
    hello: Hello,
    beat: Instant,
    /// Where it was when that was last said; none before it has moved.
    position: Option<Position>,
    moves: u64,
    /// The next exchange that it will call.
    next: u64,
    /// How often it has asked for sums or weights since the one before.
    asked: u64,
    goodbye: Option<u8>,
    closed: bool,
}

#[derive(Default)]
struct Round {
    parts: BTreeMap<usize, Part>,
}

/// What a rank brings to an exchange.
struct Part {
    what: String,
    /// How often it has asked for sums or weights since the exchange before.
    asked: u64,
    own: Vec<u8>,
}

struct State {
    members: Vec<Option<Member>>,
    /// Parents of ranks on other machines, who are told why the run ends.
    watchers: Vec<TcpStream>,
    /// How many of them have been told.
    told: usize,
    rounds: BTreeMap<u64, Round>,
    met: Option<Instant>,
    /// When a stranger was told last.
    stranger: Option<Instant>,
    /// Since when strangers have been calling from an address, and when they did last.
    strangers: BTreeMap<IpAddr, (Instant, Instant)>,
    /// When a beacon of any rank moved last.
    moved: Instant,
    failed: Option<Cause>,
}

type Notify = Box<dyn Fn(Event) + Send + Sync>;

struct Shared {
    size: usize,
    /// By which name or address ranks elsewhere were told to find the hub.
    called: String,
    secret: Secret,
    hang: Duration,
    state: Mutex<State>,
    /// A connection was closed, or a parent of ranks was told.
    changed: Condvar,
    /// Which attempt of a run the hub is of.
    attempt: AtomicU32,
    /// Nobody is let in any more.
    shut: AtomicBool,
    notify: Notify,
}

/// The hub. The thread that lets ranks in ends with [`Hub::shut`]; the others live as long as ranks are connected, or the process.
#[derive(Clone)]
pub struct Hub {
    shared: Arc<Shared>,
    address: SocketAddr,
}

impl Hub {
    /// Listens for `size` ranks that know the secret; those elsewhere call it by the name or address `called`. `hang`: how long no rank
    /// may move before that is a failure.
    ///
    /// # Errors
    /// If the listener has no address, or no thread can be started.
    pub fn start(
        listener: TcpListener,
        called: &str,
        size: usize,
        secret: &Secret,
        hang: Duration,
        notify: impl Fn(Event) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let state = State {
            members: (0..size).map(|_| None).collect(),
            watchers: Vec::new(),
            told: 0,
            rounds: BTreeMap::new(),
            met: None,
            stranger: None,
            strangers: BTreeMap::new(),
            moved: Instant::now(),
            failed: None,
        };
        let shared = Arc::new(Shared {
            size,
            called: called.into(),
            secret: secret.clone(),
            hang,
            state: Mutex::new(state),
            changed: Condvar::new(),
            attempt: AtomicU32::new(0),
            shut: AtomicBool::new(false),
            notify: Box::new(notify),
        });
        let address = listener.local_addr()?;
        let accept = Arc::clone(&shared);
        std::thread::Builder::new().name("hub".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                if accept.shut.load(SeqCst) {
                    return;
                }
                let shared = Arc::clone(&accept);
                // Without a thread the stranger is turned away; a rank tries again or is missed.
                let _ = std::thread::Builder::new().name("hub-rank".into()).spawn(move || serve(&shared, stream));
            }
        })?;
        let watch = Arc::clone(&shared);
        std::thread::Builder::new().name("hub-watch".into()).spawn(move || watch_over(&watch))?;
        Ok(Self { shared, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Gives the port back, for the hub of another attempt.
    pub fn shut(&self) {
        self.shared.shut.store(true, SeqCst);
        // Wakes the thread that waits for callers, and holds the port.
        let (ip, port) = (self.address.ip(), self.address.port());
        let ip = if ip.is_unspecified() { IpAddr::from(Ipv4Addr::LOCALHOST) } else { ip };
        let _ = TcpStream::connect_timeout(&(ip, port).into(), PATIENCE);
    }

    /// Tells every rank why the run ends, those that come later too.
    pub fn fail(&self, cause: &Cause) {
        let mut state = self.shared.lock();
        if state.failed.is_none() {
            state.failed = Some(cause.clone());
            let message = Message::Failed(cause.clone());
            state.tell_all(&message);
            let State { watchers, told, .. } = &mut *state;
            *told += watchers.iter_mut().filter_map(|to| message.write(to).ok()).count();
        }
    }

    /// Asks every rank to end as after a signal. Whether any could be asked.
    pub fn stop(&self, signal: i32) -> bool {
        self.shared.lock().tell_all(&Message::Stop(signal)) > 0
    }

    /// Where a rank was when it last said so.
    pub fn position(&self, rank: usize) -> Option<Position> {
        self.shared.lock().members.get(rank)?.as_ref().and_then(|m| m.position)
    }

    /// The machine of a rank, once it has come.
    pub fn host(&self, rank: usize) -> Option<String> {
        self.shared.lock().members.get(rank)?.as_ref().map(|m| m.hello.host.clone())
    }

    /// Waits until the connections of all other ranks are closed, at most so long: who holds the hub leaves last.
    pub fn leave_after(&self, own: usize, limit: Duration) {
        let until = Instant::now() + limit;
        let open = |state: &State| {
            state.members.iter().enumerate().any(|(r, m)| r != own && m.as_ref().is_some_and(|m| !m.closed))
        };
        let mut state = self.shared.lock();
        while open(&state) && Instant::now() < until {
            let wait = until.saturating_duration_since(Instant::now());
            state = self.shared.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The parents of ranks that watch another attempt are turned away. Without a word it is the first one, 0.
    pub fn is_of_attempt(&self, number: u32) {
        self.shared.attempt.store(number, SeqCst);
    }

    /// Waits until so many parents of ranks on other machines know why the run has failed, at most so long.
    pub fn wait_until_told(&self, parents: usize, limit: Duration) {
        let until = Instant::now() + limit;
        let mut state = self.shared.lock();
        while state.told < parents && Instant::now() < until {
            let wait = until.saturating_duration_since(Instant::now());
            state = self.shared.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All clocks start anew: the ranks, or the whole machine, were suspended.
    pub fn wake(&self) {
        self.shared.lock().wake();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The number of ranks that were told.
    fn tell_all(&mut self, message: &Message) -> usize {
        let open = self.members.iter_mut().flatten().filter(|m| !m.closed);
        open.filter_map(|m| message.write(&mut m.out).ok()).count()
    }

    fn wake(&mut self) {
        let now = Instant::now();
        self.moved = now;
        self.members.iter_mut().flatten().for_each(|m| m.beat = now);
    }

    fn cause(&self, rank: usize, text: String, code: u8) -> Event {
        let member = self.members[rank].as_ref();
        let host = member.map_or_else(|| "unknown".into(), |m| m.hello.host.clone());
        Event::Failed(Cause { rank, host, position: member.and_then(|m| m.position), text, code })
    }
}

/// One connection, from its hello to its end.
fn serve(shared: &Shared, mut stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    // A rank that reads nothing must not hold up the others.
    let _ = stream.set_write_timeout(Some(PATIENCE));
    match shared.secret.answer(&mut stream) {
        Ok(true) => {}
        Ok(false) => return stranger(shared, &stream),
        Err(_) => return,
    }
    let _ = stream.set_read_timeout(Some(PATIENCE));
    let Ok(Some(Message::Hello(hello))) = Message::read(&mut stream, LIMIT) else { return };
    if let Some(rank) = hello["observes"].as_u64() {
        return observe(shared, &mut stream, &hello, rank as usize);
    }
    if let Some(attempt) = hello["watches"].as_u64() {
        return watched_from_elsewhere(shared, stream, &hello, attempt);
    }
    let Some(rank) = admit(shared, &stream, &hello) else { return };
    (shared.notify)(Event::Joined(rank));
    let _ = stream.set_read_timeout(None);
    while let Ok(Some(message)) = Message::read(&mut stream, LIMIT) {
        if let Some(event) = receive(shared, rank, message) {
            (shared.notify)(event);
        }
    }
    let goodbye = shared.lock().members[rank].as_mut().and_then(|m| {
        m.closed = true;
        m.goodbye
    });
    shared.changed.notify_all();
    (shared.notify)(Event::Closed(rank, goodbye));
}

/// It may be a rank of another run, or one of ours with another secret: its word ends nothing, unless it does not give up while ranks are
/// missing.
fn stranger(shared: &Shared, stream: &TcpStream) {
    let Ok(from) = stream.peer_addr().map(|address| address.ip()) else { return };
    let mut state = shared.lock();
    if state.met.is_some() || state.failed.is_some() {
        return;
    }
    let now = Instant::now();
    state.strangers.retain(|_, (_, last)| last.elapsed() < OFTEN);
    let (first, last) = state.strangers.entry(from).or_insert((now, now));
    *last = now;
    let event = if first.elapsed() > PERSISTENT
        && let Some(missing) = state.members.iter().position(Option::is_none)
    {
        let text = format!("did not come; {}", a_stranger(&from.to_string()));
        state.strangers.clear();
        state.cause(missing, text, 1)
    } else if state.stranger.is_none_or(|told| told.elapsed() > REMINDER) {
        state.stranger = Some(now);
        Event::Stranger(from.to_string())
    } else {
        return;
    };
    drop(state);
    (shared.notify)(event);
}

/// The parent of a rank that stands elsewhere says what became of it.
fn observe(shared: &Shared, stream: &mut TcpStream, hello: &Value, rank: usize) {
    if hello["size"].as_u64() == Some(shared.size as u64)
        && rank < shared.size
        && let Ok(Some(Message::Failed(cause))) = Message::read(stream, LIMIT)
    {
        (shared.notify)(Event::Failed(Cause { rank, ..cause }));
    }
}

/// The parent of ranks that stand elsewhere is told why the run ends, and says where they are.
fn watched_from_elsewhere(shared: &Shared, mut stream: TcpStream, hello: &Value, attempt: u64) {
    let Ok(mut out) = stream.try_clone() else { return };
    let ours = u64::from(shared.attempt.load(SeqCst)) == attempt && hello["size"].as_u64() == Some(shared.size as u64);
    if !ours || Message::Known.write(&mut out).is_err() {
        return;
    }
    {
        let mut state = shared.lock();
        if let Some(cause) = &state.failed {
            let told = Message::Failed(cause.clone()).write(&mut out).is_ok();
            state.told += usize::from(told);
            shared.changed.notify_all();
            return;
        }
        state.watchers.push(out);
    }
    let _ = stream.set_read_timeout(None);
    while let Ok(Some(message)) = Message::read(&mut stream, LIMIT) {
        let Message::Place { rank, position } = message else { continue };
        let mut state = shared.lock();
        if let Some(Some(member)) = usize::try_from(rank).ok().and_then(|rank| state.members.get_mut(rank)) {
            member.position = Some(Position::unpack(position));
        }
    }
}

/// By which name or address others reach a rank, which does not know that itself. One on the hub's own machine may have come by an
/// address that leads nowhere else, as the loopback one does: it is where the hub is found.
fn seen_as(called: &str, stream: &TcpStream) -> Option<String> {
    let (from, to) = (stream.peer_addr().ok()?.ip(), stream.local_addr().ok()?.ip());
    let here = from.is_loopback() || from == to;
    let name = if here && !called.is_empty() { called.to_string() } else { from.to_string() };
    Some(if name.contains(':') && !name.starts_with('[') { format!("[{name}]") } else { name })
}

/// Takes a rank in if it is one of as many and nobody has its number.
fn admit(shared: &Shared, stream: &TcpStream, hello: &Value) -> Option<usize> {
    if hello["size"].as_u64() != Some(shared.size as u64) {
        return None;
    }
    let mut hello = Hello::from_json(hello)?;
    let (rank, mut out) = (hello.rank, stream.try_clone().ok()?);
    let seen = seen_as(&shared.called, stream)?;
    hello.listens.iter_mut().for_each(|door| {
        if let Some(port) = door.strip_prefix('*') {
            *door = format!("{seen}{port}");
        }
    });
    let mut state = shared.lock();
    if rank >= shared.size || state.members[rank].is_some() || Message::Known.write(&mut out).is_err() {
        return None;
    }
    if let Some(cause) = &state.failed {
        let _ = Message::Failed(cause.clone()).write(&mut out);
    }
    let member = Member {
        out,
        hello,
        beat: Instant::now(),
        position: None,
        moves: 0,
        next: 0,
        asked: 0,
        goodbye: None,
        closed: false,
    };
    state.members[rank] = Some(member);
    if state.members.iter().all(Option::is_some) {
        let all: Vec<Value> = state.members.iter().flatten().map(|m| m.hello.to_json()).collect();
        state.met = Some(Instant::now());
        state.wake();
        state.tell_all(&Message::Welcome(Value::Array(all)));
    }
    Some(rank)
}

fn receive(shared: &Shared, rank: usize, message: Message) -> Option<Event> {
    let mut state = shared.lock();
    let member = state.members[rank].as_mut()?;
    member.beat = Instant::now();
    match message {
        Message::Beat { position, moves, next, asked } => {
            if moves > 0 {
                member.position = Some(Position::unpack(position));
            }
            if member.moves != moves {
                member.moves = moves;
                state.moved = Instant::now();
            }
            if let Some(member) = &mut state.members[rank] {
                (member.next, member.asked) = (next, asked);
            }
            lost_each_other(&state)
        }
        Message::Saved(step) => Some(Event::Saved(step)),
        Message::Failed(cause) => Some(Event::Failed(Cause { rank, ..cause })),
        Message::Goodbye(code) => {
            member.goodbye = Some(code);
            None
        }
        Message::Gather { seq, what, asked, own } => gather(&mut state, rank, seq, Part { what, asked, own }),
        _ => None,
    }
}

/// Adds a rank's part of an exchange; all get all of them once they are there.
fn gather(state: &mut State, rank: usize, seq: u64, part: Part) -> Option<Event> {
    let round = state.rounds.entry(seq).or_default();
    let what = part.what.clone();
    let other = round.parts.iter().find(|(_, other)| other.what != what).map(|(r, other)| (*r, other.what.clone()));
    round.parts.insert(rank, part);
    if let Some((other, name)) = other {
        let text =
            format!("calls \"{what}\" as exchange {seq}, rank {other} calls \"{name}\": they have lost each other");
        return Some(state.cause(rank, text, 1));
    }
    if let Some(event) = lost_each_other(state) {
        return Some(event);
    }
    if state.rounds.get(&seq).is_some_and(|round| round.parts.len() == state.members.len()) {
        let parts = state.rounds.remove(&seq).map(|r| r.parts).unwrap_or_default();
        state.tell_all(&Message::Gathered { seq, all: parts.into_values().map(|part| part.own).collect() });
        return None;
    }
    let gone = (0..state.members.len()).find(|&r| state.members[r].as_ref().is_some_and(|m| m.goodbye.is_some()))?;
    Some(state.cause(gone, format!("has ended, and rank {rank} waits for it in \"{what}\""), 1))
}
