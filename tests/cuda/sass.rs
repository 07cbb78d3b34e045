//! The loops of products and of attention in machine code of sm_80 and sm_90: how many instructions it has for each of the tensor cores. No tool of the
//! toolkit is needed: an instruction is 16 bytes, its kind the lowest 12 bits, where a branch goes stands in the first word.

const TENSOR: u64 = 0x23c;
const WARPGROUP: u64 = 0x9f0;
const COPY: u64 = 0xfae;
const BRANCH: u64 = 0x947;
const NOTHING: u64 = 0x918;

fn number(bytes: &[u8], at: usize, width: usize) -> usize {
    bytes[at..at + width].iter().rev().fold(0, |n, &b| n << 8 | usize::from(b))
}

/// The code of an entry: ELF, section `.text.ENTRY`.
fn code<'a>(cubin: &'a [u8], entry: &str) -> &'a [u8] {
    let (headers, size) = (number(cubin, 0x28, 8), number(cubin, 0x3a, 2));
    let header = |i: usize| &cubin[headers + i * size..][..size];
    let section = |h: &[u8]| &cubin[number(h, 0x18, 8)..][..number(h, 0x20, 8)];
    let names = section(header(number(cubin, 0x3e, 2)));
    let name = |h: &[u8]| names[number(h, 0, 4)..].split(|&b| b == 0).next().unwrap_or_default();
    let wanted = format!(".text.{entry}");
    let found = (0..number(cubin, 0x3c, 2)).map(header).find(|h| name(h) == wanted.as_bytes());
    section(found.unwrap_or_else(|| panic!("no section {wanted}")))
}

/// Bytes that a branch goes on from the next instruction: on sm_90 the lowest 8 bits of a quarter of them lie apart.
fn distance(word: u64, sm_90: bool) -> isize {
    let upper = ((word >> 32) as u32).cast_signed() as isize;
    if sm_90 { ((upper >> 2) * 256 + (word >> 16 & 0xff) as isize) * 4 } else { upper }
}

/// The kinds of the instructions of each innermost loop.
fn loops(cubin: &[u8], entry: &str, sm_90: bool) -> Vec<Vec<u64>> {
    let words: Vec<u64> = code(cubin, entry).chunks_exact(16).map(|i| number(i, 0, 8) as u64).collect();
    // Where a branch goes back to.
    let back = |i: usize| {
        let by = distance(words[i], sm_90) / 16;
        (words[i] & 0xfff == BRANCH && by < 0).then(|| (i + 1).saturating_add_signed(by))
    };
    let loops = (0..words.len()).filter_map(|i| Some((back(i)?, i)));
    let inner =
        loops.clone().filter(|&(from, to)| !loops.clone().any(|(f, t)| (f, t) != (from, to) && from <= f && t <= to));
    inner.map(|(from, to)| words[from..=to].iter().map(|w| w & 0xfff).collect()).collect()
}

fn count(body: &[u64], kind: u64) -> usize {
    body.iter().filter(|&&k| k == kind).count()
}

/// (instructions, those of the tensor cores) of the innermost loop that copies tiles and multiplies them.
pub fn product_loop(cubin: &[u8], entry: &str, sm_90: bool) -> (usize, usize) {
    let mut found = loops(cubin, entry, sm_90);
    found.retain(|b| count(b, TENSOR) > 0 && count(b, COPY) > 0);
    assert_eq!(found.len(), 1, "{entry}: loops that copy and multiply: {}", found.len());
    (found[0].len() - count(&found[0], NOTHING), count(&found[0], TENSOR))
}

/// Instructions of the innermost loop of sm_90 that starts the four products of a warpgroup for 64 steps of k.
pub fn warpgroup_loop(cubin: &[u8], entry: &str) -> usize {
    let found = loops(cubin, entry, true).into_iter().filter(|b| count(b, WARPGROUP) == 4);
    found.map(|b| b.len() - count(&b, NOTHING)).min().unwrap_or_else(|| panic!("{entry}: no loop of four products"))
}
