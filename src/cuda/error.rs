//! Errors of the driver in words a user can act on.

use cudarc::driver::{DriverError, sys::CUresult};

use super::device_library;
use crate::error::Error;

/// The error of a driver call: what was tried, what the driver says, and what to do where that is known.
pub fn driver(what: &str, e: DriverError) -> Error {
    let hint = match e.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "the device's memory is full; use a smaller --micro-batch-size or --max-seq-len, or end other programs on the device"
        }
        CUresult::CUDA_ERROR_NO_DEVICE => "no GPU is visible; check `nvidia-smi` and CUDA_VISIBLE_DEVICES",
        CUresult::CUDA_ERROR_INVALID_DEVICE => "there is no device of this number; `ringtune doctor` lists them",
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS => {
            "a kernel that ran before this call read or wrote where it must not: a mistake in ringtune, please report it with the \
             command that led to it; the device cannot be used again in this process"
        }
        CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
        | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
        | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE
        | CUresult::CUDA_ERROR_UNKNOWN => {
            "this process has lost the GPU: `nvidia-smi` and Xid in `dmesg` say more; checkpoints that were finished are whole"
        }
        CUresult::CUDA_ERROR_LAUNCH_FAILED | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT | CUresult::CUDA_ERROR_ASSERT => {
            "a kernel that ran before this call stopped; the device cannot be used again in this process"
        }
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | CUresult::CUDA_ERROR_INVALID_PTX
        | CUresult::CUDA_ERROR_INVALID_IMAGE => {
            "the driver is older than the NVRTC in use, or NVRTC does not know this GPU; install a newer driver, or name another \
             NVRTC with RINGTUNE_NVRTC"
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH | CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "libcuda and the kernel module differ in version; restart the machine after a driver update"
        }
        CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES => {
            "the launch asks for more registers or shared memory than the device has"
        }
        _ => "",
    };
    // Not the driver's own name function of cudarc's `Debug`: an old driver may lack it, and then cudarc panics.
    let name = device_library::describe(e.0 as u32).unwrap_or_else(|| format!("{:?}", e.0));
    let message = match hint {
        "" => format!("cuda: {what}: {name}"),
        hint => format!("cuda: {what}: {name}; {hint}"),
    };
    if e.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY { Error::memory(message) } else { Error::device(message) }
}

/// Adds what was tried to the result of a driver call.
pub trait DriverResult<T> {
    /// The error as [`driver`] words it.
    ///
    /// # Errors
    /// That of `self`.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> DriverResult<T> for Result<T, DriverError> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|e| driver(&what(), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_device_says_what_was_asked_for_and_what_to_do() {
        let e = driver("allocating 12.0 GiB", DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)).to_string();
        assert!(
            e.starts_with("cuda: allocating 12.0 GiB: CUDA_ERROR_OUT_OF_MEMORY") && e.contains("--micro-batch-size"),
            "{e}"
        );
        let e = driver("x", DriverError(CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION)).to_string();
        assert!(e.contains("newer driver"), "{e}");
    }
}
