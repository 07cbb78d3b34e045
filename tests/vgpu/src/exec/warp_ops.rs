//! Data exchange between the lanes of a warp: shuffles, votes, matches and reductions.

use super::alu::{pred, write_pred};
use super::code::{alu, warp_alu};
use super::{Alu, Inst, LANES, Lane, Regs, WarpAlu};

/// The warp operations in both builds.
pub(super) const SHUFFLE: WarpAlu = warp_alu!(|r, i, m| shuffle(r, i, m));
pub(super) const VOTE: WarpAlu = warp_alu!(|r, i, m| vote(r, i, m));
pub(super) const MATCH32: WarpAlu = warp_alu!(|r, i, m| match32(r, i, m));
pub(super) const MATCH64: WarpAlu = warp_alu!(|r, i, m| match64(r, i, m));
pub(super) const REDUX: WarpAlu = warp_alu!(|r, i, m| redux(r, i, m));
/// `activemask`.
pub(super) const ACTIVE_MASK: Alu = alu!(|r, i, m| u32::put(r, i.d, [m; LANES], m));

/// Checks that a member mask names exactly lanes that are here, for every lane that executes.
#[inline(always)]
fn members(r: &Regs, row: u16, active: u32) -> Result<u32, String> {
    let masks = u32::row(r, row);
    let first = masks[active.trailing_zeros() as usize % LANES];
    let mut wrong = 0;
    for l in 0..LANES {
        wrong |= u32::from(masks[l] != first) << l;
    }
    wrong = (wrong | !first) & active;
    if wrong != 0 {
        let lane = wrong.trailing_zeros() as usize;
        return Err(format!("lane {lane} gives member mask {:#010x}, the first lane {first:#010x}", masks[lane]));
    }
    // Named lanes that are not here have returned: the run loop waits for all others before it comes here.
    Ok(first & active)
}

/// Shuffle: `k` 0 up, 1 down, 2 bfly, 3 idx; mask in row `y`, predicate row `x`.
#[inline(always)]
pub fn shuffle(r: &mut Regs, i: &Inst, m: u32) -> Result<(), String> {
    members(r, i.y as u16, m)?;
    let (from, ok) = sources(r, i);
    let a = u32::row(r, i.a);
    let (mut out, mut missing) = ([0; LANES], 0);
    for l in 0..LANES {
        let source = from[l] as usize & 31;
        out[l] = a[source];
        missing |= (!m >> source & 1) << l;
    }
    if missing & m != 0 {
        let lane = (missing & m).trailing_zeros() as usize;
        return Err(format!("lane {lane} reads lane {}, which does not execute the shuffle", from[lane]));
    }
    u32::put(r, i.d, out, m);
    write_pred(r, i.x as u16, ok, m);
    Ok(())
}

/// Where each lane of a shuffle reads, and the lanes whose source is in range: plain arithmetic on all lanes, without branches.
#[inline(always)]
pub(super) fn sources(r: &Regs, i: &Inst) -> ([u32; LANES], u32) {
    let (b, c) = (u32::row(r, i.b), u32::row(r, i.c));
    let (mut from, mut ok) = ([0u32; LANES], 0u32);
    for l in 0..LANES {
        let lane = l as u32;
        let (b, clamp, seg) = (b[l] & 31, c[l] & 31, c[l] >> 8 & 31);
        let max = lane & seg | clamp & !seg;
        let min = lane & seg;
        let (j, inside) = match i.k {
            0 => (lane.wrapping_sub(b), lane as i32 - b as i32 >= max as i32),
            1 => (lane + b, lane + b <= max),
            2 => (lane ^ b, (lane ^ b) <= max),
            _ => (min | b & !seg, (min | b & !seg) <= max),
        };
        from[l] = if inside { j & 31 } else { lane };
        ok |= u32::from(inside) << l;
    }
    (from, ok)
}

/// Vote: `k` 0 all, 1 any, 2 uni, 3 ballot; bit 2 negates the source; mask in row `y`.
#[inline(always)]
pub fn vote(r: &mut Regs, i: &Inst, m: u32) -> Result<(), String> {
    let members = members(r, i.y as u16, m)?;
    let bits = pred(r, i.a, i.k & 4 != 0) & members;
    match i.k & 3 {
        0 => write_pred(r, i.d, if bits == members { !0 } else { 0 }, m),
        1 => write_pred(r, i.d, if bits != 0 { !0 } else { 0 }, m),
        2 => write_pred(r, i.d, if bits == 0 || bits == members { !0 } else { 0 }, m),
        _ => u32::put(r, i.d, [bits; LANES], m),
    }
    Ok(())
}

/// Match on 32 bits: `k` 0 any, 1 all with predicate row `x`.
#[inline(always)]
pub fn match32(r: &mut Regs, i: &Inst, m: u32) -> Result<(), String> {
    matching(r, i, m, u32::get(r, i.a).map(u64::from))
}

/// Match on 64 bits.
#[inline(always)]
pub fn match64(r: &mut Regs, i: &Inst, m: u32) -> Result<(), String> {
    matching(r, i, m, u64::get(r, i.a))
}

#[inline(always)]
fn matching(r: &mut Regs, i: &Inst, m: u32, a: [u64; LANES]) -> Result<(), String> {
    let members = members(r, i.y as u16, m)?;
    let same = |l: usize| (0..LANES).filter(|j| members >> j & 1 == 1 && a[*j] == a[l]).fold(0, |s, j| s | 1 << j);
    if i.k == 0 {
        u32::put(r, i.d, std::array::from_fn(same), m);
    } else {
        let all = same(members.trailing_zeros() as usize) == members;
        u32::put(r, i.d, [if all { members } else { 0 }; LANES], m);
        write_pred(r, i.x as u16, if all { !0 } else { 0 }, m);
    }
    Ok(())
}

/// Reduction: `k` 0 add, 1 min.u32, 2 max.u32, 3 min.s32, 4 max.s32, 5 and, 6 or, 7 xor.
#[inline(always)]
pub fn redux(r: &mut Regs, i: &Inst, m: u32) -> Result<(), String> {
    let members = members(r, i.y as u16, m)?;
    let a = u32::get(r, i.a);
    let mut values = (0..LANES).filter(|l| members >> l & 1 == 1).map(|l| a[l]);
    let first = values.next().unwrap_or(0);
    let v = values.fold(first, |x, y| match i.k {
        0 => x.wrapping_add(y),
        1 => x.min(y),
        2 => x.max(y),
        3 => (x as i32).min(y as i32) as u32,
        4 => (x as i32).max(y as i32) as u32,
        5 => x & y,
        6 => x | y,
        _ => x ^ y,
    });
    u32::put(r, i.d, [v; LANES], m);
    Ok(())
}
