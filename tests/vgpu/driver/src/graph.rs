//! Graphs, and the captures that record them from streams.
//!
//! A capture is a graph that grows. Each stream in it keeps its frontier: the nodes that its next operation will depend on.

use std::collections::BTreeSet;
use std::thread::ThreadId;

use crate::api::memory::set_live;
use crate::code::{Code, Result};
use crate::driver::{Origin, Recorded, State};
use crate::ffi::Handle;
use crate::op::Op;
use crate::queue::OpId;
use crate::report::say;

/// An operation of a graph.
#[derive(Clone)]
pub struct Node {
    /// What to do.
    pub op: Op,
    /// Nodes that have to end first; always earlier in the list.
    pub deps: Vec<usize>,
}

/// A graph, captured and not changed any more.
#[derive(Clone)]
pub struct Graph {
    /// Nodes, in an order that their edges allow.
    pub nodes: Vec<Node>,
    /// Context of the stream it was captured from.
    pub context: Handle,
}

/// A graph ready to be launched.
pub struct Executable {
    /// A copy of the graph's nodes.
    pub nodes: Vec<Node>,
    /// Context.
    pub context: Handle,
    /// End of its last launch: launches of one executable follow each other.
    pub last: Option<OpId>,
    /// Allocations left by a launch are freed by the next (`CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH`).
    pub auto_free: bool,
}

/// How a capture restricts calls that other threads' captures may not see.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Unsafe calls are refused in every thread.
    Global,
    /// Unsafe calls are refused in the thread that captures.
    ThreadLocal,
    /// Unsafe calls are allowed.
    Relaxed,
}

impl Mode {
    /// From its number in cuda.h.
    pub fn from_number(n: u32) -> Option<Mode> {
        [Mode::Global, Mode::ThreadLocal, Mode::Relaxed].get(n as usize).copied()
    }
}

std::thread_local! {
    /// What `cuThreadExchangeStreamCaptureMode` set.
    pub static THREAD_MODE: std::cell::Cell<Mode> = const { std::cell::Cell::new(Mode::Global) };
}

/// A capture in progress.
pub struct Capture {
    /// Nodes so far.
    pub nodes: Vec<Node>,
    /// Stream it was begun on.
    pub origin: Handle,
    /// Its mode.
    pub mode: Mode,
    /// Thread that began it.
    pub thread: ThreadId,
    /// False once a call was not allowed.
    pub valid: bool,
    /// Context of the origin.
    pub context: Handle,
}

/// A stream's part in a capture.
#[derive(Clone)]
pub struct Captured {
    /// The capture.
    pub capture: Handle,
    /// Nodes that its next operation depends on.
    pub frontier: Vec<usize>,
}

fn ancestors(nodes: &[Node], from: &[usize]) -> BTreeSet<usize> {
    let (mut found, mut open) = (BTreeSet::new(), from.to_vec());
    while let Some(n) = open.pop() {
        if found.insert(n) {
            open.extend(&nodes[n].deps);
        }
    }
    found
}

/// The union of two frontiers.
pub fn joined(a: &[usize], b: &[usize]) -> Vec<usize> {
    let all: BTreeSet<usize> = a.iter().chain(b).copied().collect();
    all.into_iter().collect()
}

impl State {
    /// Starts to record a stream.
    pub fn begin_capture(&mut self, stream: Handle, mode: Mode) -> Result {
        let s = self.streams.get(stream)?;
        if s.captured.is_some() {
            return Err(Code::ILLEGAL_STATE);
        }
        let context = s.context;
        let capture = self.captures.insert(Capture {
            nodes: Vec::new(),
            origin: stream,
            mode,
            thread: std::thread::current().id(),
            valid: true,
            context,
        });
        let frontier = Vec::new();
        self.streams.get_mut(stream)?.captured = Some(Captured { capture, frontier });
        Ok(())
    }

    /// Ends a capture and gives its graph.
    pub fn end_capture(&mut self, stream: Handle) -> Result<Graph> {
        let Some(part) = self.streams.get(stream)?.captured.clone() else {
            return Err(Code::ILLEGAL_STATE);
        };
        let c = self.captures.get_mut(part.capture)?;
        if c.mode != Mode::Relaxed && c.thread != std::thread::current().id() {
            return Err(Code::STREAM_CAPTURE_WRONG_THREAD);
        }
        if c.origin != stream {
            c.valid = false;
            return Err(Code::STREAM_CAPTURE_UNMATCHED);
        }
        // From here on the capture is over, whatever comes out.
        let c = self.captures.remove(part.capture)?;
        for (_, s) in self.streams.iter_mut() {
            if s.captured.as_ref().is_some_and(|p| p.capture == part.capture) {
                s.captured = None;
            }
        }
        if !c.valid {
            self.trash.extend(c.nodes);
            return Err(Code::STREAM_CAPTURE_INVALIDATED);
        }
        if ancestors(&c.nodes, &part.frontier).len() < c.nodes.len() {
            say("end of capture: another stream of the capture has work that the first stream does not wait for");
            self.trash.extend(c.nodes);
            return Err(Code::STREAM_CAPTURE_UNJOINED);
        }
        Ok(Graph { nodes: c.nodes, context: c.context })
    }

