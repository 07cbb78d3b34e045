//! The engine of this machine: the command of each rank.

use std::net::{Ipv4Addr, TcpListener};

use crate::devices::{Bind, nodes, spread};
use crate::options::Options;
use crate::spawn::{RankCommand, own_cores, resolve, shares};

/// What the ranks of one attempt are told.
#[derive(Clone, Debug, Default)]
pub struct Meeting {
    /// Address and port of the hub.
    pub control: String,
    /// What a rank proves there that it knows.
    pub secret: String,
    /// A free port, for programs that open one of their own.
    pub master_port: u16,
    /// Number of the attempt, from 0.
    pub attempt: u32,
}

/// The command of each rank.
pub fn commands(options: &Options, meeting: &Meeting) -> Vec<RankCommand> {
    let n = options.ranks;
    let cores = match options.bind {
        Bind::None => vec![Vec::new(); n],
        Bind::Core => shares(&own_cores(), n),
        Bind::Numa => spread(&nodes(&own_cores()), n),
    };
    let of = |(rank, cores): (usize, Vec<usize>)| RankCommand {
        program: resolve(&options.program[0]),
        args: options.program[1..].to_vec(),
        env: environment(options, meeting, rank),
        dir: options.dir.clone(),
        cores,
    };
    cores.into_iter().enumerate().map(of).collect()
}

/// What a rank finds in its environment: programs that were written for torchrun find what they know.
fn environment(options: &Options, meeting: &Meeting, rank: usize) -> Vec<(String, String)> {
    let n = options.ranks;
    let Meeting { control, secret, master_port, attempt } = meeting;
    let (group, groups) = options.node.as_ref().map_or((0, 1), |node| (node.rank, node.count));
    let master = options.node.as_ref().map_or_else(|| Ipv4Addr::LOCALHOST.to_string(), |node| node.master.0.clone());
    let own = [
        ("RANK", (group * n + rank).to_string()),
        ("WORLD_SIZE", (groups * n).to_string()),
        ("LOCAL_RANK", rank.to_string()),
        ("LOCAL_WORLD_SIZE", n.to_string()),
        ("GROUP_RANK", group.to_string()),
        ("MASTER_ADDR", master),
        ("MASTER_PORT", master_port.to_string()),
        ("RINGTUNE_CONTROL", control.clone()),
        ("RINGTUNE_SECRET", secret.clone()),
        ("RINGTUNE_RESTART", attempt.to_string()),
    ];
    let own = own.into_iter().map(|(name, value)| (name.to_string(), value));
    options.env.iter().cloned().chain(own).collect()
}

/// A port that is free now.
pub fn free_port() -> u16 {
    let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|l| l.local_addr());
    bound.map_or(0, |address| address.port())
}
