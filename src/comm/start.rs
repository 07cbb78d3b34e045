//! The start of a rank: who it is, where the others are, and a connection to each of them.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use launcher::beacon::Beacon;
use launcher::cause::{BYSTANDER, Cause, HANG};
use launcher::environment::{Identity, Launcher, Meeting, identify, own};
use launcher::hub::{Event, Hub, SILENCE, a_stranger};
use launcher::protocol::{Hello, LIMIT, Message};
use launcher::secret::{PATIENCE, Secret};
use launcher::spawn::{own_cores, parse_ranges, ranges};

use super::control::{Channel, is_ending};
use super::doors::{Doors, MEETING};
use super::mpi::Choice;
use super::ranks::{BUCKET, Ranks};
use super::transport::{Sockets, Stream, Transport};
use super::{Communicator, Fold, Solo, Sums, Ways, World, mpi};
use crate::backend::Backend;
use crate::error::{Context, Error, Result};
use crate::{bail, ensure, machine, say};

/// How long a rank's words to the hub may stay without an answer from its machine.
const LOST: Duration = Duration::from_secs(10);
/// How long a rank goes on looking for its hub where that of another run is: its own may come a little later. A hub whose ranks are missing
/// ends the run when it has been called so for eight.
const STRANGE: Duration = Duration::from_secs(10);
/// The same where the hub knows the secret and does not want this rank: that of a run that has failed leaves when its last checkpoint is written.
const OLD: Duration = Duration::from_secs(90);
/// Ports that are tried where the first one is taken.
const PORTS: u16 = 16;

/// The ranks of this run.
pub enum Comm {
    /// One.
    Solo,
    /// Several, or one that ringrun watches.
    Ranks(Box<Joined>),
}

/// The ranks of a run on a device.
pub enum On<'a, B: Backend> {
    /// Whatever the device.
    Any(&'a dyn Communicator<B>),
    /// Those of this device.
    Own(Box<dyn Communicator<B>>),
}

impl<B: Backend> On<'_, B> {
    /// As the trainer holds it.
    pub fn get(&self) -> &dyn Communicator<B> {
        match self {
            On::Any(ranks) => *ranks,
            On::Own(ranks) => ranks.as_ref(),
        }
    }
}

/// A rank that has met the others.
pub struct Joined {
    ranks: Ranks,
    channel: Rc<Channel>,
    /// Cores that are this rank's share.
    threads: usize,
    /// What carries gradients.
    carrier: String,
    ways: Ways,
}

/// Which rank this is, before it has met the others: who is not the main one is silent from the beginning.
///
/// # Errors
/// A usage error where the environment makes no sense.
pub fn announce() -> Result<()> {
    let identity = identify(&own).map_err(Error::usage)?;
    say::set_rank(identity.map_or(0, |i| i.rank));
    Ok(())
}

/// How many ranks whatever started this process started; 1 without a launcher.
///
/// # Errors
/// A usage error where the environment makes no sense.
pub fn ranks_of_environment() -> Result<usize> {
    let identity = identify(&own).map_err(Error::usage)?;
    Ok(identity.map_or(1, |i| i.size))
}

