//! Names and texts of errors.

use std::ffi::c_char;

use crate::code::Code;
use crate::driver::driver;
use crate::ffi::{Out, api};

api! {
    /// Name of an error code.
    fn cuGetErrorName(code: Code, out: Out<*const c_char>) {
        let name = code.name();
        out.set(name.map_or(std::ptr::null(), |n| n.as_ptr()))?;
        name.map(|_| ()).ok_or(Code::INVALID_VALUE)
    }

    /// Text of an error code; after a fault, the text of the first fault with this code.
    fn cuGetErrorString(code: Code, out: Out<*const c_char>) {
        let fault = driver().state().fault_texts.get(&code.0).copied();
        let text = fault.or(code.text());
        out.set(text.map_or(std::ptr::null(), |n| n.as_ptr()))?;
        text.map(|_| ()).ok_or(Code::INVALID_VALUE)
    }
}
