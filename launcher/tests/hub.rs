//! The hub as ranks see it.

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use launcher::beacon::{Beacon, Phase, Position};
use launcher::cause::Cause;
use launcher::hub::{Event, Hub};
use launcher::link::{Heard, Link};
use launcher::protocol::{Hello, LIMIT, Message};
use launcher::secret::{PATIENCE, Secret};

use crate::program::wait_until;

fn hub(size: usize, hang: Duration) -> (Hub, Receiver<Event>) {
    let (to, events) = channel();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let hub = Hub::start(listener, "", size, &Secret::of("s"), hang, move |e| drop(to.send(e))).unwrap();
    (hub, events)
}

/// A rank that has said hello; whether the hub took it in.
fn rank(hub: &Hub, rank: usize, secret: &str, size: usize) -> (TcpStream, bool) {
    let mut stream = TcpStream::connect(hub.address()).unwrap();
    let hello = Hello {
        rank,
        host: format!("h{rank}"),
        place: "p".into(),
        pid: 1,
        cores: "0".into(),
        listens: vec!["*:7".into()],
        mpi: false,
    };
    let mut value = hello.to_json();
    value["size"] = size.into();
    if !Secret::of(secret).call(&mut stream, PATIENCE).unwrap() {
        return (stream, false);
    }
    Message::Hello(value).write(&mut stream).unwrap();
    let known = matches!(Message::read(&mut stream, LIMIT), Ok(Some(Message::Known)));
    (stream, known)
}

/// The next event that is not about a stranger.
fn next(events: &Receiver<Event>) -> Event {
    loop {
        match events.recv_timeout(Duration::from_secs(20)).unwrap() {
            Event::Stranger(_) => {}
            event => return event,
        }
    }
}

/// Two ranks that have met.
fn two(hub: &Hub, events: &Receiver<Event>) -> [TcpStream; 2] {
    let mut both = [0, 1].map(|r| rank(hub, r, "s", 2).0);
    let mut joined = [next(events), next(events)].map(|e| format!("{e:?}"));
    joined.sort_unstable();
    assert_eq!(joined, ["Joined(0)", "Joined(1)"]);
    for stream in &mut both {
        let Some(Message::Welcome(all)) = Message::read(stream, LIMIT).unwrap() else { panic!("no welcome") };
        let members: Vec<Hello> = all.as_array().unwrap().iter().map(|m| Hello::from_json(m).unwrap()).collect();
        assert_eq!((members.len(), members[1].host.as_str(), members[1].listens[0].as_str()), (2, "h1", "127.0.0.1:7"));
        assert!(all[0]["secret"].is_null(), "the secret is not handed on");
    }
    both
}

fn gather(to: &mut TcpStream, seq: u64, what: &str, own: &[u8]) {
    asked(to, seq, what, 0, own);
}

/// The same of a rank that has asked for sums or weights so often since the exchange before.
fn asked(to: &mut TcpStream, seq: u64, what: &str, asked: u64, own: &[u8]) {
    Message::Gather { seq, what: what.into(), asked, own: own.into() }.write(to).unwrap();
}

/// Where a rank is, before its first exchange.
fn beat(step: u64, phase: Phase) -> Message {
    Message::Beat { position: Position { step, phase, layer: None }.pack(), moves: 1, next: 0, asked: 0 }
}

