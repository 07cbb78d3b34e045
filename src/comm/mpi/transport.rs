//! Exchanges over MPI. Every call but the one for the version is made by the thread of the collectives, which initialises MPI too: it
//! needs no more of MPI than `MPI_THREAD_FUNNELED`.
//!
//! Each call's return code is looked at; the safe layer of the crate `mpi` does not do that. Waiting is a test and a short sleep, since
//! `MPI_Wait` spins on a core. A failure ends the process in this thread: buffers of requests that are under way must not be freed.

use std::ffi::{c_char, c_int};
use std::time::Duration;

use mpi::ffi;

use super::check_world;
use crate::comm::World;
use crate::comm::control::{end_here, is_ending};
use crate::comm::transport::{HEADER, Header, Incoming, Outgoing, Transport};
use crate::error::{Context, Error, Result};

/// Counts of MPI are C ints, and some of its ways between machines know less: longer values go in pieces.
const LONGEST: usize = 64 << 20;
/// Messages of a pair arrive in the order in which they were sent.
const TAG: c_int = 0;
/// Tests before the first sleep.
const QUICK: u32 = 20;
const PAUSE: Duration = Duration::from_micros(50);

/// Ranks of `MPI_COMM_WORLD`.
pub struct Mpi {
    world: World,
    sequence: u32,
    /// MPI was initialised and not finalised.
    open: bool,
}

impl Mpi {
    /// This rank, before MPI is initialised.
    pub fn new(world: &World) -> Self {
        Self { world: world.clone(), sequence: 0, open: false }
    }
}

/// `Open MPI v4.1.4`, `MPICH 4.0.2`: what the library says of itself, up to the first comma or line.
pub fn library() -> String {
    let mut text = vec![0u8; ffi::MPI_MAX_LIBRARY_VERSION_STRING as usize];
    let mut len: c_int = 0;
    // SAFETY: the buffer has the length that the standard asks for; the call is allowed before MPI is initialised, in any thread.
    let code = unsafe { ffi::MPI_Get_library_version(text.as_mut_ptr().cast::<c_char>(), &mut len) };
    let text = &text[..usize::try_from(len).unwrap_or(0).min(text.len())];
    let text = String::from_utf8_lossy(text);
    let line = text.split([',', '\n', '\0']).next().unwrap_or_default();
    let words: Vec<&str> = line.split_whitespace().filter(|word| *word != "Version:").collect();
    if code == 0 && !words.is_empty() { words.join(" ") } else { "an MPI without a name".into() }
}

/// An error where a call failed: its name, and what MPI says.
fn checked(call: &str, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let mut text = vec![0u8; ffi::MPI_MAX_ERROR_STRING as usize];
    let mut len: c_int = 0;
    // SAFETY: the buffer has the length that the standard asks for.
    let said = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut len) } == 0;
    let text = &text[..usize::try_from(len).unwrap_or(0).min(text.len())];
    let text = if said { String::from_utf8_lossy(text).into_owned() } else { format!("error {code}") };
    Err(Error::new(format!("{call}: {text}")))
}

/// Buffers of requests that are under way are in use by MPI: who gave them must not get them back with an error.
fn needed(call: &str, code: c_int) {
    if let Err(e) = checked(call, code) {
        end_here(&format!("gradients over MPI: {e}"));
    }
}

/// Which way bytes go.
#[derive(Clone, Copy)]
enum Way {
    To,
    From,
}

/// Requests under way, none of whose buffers may go before [`Requests::wait`] has returned.
#[derive(Default)]
struct Requests(Vec<ffi::MPI_Request>);

impl Requests {
    /// Sends to a rank, in pieces.
    fn send(&mut self, bytes: &[u8], rank: usize) {
        self.start(Way::To, bytes.as_ptr().cast_mut(), bytes.len(), rank);
    }

    /// Receives from a rank, in pieces.
    fn receive(&mut self, bytes: &mut [u8], rank: usize) {
        self.start(Way::From, bytes.as_mut_ptr(), bytes.len(), rank);
    }

