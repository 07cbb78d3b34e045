//! Finding functions by name.

use std::ffi::{c_char, c_int};

use crate::code::Code;
use crate::ffi::{In, Out, api};

const FOUND: u32 = 0;
const NOT_FOUND: u32 = 1;
const TOO_OLD: u32 = 2;

/// Versions of CUDA from which a name without suffix means a later form, where that is not "always".
const SINCE: &[(&str, c_int)] = &[
    ("cuDeviceGetUuid_v2", 11040),
    ("cuCtxCreate_v3", 11040),
    ("cuCtxCreate_v4", 12050),
    ("cuStreamBeginCapture_v2", 10010),
    ("cuStreamGetCaptureInfo_v2", 11030),
    ("cuMemAdvise_v2", 12020),
    ("cuMemPrefetchAsync_v2", 12020),
    ("cuEventElapsedTime_v2", 12080),
    ("cuGraphExecUpdate_v2", 12000),
    ("cuGetProcAddress_v2", 12000),
    ("cuStreamGetCtx_v2", 12050),
];

/// Address of the newest form of a function that `version` knows, and a status.
fn find(name: &str, version: c_int) -> (*const (), u32) {
    let forms = [4, 3, 2].map(|v| format!("{name}_v{v}"));
    let mut too_old = false;
    for form in forms.iter().map(String::as_str).chain([name]) {
        let Some(s) = super::symbols().find(|s| s.name == form && !s.name.starts_with("vgpu")) else {
            continue;
        };
        let since = SINCE.iter().find(|(n, _)| *n == form).map_or(0, |(_, v)| *v);
        if version >= since {
            return (s.address, FOUND);
        }
        too_old = true;
    }
    (std::ptr::null(), if too_old { TOO_OLD } else { NOT_FOUND })
}

api! {
    /// Address of a function; a name that is not known leaves null and succeeds.
    fn cuGetProcAddress_v2(name: In<c_char>, out: Out<*const ()>, version: c_int, flags: u64, status: Out<u32>) {
        if flags > 2 {
            return Err(Code::INVALID_VALUE);
        }
        // In CUDA 12 the plain name means the form with flags.
        let name = match name.text()?.as_str() {
            "cuGraphInstantiate" if version >= 12000 => "cuGraphInstantiateWithFlags".to_owned(),
            n => n.to_owned(),
        };
        let (address, found) = find(&name, version);
        out.set(address)?;
        status.set_if(found);
        Ok(())
    }

    /// As `cuGetProcAddress_v2` in the form of CUDA 11: an unknown name is an error.
    fn cuGetProcAddress(name: In<c_char>, out: Out<*const ()>, version: c_int, flags: u64) {
        if flags > 2 {
            return Err(Code::INVALID_VALUE);
        }
        let (address, found) = find(&name.text()?, version);
        out.set(address)?;
        if found == FOUND { Ok(()) } else { Err(Code::NOT_FOUND) }
    }
}
