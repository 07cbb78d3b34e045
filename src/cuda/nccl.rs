//! NCCL, the library of collectives between GPUs: where it is, its calls through a table of our own, and a communicator. cudarc's looks for
//! fewer names, panics where a function is missing, takes results that it does not know for values of an enumeration, and its communicator
//! aborts when it is dropped, which blocks in several versions.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr::NonNull;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::library::{Library, names, pip_folders};
use crate::ensure;
use crate::error::{Error, Result};

/// What to do where there is none.
pub const HOW_TO_GET: &str = "needed for several GPUs only; install libnccl2, or the package nvidia-nccl-cu13 or nvidia-nccl-cu12 of PyPI, or put the folder \
                              of libnccl.so.2 into LD_LIBRARY_PATH";

/// `ncclUniqueId`: what the ranks of a communicator have in common.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId(pub [u8; 128]);

type Handle = *mut c_void;
type Stream = *mut c_void;

/// `ncclConfig_t` as of 2.17, which later versions read by its size and version.
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const SUM: c_int = 0;

/// Element types of what moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Bytes, which are moved and never summed.
    Byte = 1,
    /// f32.
    F32 = 7,
}

/// What all ranks do together with memory that has a slot for each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Collective {
    /// All get the sums of `n` f32 values: `ncclAllReduce`.
    Sum {
        /// Values of all slots together.
        n: usize,
    },
    /// Rank r gets the sums of slot r, in which each rank has `n` f32 values: `ncclReduceScatter`.
    SumSlots {
        /// Values of a slot.
        n: usize,
    },
    /// All get the slots of all: `ncclAllGather`.
    Gather {
        /// Bytes of a slot.
        bytes: usize,
    },
}

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the other rank.
    To,
    /// From it.
    From,
}

/// f32 values that go to another rank or come from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Which way.
    pub way: Way,
    /// The other rank.
    pub peer: usize,
    /// Address of the first value in device memory.
    pub values: u64,
    /// How many.
    pub n: usize,
}

// Functions of nccl.h, whose signatures are those of every version since 2.14.
type Version = unsafe extern "C" fn(*mut c_int) -> c_int;
type MakeId = unsafe extern "C" fn(*mut UniqueId) -> c_int;
type Init = unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int;
type State = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
type Reduce = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Stream) -> c_int;
type Gather = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Handle, Stream) -> c_int;
type SendTo = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, Stream) -> c_int;
type ReceiveFrom = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, Stream) -> c_int;
type Group = unsafe extern "C" fn() -> c_int;
type End = unsafe extern "C" fn(Handle) -> c_int;
type Describe = unsafe extern "C" fn(c_int) -> *const c_char;
type Last = unsafe extern "C" fn(Handle) -> *const c_char;

/// The functions that are called, and the file they are from.
pub struct Nccl {
    library: Library,
    version: Version,
    unique_id: MakeId,
    init: Init,
    async_error: State,
    all_reduce: Reduce,
    reduce_scatter: Reduce,
    all_gather: Gather,
    send: SendTo,
    receive: ReceiveFrom,
    group_start: Group,
    group_end: Group,
    finalize: End,
    destroy: End,
    error_string: Describe,
    last_error: Option<Last>,
}

