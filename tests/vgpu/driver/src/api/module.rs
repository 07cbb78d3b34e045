//! Modules and what can be looked up in them.

use std::ffi::{CStr, c_char};
use std::sync::{Arc, Mutex};

use crate::code::{Code, Result};
use crate::driver::driver;
use crate::ffi::{Handle, In, Out, api};
use crate::module::{Function, Module, directive};
use crate::report::say;

/// Reads the text of an image; anything but PTX is refused with the reason.
fn image_text(image: usize) -> Result<String> {
    if image == 0 {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: the C caller promises an image; every kind of image has at least eight bytes (text ends in a zero that is seen first).
    let head: Vec<u8> = (0..8)
        .map_while(|i| Some(unsafe { *((image + i) as *const u8) }).filter(|b| *b != 0))
        .collect();
    // An ELF file is a cubin, these four bytes start a fat binary.
    if head.starts_with(b"\x7fELF") || head.starts_with(&[0x50, 0xed, 0x55, 0xba]) {
        say(
            "the image is compiled machine code (cubin or fatbin); only PTX text runs here: compile with compute_XX, not sm_XX",
        );
        return Err(Code::NO_BINARY_FOR_GPU);
    }
    // SAFETY: the image is text, and the C caller promises that text ends in a zero.
    let text = unsafe { CStr::from_ptr(image as *const c_char) };
    text.to_str().map(str::to_owned).map_err(|_| Code::INVALID_IMAGE)
}

/// Loads PTX text into the current context.
pub fn load(text: &str) -> Result<Handle> {
    let st = driver().state();
    let context = st.healthy()?;
    let device = st.device(context)?;
    drop(st);
    let (Some(version), Some(target)) = (directive(text, ".version"), directive(text, ".target")) else {
        say("the image is no PTX text: it has no .version or no .target");
        return Err(Code::INVALID_IMAGE);
    };
    let sm = driver().config.chip.sm();
    if target > sm {
        say(&format!("the module is for sm_{target}, the device is sm_{sm}"));
        return Err(Code::NO_BINARY_FOR_GPU);
    }
    let image = driver().devices[device]
        .change(|m| vgpu::Module::load(text, m))
        .map_err(|e| {
            say(&format!("module refused: {e}"));
            Code::INVALID_PTX
        })?;
    let module = Module {
        image,
        functions: Mutex::default(),
        context,
        device,
        versions: (version, target),
    };
    Ok(driver().state().modules.insert(Arc::new(module)))
}

api! {
    /// Loads a module from PTX text.
    fn cuModuleLoadData(out: Out<Handle>, image: usize) {
        out.check()?;
        out.set(load(&image_text(image)?)?)
    }

    /// Loads a module from a file of PTX text.
    fn cuModuleLoad(out: Out<Handle>, path: In<c_char>) {
        out.check()?;
        let mut bytes = std::fs::read(path.text()?).map_err(|_| Code::FILE_NOT_FOUND)?;
        bytes.extend([0; 8]);
        out.set(load(&image_text(bytes.as_ptr() as usize)?)?)
    }

    /// Ends a module.
    fn cuModuleUnload(module: Handle) {
        let mut st = driver().state();
        st.current()?;
        let m = st.modules.remove(module)?;
        st.functions.remove_if(|f| Arc::ptr_eq(&f.module, &m));
        Ok(())
    }

    /// A kernel by name.
    fn cuModuleGetFunction(out: Out<Handle>, module: Handle, name: In<c_char>) {
        out.check()?;
        let name = name.text()?;
        let mut st = driver().state();
        st.healthy()?;
        let m = st.modules.get(module)?.clone();
        m.image.kernel(&name).map_err(|_| Code::NOT_FOUND)?;
        let mut known = m.functions.lock().unwrap_or_else(|e| e.into_inner());
        let made = || st.functions.insert(Arc::new(Function::new(m.clone(), name.clone())));
        out.set(*known.entry(name.clone()).or_insert_with(made))
    }

    /// A variable by name.
    fn cuModuleGetGlobal_v2(address: Out<u64>, bytes: Out<usize>, module: Handle, name: In<c_char>) {
        let st = driver().state();
        st.healthy()?;
        let m = st.modules.get(module)?;
        let (at, n) = m.image.global(&name.text()?).ok_or(Code::NOT_FOUND)?;
        address.set_if(at);
        bytes.set_if(n);
        Ok(())
    }
}
