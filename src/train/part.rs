//! A rank's part of a checkpoint that ranks write together: its own file of the optimiser's state.
//!
//! ```text
//! main: creates .checkpoint-N.tmp, tells all ─► each rank: writes and syncs its file there, tells all its record (name, bytes, hash)
//!     ─► main: has all records, writes the manifest, makes the one rename
//! ```
//! A rank that fails or dies before that leaves the folder under its temporary name, which is no checkpoint.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use crate::checkpoint::manifest::FileRecord;
use crate::checkpoint::shards;
use crate::comm::World;
use crate::comm::control::Aside;
use crate::ensure;
use crate::error::{Context, Error, Result};
use crate::files::parent;
use crate::hf::HostTensor;

/// How long a folder that the main rank made may take to be seen: network file systems remember for a while that there was none.
const SEEN: Duration = Duration::from_secs(60);

/// What a rank writes, and how it tells the others.
pub struct Part {
    /// Which rank this is.
    pub world: World,
    /// What it holds of the optimiser's state.
    pub tensors: Vec<(String, HostTensor)>,
    /// How the threads that write meet.
    pub aside: Arc<dyn Aside>,
    /// Set once this rank ends for another reason.
    pub given_up: Arc<AtomicBool>,
}

impl Part {
    /// Writes the file into the folder of the checkpoint of a step, and waits until every rank has: the records of all.
    ///
    /// # Errors
    /// If the folder is not there, the file cannot be written, or another rank is gone.
    pub fn write(self, dir: &Path, step: u64) -> Result<BTreeMap<String, FileRecord>> {
        let Self { world, tensors, aside, given_up } = self;
        let explain = || format!("checkpoint at step {step} was not written, earlier ones are untouched");
        wait_for(dir).context(explain)?;
        shards::write(dir, world.rank, world.size, &tensors).context(explain)?;
        drop(tensors);
        let name = shards::file_of(world.rank, world.size);
        let record = FileRecord::of(&dir.join(&name)).context(explain)?;
        let own = serde_json::to_vec(&(name, record)).expect("a record always prints");
        let all = aside.gather(&format!("checkpoint of step {step}"), &own, &given_up)?;
        let parse = |bytes: &Vec<u8>| serde_json::from_slice(bytes);
        all.iter().map(parse).collect::<Result<_, _>>().map_err(|e| Error::new(format!("record of a rank's file: {e}")))
    }
}

/// Waits until a folder is seen.
fn wait_for(dir: &Path) -> Result<()> {
    let until = Instant::now() + SEEN;
    while !dir.is_dir() {
        ensure!(
            Instant::now() < until,
            "{}: rank 0 has made this folder, and it is not here; with --zero 1 all machines need the same output folder",
            dir.display()
        );
        // Asking for the entries of the folder above makes a network file system look again.
        let _ = std::fs::read_dir(parent(dir)).map(Iterator::count);
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::SeqCst;
    use std::sync::{Barrier, Mutex};

    use super::*;
    use crate::checkpoint::manifest::{self, CheckpointWriter};

    /// Ranks that meet in memory; one that is away keeps the others waiting.
    struct Here {
        barrier: Barrier,
        records: Mutex<Vec<Vec<u8>>>,
    }

    impl Aside for Here {
        fn gather(&self, _what: &str, own: &[u8], given_up: &AtomicBool) -> Result<Vec<Vec<u8>>> {
            self.records.lock().unwrap().push(own.to_vec());
            ensure!(!given_up.load(SeqCst), "given up");
            self.barrier.wait();
            Ok(self.records.lock().unwrap().clone())
        }
    }

    fn part(here: &Arc<Here>, rank: usize) -> Part {
        let world = World { rank, size: 3, local_rank: rank, local_size: 3 };
        let data = vec![rank as f32; 5];
        let tensors = vec![(format!("m.a@{}", 5 * rank), HostTensor { rows: 1, cols: 5, data })];
        Part { world, tensors, aside: Arc::clone(here) as Arc<dyn Aside>, given_up: Arc::default() }
    }

    #[test]
    fn a_checkpoint_has_the_files_of_all_ranks_and_one_manifest() {
        let dir = tempfile::tempdir().unwrap();
        let here = Arc::new(Here { barrier: Barrier::new(3), records: Mutex::default() });
        let writer = CheckpointWriter::shared(dir.path(), 7).unwrap();
        let temp = writer.dir().to_path_buf();
        let records = std::thread::scope(|scope| {
            let others = [1, 2].map(|rank| {
                let (part, temp) = (part(&here, rank), &temp);
                scope.spawn(move || part.write(temp, 7).unwrap())
            });
            let own = part(&here, 0).write(&temp, 7).unwrap();
            assert!(others.into_iter().all(|other| other.join().unwrap() == own));
            own
        });
        assert_eq!(records.len(), 3);
        let path = writer.finish_with(&records).unwrap();
        assert_eq!(manifest::verify(&path).unwrap().files, records);
        assert_eq!(path, manifest::path_of(dir.path(), 7));
    }

    #[test]
    fn a_file_that_is_not_as_its_rank_said_is_no_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let here = Arc::new(Here { barrier: Barrier::new(1), records: Mutex::default() });
        for lost in [true, false] {
            let writer = CheckpointWriter::shared(dir.path(), 7).unwrap();
            here.records.lock().unwrap().clear();
            let records = part(&here, 2).write(writer.dir(), 7).unwrap();
            let file = writer.dir().join(shards::file_of(2, 3));
            if lost {
                std::fs::remove_file(&file).unwrap()
            } else {
                std::fs::write(&file, "x").unwrap()
            }
            let e = writer.finish_with(&records).unwrap_err().to_string();
            assert!(
                e.contains("checkpoint at step 7 was not written") && e.contains("optimizer-00003-of-00003"),
                "{e}"
            );
            assert_eq!(manifest::list(dir.path()).unwrap(), []);
        }
        // What is left of it is removed by the next run.
        assert!(dir.path().join(".checkpoint-7.tmp").is_dir());
        manifest::clean_up(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
