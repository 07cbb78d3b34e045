//! Where ranks connect to each other: Unix sockets on one machine, TCP between machines. Both ends prove that they know the run's secret.

use std::net::{Ipv4Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};
use std::time::{Duration, Instant};

use launcher::protocol::Hello;
use launcher::secret::{PATIENCE, Secret, Timed, nonce};

use super::transport::Stream;
use crate::ensure;
use crate::error::{Context, Error, Result};

/// How long ranks wait for each other.
pub(super) const MEETING: Duration = Duration::from_secs(300);

/// Where other ranks connect to this one.
pub(super) struct Doors {
    unix: UnixListener,
    tcp: Option<TcpListener>,
    /// What they are called.
    pub names: Vec<String>,
}

impl Doors {
    /// Opens them; `elsewhere`: whether there may be ranks on other machines. The hub says there by which address they see this one.
    ///
    /// # Errors
    /// If the system grants none.
    pub fn open(rank: usize, elsewhere: bool) -> Result<Self> {
        // Names of this kind are one space for all containers that share a network.
        let name = format!("ringtune-{}-{rank}", blake3::Hash::from(nonce()?).to_hex());
        let address = near(&name)?;
        let unix = UnixListener::bind_addr(&address).context(|| "cannot listen for other ranks".into())?;
        let mut names = vec![format!("@{name}")];
        let mut tcp = None;
        if elsewhere {
            let listener =
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).context(|| "cannot listen for other ranks".into())?;
            names.push(format!("*:{}", listener.local_addr()?.port()));
            tcp = Some(listener);
        }
        Ok(Self { unix, tcp, names })
    }

    /// A connection to every other rank: this one calls those below it, those above it call.
    ///
    /// # Errors
    /// If one cannot be reached, does not come, or does not know the secret.
    pub fn connect(self, rank: usize, members: &[Hello], secret: &Secret) -> Result<Vec<Option<Box<dyn Stream>>>> {
        let mut peers: Vec<Option<Box<dyn Stream>>> = members.iter().map(|_| None).collect();
        for (r, peer) in members.iter().enumerate().take(rank) {
            let lost = || format!("cannot reach rank {r} on host {}", peer.host);
            let near = peer.place == members[rank].place;
            peers[r] = Some(match near {
                true => introduced(near_to(peer).context(lost)?, rank, secret).context(lost)?,
                false => introduced(far_to(peer).context(lost)?, rank, secret).context(lost)?,
            });
        }
        let until = Instant::now() + MEETING;
        self.unix.set_nonblocking(true)?;
        self.tcp.iter().try_for_each(|tcp| tcp.set_nonblocking(true))?;
        while peers.iter().skip(rank + 1).any(Option::is_none) {
            ensure!(Instant::now() < until, "other ranks did not connect within {} s", MEETING.as_secs());
            let near = self.unix.accept().ok().map(|(stream, _)| stream);
            let far = self.tcp.as_ref().and_then(|tcp| tcp.accept().ok()).map(|(stream, _)| stream);
            if near.is_none() && far.is_none() {
                self.wait()?;
                continue;
            }
            let near = near.and_then(|s| greeted(s, secret).ok().flatten());
            let far = far.and_then(|s| s.set_nodelay(true).and_then(|()| greeted(s, secret)).ok().flatten());
            for (r, stream) in near.into_iter().chain(far) {
                // Whoever comes twice is turned away.
                let place = (r > rank).then(|| peers.get_mut(r)).flatten();
                if let Some(place) = place.filter(|p| p.is_none()) {
                    *place = Some(stream);
                }
            }
        }
        Ok(peers)
    }

    /// Waits until somebody knocks, or for a second.
    fn wait(&self) -> Result<()> {
        use std::os::fd::AsRawFd;
        let fds = [Some(self.unix.as_raw_fd()), self.tcp.as_ref().map(AsRawFd::as_raw_fd)];
        let mut fds: Vec<libc::pollfd> =
            fds.into_iter().flatten().map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
        // SAFETY: the pointer and the length are those of a vector that lives during the call.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 1000) };
        Ok(())
    }
}

/// A connection whose other end may be asked for proof.
trait Door: Timed + Stream + 'static {
    fn block(&self, blocks: bool) -> std::io::Result<()>;
}

impl Door for TcpStream {
    fn block(&self, blocks: bool) -> std::io::Result<()> {
        self.set_nonblocking(!blocks)
    }
}

impl Door for UnixStream {
    fn block(&self, blocks: bool) -> std::io::Result<()> {
        self.set_nonblocking(!blocks)
    }
}

/// The rank that a caller says it is, if it knows the secret.
fn greeted(mut from: impl Door, secret: &Secret) -> std::io::Result<Option<(usize, Box<dyn Stream>)>> {
    from.block(true)?;
    if !secret.answer(&mut from)? {
        return Ok(None);
    }
    let mut rank = [0; 4];
    from.limit(Some(PATIENCE))?;
    from.read_exact(&mut rank)?;
    from.limit(None)?;
    from.block(false)?;
    Ok(Some((u32::from_le_bytes(rank) as usize, Box::new(from))))
}

/// Tells a rank that was called who calls.
fn introduced(mut to: impl Door, rank: usize, secret: &Secret) -> Result<Box<dyn Stream>> {
    // It may be calling others itself before it answers.
    ensure!(secret.call(&mut to, MEETING)?, "what answers does not know the secret of this run");
    to.write_all(&(rank as u32).to_le_bytes())?;
    to.block(false)?;
    Ok(Box::new(to))
}

fn near_to(peer: &Hello) -> Result<UnixStream> {
    let name = peer.listens.iter().find_map(|l| l.strip_prefix('@'));
    let name = name.ok_or_else(|| Error::new("it has no door for ranks of its machine"))?;
    Ok(UnixStream::connect_addr(&near(name)?)?)
}

/// The address of a Unix socket that no folder has.
#[cfg(target_os = "linux")]
fn near(name: &str) -> std::io::Result<UnixAddr> {
    use std::os::linux::net::SocketAddrExt;
    UnixAddr::from_abstract_name(name)
}

/// The address of a Unix socket among the temporary files: names without a folder are Linux's own. A path may be 103 bytes long.
#[cfg(not(target_os = "linux"))]
fn near(name: &str) -> std::io::Result<UnixAddr> {
    let short = blake3::hash(name.as_bytes()).to_hex();
    UnixAddr::from_pathname(std::env::temp_dir().join(format!("rt-{}", &short[..24])))
}

fn far_to(peer: &Hello) -> Result<TcpStream> {
    let door = peer.listens.iter().find(|l| !l.starts_with('@'));
    let door = door.ok_or_else(|| Error::new("it has no door for ranks of other machines"))?;
    let found = door.to_socket_addrs()?.find_map(|a| TcpStream::connect_timeout(&a, Duration::from_secs(10)).ok());
    let stream =
        found.ok_or_else(|| Error::new(format!("{door} does not answer: is there a firewall between them?")))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
