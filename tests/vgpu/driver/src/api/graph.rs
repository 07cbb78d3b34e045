//! Stream capture, graphs and their launches.

use crate::abi::UpdateInfo;
use crate::code::{Code, Result};
use crate::driver::driver;
use crate::ffi::{Handle, Out, api};
use crate::graph::{Executable, Graph, Mode, THREAD_MODE};

const UPDATE_TOPOLOGY_CHANGED: u32 = 2;
const STATUS_NONE: u32 = 0;
const STATUS_ACTIVE: u32 = 1;
const STATUS_INVALIDATED: u32 = 2;

/// Free the allocations that the last launch left.
const AUTO_FREE: u64 = 1;
/// Upload, device launch and node priorities change nothing here; device launch is not offered.
const IGNORED_FLAGS: u64 = 2 | 8;

/// Copies a graph into a form that can be launched.
fn instantiate(out: Out<Handle>, graph: Handle, flags: u64) -> Result {
    out.check()?;
    let mut st = driver().state();
    st.healthy()?;
    if flags & !(AUTO_FREE | IGNORED_FLAGS) != 0 {
        return Err(Code::INVALID_VALUE);
    }
    let g = st.graphs.get(graph).map_err(|_| Code::INVALID_VALUE)?.clone();
    let auto_free = flags & AUTO_FREE != 0;
    let exec = Executable { nodes: g.nodes, context: g.context, last: None, auto_free };
    out.set(st.executables.insert(exec))
}

/// Whether two graphs differ in arguments alone.
fn same_shape(a: &Executable, b: &Graph) -> bool {
    let pairs = || a.nodes.iter().zip(&b.nodes);
    a.nodes.len() == b.nodes.len()
        && pairs().all(|(x, y)| x.deps == y.deps && std::mem::discriminant(&x.op) == std::mem::discriminant(&y.op))
}

