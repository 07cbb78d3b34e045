//! `ringtune watch`: the report of a run that goes on, served on this machine and renewed as the run writes.

mod follow;
mod http;
mod serve;

use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command, value_parser};

use crate::error::{Context, Error, Result};
use crate::say;
use follow::Followed;

/// Where it is found where nobody says otherwise.
const HOST: &str = "127.0.0.1";
const PORT: &str = "7070";
/// How often the files of the runs are looked at.
const PAUSE: Duration = Duration::from_millis(500);
/// Ports looked through for one to name in place of one that is taken.
const NEIGHBOURS: u16 = 50;

/// The command line of `watch`.
pub fn command() -> Command {
    Command::new("watch")
        .about("Serve the report of a run on this machine, renewed while the run goes on, until Ctrl-C")
        .arg(
            Arg::new("run_dir")
                .value_name("PATH")
                .value_parser(value_parser!(PathBuf))
                .required(true)
                .num_args(1..)
                .help("Folders of runs, as --output-dir named them"),
        )
        .arg(
            Arg::new("port")
                .long("port")
                .value_name("N")
                .default_value(PORT)
                .value_parser(value_parser!(u16))
                .help("Port to listen on; 0: any that is free"),
        )
        .arg(
            Arg::new("host")
                .long("host")
                .value_name("HOST")
                .default_value(HOST)
                .help("Address to listen on; 0.0.0.0 lets everybody look who reaches this machine"),
        )
}

/// Serves the runs of the folders named until a signal ends it.
///
/// # Errors
/// If a folder holds no run, or the address cannot be listened on.
pub fn run(m: &ArgMatches) -> Result<()> {
    let dirs: Vec<PathBuf> = m.get_many("run_dir").expect("clap requires it").cloned().collect();
    let host = m.get_one::<String>("host").expect("it has a default");
    let port = *m.get_one::<u16>("port").expect("it has a default");
    let followed = Arc::new(Followed::open(&dirs)?);
    let listener = listen(host, port)?;
    end_on_signals()?;
    let at = listener.local_addr().context(|| "cannot listen".into())?;
    if !at.ip().is_loopback() {
        say::warning(&format!(
            "whoever reaches {at} can read this run; the default --host {HOST} serves this machine alone"
        ));
    }
    say::result(&format!("http://{}/", shown(host, at)));
    say::note("the page follows the run; Ctrl-C ends it");
    let eyes = Arc::clone(&followed);
    let look = move || eyes.look().iter().for_each(|fell| say::warning(fell));
    look();
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(PAUSE);
            look();
        }
    });
    serve::serve(&listener, &followed, host)
}

/// Ctrl-C is the way to end it: no failure.
fn end_on_signals() -> Result<()> {
    use signal_hook::consts::{SIGINT, SIGTERM};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM]).context(|| "cannot listen for signals".into())?;
    std::thread::spawn(move || {
        if signals.forever().next().is_some() {
            // It writes nothing that could be left unfinished.
            std::process::exit(0);
        }
    });
    Ok(())
}

/// What to type in a browser: an address of no machine in particular is this one's.
fn shown(host: &str, at: SocketAddr) -> String {
    match host.parse::<IpAddr>() {
        Ok(ip) if !ip.is_unspecified() => at.to_string(),
        Ok(_) => format!("localhost:{}", at.port()),
        Err(_) => format!("{host}:{}", at.port()),
    }
}

fn addresses(host: &str, port: u16) -> Result<Vec<SocketAddr>> {
    let found = (host.trim_start_matches('[').trim_end_matches(']'), port).to_socket_addrs();
    let all: Vec<SocketAddr> = found.map_err(|e| Error::usage(format!("--host {host}: {e}")))?.collect();
    match all.is_empty() {
        true => Err(Error::usage(format!("--host {host}: no address"))),
        false => Ok(all),
    }
}

/// Listens on a port.
///
/// # Errors
/// A usage error where it is taken, with the next one that is free; or what the system says.
fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let bind = |port: u16| TcpListener::bind(&addresses(host, port).unwrap_or_default()[..]);
    addresses(host, port)?;
    bind(port).map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            let free = (port..=port.saturating_add(NEIGHBOURS)).skip(1).find(|&next| bind(next).is_ok());
            let free = free.map_or(String::new(), |next| format!("--port {next} is free, "));
            Error::usage(format!("--port {port}: another program listens on {host}:{port}; {free}--port 0 takes any"))
        }
        _ => Error::usage(format!("--host {host} --port {port}: cannot listen there: {e}")),
    })
}
