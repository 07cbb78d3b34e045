//! Copies and fills.
//!
//! Which of them wait is what "API synchronization behavior" of the driver API documentation says, at its least: a copy that may
//! be asynchronous is.

use std::sync::Arc;

use crate::abi::{Memcpy2d, Memcpy2dEnd};
use crate::code::{Code, Result};
use crate::driver::{State, driver};
use crate::ffi::{Handle, HostAddress, In, api, host_bytes};
use crate::op::{Copy, Fill, Op, Place};
use crate::report::{pageable, say};

/// Which end of a copy an address is.
#[derive(Clone, Copy)]
pub enum End {
    /// Host memory.
    Host(HostAddress),
    /// Device memory.
    Device(u64),
}

impl State {
    /// Whether host memory is pinned as a whole.
    pub fn is_pinned(&self, at: HostAddress, len: usize) -> bool {
        let found = self.pinned.range(..=at).next_back();
        found.is_some_and(|(start, p)| at - start <= p.len && p.len - (at - start) >= len)
    }

    /// Refuses a range that no living allocation holds.
    pub fn device_range(&self, at: u64, len: usize) -> Result {
        let found = self.allocations.range(..=at).next_back();
        if found.is_some_and(|(start, a)| at - start <= a.len as u64 && a.len as u64 - (at - start) >= len as u64) {
            return Ok(());
        }
        let found = self.variables.range(..=at).next_back();
        if found.is_some_and(|(start, n)| at - start <= *n as u64 && *n as u64 - (at - start) >= len as u64) {
            return Ok(());
        }
        say(&format!("{len} bytes at {at:#x} lie in no living allocation"));
        Err(Code::INVALID_VALUE)
    }
}

/// Queues a copy on a stream and waits as the documentation asks: `blocking` for the forms without `Async`.
pub fn copy(stream: Handle, to: End, from: End, shape: [usize; 4], blocking: bool) -> Result {
    let [width, height, to_pitch, from_pitch] = shape;
    let mut st = driver().state();
    st.healthy()?;
    let stream = st.stream(stream)?;
    if width == 0 || height == 0 {
        return Ok(());
    }
    if height > 1 && (to_pitch < width || from_pitch < width) {
        return Err(Code::INVALID_VALUE);
    }
    let extent =
        |pitch: usize| pitch.checked_mul(height - 1).and_then(|n| n.checked_add(width)).ok_or(Code::INVALID_VALUE);
    let (to_len, from_len) = (extent(to_pitch)?, extent(from_pitch)?);
    for (end, len) in [(to, to_len), (from, from_len)] {
        match end {
            End::Host(0) => return Err(Code::INVALID_VALUE),
            End::Host(_) => {}
            End::Device(at) => st.device_range(at, len)?,
        }
    }
    let capturing = st.streams.get(stream)?.captured.is_some();
    if blocking {
        st.no_implicit(stream)?;
        st.safe_call()?;
    }
    for (end, len) in [(to, to_len), (from, from_len)] {
        if let End::Host(at) = end
            && !(blocking || capturing || st.is_pinned(at, len))
        {
            pageable(len);
        }
    }
    let (mut wait, mut staged) = (false, None);
    let from_place = match from {
        End::Device(at) => Place::Device(at),
        // A graph reads host memory when it is launched, whatever kind it is.
        End::Host(at) if capturing || st.is_pinned(at, from_len) => {
            wait |= blocking;
            Place::Host(at)
        }
        End::Host(at) => {
            // Pageable memory is staged by the call; the stream is waited for before that in the blocking form only.
            staged = Some(at);
            Place::Host(at)
        }
    };
    let to_place = match to {
        End::Device(at) => Place::Device(at),
        End::Host(at) => {
            wait |= blocking || !capturing && !st.is_pinned(at, to_len);
            Place::Host(at)
        }
    };
    // Between host and host there is no asynchronous form.
    wait |= !capturing && matches!((to, from), (End::Host(_), End::Host(_)));
    let context = st.streams.get(stream)?.context;
    if blocking && staged.is_some() {
        let tail = st.tail(stream)?;
        st = driver().force(st, &tail);
        st.check(context)?;
    }
    let from_place = match staged {
        // SAFETY: the C caller promises that the source is valid for the bytes it names.
        Some(at) => Place::Staged(Arc::new(unsafe { host_bytes(at, from_len) })),
        None => from_place,
    };
    let copy = Copy { to: to_place, from: from_place, width, height, to_pitch, from_pitch };
    let id = st.submit(stream, Op::Copy(copy))?;
    match id {
        Some(id) if wait => driver().force(st, &[id]).check(context),
        _ => {
            drop(driver().queued(st));
            Ok(())
        }
    }
}

