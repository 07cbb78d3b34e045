//! Token files: a round trip, every kind of damage, raw files of other programs, and a full disk.

use std::path::Path;

use proptest::prelude::*;
use ringtune::data::encode::Encoded;
use ringtune::data::raw_tokens::{RawTokens, RawWidth};
use ringtune::data::token_file::{Counts, DocInfo, Meta, TokenFile, Writer};
use ringtune::error::Result;

/// What a token file is made of.
struct Content {
    vocab_size: usize,
    meta: Meta,
    docs: Vec<(DocInfo, Encoded)>,
}

fn write(path: &Path, content: &Content) -> Result<()> {
    let mut to = Writer::new(path, content.vocab_size)?;
    content.docs.iter().try_for_each(|(info, doc)| to.push(info, doc))?;
    to.finish(&content.meta, [&"ab".repeat(32), &"cd".repeat(32)])
}

fn content(vocab_size: usize, docs: &[&[u32]]) -> Content {
    let docs = docs.iter().enumerate().map(|(i, tokens)| {
        let doc =
            Encoded { tokens: tokens.to_vec(), supervised: (0..tokens.len()).map(|k| (k + i) % 3 == 0).collect() };
        (
            DocInfo {
                line: i as u32 + 1,
                n_targets: doc.n_targets() as u32,
                prompt_hash: u64::MAX - i as u64,
                source: 0,
            },
            doc,
        )
    });
    Content {
        vocab_size,
        meta: Meta {
            sources: vec!["a.jsonl".into()],
            template: "chatml".into(),
            counts: Counts { rows: 3, ..Counts::default() },
            ..Meta::default()
        },
        docs: docs.collect(),
    }
}

fn written(content: &Content) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.tok");
    write(&path, content).unwrap();
    (dir, path)
}

#[test]
fn what_is_written_is_read_in_both_widths() {
    for (vocab, width) in [(4098, 2), (65_536, 2), (65_537, 4), (128_256, 4)] {
        let top = vocab as u32 - 1;
        let content = content(vocab, &[&[2, top, 3], &[], &[0, 1, 2, 3, 4, 5, 6, 7, 8, top]]);
        let (_dir, path) = written(&content);
        let file = TokenFile::open(&path).unwrap();
        assert_eq!((file.n_docs(), file.n_tokens(), file.token_bytes(), file.vocab_size()), (3, 13, width, vocab));
        assert_eq!(file.meta(), &content.meta);
        for (i, (info, doc)) in content.docs.iter().enumerate() {
            assert_eq!((&file.info(i), &file.doc(i)), (info, doc));
        }
        let n = content.docs.iter().flat_map(|d| &d.1.supervised).filter(|&&s| s).count();
        assert_eq!(file.n_supervised(), n as u64);
        assert!(file.expect(&"ab".repeat(32), Some(&"cd".repeat(32))).is_ok());
        // Only the whole file lies in the folder.
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}

#[test]
fn damage_is_named_with_expected_and_found() {
    let (_dir, path) = written(&content(100, &[&[1, 2, 3, 4, 5]]));
    let good = std::fs::read(&path).unwrap();
    let check = |change: &dyn Fn(&mut Vec<u8>), expected: &str| {
        let mut bytes = good.clone();
        change(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        let e = TokenFile::open(&path).unwrap_err().to_string();
        assert!(e.contains("x.tok") && e.contains("expected") && e.contains(expected), "{expected}: {e}");
    };
    check(&|b| b.truncate(b.len() - 8), "truncated");
    check(&|b| b.truncate(20), "truncated, expected at least 152 bytes, found 20");
    check(&|b| b.clear(), "found 0");
    check(&|b| b.extend([0; 8]), "too long");
    check(&|b| b[0] = b'X', "wrong magic");
    check(&|b| b[8] = 9, "wrong version, expected 1, found 9");
    check(&|b| b[56] ^= 1, "wrong checksum");
    check(&|b| *b.last_mut().unwrap() ^= 1, "wrong checksum");
    check(&|b| b[12] = 3, "bytes a token");
    check(&|b| b[24] = 200, "truncated");
    std::fs::write(&path, &good).unwrap();
    // Counts beyond any file must neither overflow nor allocate.
    for at in [16, 24, 32, 48] {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        assert!(TokenFile::open(&path).is_err());
    }
    std::fs::write(&path, &good).unwrap();
    let e = TokenFile::open(&path).unwrap().expect(&"ef".repeat(32), None).unwrap_err().to_string();
    assert!(e.contains("another tokenizer") && e.contains("efef") && e.contains("abab"), "{e}");
    let e = TokenFile::open(Path::new("no/such.tok")).unwrap_err().to_string();
    assert!(e.contains("no/such.tok"), "{e}");
}

/// The checksum is put right again, so what is behind it has to hold by itself.
fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.len() > 152 {
        let mut h = blake3::Hasher::new();
        h.update(&bytes[..120]).update(&bytes[152..]);
        bytes[120..152].copy_from_slice(h.finalize().as_bytes());
    }
    bytes
}

thread_local! {
    /// A good file, written and synced once.
    static HOSTILE_BASE: Vec<u8> = {
        let (_dir, path) = written(&content(300, &[&[1, 2, 3], &[4, 5, 6, 7, 8, 9], &[10]]));
        std::fs::read(path).unwrap()
    };
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn hostile_files_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), cut in any::<Option<prop::sample::Index>>(), seal: bool) {
        let mut bytes = HOSTILE_BASE.with(Vec::clone);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.tok");
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            let n = cut.index(bytes.len());
            bytes.truncate(n);
        }
        std::fs::write(&path, if seal { resealed(bytes) } else { bytes }).unwrap();
        if let Ok(file) = TokenFile::open(&path) {
            for doc in 0..file.n_docs() {
                prop_assert!(file.doc(doc).tokens.iter().all(|&t| (t as usize) < file.vocab_size()));
                file.info(doc);
            }
        }
    }
}

