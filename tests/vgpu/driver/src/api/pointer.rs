//! What an address is.

use std::ffi::c_int;

use crate::code::{Code, Result};
use crate::driver::{State, driver};
use crate::ffi::{Handle, In, Out, api};

const HOST: u32 = 1;
const DEVICE: u32 = 2;

/// An attribute of a pointer as the bytes that the caller wants.
enum Answer {
    Int(u32),
    Long(u64),
    Flag(bool),
    Pools([u32; 2]),
}

struct Found {
    start: u64,
    len: usize,
    context: Handle,
    device: usize,
    host: bool,
}

fn find(st: &State, at: u64) -> Option<Found> {
    if let Some((start, a)) = st.allocations.range(..=at).next_back()
        && at - start < a.len as u64
    {
        return Some(Found { start: *start, len: a.len, context: a.context, device: a.device, host: false });
    }
    let (start, p) = st.pinned.range(..=at as usize).next_back()?;
    (at as usize - start < p.len).then_some(Found {
        start: *start as u64,
        len: p.len,
        context: p.context,
        device: st.device(p.context).unwrap_or(0),
        host: true,
    })
}

fn attribute(st: &State, number: c_int, at: u64) -> Result<Answer> {
    let f = find(st, at).ok_or(Code::INVALID_VALUE)?;
    Ok(match number {
        1 => Answer::Long(f.context.0 as u64),
        2 => Answer::Int(if f.host { HOST } else { DEVICE }),
        3 if !f.host => Answer::Long(at),
        4 if f.host => Answer::Long(at),
        6 => Answer::Flag(false),
        // Addresses are never used again, so the first one names the allocation.
        7 | 20 => Answer::Long(f.start),
        8 | 10 | 15 => Answer::Flag(false),
        9 => Answer::Int(f.device as u32),
        11 | 19 => Answer::Long(f.start),
        12 | 18 => Answer::Long(f.len as u64),
        13 => Answer::Flag(!f.host),
        14 => Answer::Long(0),
        16 => Answer::Int(3),
        17 => Answer::Pools([0; 2]),
        _ => return Err(Code::INVALID_VALUE),
    })
}

/// Leaves an answer at an address; the address is not null.
fn leave(data: usize, answer: Answer) {
    // SAFETY: the C caller promises a place of the attribute's type at a data pointer that is not null, which was checked.
    unsafe {
        match answer {
            Answer::Int(v) => (data as *mut u32).write_unaligned(v),
            Answer::Long(v) => (data as *mut u64).write_unaligned(v),
            Answer::Flag(v) => (data as *mut u8).write_unaligned(u8::from(v)),
            Answer::Pools(v) => (data as *mut [u32; 2]).write_unaligned(v),
        }
    }
}

api! {
    /// Something about an address.
    fn cuPointerGetAttribute(data: usize, number: c_int, at: u64) {
        let st = driver().state();
        st.current()?;
        if data == 0 {
            return Err(Code::INVALID_VALUE);
        }
        leave(data, attribute(&st, number, at)?);
        Ok(())
    }

    /// Several things about an address; zeroes where the address is not known.
    fn cuPointerGetAttributes(n: u32, numbers: In<c_int>, data: In<usize>, at: u64) {
        let st = driver().state();
        st.current()?;
        let (numbers, data) = (numbers.slice(n as usize)?, data.slice(n as usize)?);
        if n == 0 || data.contains(&0) || numbers.iter().any(|k| !(1..=20).contains(k) || *k == 5) {
            return Err(Code::INVALID_VALUE);
        }
        for (number, data) in numbers.into_iter().zip(data) {
            let none = match number {
                2 | 16 => Answer::Int(0),
                9 => Answer::Int(u32::MAX - 1),
                6 | 8 | 10 | 13 | 15 => Answer::Flag(false),
                _ => Answer::Long(0),
            };
            leave(data, attribute(&st, number, at).unwrap_or(none));
        }
        Ok(())
    }

    /// First address and size of the allocation that holds an address.
    fn cuMemGetAddressRange_v2(start: Out<u64>, len: Out<usize>, at: u64) {
        let st = driver().state();
        st.healthy()?;
        let f = find(&st, at).filter(|f| !f.host).ok_or(Code::NOT_FOUND)?;
        start.set_if(f.start);
        len.set_if(f.len);
        Ok(())
    }
}
