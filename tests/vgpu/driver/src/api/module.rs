//! Modules and what can be looked up in them.

use std::ffi::{CStr, c_char, c_int};
use std::sync::{Arc, Mutex};

use crate::code::{Code, Result};
use crate::driver::driver;
use crate::ffi::{Handle, In, Out, api};
use crate::module::{Function, Head, Module};
use crate::report::say;

/// Reads the text of an image; anything but PTX is refused with the reason.
pub fn image_text(image: usize) -> Result<String> {
    if image == 0 {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: the C caller promises an image; every kind of image has at least eight bytes (text ends in a zero that is seen first).
    let head: Vec<u8> =
        (0..8).map_while(|i| Some(unsafe { *((image + i) as *const u8) }).filter(|b| *b != 0)).collect();
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

/// Options of a load: where logs go and what limits the registers.
#[derive(Default)]
pub struct Options {
    info: Log,
    error: Log,
    max_registers: Option<u32>,
}

/// A buffer of the caller for a log.
#[derive(Default)]
struct Log {
    buffer: usize,
    size: usize,
    /// Where to leave the bytes used: the value of the size option.
    used: usize,
}

impl Log {
    fn write(&self, text: &str) {
        if self.buffer == 0 || self.size == 0 {
            return;
        }
        let bytes = &text.as_bytes()[..text.len().min(self.size - 1)];
        // SAFETY: the C caller promises a buffer of the size it gave, and that the array of values can be written.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.buffer as *mut u8, bytes.len());
            (self.buffer as *mut u8).add(bytes.len()).write(0);
            (self.used as *mut usize).write_unaligned(bytes.len());
        }
    }
}

impl Options {
    /// Reads `CUjit_option`s. Those that steer the compiler change nothing here; a number out of range is an invalid argument.
    pub fn read(n: u32, options: &In<c_int>, values: &In<usize>) -> Result<Options> {
        let mut o = Options::default();
        let (names, given) = (options.slice(n as usize)?, values.slice(n as usize)?);
        for (i, (name, value)) in names.into_iter().zip(given).enumerate() {
            let used = values.address() + i * size_of::<usize>();
            match name {
                // Numbers are passed in the pointer's low half.
                0 => o.max_registers = Some(value as u32).filter(|n| *n > 0),
                3 => o.info.buffer = value,
                4 => (o.info.size, o.info.used) = (value as u32 as usize, used),
                5 => o.error.buffer = value,
                6 => (o.error.size, o.error.used) = (value as u32 as usize, used),
                1..=33 => {}
                _ => return Err(Code::INVALID_VALUE),
            }
        }
        Ok(o)
    }

    fn refuse<T>(&self, code: Code, why: &str) -> Result<T> {
        say(&format!("module refused: {why}"));
        self.error.write(&format!("error: {why}\n"));
        Err(code)
    }
}

/// Loads PTX text into the current context.
pub fn load(text: &str, options: &mut Options, library: bool) -> Result<Handle> {
    let mut st = driver().state();
    let context = st.healthy()?;
    st.safe_call()?;
    let device = st.device(context)?;
    drop(st);
    let Some(head) = Head::of(text) else {
        return options.refuse(Code::INVALID_IMAGE, "the image is no PTX text: it has no .version or no .target");
    };
    let config = &driver().config;
    if !head.runs_on(config.chip.cc) {
        let suffix = head.suffix.map_or(String::new(), String::from);
        let why = format!("the module is for sm_{}{suffix}, the device is sm_{}", head.target, config.chip.sm());
        return options.refuse(Code::NO_BINARY_FOR_GPU, &why);
    }
    if head.version > config.newest_ptx() {
        let (v, newest, cuda) = (head.version, config.newest_ptx(), config.version);
        let why = format!(
            "PTX version {}.{} is newer than {}.{}, which a driver of CUDA {}.{} takes (VGPU_DRIVER)",
            v / 10,
            v % 10,
            newest / 10,
            newest % 10,
            cuda / 1000,
            cuda % 1000 / 10,
        );
        return options.refuse(Code::UNSUPPORTED_PTX_VERSION, &why);
    }
    let image = match driver().devices[device].change(|m| vgpu::Module::load(text, m)) {
        Ok(image) => image,
        Err(e) => return options.refuse(Code::INVALID_PTX, &e.to_string()),
    };
    options.info.write("info: decoded by vgpu\n");
    let module = Module {
        image,
        functions: Mutex::default(),
        context,
        device,
        versions: (head.version, head.target),
        max_registers: options.max_registers,
        library,
    };
    let mut st = driver().state();
    st.variables.extend(module.image.variables());
    Ok(st.modules.insert(Arc::new(module)))
}

/// Ends a module or a library, and its variables.
pub fn unload(module: Handle, library: bool) -> Result {
    let mut st = driver().state();
    let context = st.current()?;
    st.safe_call()?;
    if st.modules.get(module)?.library != library {
        return Err(Code::INVALID_HANDLE);
    }
    // Launches that are queued keep their kernels, but variables of the module end with it.
    let tail = st.context_tail(context);
    let mut st = driver().force(st, &tail);
    let m = st.modules.remove(module)?;
    st.functions.remove_if(|f| Arc::ptr_eq(&f.module, &m));
    for (address, _) in m.image.variables() {
        st.variables.remove(&address);
    }
    drop(st);
    for (address, _) in m.image.variables() {
        // Allocated when the module was loaded, and freed here alone.
        let _ = driver().release(address);
    }
    Ok(())
}

/// A kernel by name.
pub fn function(out: Out<Handle>, module: Handle, name: In<c_char>, library: bool) -> Result {
    out.check()?;
    let name = name.text()?;
    let mut st = driver().state();
    st.healthy()?;
    let m = st.modules.get(module)?.clone();
    if library && !m.library {
        return Err(Code::INVALID_HANDLE);
    }
    m.image.kernel(&name).map_err(|_| Code::NOT_FOUND)?;
    let mut known = m.functions.lock().unwrap_or_else(|e| e.into_inner());
    let made = || st.functions.insert(Arc::new(Function::new(m.clone(), name.clone())));
    out.set(*known.entry(name.clone()).or_insert_with(made))
}

/// A variable by name.
pub fn global(address: Out<u64>, bytes: Out<usize>, module: Handle, name: In<c_char>) -> Result {
    let st = driver().state();
    st.healthy()?;
    let (at, n) = st.modules.get(module)?.image.global(&name.text()?).ok_or(Code::NOT_FOUND)?;
    address.set_if(at);
    bytes.set_if(n);
    Ok(())
}

api! {
    /// Loads a module from PTX text.
    fn cuModuleLoadData(out: Out<Handle>, image: usize) {
        out.check()?;
        out.set(load(&image_text(image)?, &mut Options::default(), false)?)
    }

    /// Loads a module from PTX text with options.
    fn cuModuleLoadDataEx(out: Out<Handle>, image: usize, n: u32, options: In<c_int>, values: In<usize>) {
        out.check()?;
        let mut o = Options::read(n, &options, &values)?;
        out.set(load(&image_text(image)?, &mut o, false)?)
    }

    /// Loads a module from an image of several forms: PTX text is the one that runs here.
    fn cuModuleLoadFatBinary(out: Out<Handle>, image: usize) {
        out.check()?;
        out.set(load(&image_text(image)?, &mut Options::default(), false)?)
    }

    /// Loads a module from a file of PTX text.
    fn cuModuleLoad(out: Out<Handle>, path: In<c_char>) {
        out.check()?;
        let mut bytes = std::fs::read(path.text()?).map_err(|_| Code::FILE_NOT_FOUND)?;
        bytes.extend([0; 8]);
        out.set(load(&image_text(bytes.as_ptr() as usize)?, &mut Options::default(), false)?)
    }

    /// Ends a module.
    fn cuModuleUnload(module: Handle) {
        unload(module, false)
    }

    /// A kernel by name.
    fn cuModuleGetFunction(out: Out<Handle>, module: Handle, name: In<c_char>) {
        function(out, module, name, false)
    }

    /// Number of kernels.
    fn cuModuleGetFunctionCount(out: Out<u32>, module: Handle) {
        let st = driver().state();
        st.healthy()?;
        out.set(st.modules.get(module)?.image.kernels().count() as u32)
    }

    /// A variable by name.
    fn cuModuleGetGlobal_v2(address: Out<u64>, bytes: Out<usize>, module: Handle, name: In<c_char>) {
        global(address, bytes, module, name)
    }

    /// Everything is loaded at once.
    fn cuModuleGetLoadingMode(mode: Out<u32>) {
        const EAGER: u32 = 1;
        mode.set(EAGER)
    }
}