fn line(n: usize) -> [usize; 4] {
    [n, 1, n, n]
}

/// Queues a fill; fills of device memory are asynchronous in both forms.
fn fill(stream: Handle, fill: Fill) -> Result {
    let mut st = driver().state();
    st.healthy()?;
    let stream = st.stream(stream)?;
    if fill.width == 0 || fill.height == 0 {
        return Ok(());
    }
    let row = fill.width.checked_mul(fill.size).ok_or(Code::INVALID_VALUE)?;
    if !fill.to.is_multiple_of(fill.size as u64)
        || fill.height > 1 && (fill.pitch < row || !fill.pitch.is_multiple_of(fill.size))
    {
        return Err(Code::INVALID_VALUE);
    }
    let extent = fill.pitch.checked_mul(fill.height - 1).and_then(|n| n.checked_add(row)).ok_or(Code::INVALID_VALUE)?;
    st.device_range(fill.to, extent)?;
    st.submit(stream, Op::Fill(fill))?;
    drop(driver().queued(st));
    Ok(())
}

fn elements(to: u64, value: u32, size: usize, width: usize) -> Fill {
    Fill { to, value, size, width, height: 1, pitch: 0 }
}

/// Which end an address of the unified address space is.
fn end_of(address: u64) -> End {
    match driver().device_of(address) {
        Some(_) => End::Device(address),
        None => End::Host(address as usize),
    }
}

fn copy_2d(stream: Handle, c: &Memcpy2d, blocking: bool) -> Result {
    let place = |e: &Memcpy2dEnd| -> Result<End> {
        let offset = e.y.checked_mul(e.pitch).and_then(|n| n.checked_add(e.x)).ok_or(Code::INVALID_VALUE)?;
        if c.height > 1 && e.pitch < c.width.saturating_add(e.x) {
            return Err(Code::INVALID_VALUE);
        }
        match e.kind {
            HOST if e.host == 0 => Err(Code::INVALID_VALUE),
            HOST => Ok(End::Host(e.host + offset)),
            DEVICE => Ok(End::Device(e.device + offset as u64)),
            UNIFIED => Ok(end_of(e.device + offset as u64)),
            ARRAY => Err(Code::NOT_SUPPORTED),
            _ => Err(Code::INVALID_VALUE),
        }
    };
    let (to, from) = (place(&c.to)?, place(&c.from)?);
    copy(stream, to, from, [c.width, c.height, c.to.pitch, c.from.pitch], blocking)
}

const HOST: u32 = 1;
const DEVICE: u32 = 2;
const ARRAY: u32 = 3;
const UNIFIED: u32 = 4;

fn contexts(a: Handle, b: Handle) -> Result {
    let st = driver().state();
    st.current()?;
    for c in [a, b] {
        st.contexts.get(c).map_err(|_| Code::INVALID_CONTEXT)?;
    }
    Ok(())
}