#[test]
fn a_token_outside_the_vocabulary_is_refused_when_writing_and_reading() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.tok");
    let e = write(&path, &content(5, &[&[1, 5]])).unwrap_err().to_string();
    assert!(e.contains("token 5, expected one below the vocabulary's 5"), "{e}");
    assert!(!path.exists());
    write(&path, &content(6, &[&[1, 5]])).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[16] = 5;
    std::fs::write(&path, resealed(bytes)).unwrap();
    let e = TokenFile::open(&path).unwrap_err().to_string();
    assert!(e.contains("token 5, expected one below"), "{e}");
}

#[test]
fn a_folder_that_cannot_be_written_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    let e = write(&dir.path().join("file/x.tok"), &content(10, &[&[1]])).unwrap_err().to_string();
    assert!(e.contains("file"), "{e}");
    // A target that cannot be replaced: the temporary file is gone afterwards.
    std::fs::create_dir(dir.path().join("x.tok")).unwrap();
    assert!(write(&dir.path().join("x.tok"), &content(10, &[&[1]])).is_err());
    let mut left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["file", "x.tok"]);
}

/// A limit on the size of files stands for a full disk: the write fails in the middle in the same way.
#[test]
fn a_full_disk_is_a_clear_error_and_leaves_no_partial_file() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    let row = format!("{{\"prompt\": \"p\", \"response\": \"{}\"}}\n", "many words ".repeat(20));
    std::fs::write(&rows, row.repeat(500)).unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let pack = |limit: &str| {
        let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$@\"");
        std::process::Command::new("bash")
            .args(["-c", &script, "bash", env!("CARGO_BIN_EXE_ringtune"), "pack", "--dataset-paths"])
            .arg(&rows)
            .args(["--tokenizer-path", "tests/data/tokenizer/spm4k.model", "--prompt-template", "instruct", "--output"])
            .arg(out.join("rows.tok"))
            .env("RINGTUNE_CACHE", dir.path().join("cache"))
            .output()
            .unwrap()
    };
    let failed = pack("16");
    let message = String::from_utf8_lossy(&failed.stderr);
    assert_eq!(failed.status.code(), Some(1), "{message}");
    assert!(message.contains("writing ") && message.contains("bytes") && message.contains("too large"), "{message}");
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
    let worked = pack("unlimited");
    assert!(worked.status.success(), "{}", String::from_utf8_lossy(&worked.stderr));
    assert_eq!(TokenFile::open(&out.join("rows.tok")).unwrap().n_docs(), 500);
}

