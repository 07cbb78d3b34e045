//! cuBLASLt, the maker's library of products: for benches alone, which show it beside our own kernels where a machine has it. It is
//! looked for at run time and never needed.

use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::path::PathBuf;
use std::ptr::{NonNull, from_ref, null_mut};
use std::sync::{Mutex, OnceLock};

use super::device::Cuda;
use super::library::{Library, names, pip_folders};
use super::locked;
use crate::backend::{MatMul, Write};
use crate::ensure;
use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Tensor};

type Handle = *mut c_void;

// cublasLt.h, cublas_api.h and library_types.h of CUDA 12 and 13.
const SUCCESS: c_int = 0;
const COMPUTE_32F: c_int = 68;
const R_32F: c_int = 0;
const R_16BF: c_int = 14;
const TRANSA: c_int = 3;
const TRANSB: c_int = 4;
const MAX_WORKSPACE: c_int = 1;

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Heuristic {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
type DescCreate = unsafe extern "C" fn(*mut Handle, c_int, c_int) -> c_int;
type SetAttribute = unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int;
type LayoutCreate = unsafe extern "C" fn(*mut Handle, c_int, u64, u64, i64) -> c_int;
type GetHeuristic = unsafe extern "C" fn(
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    Handle,
    c_int,
    *mut Heuristic,
    *mut c_int,
) -> c_int;
type Product = unsafe extern "C" fn(
    Handle,
    Handle,
    *const c_void,
    *const c_void,
    Handle,
    *const c_void,
    Handle,
    *const c_void,
    *const c_void,
    Handle,
    *mut c_void,
    Handle,
    *const [u64; 8],
    *mut c_void,
    usize,
    *mut c_void,
) -> c_int;

/// What is multiplied: rows and columns of C, steps of k, and whether C is bf16.
type Key = (&'static str, usize, usize, usize, bool);

/// A product that the library has planned; it is kept for the life of the process.
#[derive(Clone, Copy)]
struct Plan {
    desc: Handle,
    layouts: [Handle; 3],
    algorithm: [u64; 8],
}

/// Bytes that it may work in: what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// The library, with what it made for the device of the first call; a bench has one.
struct CublasLt {
    path: String,
    handle: Handle,
    preference: Handle,
    desc_create: DescCreate,
    desc_set: SetAttribute,
    layout_create: LayoutCreate,
    heuristic: GetHeuristic,
    product: Product,
    workspace: Tensor<Cuda>,
    plans: Mutex<HashMap<Key, Plan>>,
}

// SAFETY: handles of the library may be used from any thread, descriptors are only read once they are made.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

fn checked(what: &str, code: c_int) -> Result<()> {
    ensure!(code == SUCCESS, "cuBLASLt: {what}: status {code} (cublasStatus_t)");
    Ok(())
}

/// Where it may lie: the loader's path, CUDA's folders, packages of pip.
fn places() -> Vec<PathBuf> {
    let files = names("cublasLt", &[13, 12]);
    let mut all: Vec<PathBuf> = files.iter().map(Into::into).collect();
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(var).chain([PathBuf::from("/usr/local/cuda")]);
    let mut folders: Vec<PathBuf> = homes.map(|home| home.join("lib64")).collect();
    folders.extend(pip_folders(&["cu13/lib", "cublas/lib"]).into_iter().map(|(_, folder)| folder));
    all.extend(folders.iter().flat_map(|folder| files.iter().map(move |file| folder.join(file))));
    all
}

impl CublasLt {
    fn get(dev: &Cuda) -> Result<&'static Self> {
        static ONE: OnceLock<Result<CublasLt, String>> = OnceLock::new();
        ONE.get_or_init(|| Self::open(dev).map_err(|e| e.to_string())).as_ref().map_err(Error::new)
    }

    fn open(dev: &Cuda) -> Result<Self> {
        ensure!(!dev.properties().emulated, "cuBLASLt: an emulated device runs no machine code");
        let library = Library::open_any(&places(), c"cublasLtCreate").ok_or_else(|| {
            Error::new("cuBLASLt: libcublasLt.so was not found; it is in the CUDA toolkit and in the package nvidia-cublas of PyPI")
        })?;
        let path = library.path().display().to_string();
        let symbol = |name: &CStr| {
            let missing = || Error::new(format!("cuBLASLt: {path}: {} is missing", name.to_string_lossy()));
            library.symbol(name).ok_or_else(missing)
        };
        macro_rules! function {
            ($name:literal, $type:ty) => {{
                let found = symbol($name)?;
                // SAFETY: cublasLt.h gives the function this signature, in CUDA 12 and 13.
                unsafe { std::mem::transmute::<NonNull<c_void>, $type>(found) }
            }};
        }
        let create = function!(c"cublasLtCreate", Create);
        let preference_create = function!(c"cublasLtMatmulPreferenceCreate", Create);
        let preference_set = function!(c"cublasLtMatmulPreferenceSetAttribute", SetAttribute);
        dev.bind()?;
        let (mut handle, mut preference) = (null_mut(), null_mut());
        // SAFETY: pointers to locals.
        checked("cublasLtCreate", unsafe { create(&raw mut handle) })?;
        // SAFETY: as above.
        checked("cublasLtMatmulPreferenceCreate", unsafe { preference_create(&raw mut preference) })?;
        // SAFETY: the attribute is a size_t.
        let set = unsafe { preference_set(preference, MAX_WORKSPACE, from_ref(&WORKSPACE).cast(), size_of::<usize>()) };
        checked("setting the workspace", set)?;
        Ok(Self {
            handle,
            preference,
            desc_create: function!(c"cublasLtMatmulDescCreate", DescCreate),
            desc_set: function!(c"cublasLtMatmulDescSetAttribute", SetAttribute),
            layout_create: function!(c"cublasLtMatrixLayoutCreate", LayoutCreate),
            heuristic: function!(c"cublasLtMatmulAlgoGetHeuristic", GetHeuristic),
            product: function!(c"cublasLtMatmul", Product),
            workspace: dev.alloc(WORKSPACE / 4, 1, DType::F32)?,
            plans: Mutex::default(),
            path,
        })
    }

    /// The library's matrices run down their columns: it computes C^T = op(B)^T op(A)^T, of B first.
    fn plan(&self, op: MatMul, (m, n, k): (usize, usize, usize), c_is_bf16: bool) -> Result<Plan> {
        let (turned_b, turned_a) = (op == MatMul::NT, op == MatMul::TN);
        let mut desc = null_mut();
        // SAFETY: a pointer to a local.
        checked("cublasLtMatmulDescCreate", unsafe { (self.desc_create)(&raw mut desc, COMPUTE_32F, R_32F) })?;
        for (attribute, turned) in [(TRANSA, turned_b), (TRANSB, turned_a)] {
            let operation = c_int::from(turned);
            // SAFETY: the attribute is a cublasOperation_t.
            let set = unsafe { (self.desc_set)(desc, attribute, from_ref(&operation).cast(), size_of::<c_int>()) };
            checked("saying how an operand lies", set)?;
        }
        let result = if c_is_bf16 { R_16BF } else { R_32F };
        let b = if turned_b { (k, n) } else { (n, k) };
        let a = if turned_a { (m, k) } else { (k, m) };
        let mut layouts = [null_mut(); 3];
        for (layout, (kind, (rows, cols))) in layouts.iter_mut().zip([(R_16BF, b), (R_16BF, a), (result, (n, m))]) {
            // SAFETY: a pointer to a local.
            let made = unsafe { (self.layout_create)(layout, kind, rows as u64, cols as u64, rows as i64) };
            checked("cublasLtMatrixLayoutCreate", made)?;
        }
        let [lb, la, lc] = layouts;
        let (mut found, mut count) = (Heuristic::default(), 0);
        // SAFETY: room for one result, everything else made above.
        let asked = unsafe {
            (self.heuristic)(self.handle, desc, lb, la, lc, lc, self.preference, 1, &raw mut found, &raw mut count)
        };
        checked("cublasLtMatmulAlgoGetHeuristic", asked)?;
        ensure!(
            count == 1 && found.state == SUCCESS && found.workspace <= WORKSPACE,
            "cuBLASLt: no way to multiply {m} x {n} x {k}"
        );
        Ok(Plan { desc, layouts, algorithm: found.algorithm })
    }
}

/// Where the library is.
pub(super) fn peer(dev: &Cuda) -> Result<String> {
    CublasLt::get(dev).map(|lt| format!("cuBLASLt: {}", lt.path))
}

/// C = or += op(A, B) of bf16 operands by the library.
pub(super) fn peer_matmul(
    dev: &Cuda,
    c: &mut Tensor<Cuda>,
    a: &Tensor<Cuda>,
    b: &Tensor<Cuda>,
    op: MatMul,
    write: Write,
) -> Result<()> {
    let lt = CublasLt::get(dev)?;
    ensure!(a.dtype() == DType::Bf16 && b.dtype() == DType::Bf16, "cuBLASLt: bf16 operands alone are compared");
    let (m, n) = c.shape();
    let k = if op == MatMul::TN { a.rows() } else { a.cols() };
    let c_is_bf16 = c.dtype() == DType::Bf16;
    let word = match op {
        MatMul::NT => "nt",
        MatMul::NN => "nn",
        MatMul::TN => "tn",
    };
    let key = (word, m, n, k, c_is_bf16);
    let known = locked(&lt.plans).get(&key).copied();
    let plan = match known {
        Some(plan) => plan,
        None => {
            let plan = lt.plan(op, (m, n, k), c_is_bf16)?;
            locked(&lt.plans).insert(key, plan);
            plan
        }
    };
    dev.bind()?;
    let (alpha, beta) = (1.0f32, if write == Write::Add { 1.0f32 } else { 0.0 });
    let [lb, la, lc] = plan.layouts;
    let at = |t: &Tensor<Cuda>| t.buf.address() as *const c_void;
    let to = at(c).cast_mut();
    // SAFETY: the layouts are of these shapes and types, which the tensors have; the stream orders it with everything else.
    let queued = unsafe {
        (lt.product)(
            lt.handle,
            plan.desc,
            from_ref(&alpha).cast(),
            at(b),
            lb,
            at(a),
            la,
            from_ref(&beta).cast(),
            to,
            lc,
            to,
            lc,
            &raw const plan.algorithm,
            at(&lt.workspace).cast_mut(),
            WORKSPACE,
            dev.stream().cu_stream().cast(),
        )
    };
    checked("cublasLtMatmul", queued)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_looked_for_by_name_and_in_folders() {
        let all = places();
        assert_eq!(all[..2], [PathBuf::from("libcublasLt.so"), PathBuf::from("libcublasLt.so.13")]);
        assert!(all.contains(&PathBuf::from("/usr/local/cuda/lib64/libcublasLt.so.12")), "{all:?}");
        // cublasLtMatmulHeuristicResult_t of cublasLt.h.
        assert_eq!(size_of::<Heuristic>(), 96);
    }
}
