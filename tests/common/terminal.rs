//! A terminal that a program runs in: a pseudo-terminal of a width, what was shown on it, and keys to type.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Longest that anything on a terminal is waited for; machines that run tests may be busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program on a terminal of its own.
pub struct Terminal {
    child: Child,
    keys: File,
    shown: Receiver<Vec<u8>>,
    /// All that was shown so far.
    pub screen: String,
}

impl Terminal {
    /// Starts a program with a terminal of so many columns as its standard input, output and error.
    pub fn start(mut command: Command, columns: u16) -> Self {
        let (mut master, mut slave) = (0, 0);
        let size = libc::winsize { ws_row: 50, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: both numbers and the size are locals that live during the call; name and settings may be null.
        let opened = unsafe {
            libc::openpty(
                &mut master,
                &mut slave,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                std::ptr::from_ref(&size).cast_mut(),
            )
        };
        assert_eq!(opened, 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the call above opened both, and nobody else owns them.
        let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        command.stdin(slave.try_clone().unwrap()).stdout(slave.try_clone().unwrap()).stderr(slave);
        use std::os::unix::process::CommandExt;
        // SAFETY: the closure runs between fork and exec and makes two system calls, which allocate nothing.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        drop(command);
        let (send, shown) = channel();
        let mut from = master.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut bytes = [0u8; 4096];
            // A terminal whose program has ended gives an error.
            while let Ok(n) = from.read(&mut bytes) {
                if n == 0 || send.send(bytes[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, keys: master, shown, screen: String::new() }
    }

    /// Presses keys.
    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until `text` is shown beyond the first `from` bytes of the screen; where it ends.
    pub fn wait_for(&mut self, text: &str, from: usize) -> usize {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.screen.get(from..).and_then(|s| s.find(text)) {
                return from + at + text.len();
            }
            match self.shown.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.screen += &String::from_utf8_lossy(&bytes),
                Err(e) => panic!("{text:?} is not shown ({e}):\n{}", self.screen),
            }
        }
    }

    /// Waits until the program has ended; all that was shown.
    pub fn end(mut self) -> (ExitStatus, String) {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.shown.recv_timeout(Duration::from_millis(50)) {
                Ok(bytes) => self.screen += &String::from_utf8_lossy(&bytes),
                Err(RecvTimeoutError::Timeout) if Instant::now() < end => {
                    if let Some(status) = self.child.try_wait().unwrap() {
                        // What it wrote last may still be on its way: the reader hangs up when it has all of it.
                        while let Ok(bytes) = self.shown.recv_timeout(Duration::from_secs(2)) {
                            self.screen += &String::from_utf8_lossy(&bytes);
                        }
                        return (status, self.screen);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return (self.child.wait().unwrap(), self.screen),
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.child.kill();
                    panic!("the program does not end:\n{}", self.screen)
                }
            }
        }
    }
}

/// What is shown without colours, and of a line that was drawn several times the last drawing.
pub fn plain(screen: &str) -> Vec<String> {
    let mut text = String::new();
    let mut rest = screen;
    while let Some(at) = rest.find('\x1b') {
        text += &rest[..at];
        let code = &rest[at + 1..];
        let end = code.strip_prefix('[').and_then(|c| c.find(|c: char| c.is_ascii_alphabetic())).map_or(1, |n| n + 2);
        rest = code.get(end..).unwrap_or_default();
    }
    text += rest;
    text.replace("\r\n", "\n").split('\n').map(|l| l.rsplit('\r').next().unwrap_or_default().to_string()).collect()
}
