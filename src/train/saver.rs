//! One thread that writes checkpoints from host copies while training goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::JoinHandle;

use crate::comm::control::finish_writing;
use crate::error::{Error, Result};

/// At most one write is under way; its error surfaces at the next call.
#[derive(Default)]
pub struct Saver {
    thread: Option<JoinHandle<Result<()>>>,
    /// Nobody waits for what is being written: a write that waits for other ranks ends.
    given_up: Arc<AtomicBool>,
}

impl Saver {
    /// Waits for the write before, then starts this one.
    ///
    /// # Errors
    /// The error of the write before, or that no thread could be started.
    pub fn start(&mut self, write: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        self.start_with_others(move || {
            let _finished = finish_writing();
            write()
        })
    }

    /// As [`Saver::start`], of a write that other ranks take part in: a run that fails elsewhere does not wait for it.
    ///
    /// # Errors
    /// As [`Saver::start`].
    pub fn start_with_others(&mut self, write: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        self.wait()?;
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write);
        self.thread = Some(thread.map_err(|e| Error::new(format!("cannot start the checkpoint thread: {e}")))?);
        Ok(())
    }

    /// Whether it was given up, for a write that waits for others.
    pub fn given_up(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.given_up)
    }

    /// The error of a write that has ended meanwhile, without waiting: a full disk stops the run at the next step.
    ///
    /// # Errors
    /// The write's error.
    pub fn poll(&mut self) -> Result<()> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished) { self.wait() } else { Ok(()) }
    }

    /// Waits until nothing is being written.
    ///
    /// # Errors
    /// The write's error.
    pub fn wait(&mut self) -> Result<()> {
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.given_up.store(true, SeqCst);
        // Leaving the loop by an error must not cut a checkpoint in half; its own error would hide the first one.
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn writes_in_order_and_errors_surface_once() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut saver = Saver::default();
        for i in 0..5 {
            let seen = Arc::clone(&seen);
            let write = move || {
                seen.lock().unwrap().push(i);
                Ok(())
            };
            saver.start(write).unwrap();
        }
        saver.start(|| Err(Error::new("disk full"))).unwrap();
        assert_eq!(saver.wait().unwrap_err().to_string(), "disk full");
        assert_eq!(*seen.lock().unwrap(), [0, 1, 2, 3, 4]);
        saver.wait().unwrap();
        saver.poll().unwrap();
    }

    #[test]
    fn dropping_finishes_the_write() {
        let done = Arc::new(Mutex::new(false));
        let mut saver = Saver::default();
        let flag = Arc::clone(&done);
        let write = move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            *flag.lock().unwrap() = true;
            Ok(())
        };
        saver.start(write).unwrap();
        drop(saver);
        assert!(*done.lock().unwrap());
    }
}