api! {
    /// Starts to record a stream into a graph; nothing that is recorded runs.
    fn cuStreamBeginCapture_v2(stream: Handle, mode: u32) {
        let mut st = driver().state();
        st.healthy()?;
        let mode = Mode::from_number(mode).ok_or(Code::INVALID_VALUE)?;
        if stream.0 <= 1 {
            return Err(Code::STREAM_CAPTURE_UNSUPPORTED);
        }
        let stream = st.stream(stream)?;
        st.begin_capture(stream, mode)
    }

    /// Ends a capture and gives the graph, or null and the reason.
    fn cuStreamEndCapture(stream: Handle, out: Out<Handle>) {
        out.check()?;
        let mut st = driver().state();
        st.healthy()?;
        let stream = st.stream(stream)?;
        match st.end_capture(stream) {
            Ok(graph) => out.set(st.graphs.insert(graph)),
            Err(code) => {
                let trash = std::mem::take(&mut st.trash);
                drop(st);
                drop(trash);
                out.set(Handle::NULL)?;
                Err(code)
            }
        }
    }

    /// Whether a stream is capturing.
    fn cuStreamIsCapturing(stream: Handle, status: Out<u32>) {
        let mut st = driver().state();
        st.current()?;
        let stream = st.stream(stream)?;
        status.check()?;
        st.no_implicit_query(stream)?;
        let part = st.streams.get(stream)?.captured.clone();
        status.set(match part.map(|p| st.captures.get(p.capture).is_ok_and(|c| c.valid)) {
            None => STATUS_NONE,
            Some(true) => STATUS_ACTIVE,
            Some(false) => STATUS_INVALIDATED,
        })
    }

    /// Whether a stream is capturing, and the number of the capture. The graph and its dependencies are not given out.
    fn cuStreamGetCaptureInfo_v2(
        stream: Handle, status: Out<u32>, id: Out<u64>, graph: Out<Handle>, deps: Out<usize>, n_deps: Out<usize>,
    ) {
        let mut st = driver().state();
        st.current()?;
        let stream = st.stream(stream)?;
        status.check()?;
        st.no_implicit_query(stream)?;
        let part = st.streams.get(stream)?.captured.clone();
        let Some(p) = part else {
            return status.set(STATUS_NONE);
        };
        if graph.is_some() || deps.is_some() || n_deps.is_some() {
            return Err(Code::NOT_SUPPORTED);
        }
        let valid = st.captures.get(p.capture).is_ok_and(|c| c.valid);
        id.set_if(p.capture.0 as u64);
        status.set(if valid { STATUS_ACTIVE } else { STATUS_INVALIDATED })
    }

    /// Exchanges how captures restrict this thread.
    fn cuThreadExchangeStreamCaptureMode(mode: Out<u32>) {
        let new = mode.replace_with(|old| Mode::from_number(old).map(|_| THREAD_MODE.get() as u32))?;
        THREAD_MODE.set(Mode::from_number(new).ok_or(Code::INVALID_VALUE)?);
        Ok(())
    }

    /// Makes a graph that can be launched.
    fn cuGraphInstantiateWithFlags(out: Out<Handle>, graph: Handle, flags: u64) {
        instantiate(out, graph, flags)
    }

    /// As `cuGraphInstantiateWithFlags` without flags; there is never a node to blame.
    fn cuGraphInstantiate_v2(out: Out<Handle>, graph: Handle, error_node: Out<Handle>, log: Out<u8>, len: usize) {
        error_node.set_if(Handle::NULL);
        if len > 0 {
            log.set_if(0);
        }
        instantiate(out, graph, 0)
    }

    /// Nothing to do before a launch.
    fn cuGraphUpload(exec: Handle, stream: Handle) {
        let mut st = driver().state();
        st.healthy()?;
        st.stream(stream)?;
        st.executables.get(exec).map_err(|_| Code::INVALID_VALUE)?;
        Ok(())
    }

    /// Runs a graph in stream order.
    fn cuGraphLaunch(exec: Handle, stream: Handle) {
        let mut st = driver().state();
        let context = st.healthy()?;
        let stream = st.stream(stream)?;
        st.executables.get(exec).map_err(|_| Code::INVALID_VALUE)?;
        st.launch_graph(exec, stream)?;
        driver().queued(st).check(context)
    }

    /// Takes over the arguments of a graph of the same shape.
    fn cuGraphExecUpdate_v2(exec: Handle, graph: Handle, info: Out<UpdateInfo>) {
        info.check()?;
        let mut st = driver().state();
        st.healthy()?;
        let g = st.graphs.get(graph).map_err(|_| Code::INVALID_VALUE)?.clone();
        let e = st.executables.get_mut(exec).map_err(|_| Code::INVALID_VALUE)?;
        let none = UpdateInfo { result: 0, error_node: Handle::NULL, error_from: Handle::NULL };
        if !same_shape(e, &g) {
            info.set(UpdateInfo { result: UPDATE_TOPOLOGY_CHANGED, ..none })?;
            return Err(Code::GRAPH_EXEC_UPDATE_FAILURE);
        }
        let old = std::mem::replace(&mut e.nodes, g.nodes);
        drop(st);
        drop(old);
        info.set(none)
    }

    /// Number of nodes; with a list, their handles, which serve for counting only.
    fn cuGraphGetNodes(graph: Handle, list: Out<Handle>, n: Out<usize>) {
        let st = driver().state();
        st.current()?;
        let g = st.graphs.get(graph).map_err(|_| Code::INVALID_VALUE)?;
        n.check()?;
        if list.is_some() {
            return Err(Code::NOT_SUPPORTED);
        }
        n.set(g.nodes.len())
    }

    /// Ends a graph; what was made of it stays.
    fn cuGraphDestroy(graph: Handle) {
        let gone = driver().state().graphs.remove(graph).map_err(|_| Code::INVALID_VALUE)?;
        drop(gone);
        Ok(())
    }

    /// Ends a graph that can be launched; launches that are queued still run.
    fn cuGraphExecDestroy(exec: Handle) {
        let gone = driver().state().executables.remove(exec).map_err(|_| Code::INVALID_VALUE)?;
        drop(gone);
        Ok(())
    }
}