api! {
    /// Host to device; returns when the source may be changed.
    fn cuMemcpyHtoD_v2(to: u64, from: HostAddress, bytes: usize) {
        copy(Handle::NULL, End::Device(to), End::Host(from), line(bytes), true)
    }

    /// Device to host.
    fn cuMemcpyDtoH_v2(to: HostAddress, from: u64, bytes: usize) {
        copy(Handle::NULL, End::Host(to), End::Device(from), line(bytes), true)
    }

    /// Device to device; does not wait.
    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) {
        copy(Handle::NULL, End::Device(to), End::Device(from), line(bytes), true)
    }

    /// Host to device in stream order.
    fn cuMemcpyHtoDAsync_v2(to: u64, from: HostAddress, bytes: usize, stream: Handle) {
        copy(stream, End::Device(to), End::Host(from), line(bytes), false)
    }

    /// Device to host in stream order; waits when the destination is pageable.
    fn cuMemcpyDtoHAsync_v2(to: HostAddress, from: u64, bytes: usize, stream: Handle) {
        copy(stream, End::Host(to), End::Device(from), line(bytes), false)
    }

    /// Device to device in stream order.
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) {
        copy(stream, End::Device(to), End::Device(from), line(bytes), false)
    }

    /// Between devices in stream order.
    fn cuMemcpyPeerAsync(to: u64, to_context: Handle, from: u64, from_context: Handle, bytes: usize, stream: Handle) {
        contexts(to_context, from_context)?;
        copy(stream, End::Device(to), End::Device(from), line(bytes), false)
    }

    /// Between devices.
    fn cuMemcpyPeer(to: u64, to_context: Handle, from: u64, from_context: Handle, bytes: usize) {
        contexts(to_context, from_context)?;
        copy(Handle::NULL, End::Device(to), End::Device(from), line(bytes), true)
    }

    /// Between any two addresses.
    fn cuMemcpy(to: u64, from: u64, bytes: usize) {
        copy(Handle::NULL, end_of(to), end_of(from), line(bytes), true)
    }

    /// Between any two addresses in stream order.
    fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: Handle) {
        copy(stream, end_of(to), end_of(from), line(bytes), false)
    }

    /// Rows between any two places but arrays.
    fn cuMemcpy2D_v2(c: In<Memcpy2d>) {
        copy_2d(Handle::NULL, &c.get()?, true)
    }

    /// As `cuMemcpy2D_v2`; any alignment is as good as another here.
    fn cuMemcpy2DUnaligned_v2(c: In<Memcpy2d>) {
        copy_2d(Handle::NULL, &c.get()?, true)
    }

    /// Rows in stream order.
    fn cuMemcpy2DAsync_v2(c: In<Memcpy2d>, stream: Handle) {
        copy_2d(stream, &c.get()?, false)
    }

    /// Sets bytes.
    fn cuMemsetD8_v2(to: u64, value: u8, n: usize) {
        fill(Handle::NULL, elements(to, u32::from(value), 1, n))
    }

    /// Sets 16-bit elements.
    fn cuMemsetD16_v2(to: u64, value: u16, n: usize) {
        fill(Handle::NULL, elements(to, u32::from(value), 2, n))
    }

    /// Sets 32-bit elements.
    fn cuMemsetD32_v2(to: u64, value: u32, n: usize) {
        fill(Handle::NULL, elements(to, value, 4, n))
    }

    /// Sets bytes in stream order.
    fn cuMemsetD8Async(to: u64, value: u8, n: usize, stream: Handle) {
        fill(stream, elements(to, u32::from(value), 1, n))
    }

    /// Sets 16-bit elements in stream order.
    fn cuMemsetD16Async(to: u64, value: u16, n: usize, stream: Handle) {
        fill(stream, elements(to, u32::from(value), 2, n))
    }

    /// Sets 32-bit elements in stream order.
    fn cuMemsetD32Async(to: u64, value: u32, n: usize, stream: Handle) {
        fill(stream, elements(to, value, 4, n))
    }

    /// Sets bytes of rows.
    fn cuMemsetD2D8_v2(to: u64, pitch: usize, value: u8, width: usize, height: usize) {
        fill(Handle::NULL, Fill { to, value: u32::from(value), size: 1, width, height, pitch })
    }

    /// Sets 16-bit elements of rows.
    fn cuMemsetD2D16_v2(to: u64, pitch: usize, value: u16, width: usize, height: usize) {
        fill(Handle::NULL, Fill { to, value: u32::from(value), size: 2, width, height, pitch })
    }

    /// Sets 32-bit elements of rows.
    fn cuMemsetD2D32_v2(to: u64, pitch: usize, value: u32, width: usize, height: usize) {
        fill(Handle::NULL, Fill { to, value, size: 4, width, height, pitch })
    }

    /// Sets bytes of rows in stream order.
    fn cuMemsetD2D8Async(to: u64, pitch: usize, value: u8, width: usize, height: usize, stream: Handle) {
        fill(stream, Fill { to, value: u32::from(value), size: 1, width, height, pitch })
    }

    /// Sets 32-bit elements of rows in stream order.
    fn cuMemsetD2D32Async(to: u64, pitch: usize, value: u32, width: usize, height: usize, stream: Handle) {
        fill(stream, Fill { to, value, size: 4, width, height, pitch })
    }
}
