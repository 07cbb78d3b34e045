//! The instruction levels that a machine runs, tiles emulated where it has none.

use ringtune::cpu::{Cpu, Level};

/// How a level runs here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    Native,
    Emulated,
    None,
}

impl Support {
    pub fn of(level: Level) -> Self {
        // The vectors beside the tiles are not emulated.
        let emulated = cfg!(all(target_arch = "x86_64", target_os = "linux"))
            && level == Level::Amx
            && Level::Avx512Bf16.is_supported();
        match (level.is_supported(), emulated) {
            (true, _) => Self::Native,
            (false, true) => Self::Emulated,
            (false, false) => Self::None,
        }
    }

    pub fn word(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Emulated => "emulated",
            Self::None => "cannot run here",
        }
    }
}

/// The levels that run here, from what every processor has.
pub fn levels() -> Vec<Level> {
    Level::ALL.into_iter().filter(|&l| Support::of(l) != Support::None).collect()
}

/// A device at a level that runs here.
pub fn cpu(threads: usize, level: Level) -> Cpu {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if Support::of(level) == Support::Emulated {
        super::amx::install();
        // SAFETY: the handler that was just installed carries out what the processor lacks.
        return unsafe { Cpu::with_level_unchecked(Some(threads), level) }.unwrap();
    }
    Cpu::with_level(Some(threads), level).unwrap()
}
