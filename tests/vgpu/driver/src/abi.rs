//! Structures of cuda.h that cross the border. A test compares sizes and offsets with cudarc's.

use crate::ffi::Handle;

/// `CUlaunchConfig`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct LaunchConfig {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared bytes.
    pub shared: u32,
    /// The stream.
    pub stream: Handle,
    /// Address of an array of [`LaunchAttribute`].
    pub attributes: usize,
    /// Its length.
    pub n_attributes: u32,
}

/// `CUlaunchAttribute`: a number and a union of 64 bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct LaunchAttribute {
    /// `CUlaunchAttributeID`.
    pub id: u32,
    pad: u32,
    /// The value, as words.
    pub value: [u32; 16],
}

/// `CUDA_MEMCPY2D`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Memcpy2d {
    /// The source.
    pub from: Memcpy2dEnd,
    /// The destination.
    pub to: Memcpy2dEnd,
    /// Bytes of a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
}

/// One end of a [`Memcpy2d`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Memcpy2dEnd {
    /// First byte of a row.
    pub x: usize,
    /// First row.
    pub y: usize,
    /// `CUmemorytype`.
    pub kind: u32,
    /// Host address.
    pub host: usize,
    /// Device address.
    pub device: u64,
    /// Arrays are not offered.
    pub array: usize,
    /// Distance of rows in bytes.
    pub pitch: usize,
}

/// `CUmemLocation`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Location {
    /// `CUmemLocationType`; 1 is a device.
    pub kind: u32,
    /// The device's number.
    pub id: i32,
}

/// `CUmemPoolProps`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct PoolProps {
    /// `CUmemAllocationType`; must be pinned, 1.
    pub allocation: u32,
    /// `CUmemAllocationHandleType`; none is offered.
    pub handles: u32,
    /// Where.
    pub location: Location,
    security: usize,
    /// Most bytes, 0 for all.
    pub max_size: usize,
    usage: u16,
    reserved: [u8; 54],
}

/// `CUgraphExecUpdateResultInfo`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UpdateInfo {
    /// `CUgraphExecUpdateResult`.
    pub result: u32,
    /// Node of the updated graph.
    pub error_node: Handle,
    /// Node that the wrong edge comes from.
    pub error_from: Handle,
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use cudarc::driver::sys;

    use super::*;

    #[test]
    fn structures_lie_as_in_cudarc() {
        assert_eq!(size_of::<LaunchConfig>(), size_of::<sys::CUlaunchConfig>());
        assert_eq!(offset_of!(LaunchConfig, block), offset_of!(sys::CUlaunchConfig, blockDimX));
        assert_eq!(offset_of!(LaunchConfig, shared), offset_of!(sys::CUlaunchConfig, sharedMemBytes));
        assert_eq!(offset_of!(LaunchConfig, stream), offset_of!(sys::CUlaunchConfig, hStream));
        assert_eq!(offset_of!(LaunchConfig, attributes), offset_of!(sys::CUlaunchConfig, attrs));
        assert_eq!(offset_of!(LaunchConfig, n_attributes), offset_of!(sys::CUlaunchConfig, numAttrs));
        assert_eq!(size_of::<LaunchAttribute>(), size_of::<sys::CUlaunchAttribute>());
        assert_eq!(offset_of!(LaunchAttribute, value), offset_of!(sys::CUlaunchAttribute, value));
        assert_eq!(size_of::<Memcpy2d>(), size_of::<sys::CUDA_MEMCPY2D>());
        assert_eq!(offset_of!(Memcpy2d, to), offset_of!(sys::CUDA_MEMCPY2D, dstXInBytes));
        assert_eq!(offset_of!(Memcpy2dEnd, kind), offset_of!(sys::CUDA_MEMCPY2D, srcMemoryType));
        assert_eq!(offset_of!(Memcpy2dEnd, host), offset_of!(sys::CUDA_MEMCPY2D, srcHost));
        assert_eq!(offset_of!(Memcpy2dEnd, device), offset_of!(sys::CUDA_MEMCPY2D, srcDevice));
        assert_eq!(offset_of!(Memcpy2dEnd, pitch), offset_of!(sys::CUDA_MEMCPY2D, srcPitch));
        assert_eq!(offset_of!(Memcpy2d, width), offset_of!(sys::CUDA_MEMCPY2D, WidthInBytes));
        assert_eq!(size_of::<PoolProps>(), size_of::<sys::CUmemPoolProps>());
        assert_eq!(offset_of!(PoolProps, handles), offset_of!(sys::CUmemPoolProps, handleTypes));
        assert_eq!(offset_of!(PoolProps, location), offset_of!(sys::CUmemPoolProps, location));
        assert_eq!(offset_of!(PoolProps, max_size), offset_of!(sys::CUmemPoolProps, maxSize));
        assert_eq!(size_of::<Location>(), size_of::<sys::CUmemLocation>());
        assert_eq!(size_of::<UpdateInfo>(), size_of::<sys::CUgraphExecUpdateResultInfo>());
        assert_eq!(offset_of!(UpdateInfo, error_node), offset_of!(sys::CUgraphExecUpdateResultInfo, errorNode));
    }
}
