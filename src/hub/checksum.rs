//! What a file's content has to be: sha256 of large files, and git's hash of the others (git-scm.com/book, "Git Internals - Git Objects"),
//! the sha1 of `blob`, the length and the bytes.

use std::fs::File;
use std::io::Read;

use sha2::{Digest, Sha256};

/// Bytes read at once.
const PIECE: usize = 1 << 17;

/// The checksum of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// In small hexadecimal digits, as all of them.
    Sha256(String),
    /// The sha1 that git gives a file of this content; a mirror may mean that of the bytes alone, which will do as well.
    Git(String),
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether a name of content is a sha256.
pub fn is_sha256(text: &str) -> bool {
    is_hex(text, 64)
}

impl Checksum {
    /// What a name of content, in small letters, says; `None` where it is no checksum: mirrors may have tags of their own.
    pub fn of_tag(tag: &str) -> Option<Self> {
        match tag {
            tag if is_sha256(tag) => Some(Self::Sha256(tag.into())),
            tag if is_hex(tag, 40) => Some(Self::Git(tag.into())),
            _ => None,
        }
    }

    /// Compares it with the first `length` bytes of a file. Gives what is wrong, in words; `None`: nothing.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn differs(&self, file: File, length: u64) -> std::io::Result<Option<String>> {
        let front = file.take(length);
        let found = match self {
            Self::Sha256(_) => {
                let mut hasher = Sha256::new();
                each_piece(front, |piece| hasher.update(piece))?;
                hex(&hasher.finalize())
            }
            Self::Git(expected) => {
                let (mut hasher, mut plain) = (Sha1::default(), Sha1::default());
                hasher.update(format!("blob {length}\0").as_bytes());
                each_piece(front, |piece| [&mut hasher, &mut plain].into_iter().for_each(|h| h.update(piece)))?;
                let found = hex(&hasher.finish());
                if found != *expected && hex(&plain.finish()) == *expected {
                    return Ok(None);
                }
                found
            }
        };
        Ok(self.compared(&found))
    }

    /// What is wrong with a checksum of the same kind.
    pub fn compared(&self, found: &str) -> Option<String> {
        let (kind, expected) = match self {
            Self::Sha256(expected) => ("sha256", expected),
            Self::Git(expected) => ("git's hash", expected),
        };
        (expected != found).then(|| format!("checksum mismatch: expected {kind} {expected}, found {found}"))
    }
}

/// Bytes as small hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn each_piece(mut from: impl Read, mut take: impl FnMut(&[u8])) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        match from.read(&mut piece)? {
            0 => return Ok(()),
            n => take(&piece[..n]),
        }
    }
}

/// SHA-1 (FIPS 180-4, 6.1). It proves that nothing was damaged on its way, not who made it; that is TLS's part.
struct Sha1 {
    state: [u32; 5],
    /// Bytes of a block that is not whole.
    open: Vec<u8>,
    length: u64,
}

impl Default for Sha1 {
    fn default() -> Self {
        let state = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476, 0xc3d2_e1f0];
        Self { state, open: Vec::with_capacity(64), length: 0 }
    }
}

impl Sha1 {
    fn update(&mut self, mut bytes: &[u8]) {
        self.length += bytes.len() as u64;
        if !self.open.is_empty() {
            let n = bytes.len().min(64 - self.open.len());
            self.open.extend(&bytes[..n]);
            bytes = &bytes[n..];
            if self.open.len() < 64 {
                return;
            }
            let block = std::mem::take(&mut self.open);
            self.block(&block);
        }
        let mut blocks = bytes.chunks_exact(64);
        blocks.by_ref().for_each(|block| self.block(block));
        self.open.extend(blocks.remainder());
    }

