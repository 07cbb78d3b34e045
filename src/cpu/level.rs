//! Which vector instructions the processor has, and one source for every level of them.

use std::sync::OnceLock;

use crate::error::{Error, Result};

/// Instruction levels. Of those of one kind of processor, [`Level::ALL`], each includes the ones before it.
///
/// They differ in the last bits of products: `avx2`, `avx512` and `neon` multiply bf16 on the units of f32, each operand rounded first;
/// `avx512bf16`, `amx` and `neonbf16` have instructions for pairs of bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// What the compiler assumes everywhere, a product and a sum apart: SSE2 on x86-64, NEON on aarch64.
    Portable,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// 512-bit vectors.
    Avx512,
    /// 512-bit vectors with products of bf16 pairs (`vdpbf16ps`).
    Avx512Bf16,
    /// Products of bf16 on tiles (`tdpbf16ps`), all else as [`Level::Avx512Bf16`].
    Amx,
    /// On aarch64: 128-bit vectors with fused multiply-add.
    Neon,
    /// On aarch64: products of 2 x 4 by 4 x 2 of bf16 (`bfmmla`).
    NeonBf16,
}

/// Whether a process may use AMX tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tiles {
    /// The processor has none, or none for bf16.
    Absent,
    /// It has, but the system keeps their state from this process.
    Refused,
    /// It has, and the system grants their state.
    Granted,
}

/// What a processor has and a system grants, as far as the choice of a level goes by it.
#[derive(Clone, Copy, Debug)]
struct Facts {
    avx2: bool,
    avx512: bool,
    neon: bool,
    /// Products of bf16 in the widest vectors it has.
    bf16: bool,
    tiles: Tiles,
    /// Whether `vdpbf16ps` starts half as often as a multiply-add of f32: it then does no more operations in a second, and the
    /// products on the units of f32 are the faster ones.
    half_rate: bool,
}

impl Facts {
    /// Of this machine. The system is asked for the state of tiles once.
    fn get() -> Self {
        static FACTS: OnceLock<Facts> = OnceLock::new();
        *FACTS.get_or_init(Self::find)
    }

    #[cfg(target_arch = "x86_64")]
    fn find() -> Self {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        let bf16 = avx512 && is_x86_feature_detected!("avx512bf16");
        // A rule, not a measurement: the level decides the last bits of a run, so it must be the same at every start. All cores of
        // Intel that have the instruction, from Cooper Lake on, run it on one of the two ports that multiply f32.
        Self { avx2, avx512, neon: false, bf16, tiles: super::tiles::granted().into(), half_rate: is_intel() }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn find() -> Self {
        // Every processor of this kind has NEON.
        let neon = cfg!(target_arch = "aarch64");
        #[cfg(target_arch = "aarch64")]
        let bf16 = std::arch::is_aarch64_feature_detected!("bf16");
        #[cfg(not(target_arch = "aarch64"))]
        let bf16 = false;
        Self { avx2: false, avx512: false, neon, bf16, tiles: Tiles::Absent, half_rate: false }
    }

    fn supports(&self, level: Level) -> bool {
        match level {
            Level::Portable => true,
            Level::Avx2 => self.avx2,
            Level::Avx512 => self.avx512,
            Level::Avx512Bf16 => self.avx512 && self.bf16,
            Level::Amx => self.avx512 && self.bf16 && self.tiles == Tiles::Granted,
            Level::Neon => self.neon,
            Level::NeonBf16 => self.neon && self.bf16,
        }
    }

    /// The level with the fastest products.
    fn fastest(&self) -> Level {
        let slow = |l: Level| l == Level::Avx512Bf16 && self.half_rate;
        let chosen = Level::ALL.into_iter().rev().find(|&l| self.supports(l) && !slow(l));
        chosen.expect("portable always runs")
    }

    /// Why a level that the processor's features promise is not the fastest one.
    fn note(&self) -> Option<&'static str> {
        match (self.fastest(), self.tiles) {
            (Level::Amx, _) => None,
            (_, Tiles::Refused) => Some("amx: the system grants no tile state"),
            (Level::Avx512, _) if self.bf16 => Some("vdpbf16ps runs at half rate"),
            _ => None,
        }
    }
}