impl Nccl {
    /// The library of this machine, under any of its names.
    ///
    /// # Errors
    /// If there is none, or it lacks a function: then it is older than 2.14.
    pub fn get() -> Result<&'static Self> {
        static ONE: OnceLock<Result<Nccl, String>> = OnceLock::new();
        ONE.get_or_init(Self::open).as_ref().map_err(Error::new)
    }

    fn open() -> Result<Self, String> {
        let mut all: Vec<std::path::PathBuf> = names("nccl", &[2]).into_iter().map(Into::into).collect();
        all.extend(pip_folders(&["nccl/lib"]).into_iter().map(|(_, folder)| folder.join("libnccl.so.2")));
        let library = Library::open_any(&all, c"ncclGetVersion").ok_or("libnccl.so was not found")?;
        let path = library.path().display().to_string();
        let symbol = |name: &CStr| {
            let missing = || format!("{path}: {} is missing; NCCL 2.14 or later is needed", name.to_string_lossy());
            library.symbol(name).ok_or_else(missing)
        };
        macro_rules! function {
            ($name:literal, $type:ty) => {{
                let found = symbol($name)?;
                // SAFETY: nccl.h gives the function this signature, in every version since 2.14.
                unsafe { std::mem::transmute::<NonNull<c_void>, $type>(found) }
            }};
        }
        Ok(Self {
            version: function!(c"ncclGetVersion", Version),
            unique_id: function!(c"ncclGetUniqueId", MakeId),
            init: function!(c"ncclCommInitRankConfig", Init),
            async_error: function!(c"ncclCommGetAsyncError", State),
            all_reduce: function!(c"ncclAllReduce", Reduce),
            reduce_scatter: function!(c"ncclReduceScatter", Reduce),
            all_gather: function!(c"ncclAllGather", Gather),
            send: function!(c"ncclSend", SendTo),
            receive: function!(c"ncclRecv", ReceiveFrom),
            group_start: function!(c"ncclGroupStart", Group),
            group_end: function!(c"ncclGroupEnd", Group),
            finalize: function!(c"ncclCommFinalize", End),
            destroy: function!(c"ncclCommDestroy", End),
            error_string: function!(c"ncclGetErrorString", Describe),
            last_error: library.symbol(c"ncclGetLastError").map(|found| {
                // SAFETY: as above.
                unsafe { std::mem::transmute::<NonNull<c_void>, Last>(found) }
            }),
            library,
        })
    }

    /// Where it was found.
    pub fn path(&self) -> &std::path::Path {
        self.library.path()
    }

    /// `major.minor.patch`.
    ///
    /// # Errors
    /// If the library does not say.
    pub fn version(&self) -> Result<String> {
        let mut code = 0;
        // SAFETY: the pointer is to a local.
        self.checked("ncclGetVersion", unsafe { (self.version)(&raw mut code) }, None)?;
        Ok(format!("{}.{}.{}", code / 10_000, code % 10_000 / 100, code % 100))
    }

    /// A fresh name for a communicator.
    ///
    /// # Errors
    /// If no network interface is found for it.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the pointer is to a local of the size that nccl.h asks for.
        self.checked("ncclGetUniqueId", unsafe { (self.unique_id)(&raw mut id) }, None)?;
        Ok(id)
    }

    fn checked(&self, call: &str, code: c_int, of: Option<Handle>) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        let text = |p: *const c_char| {
            // SAFETY: the library gives null or a C string that it keeps.
            (!p.is_null()).then(|| unsafe { CStr::from_ptr(p) }.to_string_lossy().trim().to_string())
        };
        // SAFETY: any number may be asked for.
        let what = text(unsafe { (self.error_string)(code) }).unwrap_or_else(|| format!("error {code}"));
        // SAFETY: null asks for the last error of any communicator, else it is one that is open.
        let more = self.last_error.and_then(|f| text(unsafe { f(of.unwrap_or(std::ptr::null_mut())) }));
        let more = more.filter(|more| !more.is_empty()).map_or(String::new(), |more| format!(" ({more})"));
        Err(Error::new(format!("nccl: {call}: {what}{more}")))
    }
}

/// One rank of a communicator. It is given back in [`Comm::close`] alone: after a failure it is left as it is, since aborting blocks in
/// several versions, and the process ends.
pub struct Comm {
    nccl: &'static Nccl,
    handle: Handle,
    rank: usize,
}

// SAFETY: NCCL allows calls on a communicator from several threads, one at a time, and asking for its error at any time.
unsafe impl Send for Comm {}
// SAFETY: as above; calls that queue work are made by the thread that owns the collectives.
unsafe impl Sync for Comm {}

/// How long a call may stay under way: ranks join, or a connection is made.
const LIMIT: Duration = Duration::from_secs(120);

