//! Removes shared memory that killed programs left behind.

use std::fs;
use std::mem::size_of;
use std::time::Duration;

use crate::member::{Member, started, state};
use crate::shared::{FOLDER, MAGIC, MAX_RANKS, VERSION, is_name, members_at};

/// Removes what communicators left behind whose ranks were killed before all had joined.
pub fn sweep() {
    let Ok(entries) = fs::read_dir(FOLDER) else {
        return;
    };
    for name in entries.flatten().filter_map(|e| e.file_name().into_string().ok()) {
        if is_name(&name) && is_stale(&name) {
            let _ = fs::remove_file(format!("{FOLDER}/{name}"));
        }
    }
}

fn is_stale(name: &str) -> bool {
    use std::os::unix::fs::FileExt;
    let path = format!("{FOLDER}/{name}");
    let (Ok(file), Ok(about)) = (fs::File::open(&path), fs::metadata(&path)) else {
        return false;
    };
    // Whoever made it may be between two steps: young files are left alone.
    let age = about.modified().ok().and_then(|t| t.elapsed().ok()).unwrap_or_default();
    if age < Duration::from_secs(2) {
        return false;
    }
    // Three words at `at`; zeros where the file ends.
    let words = |at: usize| {
        let mut bytes = [0; 24];
        let _ = file.read_exact_at(&mut bytes, at as u64);
        [0, 8, 16].map(|i| u64::from_le_bytes(bytes[i..i + 8].try_into().expect("eight bytes")))
    };
    let [magic, about_ranks, _] = words(0);
    if magic != MAGIC || about_ranks as u32 != VERSION {
        return age > Duration::from_secs(60);
    }
    let ranks = ((about_ranks >> 32) as usize).min(MAX_RANKS);
    // Fields of a member in their order: state and process, thread, start.
    let members = (0..ranks).map(|r| words(members_at() + r * size_of::<Member>()));
    let joined: Vec<(u32, u64)> =
        members.filter(|w| w[0] as u32 != state::EMPTY).map(|w| ((w[0] >> 32) as u32, w[2])).collect();
    joined.iter().all(|(pid, start)| started(*pid) != Some(*start)) && !joined.is_empty()
        || age > Duration::from_secs(60)
}
