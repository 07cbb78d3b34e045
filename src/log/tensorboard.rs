//! TensorBoard event files: scalars only. Written here because the crates for it bring an image library and old protobuf.
//!
//! A file is a sequence of TFRecords: length (u64), masked crc32c of the length, data, masked crc32c of the data, all little
//! endian. Each datum is one `Event` message (tensorflow/core/util/event.proto); six of its fields are needed.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Context, Result};
use crate::files::create_dir_all;

/// An event file of its own in a folder; TensorBoard joins the files of one folder.
pub struct EventFile {
    file: File,
}

impl EventFile {
    /// Creates a file in `dir`. When a run resumes after `first_step - 1` steps, TensorBoard drops the points of older files
    /// from `first_step` on: a killed run may have logged steps that are now run again.
    ///
    /// # Errors
    /// If the folder or the file cannot be written.
    pub fn create(dir: &Path, first_step: u64) -> Result<Self> {
        create_dir_all(dir)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Nanoseconds keep the name unique and sort files of one folder by time.
        let name = format!("events.out.tfevents.{}.{:09}.{}", now.as_secs(), now.subsec_nanos(), std::process::id());
        let path = dir.join(name);
        let file = File::create_new(&path).context(|| format!("{}: cannot create", path.display()))?;
        let mut this = Self { file };
        let mut version = Message::default();
        version.bytes(3, b"brain.Event:2");
        this.event(0, version)?;
        let mut session = Message::default();
        session.varint(1, 1); // SessionLog.status = START
        let mut start = Message::default();
        start.bytes(7, &session.0);
        this.event(first_step, start)?;
        Ok(this)
    }

    /// Adds scalars at a step.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let mut v = Message::default();
            v.bytes(1, tag.as_bytes());
            v.fixed32(2, (*value as f32).to_bits());
            summary.bytes(1, &v.0);
        }
        let mut event = Message::default();
        event.bytes(5, &summary.0);
        self.event(step, event)
    }

    fn event(&mut self, step: u64, what: Message) -> Result<()> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let mut event = Message::default();
        event.fixed64(1, seconds.to_bits());
        event.varint(2, step);
        event.0.extend(what.0);
        self.file.write_all(&record(&event.0)).context(|| "cannot write the TensorBoard event file".into())
    }
}

/// A protobuf message under construction (wire format of protobuf.dev/programming-guides/encoding).
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn raw_varint(&mut self, mut v: u64) {
        while v >= 0x80 {
            self.0.push(v as u8 | 0x80);
            v >>= 7;
        }
        self.0.push(v as u8);
    }

    fn varint(&mut self, field: u64, v: u64) {
        self.raw_varint(field << 3);
        self.raw_varint(v);
    }

    fn fixed64(&mut self, field: u64, v: u64) {
        self.raw_varint(field << 3 | 1);
        self.0.extend(v.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, v: &[u8]) {
        self.raw_varint(field << 3 | 2);
        self.raw_varint(v.len() as u64);
        self.0.extend(v);
    }

    fn fixed32(&mut self, field: u64, v: u32) {
        self.raw_varint(field << 3 | 5);
        self.0.extend(v.to_le_bytes());
    }
}

fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend(length);
    out.extend(masked(crc32c(&length)).to_le_bytes());
    out.extend(data);
    out.extend(masked(crc32c(data)).to_le_bytes());
    out
}

/// A crc of data that holds crcs is weak, so TFRecord stores it rotated and shifted.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78), bit by bit: events are a few hundred bytes.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 * (crc & 1));
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, appendix B.4.
    #[test]
    fn crc32c_known_answers() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn records_frame_and_decode() {
        let dir = tempfile::tempdir().unwrap();
        let mut f = EventFile::create(dir.path(), 5).unwrap();
        f.scalars(7, &[("train/loss", 1.5), ("train/learning_rate", 2e-4)]).unwrap();
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let all = std::fs::read(path).unwrap();
        let (mut at, mut events) = (0, Vec::new());
        while at < all.len() {
            let n = u64::from_le_bytes(all[at..at + 8].try_into().unwrap()) as usize;
            assert_eq!(all[at + 8..at + 12], masked(crc32c(&all[at..at + 8])).to_le_bytes());
            let data = &all[at + 12..at + 12 + n];
            assert_eq!(all[at + 12 + n..at + 16 + n], masked(crc32c(data)).to_le_bytes());
            events.push(data.to_vec());
            at += 16 + n;
        }
        assert_eq!(events.len(), 3);
        assert_eq!(&events[0][11..], b"\x1a\x0dbrain.Event:2");
        assert_eq!(&events[1][9..], b"\x10\x05\x3a\x02\x08\x01");
        let mut expected = b"\x10\x07\x2a\x2f\x0a\x11\x0a\x0atrain/loss\x15".to_vec();
        expected.extend(1.5f32.to_le_bytes());
        expected.extend(b"\x0a\x1a\x0a\x13train/learning_rate\x15");
        expected.extend(2e-4f32.to_le_bytes());
        assert_eq!(&events[2][9..], expected);
    }
}