#[test]
fn raw_files_of_other_programs_are_read_as_documents() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.bin");
    let u16s = |ids: &[u16]| ids.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<u8>>();
    let header = |magic: i32, version: i32, n: i32| {
        let mut h: Vec<u8> = [magic, version, n].iter().flat_map(|x| x.to_le_bytes()).collect();
        h.resize(1024, 0);
        h
    };
    let docs = |bytes: &[u8], width: Option<RawWidth>| {
        std::fs::write(&path, bytes).unwrap();
        RawTokens::open(&path, 4096, 3, width).map(|r| {
            (0..r.n_docs())
                .map(|d| {
                    let mut out = Vec::new();
                    r.visit(d, 0, r.doc_len(d), |t, supervised| out.push(if supervised { t } else { u32::MAX }));
                    out
                })
                .collect::<Vec<_>>()
        })
    };
    let expected = vec![vec![2, 10, 3], vec![2, 4095, 11]];
    let ids = [2u16, 10, 3, 2, 4095, 11];
    assert_eq!(docs(&u16s(&ids), None).unwrap(), expected);
    let u32s: Vec<u8> = ids.iter().flat_map(|&t| u32::from(t).to_le_bytes()).collect();
    assert_eq!(docs(&u32s, Some(RawWidth::U32)).unwrap(), expected);
    assert_eq!(docs(&[header(20_240_520, 1, 6), u16s(&ids)].concat(), None).unwrap(), expected);
    assert_eq!(docs(&[header(20_240_801, 7, 6), u32s.clone()].concat(), None).unwrap(), expected);
    let check = |bytes: &[u8], expected: &str| {
        let e = docs(bytes, None).unwrap_err().to_string();
        assert!(e.contains("x.bin") && e.contains("expected") && e.contains(expected), "{e}");
    };
    // Four bytes a token read as two: every second one is 0.
    let wide: Vec<u8> = (5..60u32).flat_map(u32::to_le_bytes).collect();
    let e = docs(&wide, None).unwrap_err().to_string();
    assert!(e.contains("looks like 4 bytes a token, read as 2; pass --raw-width u32"), "{e}");
    let wider: Vec<u8> = (5..60u64).flat_map(u64::to_le_bytes).collect();
    for width in [None, Some(RawWidth::U32)] {
        let e = docs(&wider, width).unwrap_err().to_string();
        assert!(e.contains("looks like 8 bytes a token") && e.contains("write it as uint16 or uint32"), "{e}");
    }
    assert_eq!(docs(&wide, Some(RawWidth::U32)).unwrap()[0].len(), 55);
    assert_eq!(docs(&wide, Some(RawWidth::U16)).unwrap()[0].len(), 110);
    assert_eq!(docs(&u16s(&[0; 40]), None).unwrap()[0].len(), 40);
    check(&[], "found an empty file");
    check(&u16s(&ids)[..5], "whole number of 2-byte tokens, found 5 bytes");
    check(&u16s(&[1, 4096]), "token 1 is 4096, expected one below the vocabulary's 4096");
    check(&[header(20_240_520, 1, 7), u16s(&ids)].concat(), "expected 1038 bytes for 7 tokens, found 1036");
    check(&[header(20_240_520, 2, 6), u16s(&ids)].concat(), "wrong version, expected 1");
    check(&[header(20_240_801, 7, -1), u32s].concat(), "for -1 tokens");
    check(&header(20_240_520, 1, 6)[..100], "truncated");
}