#[test]
fn strangers_are_turned_away_and_ranks_exchange() {
    let (hub, events) = hub(2, Duration::from_secs(600));
    assert!(!rank(&hub, 0, "wrong", 2).1 && !rank(&hub, 0, "s", 3).1 && !rank(&hub, 2, "s", 2).1);
    let mut stray = TcpStream::connect(hub.address()).unwrap();
    std::io::Write::write_all(&mut stray, b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut both = two(&hub, &events);
    assert!(!rank(&hub, 1, "s", 2).1, "nobody takes a rank's place");
    gather(&mut both[1], 0, "sum", &[3, 4]);
    gather(&mut both[0], 0, "sum", &[]);
    for stream in &mut both {
        let all = vec![vec![], vec![3, 4]];
        assert_eq!(Message::read(stream, LIMIT).unwrap(), Some(Message::Gathered { seq: 0, all }));
    }
    let [mut a, b] = both;
    beat(4, Phase::Save).write(&mut a).unwrap();
    Message::Saved(4).write(&mut a).unwrap();
    assert_eq!(next(&events), Event::Saved(4));
    assert_eq!(hub.position(0).unwrap().to_string(), "step 4, save");
    Message::Goodbye(75).write(&mut a).unwrap();
    drop(a);
    assert_eq!(next(&events), Event::Closed(0, Some(75)));
    drop(b);
    assert_eq!(next(&events), Event::Closed(1, None));
}

#[test]
fn ranks_that_lose_each_other_are_both_named() {
    let (hub, events) = hub(2, Duration::from_secs(600));
    let mut both = two(&hub, &events);
    gather(&mut both[0], 5, "barrier", &[]);
    gather(&mut both[1], 5, "sum of 3", &[]);
    let Event::Failed(cause) = next(&events) else { panic!("no failure") };
    // Whichever came second is the one to say it.
    let text =
        |second: &str, first: &str| format!("calls {second} as exchange 5, rank {first}: they have lost each other");
    let (barrier, sum) = ("\"barrier\"", "\"sum of 3\"");
    let expected = [text(sum, &format!("0 calls {barrier}")), text(barrier, &format!("1 calls {sum}"))];
    assert_eq!(cause.text, expected[1 - cause.rank]);
    hub.fail(&cause);
    hub.fail(&Cause { text: "later".into(), ..cause.clone() });
    for stream in &mut both {
        assert_eq!(
            Message::read(stream, LIMIT).unwrap(),
            Some(Message::Failed(cause.clone())),
            "the first cause alone"
        );
    }
}

#[test]
fn a_rank_that_has_left_is_not_waited_for() {
    let (hub, events) = hub(2, Duration::from_secs(600));
    let [mut a, mut b] = two(&hub, &events);
    Message::Goodbye(0).write(&mut a).unwrap();
    drop(a);
    assert_eq!(next(&events), Event::Closed(0, Some(0)));
    gather(&mut b, 9, "any", &[]);
    let Event::Failed(cause) = next(&events) else { panic!("no failure") };
    assert_eq!((cause.rank, cause.text.as_str()), (0, "has ended, and rank 1 waits for it in \"any\""));
}

#[test]
fn who_does_not_wait_is_to_blame_for_a_hang() {
    let (hub, events) = hub(2, Duration::from_millis(400));
    let mut both = two(&hub, &events);
    let at = |phase| beat(3, phase);
    at(Phase::Reduce).write(&mut both[0]).unwrap();
    at(Phase::Save).write(&mut both[1]).unwrap();
    let Event::Failed(cause) = next(&events) else { panic!("no failure") };
    assert_eq!((cause.rank, cause.code), (1, 124));
    assert_eq!(cause.line(), "rank 1 on host h1: step 3, save: hangs since 0 s; another rank waits for it");
    // A machine that was suspended, or a rank that is stopped, is another matter.
    assert!(matches!(next(&events), Event::Silent(_)));
}

/// Outside of reductions ranks wait for each other in exchanges: whoever has not come to the one that is open.
#[test]
fn who_does_not_come_to_an_exchange_is_to_blame_for_a_hang() {
    let (hub, events) = hub(2, Duration::from_millis(400));
    let mut both = two(&hub, &events);
    let at = |phase| beat(4, phase);
    both.iter_mut().for_each(|stream| at(Phase::Evaluate).write(stream).unwrap());
    // A thread that writes is no main thread.
    gather(&mut both[1], 1 << 63, "checkpoint of step 4", &[]);
    gather(&mut both[0], 3, "sum of 9", &[]);
    let Event::Failed(cause) = next(&events) else { panic!("no failure") };
    assert_eq!(cause.line(), "rank 1 on host h1: step 4, evaluate: hangs since 0 s; another rank waits for it");
}

/// On a GPU the host waits for sums of others where it asks for the figures of its update.
#[test]
fn who_has_come_least_far_is_to_blame_for_a_hang() {
    let (hub, events) = hub(2, Duration::from_millis(400));
    let mut both = two(&hub, &events);
    let at = |phase| beat(4, phase);
    at(Phase::Update).write(&mut both[0]).unwrap();
    at(Phase::Backward).write(&mut both[1]).unwrap();
    let Event::Failed(cause) = next(&events) else { panic!("no failure") };
    assert_eq!(cause.line(), "rank 1 on host h1: step 4, backward: hangs since 0 s");
}

/// One in an exchange, the other in sums: each waits for the other, and the exchange is what is said.
#[test]
fn ranks_that_wait_for_different_things_have_lost_each_other() {
    let (hub, events) = hub(2, Duration::from_millis(400));
    let mut both = two(&hub, &events);
    let at = |phase| beat(4, phase);
    at(Phase::Reduce).write(&mut both[0]).unwrap();
    at(Phase::Forward).write(&mut both[1]).unwrap();
    gather(&mut both[1], 7, "barrier", &[]);
    let Event::Failed(cause) = next(&events) else { panic!("no failure") };
    let said = "waits since 0 s in \"barrier\", exchange 7, the others for sums or weights: they have lost each other";
    assert_eq!(cause.line(), format!("rank 1 on host h1: step 4, forward: {said}"));
}

/// One is in an exchange, the other has asked for a sum that comes before it. The hub knows as soon as that one shows that it lives, long before
/// anybody hangs, whichever comes first.
#[test]
fn a_rank_in_an_exchange_and_one_in_a_sum_have_lost_each_other() {
    let far = |next, asked| Message::Beat { position: 0, moves: 0, next, asked };
    let text = "waits in \"barrier\", exchange 7, and rank 0 for sums or weights that come before it: they have lost each other";
    for exchange_first in [true, false] {
        let (hub, events) = hub(2, Duration::from_secs(600));
        let mut both = two(&hub, &events);
        // As many, or fewer, are the ordinary case; so is more after the exchange.
        far(6, 9).write(&mut both[0]).unwrap();
        far(7, 2).write(&mut both[0]).unwrap();
        if exchange_first {
            asked(&mut both[1], 7, "barrier", 2, &[]);
            std::thread::sleep(Duration::from_millis(50));
            assert!(events.try_recv().is_err());
            far(7, 3).write(&mut both[0]).unwrap();
        } else {
            far(7, 3).write(&mut both[0]).unwrap();
            asked(&mut both[1], 7, "barrier", 2, &[]);
        }
        let Event::Failed(cause) = next(&events) else { panic!("no failure") };
        assert_eq!((cause.rank, cause.text.as_str(), cause.code), (1, text, 1));
    }
    // Both come to the exchange, after another number of sums.
    let (hub, events) = hub(2, Duration::from_secs(600));
    let mut both = two(&hub, &events);
    asked(&mut both[0], 7, "barrier", 3, &[]);
    asked(&mut both[1], 7, "barrier", 2, &[]);
    let Event::Failed(cause) = next(&events) else { panic!("no failure") };
    assert_eq!((cause.rank, cause.text.as_str()), (1, text));
}

/// A rank with another secret is said, once in a while, as long as one is missing.
#[test]
fn a_rank_that_does_not_know_the_secret_is_heard_of() {
    let (hub, events) = hub(2, Duration::from_secs(600));
    assert!(!rank(&hub, 0, "wrong", 2).1 && !rank(&hub, 0, "wrong", 2).1);
    let [mut a, b] = two(&hub, &events);
    assert!(!rank(&hub, 0, "wrong", 2).1);
    Message::Saved(1).write(&mut a).unwrap();
    drop(b);
    let mut rest: Vec<Event> = events.iter().take(2).collect();
    rest.sort_unstable_by_key(|e| format!("{e:?}"));
    assert_eq!(rest, [Event::Closed(1, None), Event::Saved(1)], "no stranger matters once all are there");
    // Twice at once is told once.
    let (hub, events) = self::hub(2, Duration::from_secs(600));
    assert!(!rank(&hub, 0, "wrong", 2).1 && !rank(&hub, 1, "wrong", 2).1);
    assert_eq!(events.recv_timeout(Duration::from_secs(20)), Ok(Event::Stranger("127.0.0.1".into())));
    let _both = [0, 1].map(|r| rank(&hub, r, "s", 2));
    assert!(events.iter().take(2).all(|e| matches!(e, Event::Joined(_))));
}

/// Where others find a rank that came to the hub by an address that leads nowhere else.
#[test]
fn a_rank_beside_the_hub_is_found_where_the_hub_is() {
    for (called, expected) in [("", "127.0.0.1:7"), ("node03", "node03:7"), ("fe80::1", "[fe80::1]:7")] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let hub = Hub::start(listener, called, 1, &Secret::of("s"), Duration::from_secs(600), |_| ()).unwrap();
        let (mut stream, _) = rank(&hub, 0, "s", 1);
        let Some(Message::Welcome(all)) = Message::read(&mut stream, LIMIT).unwrap() else { panic!("no welcome") };
        assert_eq!(all[0]["listens"][0], expected);
    }
}

