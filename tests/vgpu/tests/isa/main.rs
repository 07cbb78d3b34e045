//! Every opcode that the decoder knows, in every form, against references written from the ISA text.

mod convert;
mod edges;
mod exact;
mod exchange;
mod forms;
mod harness;
mod matrix;
mod memory;
mod reference;