impl Comm {
    /// Joins the others on the device whose context is current.
    ///
    /// # Errors
    /// If the ranks cannot reach each other, or do not come within two minutes.
    pub fn join(nccl: &'static Nccl, id: UniqueId, rank: usize, size: usize) -> Result<Self> {
        let undefined = c_int::MIN;
        let mut config = Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21_700,
            blocking: 0,
            cga_cluster_size: undefined,
            min_ctas: undefined,
            max_ctas: undefined,
            net_name: std::ptr::null(),
            split_share: undefined,
        };
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: the pointers are to locals; the configuration is initialised as nccl.h has it, and copied by the call.
        let code = unsafe { (nccl.init)(&raw mut handle, size as c_int, id, rank as c_int, &raw mut config) };
        let comm = Self { nccl, handle, rank };
        comm.done("ncclCommInitRankConfig", code)?;
        Ok(comm)
    }

    /// Waits until a call that does not block is through.
    fn done(&self, call: &str, code: c_int) -> Result<()> {
        let (until, mut code) = (Instant::now() + LIMIT, code);
        while code == IN_PROGRESS {
            ensure!(
                Instant::now() < until,
                "nccl: {call}: not through after {} s: a rank is away, or NCCL took a network interface over which the machines do not \
                 reach each other (NCCL_SOCKET_IFNAME names the right one, NCCL_DEBUG=INFO says which it took)",
                LIMIT.as_secs()
            );
            std::thread::sleep(Duration::from_micros(200));
            code = self.state()?;
        }
        self.nccl.checked(call, code, Some(self.handle))
    }

    fn state(&self) -> Result<c_int> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is open, the pointer is to a local.
        let code = unsafe { (self.nccl.async_error)(self.handle, &raw mut state) };
        self.nccl.checked("ncclCommGetAsyncError", code, Some(self.handle))?;
        Ok(state)
    }

    /// The error of something that was queued, if there was one.
    pub fn error(&self) -> Option<Error> {
        let state = match self.state() {
            Ok(IN_PROGRESS) => SUCCESS,
            Ok(state) => state,
            Err(e) => return Some(e),
        };
        self.nccl.checked("a collective", state, Some(self.handle)).err()
    }

    /// Queues a collective, in place: the slots of all ranks lie one after the other from `slots` on.
    ///
    /// # Safety
    /// They lie in memory of this communicator's device, and nothing else uses them until the stream has come past this call.
    ///
    /// # Errors
    /// If NCCL refuses the call.
    pub unsafe fn collective(&self, what: Collective, slots: u64, stream: Stream) -> Result<()> {
        let at = |address: u64| address as *mut c_void;
        let own = |bytes: usize| at(slots + (self.rank * bytes) as u64);
        let (all, nccl, handle) = (at(slots), self.nccl, self.handle);
        let (f32s, bytes) = (Element::F32 as c_int, Element::Byte as c_int);
        // SAFETY: the caller's.
        let (call, code) = unsafe {
            match what {
                Collective::Sum { n } => ("ncclAllReduce", (nccl.all_reduce)(all, all, n, f32s, SUM, handle, stream)),
                Collective::SumSlots { n } => {
                    let sums = own(n * size_of::<f32>());
                    ("ncclReduceScatter", (nccl.reduce_scatter)(all, sums, n, f32s, SUM, handle, stream))
                }
                Collective::Gather { bytes: n } => {
                    ("ncclAllGather", (nccl.all_gather)(own(n), all, n, bytes, handle, stream))
                }
            }
        };
        self.done(call, code)
    }

    /// Queues that values go to other ranks and come from them, all at once. Every send has its receive of as many values on the other rank.
    ///
    /// # Safety
    /// As [`Comm::collective`], for each of the messages; what is received is written while what is sent is read.
    ///
    /// # Errors
    /// As [`Comm::collective`].
    pub unsafe fn exchange(&self, messages: &[Message], stream: Stream) -> Result<()> {
        // SAFETY: a call without arguments.
        self.nccl.checked("ncclGroupStart", unsafe { (self.nccl.group_start)() }, None)?;
        let element = Element::F32 as c_int;
        let mut queued = Ok(());
        for m in messages {
            let (peer, values) = (m.peer as c_int, m.values);
            // SAFETY: the caller's.
            let (call, code) = unsafe {
                match m.way {
                    Way::To => {
                        ("ncclSend", (self.nccl.send)(values as *const c_void, m.n, element, peer, self.handle, stream))
                    }
                    Way::From => (
                        "ncclRecv",
                        (self.nccl.receive)(values as *mut c_void, m.n, element, peer, self.handle, stream),
                    ),
                }
            };
            queued = queued.and_then(|()| {
                if code == IN_PROGRESS { Ok(()) } else { self.nccl.checked(call, code, Some(self.handle)) }
            });
        }
        // A group that was opened is closed, whatever was refused in it.
        // SAFETY: as above.
        let ended = self.done("ncclGroupEnd", unsafe { (self.nccl.group_end)() });
        queued.and(ended)
    }

    /// Ends the communicator, on all ranks, once nothing that it was given is under way.
    ///
    /// # Errors
    /// If NCCL cannot.
    pub fn close(&self) -> Result<()> {
        // SAFETY: the communicator is open; nobody uses it from here on.
        self.done("ncclCommFinalize", unsafe { (self.nccl.finalize)(self.handle) })?;
        // SAFETY: as above, and finalised.
        self.nccl.checked("ncclCommDestroy", unsafe { (self.nccl.destroy)(self.handle) }, None)
    }
}
