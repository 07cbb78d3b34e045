//! Libraries and kernels: modules that do not belong to a context. Here they are loaded into the current one.

use std::ffi::{c_char, c_int};

use crate::api::module::{Options, image_text, load};
use crate::code::{Code, Result};
use crate::driver::driver;
use crate::ffi::{Handle, In, Out, api};

fn load_library(out: Out<Handle>, text: &str, options: &mut Options, n_library_options: u32) -> Result {
    out.check()?;
    if n_library_options > 2 {
        return Err(Code::INVALID_VALUE);
    }
    out.set(load(text, options, true)?)
}

api! {
    /// Loads PTX text.
    fn cuLibraryLoadData(
        out: Out<Handle>, code: usize, options: In<c_int>, values: In<usize>, n: u32,
        library_options: In<c_int>, library_values: In<usize>, n_library: u32,
    ) {
        let _ = (library_options, library_values);
        let mut o = Options::read(n, &options, &values)?;
        load_library(out, &image_text(code)?, &mut o, n_library)
    }

    /// Loads a file of PTX text.
    fn cuLibraryLoadFromFile(
        out: Out<Handle>, path: In<c_char>, options: In<c_int>, values: In<usize>, n: u32,
        library_options: In<c_int>, library_values: In<usize>, n_library: u32,
    ) {
        let _ = (library_options, library_values);
        let mut bytes = std::fs::read(path.text()?).map_err(|_| Code::FILE_NOT_FOUND)?;
        bytes.extend([0; 8]);
        let mut o = Options::read(n, &options, &values)?;
        load_library(out, &image_text(bytes.as_ptr() as usize)?, &mut o, n_library)
    }

    /// Ends a library.
    fn cuLibraryUnload(library: Handle) {
        crate::api::module::unload(library, true)
    }

    /// A kernel of a library; its handle serves as a function's.
    fn cuLibraryGetKernel(out: Out<Handle>, library: Handle, name: In<c_char>) {
        crate::api::module::function(out, library, name, true)
    }

    /// Number of kernels.
    fn cuLibraryGetKernelCount(out: Out<u32>, library: Handle) {
        let st = driver().state();
        st.current()?;
        out.set(st.modules.get(library)?.image.kernels().count() as u32)
    }

    /// The module of a library in the current context.
    fn cuLibraryGetModule(out: Out<Handle>, library: Handle) {
        let st = driver().state();
        st.current()?;
        st.modules.get(library)?;
        out.set(library)
    }

    /// A variable of a library.
    fn cuLibraryGetGlobal(address: Out<u64>, bytes: Out<usize>, library: Handle, name: In<c_char>) {
        crate::api::module::global(address, bytes, library, name)
    }

    /// The function of a kernel in the current context.
    fn cuKernelGetFunction(out: Out<Handle>, kernel: Handle) {
        let st = driver().state();
        st.healthy()?;
        st.functions.get(kernel)?;
        out.set(kernel)
    }

    /// Something about a kernel on a device.
    fn cuKernelGetAttribute(value: Out<c_int>, attribute: c_int, kernel: Handle, device: c_int) {
        let _ = device;
        crate::api::launch::get_attribute(value, attribute, kernel)
    }

    /// Sets something on a kernel on a device.
    fn cuKernelSetAttribute(attribute: c_int, value: c_int, kernel: Handle, device: c_int) {
        let _ = device;
        crate::api::launch::set_attribute(kernel, attribute, value)
    }
}
