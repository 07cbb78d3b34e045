//! Settings from the environment, read once when the library is first used.

use crate::chip::{CHIPS, Chip};
use crate::report::say;

/// When queued operations run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Streams {
    /// As soon as they are queued.
    Eager,
    /// Only when something forces them, in an order drawn from the seed.
    Lazy,
}

/// Every setting of the library.
pub struct Config {
    /// Number of devices (`VGPU_DEVICES`, 1 to 8, default 2).
    pub devices: usize,
    /// The chip that they pose as (`VGPU_CC`, default 8.0).
    pub chip: &'static Chip,
    /// Memory of a device in bytes (`VGPU_MEMORY`, with K, M or G, default 2G).
    pub memory: u64,
    /// `VGPU_STREAMS`, `lazy` (default) or `eager`.
    pub streams: Streams,
    /// `VGPU_SEED`, default 0.
    pub seed: u64,
    /// Host threads that run the blocks of a launch (`VGPU_THREADS`, default all processors).
    pub threads: usize,
    /// Warp instructions of a launch before the watchdog stops it (`VGPU_BUDGET`).
    pub budget: u64,
    /// The launch with which the devices are lost, from 1 (`VGPU_LOST`, default never).
    pub lost: u64,
    /// Whether only as many blocks run at once as the device holds (`VGPU_RESIDENT`, `strict`; default `growing`).
    pub strict: bool,
    /// Version of the driver as `cuDriverGetVersion` gives it (`VGPU_DRIVER`, 12.0 to 13.9, default 12.9).
    pub version: i32,
}

/// Bytes as `512`, `64K`, `300M` or `2G`.
pub fn bytes(text: &str) -> Option<u64> {
    let t = text.trim();
    let (digits, shift) = match t.chars().last()?.to_ascii_uppercase() {
        'K' => (&t[..t.len() - 1], 10),
        'M' => (&t[..t.len() - 1], 20),
        'G' => (&t[..t.len() - 1], 30),
        _ => (t, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

fn setting<T>(name: &str, default: T, what: &str, parse: impl Fn(&str) -> Option<T>) -> T {
    match std::env::var(name) {
        Ok(text) => parse(&text).unwrap_or_else(|| {
            say(&format!("{name}={text}: expected {what}; the default is used"));
            default
        }),
        Err(_) => default,
    }
}

impl Config {
    /// Reads the environment; a value that makes no sense is named on stderr and replaced by the default.
    pub fn from_env() -> Config {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let number = |t: &str| t.trim().parse::<u64>().ok();
        Config {
            devices: setting("VGPU_DEVICES", 2, "0 to 8", |t| t.parse().ok().filter(|n| *n <= 8)),
            chip: setting("VGPU_CC", &CHIPS[0], "8.0, 8.9, 9.0, 10.0 or 12.0", Chip::by_name),
            memory: setting("VGPU_MEMORY", 2 << 30, "bytes such as 300M or 2G, up to 512G", |t| {
                bytes(t).filter(|n| *n <= 512 << 30)
            }),
            streams: setting("VGPU_STREAMS", Streams::Lazy, "lazy or eager", |t| match t {
                "lazy" => Some(Streams::Lazy),
                "eager" => Some(Streams::Eager),
                _ => None,
            }),
            seed: setting("VGPU_SEED", 0, "a number", number),
            threads: setting("VGPU_THREADS", cores, "1 to 256", |t| t.parse().ok().filter(|n| (1..=256).contains(n))),
            budget: setting("VGPU_BUDGET", 1 << 34, "a number of warp instructions", number),
            lost: setting("VGPU_LOST", u64::MAX, "the number of a launch", number),
            strict: setting("VGPU_RESIDENT", false, "strict or growing", |t| match t {
                "strict" => Some(true),
                "growing" => Some(false),
                _ => None,
            }),
            version: setting("VGPU_DRIVER", 12090, "12.0 to 13.9", |t| {
                let (major, minor) = t.trim().split_once('.')?;
                let (major, minor) = (major.parse::<i32>().ok()?, minor.parse::<i32>().ok()?);
                ((12..=13).contains(&major) && (0..=9).contains(&minor)).then_some(major * 1000 + minor * 10)
            }),
        }
    }

    /// Newest PTX version, times ten, that a driver of this version takes (release notes of the PTX ISA).
    pub fn newest_ptx(&self) -> i32 {
        let (major, minor) = (self.version / 1000, self.version % 1000 / 10);
        match (major, minor) {
            (12, 0..=5) => 80 + minor,
            (12, 6) => 85,
            (12, _) => 80 + minor - 1,
            _ => 90 + minor,
        }
    }
}