    /// Ends a capture as failed.
    pub fn invalidate(&mut self, capture: Handle) {
        if let Ok(c) = self.captures.get_mut(capture) {
            c.valid = false;
        }
    }

    /// Records an operation; the capture it went to has to be valid.
    pub fn record(&mut self, part: &Captured, stream: Handle, op: Op) -> Result {
        let c = self.captures.get_mut(part.capture)?;
        if !c.valid {
            return Err(Code::STREAM_CAPTURE_INVALIDATED);
        }
        let deps = part.frontier.clone();
        c.nodes.push(Node { op, deps });
        let frontier = vec![c.nodes.len() - 1];
        self.streams.get_mut(stream)?.captured = Some(Captured { capture: part.capture, frontier });
        Ok(())
    }

    /// Refuses what a capturing stream cannot do, and ends the capture as failed.
    pub fn not_capturing(&mut self, stream: Handle) -> Result {
        if let Some(part) = self.streams.get(stream)?.captured.clone() {
            self.invalidate(part.capture);
            return Err(Code::STREAM_CAPTURE_UNSUPPORTED);
        }
        self.no_implicit(stream)
    }

    /// Captures that the null stream would depend on, were it used.
    fn implicit(&self, stream: Handle) -> Result<Vec<Handle>> {
        let context = self.streams.get(stream)?.context;
        if stream != self.contexts.get(context)?.null_stream {
            return Ok(Vec::new());
        }
        let blocking = self.streams.iter().filter(|(_, s)| s.context == context && !s.non_blocking);
        Ok(blocking.filter_map(|(_, s)| s.captured.as_ref()).map(|p| p.capture).collect())
    }

    /// Refuses what would make the null stream depend on a capture of a blocking stream, and ends the capture as failed.
    pub fn no_implicit(&mut self, stream: Handle) -> Result {
        let captures = self.implicit(stream)?;
        for c in &captures {
            self.invalidate(*c);
        }
        if captures.is_empty() { Ok(()) } else { Err(Code::STREAM_CAPTURE_IMPLICIT) }
    }

    /// As [`State::no_implicit`] for a mere question, which leaves the capture as it is.
    pub fn no_implicit_query(&self, stream: Handle) -> Result {
        if self.implicit(stream)?.is_empty() { Ok(()) } else { Err(Code::STREAM_CAPTURE_IMPLICIT) }
    }

    /// Refuses to wait for a whole context while one of its streams is capturing.
    pub fn context_not_capturing(&mut self, context: Handle) -> Result {
        let ours: Vec<Handle> = self.captures.iter().filter(|(_, c)| c.context == context).map(|(h, _)| h).collect();
        for c in &ours {
            self.invalidate(*c);
        }
        if ours.is_empty() { Ok(()) } else { Err(Code::STREAM_CAPTURE_UNSUPPORTED) }
    }

    /// Refuses a call that is unsafe during a capture, by the modes of captures and of this thread.
    pub fn safe_call(&mut self) -> Result {
        let me = std::thread::current().id();
        let mine = THREAD_MODE.get();
        let forbids = |c: &Capture| match mine {
            Mode::Relaxed => false,
            Mode::ThreadLocal => c.thread == me && c.mode != Mode::Relaxed,
            Mode::Global => c.mode == Mode::Global || c.thread == me && c.mode == Mode::ThreadLocal,
        };
        let hit: Vec<Handle> = self.captures.iter().filter(|(_, c)| forbids(c)).map(|(h, _)| h).collect();
        for c in &hit {
            self.invalidate(*c);
        }
        if hit.is_empty() { Ok(()) } else { Err(Code::STREAM_CAPTURE_UNSUPPORTED) }
    }

