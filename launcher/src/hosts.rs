//! Machines and how many ranks each takes: `--host a:4,b:4`, and hostfiles of Open MPI, MPICH and DeepSpeed.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes that a file of machines has at most: tens of thousands of them.
const LONGEST: u64 = 1 << 20;

/// Ranks that a machine takes at most, as of `--nproc-per-node`.
const MOST_SLOTS: usize = 4096;
/// Ranks of a run at most, as of `-n`.
const MOST_RANKS: usize = 65_536;

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name or address.
    pub name: String,
    /// Ranks it takes.
    pub slots: usize,
}

fn host(text: &str, at: &str) -> Result<Host, String> {
    let (name, slots) = text.split_once(':').unwrap_or((text, "1"));
    let slots: usize = slots.parse().map_err(|_| format!("{at}: expected NAME or NAME:SLOTS, found {text:?}"))?;
    if name.is_empty() || !(1..=MOST_SLOTS).contains(&slots) {
        return Err(format!("{at}: expected NAME or NAME:SLOTS with 1 to {MOST_SLOTS} slots, found {text:?}"));
    }
    Ok(Host { name: name.into(), slots })
}

/// `a:4,b:4`.
///
/// # Errors
/// If it is something else.
pub fn parse_list(text: &str) -> Result<Vec<Host>, String> {
    joined(text.split(',').map(|part| host(part.trim(), "--host")).collect::<Result<_, _>>()?)
}

/// `--nnodes`: a number, or torchrun's range where both ends are the same.
///
/// # Errors
/// If it is something else: the number of machines is known from the start here.
pub fn machines(text: &str) -> Result<u64, String> {
    let (least, most) = text.split_once(':').unwrap_or((text, text));
    match (least.parse::<u64>(), most.parse::<u64>()) {
        (Ok(a), Ok(b)) if a == b && (1..=MOST_RANKS as u64).contains(&a) => Ok(a),
        (Ok(a), Ok(b)) if a < b => Err(format!("a range, expected one number: machines do not come and go, write {b}")),
        _ => Err(format!("expected a number from 1 to {MOST_RANKS}")),
    }
}

/// Reads a file as [`parse_file`] takes it.
///
/// # Errors
/// If it cannot be read, is longer than any list of machines, or as [`parse_file`].
pub fn read_file(path: &Path) -> Result<Vec<Host>, String> {
    let name = path.display().to_string();
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LONGEST + 1).read_to_end(&mut bytes));
    read.map_err(|e| format!("{name}: {e}"))?;
    if bytes.len() as u64 > LONGEST {
        return Err(format!("{name}: longer than {LONGEST} bytes, which is not expected of a list of machines"));
    }
    let text = String::from_utf8(bytes).map_err(|_| format!("{name}: it is not UTF-8 text"))?;
    parse_file(&name, &text)
}

/// Lines `a slots=4 [max_slots=8]`, `a:4` or `a`; what follows `#` is a comment.
///
/// # Errors
/// If a line is something else, or there is none: the message has the line's number.
pub fn parse_file(name: &str, text: &str) -> Result<Vec<Host>, String> {
    let mut hosts = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let at = format!("{name}: line {}", i + 1);
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        let mut found = host(first, &at)?;
        for word in words {
            let number = |n: &str| n.parse::<usize>().ok().filter(|n| (1..=MOST_SLOTS).contains(n));
            match word.split_once('=').map(|(key, n)| (key, number(n))) {
                Some(("slots", Some(n))) => found.slots = n,
                Some(("max_slots" | "max-slots", Some(_))) => {}
                _ => {
                    return Err(format!(
                        "{at}: expected slots=N or max_slots=N after the name, with 1 to {MOST_SLOTS}, found {word:?}"
                    ));
                }
            }
        }
        hosts.push(found);
    }
    match hosts.is_empty() {
        true => Err(format!("{name}: no machine in it")),
        false => joined(hosts),
    }
}

/// A machine that is named twice has the slots of both lines, as with mpirun.
fn joined(hosts: Vec<Host>) -> Result<Vec<Host>, String> {
    let mut all: Vec<Host> = Vec::new();
    for host in hosts {
        match all.iter_mut().find(|h| h.name == host.name) {
            Some(known) => known.slots += host.slots,
            None => all.push(host),
        }
    }
    Ok(all)
}

