//! Which vector instructions the processor has, and one source for every level of them.

use crate::error::{Error, Result};

/// Instruction levels, from what every processor has to what the fastest have. Each includes the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// What the compiler assumes everywhere: SSE2 on x86-64, NEON on aarch64.
    Portable,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// 512-bit vectors.
    Avx512,
    /// 512-bit vectors with products of bf16 pairs (`vdpbf16ps`).
    Avx512Bf16,
}

impl Level {
    /// All levels, slowest first.
    pub const ALL: [Level; 4] = [Level::Portable, Level::Avx2, Level::Avx512, Level::Avx512Bf16];

    /// The value of `RINGTUNE_CPU` that forces this level.
    pub fn name(self) -> &'static str {
        match self {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether this processor can run the level.
    pub fn is_supported(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            match self {
                Level::Portable => true,
                Level::Avx2 => avx2,
                Level::Avx512 => avx512,
                Level::Avx512Bf16 => avx512 && is_x86_feature_detected!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Level::Portable
        }
    }

    /// The best level of this processor, or the one that the environment variable `RINGTUNE_CPU` names.
    ///
    /// # Errors
    /// If `RINGTUNE_CPU` names no level or one that this processor lacks.
    pub fn detect() -> Result<Self> {
        let best = Self::ALL.into_iter().rev().find(|l| l.is_supported()).expect("portable always runs");
        match std::env::var("RINGTUNE_CPU") {
            Ok(name) if !name.is_empty() => {
                let found = Self::ALL.into_iter().find(|l| l.name() == name);
                let level = found.ok_or_else(|| {
                    Error::usage(format!("RINGTUNE_CPU={name}: expected portable, avx2, avx512 or avx512bf16"))
                })?;
                if !level.is_supported() {
                    return Err(Error::usage(format!(
                        "RINGTUNE_CPU={name}: this processor lacks it; its best level is {}",
                        best.name()
                    )));
                }
                Ok(level)
            }
            _ => Ok(best),
        }
    }
}

/// What differs between the levels inside a loop that the compiler vectorises.
pub trait Isa {
    /// `a * b + c`, fused where the processor can.
    fn fma(a: f32, b: f32, c: f32) -> f32;
}

/// Levels with a fused multiply-add instruction.
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
                    Level::Avx512 | Level::Avx512Bf16 => return unsafe { avx512$(::<$($g),+>)?($($arg),*) },
                    // SAFETY: as above.
                    Level::Avx2 => return unsafe { avx2$(::<$($g),+>)?($($arg),*) },
                    Level::Portable => {}
                }
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

    #[test]
    fn levels_are_ordered_and_portable_always_runs() {
        assert!(Level::Portable.is_supported());
        let mut supported = Level::ALL.into_iter().map(Level::is_supported);
        // Each level includes the ones before it: once one is missing, all later ones are.
        assert!(supported.by_ref().take_while(|&s| s).count() >= 1);
        assert!(supported.all(|s| !s));
    }
}