/// Meets the other ranks: first of all, before any file is touched. Without a launcher there are none.
///
/// # Errors
/// If the environment makes no sense, or the ranks do not find each other.
pub fn start(ways: Ways) -> Result<Comm> {
    let Some(identity) = identify(&own).map_err(Error::usage)? else {
        return Ok(Comm::Solo);
    };
    say::set_rank(identity.rank);
    // A shell may stand between the launcher and this program: it dies with whoever started it all the same.
    #[cfg(target_os = "linux")]
    if identity.launcher == Launcher::Ringrun {
        // SAFETY: a call without pointers.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    }
    let join = || join(&identity, ways).map(|joined| Comm::Ranks(Box::new(joined)));
    join().context(|| format!("rank {} of {}, started by {}", identity.rank, identity.size, identity.launcher.name()))
}

impl Comm {
    /// As the trainer holds it.
    pub fn of<B: Backend>(&self) -> &dyn Communicator<B> {
        match self {
            Comm::Solo => &Solo,
            Comm::Ranks(joined) => &joined.ranks,
        }
    }

    /// As they work together on a device: over NCCL between GPUs, else over what joined them. With ZeRO-1 a rank wants the sums that it
    /// owns.
    ///
    /// # Errors
    /// If NCCL is asked for and cannot be had, or fails to connect the GPUs.
    pub fn on<B: Backend + 'static>(&self, dev: &B, sums: Sums) -> Result<On<'_, B>> {
        let Comm::Ranks(joined) = self else { return Ok(On::Any(&Solo)) };
        let Joined { ranks, channel, ways, .. } = &**joined;
        let world = ranks.own_world();
        if world.size > 1 && matches!(ways.transport, Choice::Auto | Choice::Nccl) {
            // An order of sums has its price there: who wants it asks for it.
            let ways = Ways { fold: Some(ways.fold.unwrap_or(Fold::Step)), ..*ways };
            if let Some(own) = over_nccl(dev, world, channel, sums, ways)? {
                return Ok(On::Own(own));
            }
        }
        Ok(On::Any(ranks))
    }

    /// Which rank this is.
    pub fn world(&self) -> &World {
        match self {
            Comm::Solo => &World::SOLO,
            Comm::Ranks(joined) => joined.ranks.own_world(),
        }
    }

    /// What carries gradients between ranks, for people.
    pub fn carrier(&self) -> &str {
        match self {
            Comm::Solo => "nothing",
            Comm::Ranks(joined) => &joined.carrier,
        }
    }

    /// Threads of this rank: its share of the cores; `None`: what there is.
    pub fn threads(&self) -> Option<usize> {
        match self {
            Comm::Solo => None,
            Comm::Ranks(joined) => Some(joined.threads),
        }
    }

    /// The run has ended on this rank: the others are told why, or that all is well.
    ///
    /// # Errors
    /// The result's own.
    pub fn finish<T>(&self, result: Result<T>) -> Result<T> {
        if let Comm::Ranks(joined) = self {
            joined.channel.finish(&result);
        }
        result
    }
}

#[cfg(feature = "cuda")]
use super::nccl::join as over_nccl;

#[cfg(not(feature = "cuda"))]
fn over_nccl<B: Backend>(
    _dev: &B,
    _world: &World,
    _channel: &Rc<Channel>,
    _sums: Sums,
    ways: Ways,
) -> Result<Option<Box<dyn Communicator<B>>>> {
    ensure!(ways.transport != Choice::Nccl, "--transport nccl: this program was built without the feature `cuda`");
    Ok(None)
}

/// What tells machines, and containers on one of them, apart.
fn place() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let network = std::fs::read_link("/proc/self/ns/net").map(|p| p.display().to_string()).unwrap_or_default();
    format!("{} {} {network}", machine::host(), boot.trim())
}

fn join(identity: &Identity, ways: Ways) -> Result<Joined> {
    let &Identity { rank, size, launcher, .. } = identity;
    let mpi = size > 1 && mpi::is_ready(identity, ways.transport, &own)?;
    let inherited = std::env::var("RINGTUNE_BEACON_FD").ok().and_then(|fd| Beacon::inherited(fd.parse().ok()?).ok());
    let beacon = inherited.unwrap_or_else(Beacon::private);
    let own_hub = if rank == 0 { open_hub(identity)? } else { None };
    let (secret, addresses) = where_to(identity, own_hub.as_ref())?;
    let elsewhere = identity.local_size != Some(size);
    let doors = Doors::open(rank, elsewhere)?;
    let hello = Hello {
        rank,
        host: machine::host(),
        place: place(),
        pid: std::process::id(),
        cores: ranges(&own_cores()),
        listens: doors.names.clone(),
        mpi,
    };
    let mut control = meet(&hello, size, &secret, &addresses)?;
    #[cfg(feature = "cuda")]
    super::nccl::set_environment(control.local_addr().ok().map(|address| address.ip()));
    // Who holds the hub has said a cause when it came there.
    let speaks = launcher == Launcher::Ringrun || own_hub.is_some();
    let members = welcome(&mut control, speaks)?;
    ensure!(members.len() == size, "expected {size} ranks, met {}", members.len());
    let here: Vec<usize> = (0..size).filter(|&r| members[r].place == hello.place).collect();
    let world = World {
        rank,
        size,
        local_rank: identity.local_rank.unwrap_or_else(|| here.iter().position(|&r| r == rank).unwrap_or(0)),
        local_size: here.len(),
    };
    let sharing = here.iter().filter(|&&r| members[r].cores == hello.cores).count();
    let cores = parse_ranges(&hello.cores).map_or(1, |cores| cores.len());
    // From here on the rank shows that it lives, and hears why the run ends, while it connects to the others too.
    let channel = Rc::new(Channel::start(rank, control, beacon, own_hub, launcher == Launcher::Ringrun)?);
    let carried = carrier(&world, &members, here.len() == size, || doors.connect(rank, &members, &secret));
    let ranks = carried
        .and_then(|(transport, carrier)| Ok((Ranks::new(world, Box::new(Rc::clone(&channel)), transport)?, carrier)));
    if ranks.is_err() {
        channel.finish(&ranks);
    }
    let (ranks, carrier) = ranks?;
    let ranks = ranks.with_fold(ways.fold.unwrap_or_default()).with_buckets(ways.bucket.unwrap_or(BUCKET));
    Ok(Joined { ranks, channel, threads: (cores / sharing.max(1)).max(1), carrier, ways })
}

