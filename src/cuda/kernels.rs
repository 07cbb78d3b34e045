//! What a kernel is to those who launch it: an entry of a source with its defines and parameters. Each operation's file has its own.

use super::compile::{Define, Defines, Source, Value};
use crate::tensor::DType;

/// A parameter of an entry, in order. `launch::Launch` holds each launch to this list, and a test holds the list to the
/// PTX that the source becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Param {
    /// A tensor that is read.
    In,
    /// A tensor that is written, or read and written.
    Out,
    /// An unsigned 32-bit integer.
    U32,
    /// An unsigned 64-bit integer.
    U64,
    /// An f32.
    F32,
    /// A matrix described for tensor copies, by value.
    Map,
}

/// An entry of a source with its defines.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Source file.
    pub source: Source,
    /// Name of the `extern "C"` function.
    pub entry: &'static str,
    /// Defines it is compiled with.
    pub defines: Defines,
    /// Its parameters.
    pub params: &'static [Param],
    /// Threads of a block.
    pub threads: usize,
}

/// What names a loaded entry: source, entry, defines. No text is put together and nothing allocated where a kernel is launched.
pub type Key = (&'static str, &'static str, Defines);

impl Kernel {
    /// What it is known by.
    pub fn key(&self) -> Key {
        (self.source.name, self.entry, self.defines)
    }
}

/// The C++ type of elements.
pub fn c_type(dtype: DType) -> Value {
    Value::Word(match dtype {
        DType::F32 => "float",
        DType::Bf16 => "bf16",
        DType::I32 => panic!("a tensor of integers where numbers are expected"),
    })
}

/// The types of numbers that tensors hold.
pub const TYPES: [DType; 2] = [DType::F32, DType::Bf16];

/// Elements a thread takes at once from rows of `width`: 8 where that divides it.
pub fn vector(width: usize) -> Define {
    ("VEC", Value::Number(if width.is_multiple_of(8) { 8 } else { 1 }))
}

/// Threads of a block of kernels that go through rows or elements.
pub const THREADS: usize = 256;

/// A kernel with the dynamic shared memory of its largest launch.
pub type Configuration = (Kernel, usize);