/// Ranks of each machine, filled one after the other; all slots without a number.
///
/// # Errors
/// If there are more ranks than slots and that is not allowed.
pub fn place(hosts: &[Host], ranks: Option<usize>, oversubscribe: bool) -> Result<Vec<(String, usize)>, String> {
    let slots: usize = hosts.iter().map(|h| h.slots).sum();
    let ranks = ranks.unwrap_or(slots);
    if ranks > MOST_RANKS {
        return Err(format!("{ranks} ranks on all machines, expected at most {MOST_RANKS}"));
    }
    if ranks > slots && !oversubscribe {
        return Err(format!(
            "{ranks} ranks on {slots} slots; name more machines, raise their slots, or pass --oversubscribe"
        ));
    }
    let mut placed: Vec<(String, usize)> = hosts.iter().map(|h| (h.name.clone(), 0)).collect();
    let mut left = ranks;
    while left > 0 {
        for (host, (_, n)) in hosts.iter().zip(&mut placed) {
            let take = left.min(host.slots);
            *n += take;
            left -= take;
        }
    }
    placed.retain(|(_, n)| *n > 0);
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h(name: &str, slots: usize) -> Host {
        Host { name: name.into(), slots }
    }

    #[test]
    fn lists_and_files() {
        assert_eq!(parse_list("a:4, b,a:2").unwrap(), [h("a", 6), h("b", 1)]);
        let file = "# two of them\na slots=4 max_slots=8\n\nb:2  # MPICH\nc\n";
        assert_eq!(parse_file("hosts", file).unwrap(), [h("a", 4), h("b", 2), h("c", 1)]);
        for (text, expected) in [
            ("", "hosts: no machine in it"),
            (
                "a\nb slot=2",
                "hosts: line 2: expected slots=N or max_slots=N after the name, with 1 to 4096, found \"slot=2\"",
            ),
            (
                "a slots=0",
                "hosts: line 1: expected slots=N or max_slots=N after the name, with 1 to 4096, found \"slots=0\"",
            ),
            ("a:x", "hosts: line 1: expected NAME or NAME:SLOTS, found \"a:x\""),
        ] {
            assert_eq!(parse_file("hosts", text), Err(expected.into()), "{text:?}");
        }
        for many in ["a:0", "a:4097", "a:99999999999", "a:18446744073709551616"] {
            assert!(parse_list(many).unwrap_err().contains("SLOTS"), "{many}");
            assert!(parse_file("hosts", &many.replace(':', " slots=")).unwrap_err().contains("1 to 4096"), "{many}");
        }
        assert_eq!(parse_list("a:4096").unwrap(), [h("a", 4096)]);
        let many: Vec<Host> = (0..17).map(|i| h(&format!("n{i}"), 4096)).collect();
        assert!(place(&many, None, false).unwrap_err().contains("at most 65536"));
        assert!(place(&many[..16], None, false).is_ok());
        assert!(parse_list("a,,b").is_err());
    }

    #[test]
    fn the_number_of_machines_is_one() {
        assert_eq!((machines("3"), machines("2:2")), (Ok(3), Ok(2)));
        assert!(machines("2:4").unwrap_err().ends_with("write 4"));
        for wrong in ["0", "0:0", "4:2", "x", "", "70000"] {
            assert!(machines(wrong).unwrap_err().contains("from 1 to 65536"), "{wrong}");
        }
    }

    #[test]
    fn machines_are_filled_in_order() {
        let hosts = [h("a", 4), h("b", 2)];
        let placed =
            |ranks, over| place(&hosts, ranks, over).map(|p| p.into_iter().map(|(_, n)| n).collect::<Vec<_>>());
        assert_eq!(placed(None, false).unwrap(), [4, 2]);
        assert_eq!(placed(Some(3), false).unwrap(), [3]);
        assert_eq!(placed(Some(5), false).unwrap(), [4, 1]);
        assert_eq!(placed(Some(9), true).unwrap(), [7, 2]);
        assert!(placed(Some(7), false).unwrap_err().starts_with("7 ranks on 6 slots"));
    }
}
