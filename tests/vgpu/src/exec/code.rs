//! Two builds of each handler from one source: for x86-64-v3 processors and for any processor.
//!
//! Baseline x86-64 has neither vectors of eight words nor fused multiply-add, so that `mul_add` becomes a call; with them
//! most instructions are a few vector operations. Which build runs is decided once, when a module is loaded.

use super::{Inst, Regs};

/// Which build of the handlers a module uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Build {
    /// Code for any processor.
    Portable,
    /// Code for x86-64-v3: AVX2, FMA, BMI and F16C.
    V3,
}

impl Build {
    /// The best build this processor runs; `VGPU_PORTABLE=1` asks for the portable one.
    pub fn detect() -> Build {
        let portable = std::env::var_os("VGPU_PORTABLE").is_some_and(|v| v != "0" && !v.is_empty());
        if portable || !Build::V3.supported() { Build::Portable } else { Build::V3 }
    }

    /// Whether this processor can run it.
    pub fn supported(self) -> bool {
        match self {
            Build::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Build::V3 => {
                use std::arch::is_x86_feature_detected as has;
                has!("avx2")
                    && has!("fma")
                    && has!("bmi1")
                    && has!("bmi2")
                    && has!("lzcnt")
                    && has!("popcnt")
                    && has!("f16c")
                    && has!("movbe")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Build::V3 => false,
        }
    }
}

/// A handler in both builds.
#[derive(Clone, Copy)]
pub struct Code<F> {
    /// For any processor.
    pub portable: F,
    /// For x86-64-v3; the portable one on other architectures.
    pub v3: F,
}

impl<F: Copy> Code<F> {
    /// The handler of one build. Calling it needs a processor on which `build` is supported.
    pub fn pick(self, build: Build) -> F {
        match build {
            Build::Portable => self.portable,
            Build::V3 => self.v3,
        }
    }
}

/// An arithmetic instruction over the lanes in the mask. Unsafe to call: the processor must support its build.
pub type Handler = unsafe fn(&mut Regs, &Inst, u32);
/// An instruction that exchanges data between lanes; the error says what is wrong with its mask.
pub type WarpHandler = unsafe fn(&mut Regs, &Inst, u32) -> Result<(), String>;

/// A [`Code`] of type `$t` whose two builds have the same body.
macro_rules! builds {
    ($t:ty, $out:ty, |$r:ident, $i:ident, $m:ident| $body:expr) => {{
        #[inline(always)]
        fn body($r: &mut $crate::exec::Regs, $i: &$crate::exec::Inst, $m: u32) -> $out {
            $body
        }
        fn portable(r: &mut $crate::exec::Regs, i: &$crate::exec::Inst, m: u32) -> $out {
            body(r, i, m)
        }
        #[cfg_attr(target_arch = "x86_64", target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt,f16c,movbe"))]
        fn v3(r: &mut $crate::exec::Regs, i: &$crate::exec::Inst, m: u32) -> $out {
            body(r, i, m)
        }
        $crate::exec::code::Code::<$t> { portable, v3 }
    }};
}

/// An [`super::Alu`] from `|regs, inst, mask| body`.
macro_rules! alu {
    (|$r:ident, $i:ident, $m:ident| $body:expr) => {
        $crate::exec::code::builds!($crate::exec::code::Handler, (), |$r, $i, $m| $body)
    };
}

/// A [`super::WarpAlu`] from `|regs, inst, mask| body`.
macro_rules! warp_alu {
    (|$r:ident, $i:ident, $m:ident| $body:expr) => {
        $crate::exec::code::builds!(
            $crate::exec::code::WarpHandler,
            Result<(), String>,
            |$r, $i, $m| $body
        )
    };
}
pub(crate) use {alu, builds, warp_alu};
