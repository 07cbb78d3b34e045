//! What this machine has for ranks: GPUs, cores, and which cores are near which memory.

use std::path::Path;

use crate::spawn::parse_ranges;

/// How many ranks are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// So many.
    Number(usize),
    /// One for each GPU that is visible.
    Gpu,
    /// One for each core that ringrun may run on.
    Cpu,
    /// One for each GPU, or one where there is none.
    Auto,
}

impl Count {
    /// A number up to `most`, or a word.
    ///
    /// # Errors
    /// If it is neither.
    pub fn parse(text: &str, most: usize) -> Result<Self, String> {
        match text {
            "gpu" => Ok(Count::Gpu),
            "cpu" => Ok(Count::Cpu),
            "auto" => Ok(Count::Auto),
            _ => match text.parse() {
                Ok(n) if (1..=most).contains(&n) => Ok(Count::Number(n)),
                _ => Err(format!("expected a number from 1 to {most}, gpu, cpu or auto")),
            },
        }
    }

    /// The ranks of a machine with so many GPUs and cores.
    ///
    /// # Errors
    /// If ranks on GPUs are asked for and there is none.
    pub fn on(self, gpus: usize, cores: usize) -> Result<usize, String> {
        match self {
            Count::Number(n) => Ok(n),
            Count::Gpu if gpus == 0 => Err("gpu: no GPU is visible on this machine (neither /dev/nvidia0 nor what \
                 CUDA_VISIBLE_DEVICES names); give a number, cpu or auto"
                .into()),
            Count::Gpu => Ok(gpus),
            Count::Cpu => Ok(cores.max(1)),
            Count::Auto => Ok(gpus.max(1)),
        }
    }
}

/// How ranks are tied to cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bind {
    /// Not at all.
    None,
    /// Each rank to its equal share of the cores.
    Core,
    /// Each rank to the cores of one NUMA node.
    Numa,
}

impl Bind {
    /// As ringrun and mpirun spell it.
    pub fn word(self) -> &'static str {
        match self {
            Bind::None => "none",
            Bind::Core => "core",
            Bind::Numa => "numa",
        }
    }
}

/// GPUs of this machine that programs see.
pub fn gpus() -> usize {
    visible(boards(Path::new("/dev")), std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref())
}

/// Boards that the driver shows in a folder of devices: `nvidia0`, `nvidia1`, …
fn boards(dev: &Path) -> usize {
    let names = std::fs::read_dir(dev).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    names.filter(|n| n.strip_prefix("nvidia").is_some_and(|n| n.parse::<u32>().is_ok())).count()
}

/// How many of them `CUDA_VISIBLE_DEVICES` leaves: its words up to the first that names no device. A slice of a device counts as one.
fn visible(boards: usize, variable: Option<&str>) -> usize {
    let Some(words) = variable else { return boards };
    let names = |word: &str| word.parse::<usize>().map_or(word.contains('-') && word != "-1", |n| n < boards);
    let named = words.split(',').map(str::trim).take_while(|word| names(word)).count();
    if boards == 0 { 0 } else { named }
}

/// The cores of each NUMA node that may be used, in the order of the nodes; all in one where the system does not say.
pub fn nodes(cores: &[usize]) -> Vec<Vec<usize>> {
    nodes_of(Path::new("/sys/devices/system/node"), cores)
}

fn nodes_of(dir: &Path, cores: &[usize]) -> Vec<Vec<usize>> {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut numbers: Vec<u32> = names.filter_map(|n| n.strip_prefix("node")?.parse().ok()).collect();
    numbers.sort_unstable();
    let of = |n: u32| -> Option<Vec<usize>> {
        let list = std::fs::read_to_string(dir.join(format!("node{n}/cpulist"))).ok()?;
        Some(parse_ranges(list.trim())?.into_iter().filter(|core| cores.contains(core)).collect())
    };
    let nodes: Vec<Vec<usize>> = numbers.into_iter().filter_map(of).filter(|cores| !cores.is_empty()).collect();
    if nodes.is_empty() { vec![cores.to_vec()] } else { nodes }
}

/// The node of each of `n` ranks: neighbours share one, and all nodes have as many ranks, or nearly.
pub fn spread(nodes: &[Vec<usize>], n: usize) -> Vec<Vec<usize>> {
    (0..n).map(|rank| nodes[rank * nodes.len() / n.max(1)].clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_words() {
        assert_eq!(Count::parse("4", 8), Ok(Count::Number(4)));
        assert_eq!(["gpu", "cpu", "auto"].map(|w| Count::parse(w, 8).unwrap()), [Count::Gpu, Count::Cpu, Count::Auto]);
        for wrong in ["0", "9", "-1", "gpus", ""] {
            assert!(Count::parse(wrong, 8).unwrap_err().contains("from 1 to 8, gpu, cpu or auto"), "{wrong}");
        }
        let on = |gpus, cores| [Count::Cpu, Count::Auto].map(|c| c.on(gpus, cores).unwrap());
        assert_eq!((on(0, 6), on(2, 6)), ([6, 1], [6, 2]));
        assert!(Count::Gpu.on(0, 6).unwrap_err().contains("no GPU is visible") && Count::Gpu.on(2, 6) == Ok(2));
    }

    #[test]
    fn gpus_are_those_that_programs_see() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!((boards(dir.path()), boards(Path::new("/surely/missing"))), (3, 0));
        for (variable, seen) in [("0,2", 2), ("", 0), ("-1", 0), ("1,-1,0", 1), ("0,7,1", 1), ("GPU-1a,MIG-2b", 2)] {
            assert_eq!(visible(3, Some(variable)), seen, "{variable}");
        }
        assert_eq!((visible(3, None), visible(0, Some("0,1"))), (3, 0));
    }

    #[test]
    fn ranks_are_spread_over_nodes() {
        let dir = tempfile::tempdir().unwrap();
        for (node, list) in [("node0", "0-3,8\n"), ("node2", "4-7\n"), ("node10", "\n"), ("possible", "0-10\n")] {
            std::fs::create_dir(dir.path().join(node)).unwrap();
            std::fs::write(dir.path().join(node).join("cpulist"), list).unwrap();
        }
        let found = nodes_of(dir.path(), &[1, 2, 4, 5, 8]);
        assert_eq!(found, [vec![1, 2, 8], vec![4, 5]]);
        assert_eq!(nodes_of(dir.path(), &[1, 2]), [vec![1, 2]], "a node without a core of ours takes no rank");
        assert_eq!(nodes_of(Path::new("/surely/missing"), &[3]), [vec![3]]);
        let of = |n| spread(&found, n).iter().map(|cores| cores[0]).collect::<Vec<_>>();
        assert_eq!((of(1), of(2), of(3), of(4)), (vec![1], vec![1, 4], vec![1, 1, 4], vec![1, 1, 4, 4]));
    }
}