/// What carries gradients between these ranks, and its name for people; `near`: all are on one machine.
fn carrier(
    world: &World,
    members: &[Hello],
    near: bool,
    connect: impl FnOnce() -> Result<Vec<Option<Box<dyn Stream>>>>,
) -> Result<(Option<Box<dyn Transport>>, String)> {
    if world.size == 1 {
        return Ok((None, "nothing".into()));
    }
    if members.iter().all(|m| m.mpi) {
        return Ok((Some(mpi::transport(world)?), format!("MPI ({})", mpi::library().unwrap_or_default())));
    }
    let carrier = if near { "Unix sockets" } else { "Unix sockets and TCP" };
    Ok((Some(Box::new(Sockets::new(connect()?))), carrier.into()))
}

/// Rank 0 holds the hub where the launcher has none.
fn open_hub(identity: &Identity) -> Result<Option<Hub>> {
    let Meeting::Master { host, port, secret } = &identity.meeting else { return Ok(None) };
    let bound = (0..PORTS).find_map(|i| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port.checked_add(i)?)).ok());
    let Some(listener) = bound else { bail!("ports {port} to {} are all taken", port.saturating_add(PORTS - 1)) };
    let opened: Arc<OnceLock<Hub>> = Arc::default();
    let judge = Arc::clone(&opened);
    let said = AtomicBool::new(false);
    let notify = move |event| {
        let Some(hub) = judge.get() else { return };
        let cause = |rank, text: String, code| {
            let host = hub.host(rank).unwrap_or_default();
            Cause { rank, host, position: hub.position(rank), text, code }
        };
        // Here and now: some launchers kill all ranks as soon as one is gone.
        let fail = |cause: &Cause| {
            if !is_ending() && !said.swap(true, SeqCst) {
                say::error(&cause.line());
            }
            hub.fail(cause);
        };
        match event {
            Event::Failed(cause) => fail(&cause),
            Event::Closed(rank, None) => {
                let text = "connection closed: killed or crashed; see the launcher's own message".into();
                fail(&cause(rank, text, 1));
            }
            Event::Silent(rank) => {
                fail(&cause(rank, format!("no sign of life for {} s", SILENCE.as_secs()), HANG));
            }
            Event::Stranger(from) => say::note(&a_stranger(&from)),
            Event::Missing(ranks) => {
                let list: Vec<String> = ranks.iter().take(8).map(usize::to_string).collect();
                say::note(&format!("waiting for rank {}", list.join(", ")));
            }
            _ => {}
        }
    };
    let hang = Duration::from_secs(600);
    let hub = Hub::start(listener, host, identity.size, &Secret::of(secret), hang, notify)?;
    let _ = opened.set(hub.clone());
    Ok(Some(hub))
}

/// The secret, and where the hub may be.
fn where_to(identity: &Identity, own: Option<&Hub>) -> Result<(Secret, Vec<SocketAddr>)> {
    // Where machines are started together, names appear one after the other.
    let until = Instant::now() + MEETING;
    let resolve = |host: &str, port: u16| -> Result<Vec<SocketAddr>> {
        loop {
            match (host, port).to_socket_addrs() {
                Ok(found) => return Ok(found.collect()),
                Err(e) if Instant::now() > until => bail!("{host}: cannot be found: {e}"),
                Err(_) => std::thread::sleep(Duration::from_secs(1)),
            }
        }
    };
    match &identity.meeting {
        Meeting::Control { address, secret } => {
            let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
            let port = port
                .parse()
                .map_err(|_| Error::usage(format!("RINGTUNE_CONTROL: expected ADDRESS:PORT, found {address:?}")))?;
            Ok((Secret::of(secret), resolve(host.trim_matches(['[', ']']), port)?))
        }
        Meeting::Master { secret, .. } if own.is_some() => {
            let port = own.map_or(0, |hub| hub.address().port());
            Ok((Secret::of(secret), vec![(Ipv4Addr::LOCALHOST, port).into()]))
        }
        Meeting::Master { host, port, secret } => {
            let hosts = resolve(host, *port)?;
            let all =
                (0..PORTS).flat_map(|i| hosts.iter().map(move |a| SocketAddr::new(a.ip(), a.port().saturating_add(i))));
            Ok((Secret::of(secret), all.collect()))
        }
        Meeting::Unknown => Err(Error::usage(
            "nothing says where the ranks meet: set MASTER_ADDR and MASTER_PORT to an address and a free port of rank 0's machine, or \
             start the program with ringrun",
        )),
    }
}