impl From<Option<bool>> for Tiles {
    fn from(granted: Option<bool>) -> Self {
        granted.map_or(Tiles::Absent, |yes| if yes { Tiles::Granted } else { Tiles::Refused })
    }
}

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
}

impl Level {
    /// All levels of this kind of processor, from what each has to what the newest have.
    #[cfg(not(target_arch = "aarch64"))]
    pub const ALL: [Level; 5] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx];

    /// All levels of this kind of processor, from what each has to what the newest have.
    #[cfg(target_arch = "aarch64")]
    pub const ALL: [Level; 3] = [Level::Portable, Level::Neon, Level::NeonBf16];

    /// The value of `RINGTUNE_CPU` that forces this level.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512bf16",
            Level::Amx => "amx",
            Level::Neon => "neon",
            Level::NeonBf16 => "neonbf16",
        }
    }

    /// Whether this processor can run the level, and the system lets it.
    pub fn is_supported(self) -> bool {
        Facts::get().supports(self)
    }

    /// Whether the processor has AMX tiles for bf16, granted or not.
    pub fn has_tiles() -> bool {
        Facts::get().tiles != Tiles::Absent
    }

    /// The level with the fastest products that this machine can run: the last one, but for `avx512bf16` on processors of Intel,
    /// whose `vdpbf16ps` is slower than their multiply-add.
    pub fn fastest() -> Self {
        Facts::get().fastest()
    }

    /// In a few words, why [`Level::fastest`] is not the level that the processor's features promise; `None` where it is.
    pub fn note() -> Option<&'static str> {
        Facts::get().note()
    }

    /// [`Level::fastest`], or the one that the environment variable `RINGTUNE_CPU` names.
    ///
    /// # Errors
    /// If `RINGTUNE_CPU` names no level or one that this machine cannot run.
    pub fn detect() -> Result<Self> {
        match std::env::var("RINGTUNE_CPU") {
            Ok(name) if !name.is_empty() => {
                let found = Self::ALL.into_iter().find(|l| l.name() == name);
                let level = found.ok_or_else(|| {
                    let names = Self::ALL.map(Self::name).join(", ");
                    Error::usage(format!("RINGTUNE_CPU={name}: expected one of {names}"))
                })?;
                if !level.is_supported() {
                    let lacks = match Facts::get().tiles {
                        Tiles::Refused if level == Level::Amx => "the system grants this process no tile state",
                        _ => "this processor lacks it",
                    };
                    return Err(Error::usage(format!(
                        "RINGTUNE_CPU={name}: {lacks}; its fastest level is {}",
                        Self::fastest().name()
                    )));
                }
                Ok(level)
            }
            _ => Ok(Self::fastest()),
        }
    }
}

/// What differs between the levels inside a loop that the compiler vectorises.
pub trait Isa {
    /// `a * b + c`, fused where the processor can.
    fn fma(a: f32, b: f32, c: f32) -> f32;
}

/// Levels with a fused multiply-add instruction.
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    expect(dead_code, reason = "the portable level is the only one")
)]
pub struct Fused;

/// Levels without one, where `mul_add` would be a slow library call.
pub struct Plain;

impl Isa for Fused {
    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
}

impl Isa for Plain {
    #[inline(always)]
    fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
}

