//! What starts the ranks of a run and watches over them: `ringrun`, and what a rank shares with it.
//!
//! ```text
//! ringrun ─ options ─ run ─ supervise ─┬─ spawn ─► rank 0, rank 1, …      a process group each
//!                                      ├─ output ◄─ their lines
//!                                      └─ hub ◄──── control channel ────► ringtune's `comm::control`
//! ```
//! A rank reads who it is in [`environment`], writes where it is into its [`beacon`], and talks to the [`hub`] in the frames of
//! [`protocol`]. Nothing here knows of models or devices.

pub mod beacon;
pub mod cause;
pub mod devices;
pub mod engine;
pub mod environment;
pub mod hosts;
pub mod hub;
pub mod link;
pub mod local;
pub mod memory;
pub mod options;
pub mod output;
pub mod process;
pub mod protocol;
pub mod run;
pub mod secret;
pub mod spawn;
pub mod supervise;
pub mod system;
pub mod wrap;