    /// Starts a request for each piece of `len` bytes. The caller keeps them until all requests are done, and reads none that come.
    fn start(&mut self, way: Way, bytes: *mut u8, len: usize, rank: usize) {
        for first in (0..len).step_by(LONGEST) {
            let (piece, n) = (bytes.wrapping_add(first).cast(), (len - first).min(LONGEST) as c_int);
            // SAFETY: constants of the library, set since it was loaded.
            let (byte, world, mut request) =
                unsafe { (ffi::RSMPI_UINT8_T, ffi::RSMPI_COMM_WORLD, ffi::RSMPI_REQUEST_NULL) };
            // SAFETY: the piece lies in the caller's bytes, which it keeps; what is sent is only read; the count fits.
            let (call, code) = unsafe {
                match way {
                    Way::To => ("MPI_Isend", ffi::MPI_Isend(piece, n, byte, rank as c_int, TAG, world, &mut request)),
                    Way::From => ("MPI_Irecv", ffi::MPI_Irecv(piece, n, byte, rank as c_int, TAG, world, &mut request)),
                }
            };
            needed(call, code);
            self.0.push(request);
        }
    }

    /// Waits until all are done.
    fn wait(&mut self) {
        let mut tests = 0;
        loop {
            // A run that has failed elsewhere is ended by the control channel's thread: no more calls of MPI, which could abort.
            while is_ending() {
                std::thread::park();
            }
            let mut done: c_int = 0;
            // SAFETY: pointer and length are those of the vector; statuses are not asked for.
            let code = unsafe {
                ffi::MPI_Testall(self.0.len() as c_int, self.0.as_mut_ptr(), &mut done, ffi::RSMPI_STATUSES_IGNORE)
            };
            needed("MPI_Testall", code);
            if done != 0 {
                self.0.clear();
                return;
            }
            tests += 1;
            if tests < QUICK { std::thread::yield_now() } else { std::thread::sleep(PAUSE) }
        }
    }
}

impl Transport for Mpi {
    fn open(&mut self) -> Result<()> {
        let mut provided: c_int = 0;
        // SAFETY: MPI was not initialised before; it takes null for the program's arguments.
        let code = unsafe {
            ffi::MPI_Init_thread(std::ptr::null_mut(), std::ptr::null_mut(), ffi::RSMPI_THREAD_FUNNELED, &mut provided)
        };
        checked("MPI_Init_thread", code)?;
        self.open = true;
        let (mut rank, mut size): (c_int, c_int) = (0, 0);
        // SAFETY: MPI is initialised; the pointers are to locals.
        unsafe {
            let world = ffi::RSMPI_COMM_WORLD;
            checked("MPI_Comm_set_errhandler", ffi::MPI_Comm_set_errhandler(world, ffi::RSMPI_ERRORS_RETURN))?;
            checked("MPI_Comm_rank", ffi::MPI_Comm_rank(world, &mut rank))?;
            checked("MPI_Comm_size", ffi::MPI_Comm_size(world, &mut size))?;
        }
        check_world(&self.world, (rank as usize, size as usize), &library())
    }

    fn exchange(&mut self, call: u32, to: &[Outgoing], from: &mut [Incoming]) -> Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let own = self.world.rank;
        let (mut headers, mut theirs) = (vec![[0; HEADER]; to.len()], vec![[0; HEADER]; from.len()]);
        let (mut first, mut all) = (Requests::default(), Requests::default());
        for (r, header) in theirs.iter_mut().enumerate().filter(|(r, _)| *r != own && from[*r].len > 0) {
            first.receive(header, r);
        }
        for (r, header) in headers.iter_mut().enumerate().filter(|(r, _)| *r != own) {
            let (values, header_of) = match to[r] {
                Outgoing::Nothing => continue,
                Outgoing::Skip => (&[][..], Header { sequence: self.sequence, call, len: None }),
                Outgoing::Data(values) => (values, Header { sequence: self.sequence, call, len: Some(values.len()) }),
            };
            *header = header_of.encode();
            all.send(header, r);
            all.send(bytemuck::cast_slice(values), r);
        }
        // Who has nothing to add says so in its header, and sends nothing more.
        first.wait();
        for (r, incoming) in from.iter_mut().enumerate().filter(|(r, incoming)| *r != own && incoming.len > 0) {
            let expected = Header { sequence: self.sequence, call, len: Some(incoming.len) };
            match Header::decode(&theirs[r]).answer(expected, r) {
                Ok(len) => incoming.data.resize(len, 0.0),
                Err(e) => end_here(&e.to_string()),
            }
            all.receive(bytemuck::cast_slice_mut(&mut incoming.data), r);
        }
        all.wait();
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.open) {
            return Ok(());
        }
        // SAFETY: this thread initialised MPI, and no request is under way between exchanges.
        checked("MPI_Finalize", unsafe { ffi::MPI_Finalize() }).context(|| "gradients over MPI".into())
    }
}