    fn block(&mut self, block: &[u8]) {
        let mut w = [0u32; 80];
        for (word, bytes) in w.iter_mut().zip(block.chunks_exact(4)) {
            *word = bytes.iter().fold(0, |all, &b| all << 8 | u32::from(b));
        }
        for t in 16..80 {
            w[t] = (w[t - 3] ^ w[t - 8] ^ w[t - 14] ^ w[t - 16]).rotate_left(1);
        }
        let [mut a, mut b, mut c, mut d, mut e] = self.state;
        for (t, word) in w.iter().enumerate() {
            let (f, k) = match t {
                0..20 => (b & c | !b & d, 0x5a82_7999),
                20..40 => (b ^ c ^ d, 0x6ed9_eba1),
                40..60 => (b & c | b & d | c & d, 0x8f1b_bcdc_u32),
                _ => (b ^ c ^ d, 0xca62_c1d6),
            };
            let next = a.rotate_left(5).wrapping_add(f).wrapping_add(e).wrapping_add(k).wrapping_add(*word);
            (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
        }
        for (state, add) in self.state.iter_mut().zip([a, b, c, d, e]) {
            *state = state.wrapping_add(add);
        }
    }

    fn finish(mut self) -> [u8; 20] {
        let bits = self.length.wrapping_mul(8);
        let zeros = (119 - self.length as usize % 64) % 64;
        let mut end = vec![0x80];
        end.resize(1 + zeros, 0);
        end.extend(bits.to_be_bytes());
        self.update(&end);
        let mut out = [0; 20];
        for (bytes, word) in out.chunks_exact_mut(4).zip(self.state) {
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sha1(pieces: &[&[u8]]) -> String {
        let mut hasher = Sha1::default();
        pieces.iter().for_each(|piece| hasher.update(piece));
        hex(&hasher.finish())
    }

    /// FIPS 180's examples (csrc.nist.gov, "SHA1.pdf"), and lengths around a block, however they are cut.
    #[test]
    fn sha1_known_answers() {
        assert_eq!(sha1(&[b"abc"]), "a9993e364706816aba3e25717850c26c9cd0d89d");
        assert_eq!(sha1(&[]), "da39a3ee5e6b4b0d3255bfef95601890afd80709");
        let two = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
        assert_eq!(sha1(&[two]), "84983e441c3bd26ebaae4aa1f95129e5e54670f1");
        assert_eq!(sha1(&[&vec![b'a'; 1_000_000]]), "34aa973cd4c4daa4f61eeb2bdbad27316534016f");
        let bytes: Vec<u8> = (0..200u8).collect();
        for n in 50..140 {
            let whole = sha1(&[&bytes[..n]]);
            for cut in [0, 1, 55, 56, 63, 64, 65, n] {
                let cut = cut.min(n);
                assert_eq!(sha1(&[&bytes[..cut], &bytes[cut..n]]), whole, "{n} cut at {cut}");
            }
        }
    }

    /// `printf 'hello\n' | git hash-object --stdin`, and of nothing.
    #[test]
    fn git_names_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let differs = |tag: &str, bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            Checksum::of_tag(tag).unwrap().differs(File::open(&path).unwrap(), bytes.len() as u64).unwrap()
        };
        let hello = "ce013625030ba8dba906f756967f9e9ca394464a";
        assert_eq!(differs(hello, b"hello\n"), None);
        assert_eq!(differs("e69de29bb2d1d6434b8b29ae775ad8c2e48c5391", b""), None);
        assert_eq!(
            differs("f572d396fae9206628714fb2ce00f72e94f2258f", b"hello\n"),
            None,
            "the sha1 of the bytes alone"
        );
        let wrong = differs(hello, b"hellO\n").unwrap();
        assert!(wrong.starts_with(&format!("checksum mismatch: expected git's hash {hello}, found ")), "{wrong}");
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert_eq!(differs(sha256, b"hello\n"), None);
        assert!(differs(sha256, b"hello").unwrap().contains("expected sha256 5891"));
        for tag in ["", "d41d8cd98f00b204e9800998ecf8427e", "main-7", &"g".repeat(40), &"a".repeat(63)] {
            assert_eq!(Checksum::of_tag(tag), None, "{tag}");
        }
    }
}
