//! Models and data sets of the Hugging Face hub: downloaded into the cache that Python shares, verified, and taken from there.
//!
//! A branch is looked up with the hub, a commit never; what lies in the cache is not fetched again, and where the hub cannot be reached the
//! commit that the branch was last is taken. `HF_HUB_OFFLINE=1` asks nobody.

mod cache;
mod checksum;
mod client;
mod dataset;
mod fetch;
mod name;
mod network;
mod refusal;
mod transfer;
mod wanted;

pub use cache::{Entry, Listing, snapshot_in};
pub use checksum::Checksum;
pub use client::{Client, Failure, Refusal};
pub use dataset::choose;
pub use fetch::{Fetched, Hub};
pub(crate) use fetch::{endpoint, is_offline, token};
pub use name::{DataName, Kind, MAIN, PREFIX, Repo};
pub use network::{Network, NoAnswer};
pub use transfer::Transfer;
pub use wanted::Part;
