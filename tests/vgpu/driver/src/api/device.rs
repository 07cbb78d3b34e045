//! Initialisation, version and devices.

use std::ffi::{c_char, c_int, c_void};

use crate::code::{Code, Result};
use crate::driver::{Device, driver};
use crate::ffi::{In, Out, api};

fn device(ordinal: c_int) -> Result<&'static Device> {
    if !driver().state().initialised {
        return Err(Code::NOT_INITIALIZED);
    }
    let d = usize::try_from(ordinal).ok().and_then(|i| driver().devices.get(i));
    d.ok_or(Code::INVALID_DEVICE)
}

fn uuid(ordinal: usize) -> [u8; 16] {
    let mut id = *b"vgpu device no. ";
    id[15] = ordinal as u8;
    id
}

fn bus_id(ordinal: usize) -> String {
    format!("0000:{:02X}:00.0", ordinal + 1)
}

api! {
    /// Starts the library.
    fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        if driver().devices.is_empty() {
            return Err(Code::NO_DEVICE);
        }
        if !std::mem::replace(&mut driver().state().initialised, true) {
            crate::leaks::watch();
        }
        Ok(())
    }

    /// The version.
    fn cuDriverGetVersion(version: Out<c_int>) {
        version.set(driver().config.version)
    }

    /// Tables of the driver for other libraries: there are none.
    fn cuGetExportTable(table: Out<*const c_void>, id: In<[u8; 16]>) {
        let _ = id;
        table.set(std::ptr::null())?;
        Err(Code::NOT_FOUND)
    }

    /// A device by number.
    fn cuDeviceGet(out: Out<c_int>, ordinal: c_int) {
        device(ordinal)?;
        out.set(ordinal)
    }

    /// The number of devices.
    fn cuDeviceGetCount(count: Out<c_int>) {
        if !driver().state().initialised {
            return Err(Code::NOT_INITIALIZED);
        }
        count.set(driver().devices.len() as c_int)
    }

    /// The name, which says that this is vgpu and what it poses as.
    fn cuDeviceGetName(name: Out<c_char>, len: c_int, ordinal: c_int) {
        let d = device(ordinal)?;
        let chip = driver().config.chip;
        let text = format!("vgpu {} (sm_{}, {})", d.ordinal, chip.sm(), chip.board);
        let len = usize::try_from(len).map_err(|_| Code::INVALID_VALUE)?;
        if len == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let cut = text.bytes().take(len - 1).chain([0]);
        name.set_all(cut.map(|b| b as c_char), len)
    }

    /// Sixteen bytes that tell devices apart.
    fn cuDeviceGetUuid(out: Out<[u8; 16]>, ordinal: c_int) {
        out.set(uuid(device(ordinal)?.ordinal))
    }

    /// As `cuDeviceGetUuid`.
    fn cuDeviceGetUuid_v2(out: Out<[u8; 16]>, ordinal: c_int) {
        out.set(uuid(device(ordinal)?.ordinal))
    }

    /// Bytes of memory.
    fn cuDeviceTotalMem_v2(bytes: Out<usize>, ordinal: c_int) {
        device(ordinal)?;
        bytes.set(driver().config.memory as usize)
    }

    /// An attribute.
    fn cuDeviceGetAttribute(value: Out<c_int>, attribute: c_int, ordinal: c_int) {
        let d = device(ordinal)?;
        let v = driver().config.chip.attribute(attribute, d.ordinal as c_int);
        value.set(v.ok_or(Code::INVALID_VALUE)?)
    }

    /// A device by its bus address, as `cuDeviceGetPCIBusId` gives it.
    fn cuDeviceGetByPCIBusId(out: Out<c_int>, id: In<c_char>) {
        let text = id.text()?;
        let found = driver().devices.iter().find(|d| bus_id(d.ordinal).eq_ignore_ascii_case(&text));
        out.set(found.ok_or(Code::INVALID_DEVICE)?.ordinal as c_int)
    }

    /// Bus address of a device.
    fn cuDeviceGetPCIBusId(id: Out<c_char>, len: c_int, ordinal: c_int) {
        let text = bus_id(device(ordinal)?.ordinal);
        let len = usize::try_from(len).ok().filter(|n| *n > text.len()).ok_or(Code::INVALID_VALUE)?;
        id.set_all(text.bytes().chain([0]).map(|b| b as c_char), len)
    }

    /// The compute capability.
    fn cuDeviceComputeCapability(major: Out<c_int>, minor: Out<c_int>, ordinal: c_int) {
        device(ordinal)?;
        let (a, b) = driver().config.chip.cc;
        major.set(a)?;
        minor.set(b)
    }

    /// Kernels of one device do not reach the memory of another.
    fn cuDeviceCanAccessPeer(can: Out<c_int>, from: c_int, to: c_int) {
        device(from)?;
        device(to)?;
        can.set(0)
    }
}
