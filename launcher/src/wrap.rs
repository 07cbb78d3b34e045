//! `ringrun --wrap`: the parent of one rank that mpirun or srun started. It knows what became of its child, where the child was, and tells
//! the hub in the first ringrun.

use std::io;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cause::Cause;
use crate::environment::{Identity, identify, own};
use crate::options::Options;
use crate::protocol::Message;
use crate::secret::{PATIENCE, Secret};
use crate::spawn::{RankCommand, resolve};

/// How much later than the end of a rank its hub may come up.
const LATE: Duration = Duration::from_secs(5);
/// Between two tries to reach it.
const AGAIN: Duration = Duration::from_millis(50);

/// Where a parent of ranks says what became of them, if the hub is elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The hub.
    pub address: String,
    /// What is proven there.
    pub secret: String,
    /// Ranks of the run.
    pub size: usize,
    /// Number of the attempt, from 0.
    pub attempt: u32,
}

impl Report {
    /// Tells the hub, on a connection of its own; where that cannot be reached, its owner sees a closed connection. A hub that nobody has seen
    /// yet is waited for a little: its machine may be the last one to start.
    pub fn tell(&self, cause: &Cause, seen: bool) {
        let until = Instant::now() + if seen { Duration::ZERO } else { LATE };
        let reach = || loop {
            match TcpStream::connect(&self.address) {
                Err(_) if Instant::now() < until => std::thread::sleep(AGAIN),
                reached => return reached,
            }
        };
        let tell = || -> io::Result<()> {
            let mut hub = reach()?;
            hub.set_write_timeout(Some(Duration::from_secs(2)))?;
            if !Secret::of(&self.secret).call(&mut hub, PATIENCE)? {
                return Ok(());
            }
            Message::Hello(json!({"size": self.size, "observes": cause.rank})).write(&mut hub)?;
            Message::Failed(cause.clone()).write(&mut hub)
        };
        let _ = tell();
    }
}

/// The command of the one rank, its number, and where its end is told.
///
/// # Errors
/// If nothing says which rank this is.
pub fn command(options: &Options) -> Result<(RankCommand, usize, Report), String> {
    let get = own;
    let Some(Identity { rank, size, local_rank, local_size, .. }) = identify(&get)? else {
        return Err("--wrap: no launcher says which rank this is".into());
    };
    let rank_of = [
        ("RANK", Some(rank)),
        ("WORLD_SIZE", Some(size)),
        ("LOCAL_RANK", local_rank),
        ("LOCAL_WORLD_SIZE", local_size),
    ];
    let env = rank_of.into_iter().filter_map(|(name, n)| Some((name.to_string(), n?.to_string()))).collect();
    let report = Report {
        address: get("RINGTUNE_CONTROL").unwrap_or_default(),
        secret: get("RINGTUNE_SECRET").unwrap_or_default(),
        size,
        attempt: get("RINGTUNE_RESTART").and_then(|n| n.parse().ok()).unwrap_or_default(),
    };
    let program = resolve(&options.program[0]);
    let args = options.program[1..].to_vec();
    Ok((RankCommand { program, args, env, dir: options.dir.clone(), cores: Vec::new() }, rank, report))
}
