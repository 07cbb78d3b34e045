//! What the hub finds out by itself: ranks that do not come, that are silent, that do not move, and that have lost each other.

use std::time::{Duration, Instant};

use super::{Event, MEETING, Member, REMINDER, SILENCE, Shared, State, TICK};
use crate::beacon::Phase;
use crate::cause::HANG;

/// Looks for ranks that do not come, do not live or do not move.
pub(super) fn watch_over(shared: &Shared) {
    let (start, mut said, mut last) = (Instant::now(), Instant::now(), Instant::now());
    let mut silent = vec![false; shared.size];
    let mut hung = false;
    loop {
        std::thread::sleep(TICK);
        let mut events = Vec::new();
        let mut state = shared.lock();
        // We were suspended ourselves: nobody else's clock went on.
        if last.elapsed() > Duration::from_secs(2) {
            state.wake();
        }
        last = Instant::now();
        let missing: Vec<usize> = (0..shared.size).filter(|&r| state.members[r].is_none()).collect();
        if state.met.is_none() && missing.len() < shared.size {
            if start.elapsed() > MEETING {
                let text = format!("did not come within {} s", MEETING.as_secs());
                events.push(state.cause(missing[0], text, 1));
            } else if said.elapsed() > REMINDER {
                said = Instant::now();
                events.push(Event::Missing(missing));
            }
        }
        if state.met.is_some() {
            // Of a run that has failed too: who hears nothing of it is not waited for.
            for (rank, said) in silent.iter_mut().enumerate() {
                let Some(m) = &state.members[rank] else { continue };
                if !*said && !m.closed && m.goodbye.is_none() && m.beat.elapsed() > SILENCE {
                    *said = true;
                    events.push(Event::Silent(rank));
                }
            }
            let alive = |m: &&Member| !m.closed && m.goodbye.is_none();
            if !hung
                && state.failed.is_none()
                && state.moved.elapsed() > shared.hang
                && state.members.iter().flatten().any(|m| alive(&m))
            {
                hung = true;
                events.push(hang(&state, shared.hang));
            }
        }
        drop(state);
        events.into_iter().for_each(|event| (shared.notify)(event));
    }
}

/// Nobody moves: the culprit is who does not wait for others, of several the one that has come least far.
fn hang(state: &State, limit: Duration) -> Event {
    let alive: Vec<(usize, &Member)> =
        state.members.iter().enumerate().filter_map(|(r, m)| Some((r, m.as_ref().filter(|m| !m.closed)?))).collect();
    // An exchange that is not complete; threads that write have some of their own.
    let exchange = |r: usize| {
        let mut open = state.rounds.iter().filter(|(seq, _)| *seq >> 63 == 0);
        open.find_map(|(seq, round)| Some((*seq, &round.parts.get(&r)?.what)))
    };
    // For gradients or weights.
    let collective = |m: &Member| m.position.is_some_and(|at| matches!(at.phase, Phase::Reduce | Phase::Gather));
    let (waiting, busy): (Vec<_>, Vec<_>) =
        alive.into_iter().partition(|(r, m)| collective(m) || exchange(*r).is_some());
    let place = |m: &Member| m.position.map(|at| (at.step, at.phase as u8));
    let seconds = limit.as_secs();
    if let Some((rank, _)) = busy.into_iter().min_by_key(|(_, m)| place(m)) {
        let others = match waiting.len() {
            0 => String::new(),
            1 => "; another rank waits for it".into(),
            n => format!("; {n} others wait for it"),
        };
        return state.cause(rank, format!("hangs since {seconds} s{others}"), HANG);
    }
    // All wait: some of them for what others do not call.
    match waiting.iter().find_map(|(r, _)| Some((*r, exchange(*r)?))) {
        Some((rank, (seq, what))) => {
            let text = format!(
                "waits since {seconds} s in \"{what}\", exchange {seq}, the others for sums or weights: they have lost each other"
            );
            state.cause(rank, text, HANG)
        }
        None => {
            let rank = waiting.first().map_or(0, |(r, _)| *r);
            state.cause(rank, format!("hangs since {seconds} s, as all ranks: each waits for the others"), HANG)
        }
    }
}

/// A rank waits in an exchange, and another one has asked for sums or weights before it that the first one has not: every rank calls the
/// same in the same order, so neither will get what it waits for.
pub(super) fn lost_each_other(state: &State) -> Option<Event> {
    // Threads that write have exchanges of their own, in no order with sums.
    for (seq, round) in state.rounds.iter().filter(|(seq, _)| *seq >> 63 == 0) {
        let (rank, part) = round.parts.iter().min_by_key(|(_, part)| part.asked)?;
        let in_it = |r: usize| round.parts.get(&r).map(|other| other.asked);
        let before_it = |m: &Member| (m.next == *seq).then_some(m.asked);
        let more = state.members.iter().enumerate().find_map(|(r, m)| {
            let asked = in_it(r).or_else(|| before_it(m.as_ref()?))?;
            (asked > part.asked).then_some(r)
        });
        if let Some(other) = more {
            let text = format!(
                "waits in \"{}\", exchange {seq}, and rank {other} for sums or weights that come before it: they have lost each other",
                part.what
            );
            return Some(state.cause(*rank, text, 1));
        }
    }
    None
}
