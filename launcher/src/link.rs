//! A ringrun whose hub is elsewhere keeps a connection to it: it hears there why the run has failed, whether or not its ranks can, and
//! says where they are, which the hub learns from nobody else once a rank no longer speaks.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;

use crate::beacon::Beacon;
use crate::cause::Cause;
use crate::protocol::{LIMIT, Message};
use crate::secret::{PATIENCE, Secret};
use crate::wrap::Report;

/// Between two tries to reach a hub that is not there yet.
const AGAIN: Duration = Duration::from_millis(100);
/// How often it says where its ranks are.
const PLACES: Duration = Duration::from_millis(500);

/// What came of the connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The hub knows this parent of ranks, and will say why the run ends.
    Open,
    /// The run has failed.
    Failed(Cause),
    /// The hub is gone, and did not say why.
    Gone,
    /// What listens there does not know the secret.
    Stranger,
}

/// The connection, until it is dropped.
pub struct Link {
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    over: AtomicBool,
    stream: Mutex<Option<TcpStream>>,
}

impl Link {
    /// Reaches the hub in threads of its own, as soon as it is there. `pages`: the ranks whose parent this is.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start(
        report: &Report,
        pages: Vec<(usize, Beacon)>,
        notify: impl Fn(Heard) + Send + 'static,
    ) -> io::Result<Self> {
        let state = Arc::new(State::default());
        let (report, shared) = (report.clone(), Arc::clone(&state));
        std::thread::Builder::new().name("link".into()).spawn(move || {
            let Some(stream) = reach(&report, &shared, &notify) else { return };
            let Ok(out) = stream.try_clone() else { return };
            let places = Arc::clone(&shared);
            // Without this thread the hub knows what the ranks say of themselves.
            let _ = std::thread::Builder::new().name("places".into()).spawn(move || say(&places, out, &pages));
            listen(&shared, stream, &notify);
        })?;
        Ok(Self { state })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.state.over.store(true, SeqCst);
        if let Some(stream) = self.state.stream.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = stream.shutdown(Shutdown::Both); // It wakes who reads; a connection that is gone needs none.
        }
    }
}

/// Tries until the hub of this attempt is there. None: it has another secret, or nobody wants it any more.
fn reach(report: &Report, state: &State, notify: &impl Fn(Heard)) -> Option<TcpStream> {
    while !state.over.load(SeqCst) {
        let Ok(mut stream) = TcpStream::connect(&report.address) else {
            std::thread::sleep(AGAIN);
            continue;
        };
        stream.set_write_timeout(Some(PATIENCE)).ok()?;
        match Secret::of(&report.secret).call(&mut stream, PATIENCE) {
            Ok(true) => {}
            // Its ranks say that they are not known there.
            Ok(false) => {
                notify(Heard::Stranger);
                return None;
            }
            Err(_) => {
                std::thread::sleep(AGAIN);
                continue;
            }
        }
        let hello = Message::Hello(json!({"size": report.size, "watches": report.attempt}));
        let limit = |time| stream.set_read_timeout(time).is_ok();
        let known = hello.write(&mut &stream).is_ok()
            && limit(Some(PATIENCE))
            && matches!(Message::read(&mut &stream, LIMIT), Ok(Some(Message::Known)))
            && limit(None);
        if !known {
            // The hub of the attempt before is about to give its port to the next one.
            std::thread::sleep(AGAIN);
            continue;
        }
        *state.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.try_clone().ok()?);
        // It may have been dropped meanwhile, when nothing to shut down was there.
        return (!state.over.load(SeqCst)).then_some(stream);
    }
    None
}

fn listen(state: &State, mut stream: TcpStream, notify: &impl Fn(Heard)) {
    notify(Heard::Open);
    loop {
        match Message::read(&mut stream, LIMIT) {
            Ok(Some(Message::Failed(cause))) => return notify(Heard::Failed(cause)),
            Ok(Some(_)) => {}
            Ok(None) | Err(_) if state.over.load(SeqCst) => return,
            Ok(None) | Err(_) => return notify(Heard::Gone),
        }
    }
}

fn say(state: &State, mut out: TcpStream, pages: &[(usize, Beacon)]) {
    while !state.over.load(SeqCst) {
        for (rank, page) in pages.iter().filter(|(_, page)| page.moves() > 0) {
            let place = Message::Place { rank: *rank as u64, position: page.position().pack() };
            if place.write(&mut out).is_err() {
                return;
            }
        }
        std::thread::sleep(PLACES);
    }
}
