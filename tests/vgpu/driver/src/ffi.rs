//! The border to C: pointers that the caller answers for, and a guard that lets no panic cross.

use std::ffi::{CStr, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::code::{Code, Result};

/// An opaque handle (`CUcontext`, `CUstream`, ...): a number that is looked up in a table and never followed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(transparent)]
pub struct Handle(pub usize);

impl Handle {
    /// The null handle.
    pub const NULL: Handle = Handle(0);
}

/// A host address that is data of the caller: only copied and compared until a copy runs.
pub type HostAddress = usize;

/// Where a function leaves a result. Null, or valid for writing one `T`: the C caller promises that.
#[repr(transparent)]
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Leaves `value`; a null pointer is an invalid argument.
    pub fn set(&self, value: T) -> Result {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, and the C caller promises a place for a `T`.
        unsafe { self.0.write_unaligned(value) };
        Ok(())
    }

    /// Whether there is a place.
    pub fn is_some(&self) -> bool {
        !self.0.is_null()
    }

    /// Fails early when there is no place for the result.
    pub fn check(&self) -> Result {
        if self.is_some() { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// Leaves `value` where the caller wants it, and nothing where the pointer is null.
    pub fn set_if(&self, value: T) {
        if self.is_some() {
            // SAFETY: as in `set`.
            unsafe { self.0.write_unaligned(value) };
        }
    }

    /// Reads what is there, leaves what `f` makes of it, and gives back what was read; `None` is an invalid argument.
    pub fn replace_with(&self, f: impl FnOnce(T) -> Option<T>) -> Result<T>
    where
        T: Copy,
    {
        self.check()?;
        // SAFETY: not null, and the C caller promises a valid `T` for arguments that go both ways.
        let old = unsafe { self.0.read_unaligned() };
        self.set(f(old).ok_or(Code::INVALID_VALUE)?)?;
        Ok(old)
    }

    /// Fills `n` places from an iterator that gives as many.
    pub fn set_all(&self, values: impl Iterator<Item = T>, n: usize) -> Result {
        self.check()?;
        for (i, v) in values.take(n).enumerate() {
            // SAFETY: the C caller promises `n` places.
            unsafe { self.0.add(i).write_unaligned(v) };
        }
        Ok(())
    }
}

/// What a function reads from the caller. Null, or valid for reading: the C caller promises that.
#[repr(transparent)]
pub struct In<T>(*const T);

impl<T: Copy> In<T> {
    /// The one value.
    pub fn get(&self) -> Result<T> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, and the C caller promises a `T`.
        Ok(unsafe { self.0.read_unaligned() })
    }

    /// The first `n` values of an array; none is asked of a null pointer when `n` is zero.
    pub fn slice(&self, n: usize) -> Result<Vec<T>> {
        if n == 0 {
            return Ok(Vec::new());
        }
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, and the C caller promises `n` values.
        Ok((0..n).map(|i| unsafe { self.0.add(i).read_unaligned() }).collect())
    }

    /// What a caller who gives nothing gives.
    pub const fn null() -> In<T> {
        In(std::ptr::null())
    }

    /// Whether the caller gave anything.
    pub fn is_some(&self) -> bool {
        !self.0.is_null()
    }

    /// The address alone.
    pub fn address(&self) -> usize {
        self.0 as usize
    }
}

impl In<c_char> {
    /// A string that ends in a zero.
    pub fn text(&self) -> Result<String> {
        if self.0.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: not null, and the C caller promises a terminated string.
        let s = unsafe { CStr::from_ptr(self.0) };
        Ok(s.to_string_lossy().into_owned())
    }
}

/// Copies `n` bytes of the caller's memory.
///
/// # Safety
/// `from` is valid for `n` bytes.
pub unsafe fn host_bytes(from: HostAddress, n: usize) -> Vec<u8> {
    let mut v = vec![0u8; n];
    // SAFETY: the caller promises the source; the destination is the vector just made.
    unsafe { std::ptr::copy_nonoverlapping(from as *const u8, v.as_mut_ptr(), n) };
    v
}

/// A host function of the interface, `void (*)(void *)`.
pub type HostFn = Option<unsafe extern "C" fn(*mut c_void)>;

std::thread_local! {
    /// Set while this thread runs a host function of a stream, which must not call the driver.
    pub static IN_HOST_FUNCTION: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs the body of an interface function: no panic leaves, and host functions are refused.
pub fn guard(name: &'static str, body: impl FnOnce() -> Result) -> Code {
    if IN_HOST_FUNCTION.get() {
        crate::report::say(&format!("{name} called from a host function of a stream, which the documentation forbids"));
        return Code::NOT_PERMITTED;
    }
    let code = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => Code::SUCCESS,
        Ok(Err(code)) => code,
        Err(_) => {
            crate::report::say(&format!("{name}: an invariant of the library broke; see the message above"));
            Code::UNKNOWN
        }
    };
    crate::report::call(name, code);
    code
}

/// An exported function, for `cuGetProcAddress` and for the test that compares prototypes with cuda.h.
pub struct Symbol {
    /// Its name.
    pub name: &'static str,
    /// Where it is.
    pub address: *const (),
    /// Bytes of each argument.
    pub sizes: &'static [usize],
}

/// Defines exported functions whose bodies end in `Ok(())` or leave with `?`, and the table `SYMBOLS` of them.
macro_rules! api {
    ($($(#[$meta:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block)*) => {
        $(
            $(#[$meta])*
            ///
            /// # Safety
            /// Pointers are null or valid as the documentation of the function of this name asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($arg: $ty),*) -> $crate::code::Code {
                $crate::ffi::guard(stringify!($name), move || -> $crate::code::Result { $body })
            }
        )*
        /// The functions of this file.
        pub const SYMBOLS: &[$crate::ffi::Symbol] = &[$($crate::ffi::Symbol {
            name: stringify!($name),
            address: $name as *const (),
            sizes: &[$(size_of::<$ty>()),*],
        }),*];
    };
}
pub(crate) use api;
