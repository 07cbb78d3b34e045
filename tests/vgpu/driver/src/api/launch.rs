//! Launches, and what may be asked of and set on a function.

use std::ffi::{c_char, c_int};
use std::io::Write;
use std::sync::atomic::Ordering::Relaxed;

use vgpu::tensor_map;

use crate::abi::{LaunchAttribute, LaunchConfig};
use crate::chip::REGISTERS;
use crate::code::{Code, Result};
use crate::driver::driver;
use crate::ffi::{Handle, In, Out, api, host_bytes};
use crate::module::Function;
use crate::occupancy::{blocks_per_sm, registers_claimed};
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
    /// What else was asked for.
    pub extras: Extras,
}

/// Attributes of a launch that matter here.
#[derive(Clone, Copy, Default)]
pub struct Extras {
    /// Every block has to be resident at once.
    pub cooperative: bool,
    /// Blocks of a cluster.
    pub cluster: Option<[u32; 3]>,
}

/// Reads the attributes of a launch. Hints are taken and change nothing; what would change results and is not offered is refused.
pub fn extras(c: &LaunchConfig) -> Result<Extras> {
    const COOPERATIVE: u32 = 2;
    const CLUSTER: u32 = 4;
    let mut e = Extras::default();
    for i in 0..c.n_attributes as usize {
        if c.attributes == 0 {
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: the C caller promises an array of as many attributes.
        let a = unsafe { (c.attributes as *const LaunchAttribute).add(i).read_unaligned() };
        match a.id {
            COOPERATIVE => e.cooperative = a.value[0] != 0,
            CLUSTER => e.cluster = Some([a.value[0], a.value[1], a.value[2]]),
            // Nothing, access policy, scheduling of clusters, programmatic serialisation (which allows overlap and forces none),
            // priority, memory domains, preferred cluster, carveout.
            0 | 1 | 5 | 6 | 8..=11 | 14 => {}
            _ => {
                say(&format!("launch attribute {} is not offered", a.id));
                return Err(Code::NOT_SUPPORTED);
            }
        }
    }
    Ok(e)
}

/// Checks a launch against the limits of the device and of the function; the error says which.
fn check(f: &Function, r: &Request) -> Result {
    let chip = driver().config.chip;
    let refuse = |code: Code, why: String| {
        say(&format!("kernel {}: {why}", f.name));
        Err(code)
    };
    let block_fits = r.block[0] <= 1024 && r.block[1] <= 1024 && r.block[2] <= 64;
    let grid_fits = r.grid[0] <= i32::MAX as u32 && r.grid[1] <= 65535 && r.grid[2] <= 65535;
    if r.grid.contains(&0) || r.block.contains(&0) || !block_fits || !grid_fits {
        return refuse(
            Code::INVALID_VALUE,
            format!("grid {:?} of blocks {:?} is over a limit or zero", r.grid, r.block),
        );
    }
    let threads = r.block.iter().product::<u32>();
    if threads > f.max_threads() {
        let why = format!("blocks of {:?} threads; the device and the kernel allow {}", r.block, f.max_threads());
        return refuse(Code::INVALID_VALUE, why);
    }
    if let Some(required) = f.required_threads()
        && required != r.block
    {
        return refuse(
            Code::INVALID_VALUE,
            format!("blocks of {:?} threads; the kernel requires {required:?}", r.block),
        );
    }
    if r.shared > f.dynamic_limit() {
        let why = format!(
            "{} bytes of dynamic shared memory; {} are allowed (above 48 KiB set CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)",
            r.shared,
            f.dynamic_limit()
        );
        return refuse(Code::INVALID_VALUE, why);
    }
    let claimed = registers_claimed(f.registers(), threads);
    if claimed > REGISTERS as u32 {
        let why = format!("{threads} threads of {} registers need {claimed} of {REGISTERS}", f.registers());
        return refuse(Code::LAUNCH_OUT_OF_RESOURCES, why);
    }
    let cluster = r.cluster(f)?;
    let size = cluster.iter().fold(1, |a: u32, b| a.saturating_mul(*b));
    if size > 1 && chip.cluster == 0 {
        return refuse(
            Code::INVALID_CLUSTER_SIZE,
            format!("clusters need compute capability 9.0, the device has {}", chip.sm()),
        );
    }
    let most = if f.non_portable_cluster.load(Relaxed) != 0 { 16 } else { chip.cluster.max(1) as u32 };
    if cluster.contains(&0) || size > most {
        return refuse(Code::INVALID_CLUSTER_SIZE, format!("a cluster of {cluster:?} blocks; {most} are allowed"));
    }
    if r.grid.iter().zip(cluster).any(|(g, c)| g % c != 0) {
        return refuse(Code::INVALID_VALUE, format!("grid {:?} is no multiple of the cluster {cluster:?}", r.grid));
    }
    if r.extras.cooperative {
        let resident = resident(f, r) as u64;
        let blocks = r.grid.iter().map(|g| u64::from(*g)).product::<u64>();
        if blocks > resident {
            let why = format!("a cooperative launch of {blocks} blocks; {resident} are resident at once");
            return refuse(Code::COOPERATIVE_LAUNCH_TOO_LARGE, why);
        }
    }
    Ok(())
}

/// Blocks of a launch that the device holds at the same time.
fn resident(f: &Function, r: &Request) -> usize {
    let chip = driver().config.chip;
    let threads = r.block.iter().fold(1, |a: u32, b| a.saturating_mul(*b));
    blocks_per_sm(chip, &f.needs(), threads, r.shared) as usize * chip.sms as usize
}

impl Request {
    /// Blocks of a cluster, from the launch or from the kernel's directive.
    fn cluster(&self, f: &Function) -> Result<[u32; 3]> {
        match (self.extras.cluster, f.required_cluster()) {
            (Some(a), Some(b)) if a != b => {
                say(&format!("kernel {}: a cluster of {a:?}; the kernel requires {b:?}", f.name));
                Err(Code::INVALID_VALUE)
            }
            (a, b) => Ok(a.or(b).unwrap_or([1; 3])),
        }
    }
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
    check(&f, r)?;
    let args = arguments(&f.params(), params, extra)?;
    let device = f.module.device;
    let config = vgpu::Config {
        grid: r.grid,
        block: r.block,
        dynamic_shared: r.shared,
        threads: driver().config.threads,
        budget: driver().config.budget,
        cluster: r.cluster(&f)?,
        cooperative: r.extras.cooperative,
        resident: driver().config.strict.then(|| resident(&f, r)),
        output: vgpu::Output::new(print),
        ..vgpu::Config::default()
    };
    st.submit(stream, Op::Launch(Launch { function: f.clone(), config, args, device }.into()))?;
    let st = driver().queued(st);
    st.check(context)
}

/// Where kernels print. Flushed at once: nothing else does so for a library when the process ends.
fn print(text: &str) {
    let mut out = std::io::stdout();
    // A closed stdout is no reason to stop.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
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

/// Something about a function.
pub fn get_attribute(value: Out<c_int>, attribute: c_int, function: Handle) -> Result {
    value.check()?;
    let st = driver().state();
    st.healthy()?;
    let f = st.functions.get(function)?;
    let kernel = f.module.image.kernel(&f.name).map_err(|_| Code::INVALID_HANDLE)?;
    let cluster = f.required_cluster();
    value.set(match attribute {
        0 => f.max_threads() as c_int,
        1 => f.static_shared() as c_int,
        2 => f.constant_bytes() as c_int,
        3 => kernel.local() as c_int,
        4 => f.registers() as c_int,
        5 => f.module.versions.1,
        6 => driver().config.chip.sm(),
        7 => 0,
        8 => f.dynamic_limit() as c_int,
        9 => f.carveout.load(Relaxed),
        10 => c_int::from(cluster.is_some()),
        11..=13 => cluster.map_or(0, |c| c[attribute as usize - 11] as c_int),
        14 => f.non_portable_cluster.load(Relaxed),
        15 => f.cluster_policy.load(Relaxed),
        _ => return Err(Code::INVALID_VALUE),
    })
}

/// Sets something on a function.
pub fn set_attribute(function: Handle, attribute: c_int, value: c_int) -> Result {
    let st = driver().state();
    st.healthy()?;
    let f = st.functions.get(function)?;
    match attribute {
        8 => {
            let most = driver().config.chip.shared_optin - f.static_shared() as c_int;
            if value < 0 || value > most {
                say(&format!("kernel {}: {value} bytes of dynamic shared memory; the device allows {most}", f.name));
                return Err(Code::INVALID_VALUE);
            }
            f.max_dynamic_shared.store(value, Relaxed);
        }
        9 if (-1..=100).contains(&value) => f.carveout.store(value, Relaxed),
        11..=13 => {
            if f.directive_cluster().is_some() {
                return Err(Code::NOT_PERMITTED);
            }
            let v = u32::try_from(value).map_err(|_| Code::INVALID_VALUE)?;
            f.set_cluster.lock().unwrap_or_else(|e| e.into_inner())[attribute as usize - 11] = v;
        }
        14 if (0..=1).contains(&value) => f.non_portable_cluster.store(value, Relaxed),
        15 if (0..=2).contains(&value) => f.cluster_policy.store(value, Relaxed),
        _ => return Err(Code::INVALID_VALUE),
    }
    Ok(())
}

api! {
    /// Launches a kernel.
    fn cuLaunchKernel(
        function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared: u32, stream: Handle,
        params: In<usize>, extra: In<usize>,
    ) {
        let extras = Extras::default();
        let r = Request { grid: [gx, gy, gz], block: [bx, by, bz], shared: shared as usize, extras };
        launch(function, &r, stream, params, extra)
    }

    /// Launches a kernel whose blocks are all resident at once.
    fn cuLaunchCooperativeKernel(
        function: Handle, gx: u32, gy: u32, gz: u32, bx: u32, by: u32, bz: u32, shared: u32, stream: Handle,
        params: In<usize>,
    ) {
        let extras = Extras { cooperative: true, cluster: None };
        let r = Request { grid: [gx, gy, gz], block: [bx, by, bz], shared: shared as usize, extras };
        launch(function, &r, stream, params, In::null())
    }

    /// Launches a kernel with attributes.
    fn cuLaunchKernelEx(config: In<LaunchConfig>, function: Handle, params: In<usize>, extra: In<usize>) {
        let c = config.get()?;
        let extras = extras(&c)?;
        let r = Request { grid: c.grid, block: c.block, shared: c.shared as usize, extras };
        launch(function, &r, c.stream, params, extra)
    }

    /// Something about a function.
    fn cuFuncGetAttribute(value: Out<c_int>, attribute: c_int, function: Handle) {
        get_attribute(value, attribute, function)
    }

    /// Sets something on a function.
    fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) {
        set_attribute(function, attribute, value)
    }

    /// Preference between cache and shared memory; without effect.
    fn cuFuncSetCacheConfig(function: Handle, config: u32) {
        let st = driver().state();
        st.healthy()?;
        st.functions.get(function)?;
        if config > 3 { Err(Code::INVALID_VALUE) } else { Ok(()) }
    }

    /// Width of shared memory banks; without effect.
    fn cuFuncSetSharedMemConfig(function: Handle, config: u32) {
        let st = driver().state();
        st.healthy()?;
        st.functions.get(function)?;
        if config > 2 { Err(Code::INVALID_VALUE) } else { Ok(()) }
    }

    /// Module of a function.
    fn cuFuncGetModule(out: Out<Handle>, function: Handle) {
        let st = driver().state();
        st.healthy()?;
        let f = st.functions.get(function)?;
        let found = st.modules.iter().find(|(_, m)| std::sync::Arc::ptr_eq(m, &f.module)).map(|(h, _)| h);
        out.set(found.ok_or(Code::INVALID_HANDLE)?)
    }

    /// Name of a function; the text lives as long as the library.
    fn cuFuncGetName(out: Out<*const c_char>, function: Handle) {
        out.check()?;
        let mut st = driver().state();
        st.healthy()?;
        let name = st.functions.get(function)?.name.clone();
        out.set(st.keep(&name)?.as_ptr())
    }

    /// Offset and size of a parameter.
    fn cuFuncGetParamInfo(function: Handle, index: usize, offset: Out<usize>, size: Out<usize>) {
        let st = driver().state();
        st.healthy()?;
        let (at, n) = *st.functions.get(function)?.params().get(index).ok_or(Code::INVALID_VALUE)?;
        offset.check()?;
        size.set_if(n);
        offset.set(at)
    }

    /// Encodes a description of a tensor in global memory for the copies that take one.
    fn cuTensorMapEncodeTiled(
        out: Out<[u8; tensor_map::BYTES]>, data_type: u32, rank: u32, address: u64, dims: In<u64>, strides: In<u64>,
        box_dims: In<u32>, element_strides: In<u32>, interleave: u32, swizzle: u32, promotion: u32, fill: u32,
    ) {
        out.check()?;
        if driver().config.chip.cluster == 0 {
            return Err(Code::NOT_SUPPORTED);
        }
        let n = usize::try_from(rank).ok().filter(|n| (1..=5).contains(n)).ok_or(Code::INVALID_VALUE)?;
        let tiled = tensor_map::Tiled {
            data_type,
            rank,
            address,
            dims: &dims.slice(n)?,
            strides: &strides.slice(n - 1)?,
            box_dims: &box_dims.slice(n)?,
            element_strides: &element_strides.slice(n)?,
            interleave,
            swizzle,
            l2_promotion: promotion,
            oob_fill: fill,
        };
        match tensor_map::encode(&tiled) {
            Ok(bytes) => out.set(bytes),
            Err(e) => {
                say(&e.to_string());
                match e {
                    tensor_map::Refused::Invalid(_) => Err(Code::INVALID_VALUE),
                    tensor_map::Refused::Unsupported(_) => Err(Code::NOT_SUPPORTED),
                }
            }
        }
    }
}