/// From now on the connection breaks when what was sent is not acknowledged for so long: a cable that is pulled closes nothing, and a
/// rank would wait for the hub for a quarter of an hour. Heartbeats see to it that something is always sent.
#[cfg(target_os = "linux")]
fn give_up_after(stream: &TcpStream, time: Duration) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    let ms = time.as_millis() as libc::c_uint;
    // SAFETY: the pointer is to a local of the size that is given.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_USER_TIMEOUT,
            std::ptr::from_ref(&ms).cast(),
            size_of::<libc::c_uint>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Other systems have no such option: there a connection breaks when the system gives it up.
#[cfg(not(target_os = "linux"))]
fn give_up_after(_stream: &TcpStream, _time: Duration) -> std::io::Result<()> {
    Ok(())
}

/// What came of a call.
enum Called {
    /// It is our hub, and knows this rank.
    Known(TcpStream),
    /// It knows the secret and does not want this rank: the number is taken, or there are more or fewer ranks.
    Unwanted,
    /// Something else listens there.
    Stranger,
}

/// Calls what may be the hub.
fn call(address: &SocketAddr, hello: &Message, secret: &Secret) -> std::io::Result<Called> {
    let mut stream = TcpStream::connect_timeout(address, Duration::from_secs(2))?;
    stream.set_nodelay(true)?;
    give_up_after(&stream, LOST)?;
    if !secret.call(&mut stream, PATIENCE)? {
        return Ok(Called::Stranger);
    }
    stream.set_read_timeout(Some(PATIENCE))?;
    hello.write(&mut stream)?;
    Ok(match Message::read(&mut stream, LIMIT)? {
        Some(Message::Known) => Called::Known(stream),
        _ => Called::Unwanted,
    })
}

/// Connects to the hub and is known there.
fn meet(hello: &Hello, size: usize, secret: &Secret, addresses: &[SocketAddr]) -> Result<TcpStream> {
    let mut value = hello.to_json();
    value["size"] = size.into();
    let hello = Message::Hello(value);
    let until = Instant::now() + MEETING;
    let mut why = "nothing answers there";
    let mut refused = None;
    loop {
        for address in addresses {
            match call(address, &hello, secret) {
                Ok(Called::Known(stream)) => return Ok(stream),
                Ok(Called::Unwanted) => {
                    // ringrun's hub of the attempt before may be there as long as a checkpoint is written.
                    let patience = if addresses.len() == 1 { MEETING } else { OLD };
                    refused.get_or_insert_with(|| (Instant::now(), patience));
                    why = "the hub there has another number of ranks, or this rank already";
                }
                // Another program, or another run.
                Ok(Called::Stranger) => {
                    // Its calls, again and again, are how the hub knows that it is not one of another run.
                    refused.get_or_insert_with(|| (Instant::now(), STRANGE));
                    why = "what listens there does not know the secret of this run: RINGTUNE_SECRET has to be the same on all machines, and two \
                           runs on one machine need a MASTER_PORT each";
                }
                Err(_) => {}
            }
        }
        let places: Vec<String> = addresses.iter().take(3).map(SocketAddr::to_string).collect();
        let wrong = refused.is_some_and(|(since, patience)| since.elapsed() >= patience);
        ensure!(!wrong && Instant::now() < until, "no hub of this run at {}: {why}", places.join(", "));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Waits until all ranks are there. `said`: whoever finds out that they will not come says so.
fn welcome(control: &mut TcpStream, said: bool) -> Result<Vec<Hello>> {
    control.set_read_timeout(Some(MEETING + Duration::from_secs(30)))?;
    let message = Message::read(control, LIMIT).context(|| "waiting for the other ranks".into())?;
    control.set_read_timeout(None)?;
    match message {
        Some(Message::Welcome(all)) => {
            let members = all.as_array().into_iter().flatten().map(Hello::from_json).collect();
            let members: Option<Vec<Hello>> = members;
            members.ok_or_else(|| Error::new("the hub's welcome cannot be read: is ringrun of the same version?"))
        }
        Some(Message::Failed(cause)) => {
            if !said {
                say::error(&cause.line());
            }
            std::process::exit(BYSTANDER.into())
        }
        _ => bail!("the hub is gone"),
    }
}