#[test]
fn a_parent_says_what_became_of_its_rank() {
    let (hub, events) = hub(2, Duration::from_secs(600));
    let cause = Cause { rank: 1, host: "b".into(), position: None, text: "killed by SIGKILL".into(), code: 137 };
    let report = launcher::wrap::Report { address: hub.address().to_string(), secret: "s".into(), size: 2, attempt: 0 };
    launcher::wrap::Report { secret: "wrong".into(), ..report.clone() }.tell(&cause, true);
    report.tell(&cause, true);
    assert_eq!(next(&events), Event::Failed(cause));
}

/// A parent of ranks elsewhere knows where they are when they cannot say it any more, and hears why the run ends when they cannot.
#[test]
fn a_parent_elsewhere_says_where_its_ranks_are_and_hears_why_the_run_ends() {
    let (hub, events) = hub(2, Duration::from_secs(600));
    hub.is_of_attempt(1);
    let both = two(&hub, &events);
    assert_eq!(hub.position(1), None, "nobody has said it");
    let report = launcher::wrap::Report { address: hub.address().to_string(), secret: "s".into(), size: 2, attempt: 1 };
    let watch = |report: &launcher::wrap::Report, pages| {
        let (to, heard) = channel();
        (Link::start(report, pages, move |h| drop(to.send(h))).unwrap(), heard)
    };
    let page = Beacon::private();
    let at = Position { step: 7, phase: Phase::Backward, layer: Some(2) };
    page.set(at);
    let (_link, heard) = watch(&report, vec![(1, page)]);
    // Of another attempt, and with another secret: neither is told anything.
    let (_other, other) = watch(&launcher::wrap::Report { attempt: 0, ..report.clone() }, Vec::new());
    let (_wrong, wrong) = watch(&launcher::wrap::Report { secret: "wrong".into(), ..report.clone() }, Vec::new());
    let patience = Duration::from_secs(20);
    assert_eq!(heard.recv_timeout(patience).unwrap(), Heard::Open);
    wait_until("the hub knows the place", || hub.position(1) == Some(at));
    assert_eq!(hub.position(0), None);
    let cause = Cause { rank: 0, host: "a".into(), position: None, text: "killed by SIGKILL".into(), code: 137 };
    hub.fail(&cause);
    assert_eq!(heard.recv_timeout(patience).unwrap(), Heard::Failed(cause.clone()));
    // Who comes late is told too.
    let (_late, late) = watch(&report, Vec::new());
    assert_eq!(
        [late.recv_timeout(patience).unwrap(), late.recv_timeout(patience).unwrap()],
        [Heard::Open, Heard::Failed(cause)]
    );
    hub.wait_until_told(2, patience);
    assert!(other.try_recv().is_err());
    assert_eq!(wrong.iter().collect::<Vec<_>>(), [Heard::Stranger], "it is told nothing else");
    drop(both);
}
