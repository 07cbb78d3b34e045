//! Launches, and what may be asked of and set on a function.

use std::ffi::c_int;
use std::sync::atomic::Ordering::Relaxed;

use crate::chip::{REGISTERS_PER_THREAD, SHARED_DEFAULT};
use crate::code::{Code, Result};
use crate::driver::driver;
use crate::ffi::{Handle, In, Out, api, host_bytes};
use crate::op::{Launch, Op};
use crate::report::say;

/// Shape of a launch as the caller gives it.
pub struct Request {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared bytes.
    pub shared: usize,
}

/// Queues a launch after checking it against the limits of the device and the function.
pub fn launch(function: Handle, r: &Request, stream: Handle, params: In<usize>, extra: In<usize>) -> Result {
    let mut st = driver().state();
    let context = st.healthy()?;
    let f = st.functions.get(function)?.clone();
    let stream = st.stream(stream)?;
    if f.module.context != context || st.streams.get(stream)?.context != context {
        return Err(Code::INVALID_HANDLE);
    }
    let refuse = |code: Code, why: String| {
        say(&format!("kernel {}: {why}", f.name));
        Err(code)
    };
    let threads = r.block.iter().try_fold(1u32, |a, b| a.checked_mul(*b));
    let block_fits = r.block[0] <= 1024 && r.block[1] <= 1024 && r.block[2] <= 64;
    let grid_fits = r.grid[0] <= i32::MAX as u32 && r.grid[1] <= 65535 && r.grid[2] <= 65535;
    if r.grid.contains(&0) || r.block.contains(&0) || !block_fits || !grid_fits {
        return refuse(
            Code::INVALID_VALUE,
            format!("grid {:?} of blocks {:?} is over a limit or zero", r.grid, r.block),
        );
    }
    match threads {
        Some(n) if n <= f.max_threads() => {}
        _ => {
            let why = format!(
                "blocks of {:?} threads; the device and the kernel allow {}",
                r.block,
                f.max_threads()
            );
            return refuse(Code::INVALID_VALUE, why);
        }
    }
    if r.shared > f.dynamic_limit() {
        let why = format!(
            "{} bytes of dynamic shared memory; {} are allowed (above 48 KiB set CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)",
            r.shared,
            f.dynamic_limit()
        );
        return refuse(Code::INVALID_VALUE, why);
    }
    let args = arguments(&f.params(), params, extra)?;
    let device = f.module.device;
    let config = vgpu::Config {
        grid: r.grid,
        block: r.block,
        dynamic_shared: r.shared,
        threads: driver().config.threads,
        budget: driver().config.budget,
        ..vgpu::Config::default()
    };
    st.submit(
        stream,
        Op::Launch(
            Launch {
                function: f.clone(),
                config,
                args,
                device,
            }
            .into(),
        ),
    )?;
    let st = driver().queued(st);
    st.check(context)
}

/// The bytes of each argument, from an array of pointers or from one buffer.
fn arguments(shape: &[(usize, usize)], params: In<usize>, extra: In<usize>) -> Result<Vec<Vec<u8>>> {
    if extra.is_some() {
        if params.is_some() {
            return Err(Code::INVALID_VALUE);
        }
        return from_buffer(shape, extra);
    }
    let pointers = params.slice(shape.len())?;
    let one = |(p, (_, n)): (&usize, &(usize, usize))| match p {
        0 => Err(Code::INVALID_VALUE),
        // SAFETY: the C caller promises that each pointer holds a value of the parameter's size.
        p => Ok(unsafe { host_bytes(*p, *n) }),
    };
    pointers.iter().zip(shape).map(one).collect()
}

fn from_buffer(shape: &[(usize, usize)], extra: In<usize>) -> Result<Vec<Vec<u8>>> {
    const END: usize = 0;
    const POINTER: usize = 1;
    const SIZE: usize = 2;
    let (mut pointer, mut size, mut i) = (0, None, 0);
    loop {
        // Each name is followed by a pointer; the list ends with END.
        let pair = extra.slice(i + 1)?;
        match pair[i] {
            END => break,
            POINTER => pointer = extra.slice(i + 2)?[i + 1],
            SIZE => {
                let at = extra.slice(i + 2)?[i + 1];
                if at == 0 {
                    return Err(Code::INVALID_VALUE);
                }
                // SAFETY: the C caller promises that the pointer holds a size_t.
                size = Some(unsafe { (at as *const usize).read_unaligned() });
            }
            _ => return Err(Code::INVALID_VALUE),
        }
        i += 2;
        if i > 8 {
            return Err(Code::INVALID_VALUE);
        }
    }
    let need = shape.last().map_or(0, |(at, n)| at + n);
    let size = size.ok_or(Code::INVALID_VALUE)?;
    if pointer == 0 || size < need {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: the C caller promises a buffer of the size it gave.
    let all = unsafe { host_bytes(pointer, size) };
    Ok(shape.iter().map(|(at, n)| all[*at..at + n].to_vec()).collect())
}

api! {
    /// Launches a kernel.
    fn cuLaunchKernel(
        function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared: u32, stream: Handle,
        params: In<usize>, extra: In<usize>,
    ) {
        let r = Request { grid: [gx, gy, gz], block: [bx, by, bz], shared: shared as usize };
        launch(function, &r, stream, params, extra)
    }

    /// Something about a function.
    fn cuFuncGetAttribute(value: Out<c_int>, attribute: c_int, function: Handle) {
        value.check()?;
        let st = driver().state();
        st.healthy()?;
        let f = st.functions.get(function)?;
        let kernel = f.module.image.kernel(&f.name).map_err(|_| Code::INVALID_HANDLE)?;
        value.set(match attribute {
            0 => f.max_threads() as c_int,
            1 => f.static_shared() as c_int,
            3 => kernel.local() as c_int,
            4 => 32.min(REGISTERS_PER_THREAD),
            5 => f.module.versions.1,
            6 => driver().config.chip.sm(),
            8 => f.max_dynamic_shared.load(Relaxed),
            9 => f.carveout.load(Relaxed),
            2 | 7 | 10..=13 | 15 => 0,
            14 => f.non_portable_cluster.load(Relaxed),
            _ => return Err(Code::INVALID_VALUE),
        })
    }

    /// Sets something on a function.
    fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) {
        let st = driver().state();
        st.healthy()?;
        let f = st.functions.get(function)?;
        match attribute {
            8 => {
                let most = driver().config.chip.shared_optin - f.static_shared() as c_int;
                if value < 0 || value > most.max(SHARED_DEFAULT.min(most)) {
                    say(&format!("kernel {}: {value} bytes of dynamic shared memory; the device allows {most}", f.name));
                    return Err(Code::INVALID_VALUE);
                }
                f.max_dynamic_shared.store(value, Relaxed);
            }
            9 if (-1..=100).contains(&value) => f.carveout.store(value, Relaxed),
            14 if (0..=1).contains(&value) => f.non_portable_cluster.store(value, Relaxed),
            _ => return Err(Code::INVALID_VALUE),
        }
        Ok(())
    }
}