/// Compiles one function body once per instruction level, with an [`Isa`] named `I` in scope, and adds a first parameter
/// `level` that chooses at run time. Generic parameters stand in square brackets. The body is plain safe Rust over slices
/// that the compiler turns into vectors of the level's width.
macro_rules! multiversion {
    ($(#[$doc:meta])* $vis:vis fn $name:ident $([$($g:ident: $bound:path),+])? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name$(<$($g: $bound),+>)?(level: $crate::cpu::level::Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<I: $crate::cpu::level::Isa $($(, $g: $bound)+)?>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                use $crate::cpu::level::{Fused, Level};
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512$(<$($g: $bound),+>)?($($arg: $ty),*) $(-> $ret)? {
                    body::<Fused $($(, $g)+)?>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2$(<$($g: $bound),+>)?($($arg: $ty),*) $(-> $ret)? {
                    body::<Fused $($(, $g)+)?>($($arg),*)
                }
                match level {
                    // SAFETY: a `Level` exists in a `Cpu` only after `Level::is_supported` found its features.
                    Level::Avx512 | Level::Avx512Bf16 | Level::Amx => return unsafe { avx512$(::<$($g),+>)?($($arg),*) },
                    // SAFETY: as above.
                    Level::Avx2 => return unsafe { avx2$(::<$($g),+>)?($($arg),*) },
                    Level::Portable | Level::Neon | Level::NeonBf16 => {}
                }
            }
            // Every processor of this kind has the instruction: nothing has to be enabled.
            #[cfg(target_arch = "aarch64")]
            if level != $crate::cpu::level::Level::Portable {
                return body::<$crate::cpu::level::Fused $($(, $g)+)?>($($arg),*);
            }
            let _ = level;
            body::<$crate::cpu::level::Plain $($(, $g)+)?>($($arg),*)
        }
    };
}
pub(crate) use multiversion;

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(avx2: bool, avx512: bool, bf16: bool, tiles: Tiles, half_rate: bool) -> Facts {
        Facts { avx2, avx512, neon: false, bf16, tiles, half_rate }
    }

    #[test]
    fn each_level_includes_the_ones_before_it() {
        assert!(Level::Portable.is_supported());
        let mut supported = Level::ALL.into_iter().map(Level::is_supported);
        // Once one is missing, all later ones are.
        assert!(supported.by_ref().take_while(|&s| s).count() >= 1);
        assert!(supported.all(|s| !s));
        assert!(Level::fastest().is_supported());
    }

    #[cfg(target_arch = "aarch64")]
    #[test]
    fn bf16_decides_the_level_and_those_of_other_processors_are_refused() {
        let arm = |bf16| Facts { neon: true, ..facts(false, false, bf16, Tiles::Absent, false) };
        assert_eq!((arm(false).fastest(), arm(false).supports(Level::NeonBf16)), (Level::Neon, false));
        assert_eq!((arm(true).fastest(), arm(true).note()), (Level::NeonBf16, None));
        assert!(![Level::Avx2, Level::Avx512, Level::Avx512Bf16, Level::Amx].iter().any(|&l| arm(true).supports(l)));
    }

    #[cfg(not(target_arch = "aarch64"))]
    #[test]
    fn the_level_is_the_one_with_the_fastest_products() {
        use Tiles::{Absent, Granted, Refused};
        let choice = |f: Facts| (f.fastest(), f.note().is_some());
        assert_eq!(choice(facts(false, false, false, Absent, true)), (Level::Portable, false));
        assert_eq!(choice(facts(true, false, false, Absent, true)), (Level::Avx2, false));
        assert_eq!(choice(facts(true, true, false, Absent, true)), (Level::Avx512, false));
        // AMD, then Intel without and with tiles; then tiles that the system keeps, on both.
        assert_eq!(choice(facts(true, true, true, Absent, false)), (Level::Avx512Bf16, false));
        assert_eq!(choice(facts(true, true, true, Absent, true)), (Level::Avx512, true));
        assert_eq!(choice(facts(true, true, true, Granted, true)), (Level::Amx, false));
        assert_eq!(choice(facts(true, true, true, Refused, true)), (Level::Avx512, true));
        assert_eq!(choice(facts(true, true, true, Refused, false)), (Level::Avx512Bf16, true));
        let refused = facts(true, true, true, Refused, true);
        assert!(!refused.supports(Level::Amx) && refused.note().unwrap().starts_with("amx: "));
    }
}