    /// Makes a stream wait for an event, by an edge of the queue or of a capture.
    pub fn wait_event(&mut self, stream: Handle, event: Handle) -> Result {
        let part = self.streams.get(stream)?.captured.clone();
        match (self.events.get(event)?.recorded.clone(), part) {
            (Recorded::Never, _) => Ok(()),
            (Recorded::Queued(id, _), None) => {
                self.streams.get_mut(stream)?.waits.push(id);
                Ok(())
            }
            (Recorded::Queued(..), Some(part)) => {
                self.invalidate(part.capture);
                say("a capturing stream waits for an event that was recorded outside of the capture");
                Err(Code::STREAM_CAPTURE_ISOLATION)
            }
            (Recorded::Captured(e), part) => {
                if !self.captures.get(e.capture).map_err(|_| Code::CAPTURED_EVENT)?.valid {
                    return Err(Code::STREAM_CAPTURE_INVALIDATED);
                }
                let frontier = match part {
                    None => {
                        let context = self.streams.get(stream)?.context;
                        if stream == self.contexts.get(context)?.null_stream {
                            self.invalidate(e.capture);
                            return Err(Code::STREAM_CAPTURE_IMPLICIT);
                        }
                        e.frontier
                    }
                    Some(p) if p.capture == e.capture => joined(&p.frontier, &e.frontier),
                    Some(p) => {
                        self.invalidate(p.capture);
                        self.invalidate(e.capture);
                        return Err(Code::STREAM_CAPTURE_MERGE);
                    }
                };
                let capture = e.capture;
                self.streams.get_mut(stream)?.captured = Some(Captured { capture, frontier });
                Ok(())
            }
        }
    }

    /// Notes what a launch does to the allocations of its graph. Gives those that an earlier launch left and this one has to free
    /// first; without the flag for that, they are an error.
    fn graph_memory(&mut self, exec: Handle) -> Result<Vec<u64>> {
        let e = self.executables.get(exec)?;
        let of = |f: fn(&Op) -> Option<u64>| e.nodes.iter().filter_map(|n| f(&n.op)).collect::<Vec<u64>>();
        let made = of(|op| if let Op::Commit(a) = op { Some(*a) } else { None });
        let freed = of(|op| if let Op::Free(a) = op { Some(*a) } else { None });
        let auto_free = e.auto_free;
        let live = |a: &&u64| self.allocations.get(a).is_some_and(|x| x.origin == Origin::Graph { live: true });
        let left: Vec<u64> = made.iter().filter(live).copied().collect();
        if !left.is_empty() && !auto_free {
            say("launch of a graph whose allocations of an earlier launch were not freed");
            return Err(Code::INVALID_VALUE);
        }
        for address in made {
            set_live(self, address, !freed.contains(&address))?;
        }
        for address in freed {
            set_live(self, address, false)?;
        }
        Ok(left)
    }

    /// Queues every node of an executable on a stream, or records them when the stream is capturing.
    pub fn launch_graph(&mut self, exec: Handle, stream: Handle) -> Result {
        let e = self.executables.get(exec)?;
        let (nodes, last) = (e.nodes.clone(), e.last);
        let context = self.streams.get(stream)?.context;
        if e.context != context {
            return Err(Code::INVALID_HANDLE);
        }
        if let Some(part) = self.streams.get(stream)?.captured.clone() {
            let c = self.captures.get_mut(part.capture)?;
            if !c.valid {
                return Err(Code::STREAM_CAPTURE_INVALIDATED);
            }
            let (base, ends) = (c.nodes.len(), leaves(&nodes));
            c.nodes.extend(nodes.into_iter().map(|n| Node {
                deps: if n.deps.is_empty() { part.frontier.clone() } else { n.deps.iter().map(|d| d + base).collect() },
                op: n.op,
            }));
            if !ends.is_empty() {
                let frontier = ends.iter().map(|n| n + base).collect();
                let capture = part.capture;
                self.streams.get_mut(stream)?.captured = Some(Captured { capture, frontier });
            }
            return Ok(());
        }
        self.no_implicit(stream)?;
        let left = self.graph_memory(exec)?;
        let mut before = self.edges(stream)?;
        before.extend(last);
        for address in left {
            let id = self.queue.push(Op::Free(address), stream, context, before.iter().copied());
            before = vec![id];
        }
        let mut ids: Vec<OpId> = Vec::with_capacity(nodes.len());
        for n in &nodes {
            let deps: Vec<OpId> =
                if n.deps.is_empty() { before.clone() } else { n.deps.iter().map(|d| ids[*d]).collect() };
            ids.push(self.queue.push(n.op.clone(), stream, context, deps));
        }
        let ends = leaves(&nodes).into_iter().map(|n| ids[n]);
        let end = self.queue.push(Op::Marker, stream, context, ends.chain(before.iter().copied()));
        let s = self.streams.get_mut(stream)?;
        s.waits.clear();
        s.last = Some(end);
        self.executables.get_mut(exec)?.last = Some(end);
        Ok(())
    }
}

/// Nodes that no other node depends on.
fn leaves(nodes: &[Node]) -> Vec<usize> {
    let inner: BTreeSet<usize> = nodes.iter().flat_map(|n| n.deps.iter().copied()).collect();
    (0..nodes.len()).filter(|n| !inner.contains(n)).collect()
}
