//! Kernels of one block that sum what a step leaves behind. Their threads go through all elements, which would take days and memory that is
//! written: the source is changed so that they begin far behind the first one.

use ringtune::cuda::compile::Source;
use ringtune::cuda::kernels::Kernel;
use ringtune::cuda::stats;

use super::Arg::{self, U32, U64};
use super::Word::Number;
use super::tables::table;
use super::{Case, alike, both, f32s, f64s, is_promised, read, whole};
use crate::close::normal;

/// An entry of stats.
pub fn of_stats(entry: &str) -> Kernel {
    stats::all().into_iter().find(|(k, _)| k.entry == entry).expect("an entry of stats").0
}

/// The same, whose threads begin so many elements behind the first.
fn from_element(entry: &str, first: usize) -> Kernel {
    let kernel = of_stats(entry);
    let loop_of = |begin: &str| format!("for (u32 i = threadIdx.x{begin}; i < n;");
    let text = kernel.source.text.replace(&loop_of(""), &loop_of(&format!(" + {first}u")));
    assert_ne!(text, kernel.source.text, "no loop over elements");
    Kernel { source: Source { text: text.leak(), ..kernel.source }, ..kernel }
}

fn one_block(kernel: Kernel, args: Vec<Arg>) -> Case {
    Case { kernel, shared: 0, far_block: 0, blocks: 1, args }
}

/// Figures of a step that are kept: right arg maxes, squared norm, clip factor, whether all is finite.
fn figures() -> Vec<u8> {
    f64s([3.0, 4.0, 0.5, 1.0])
}

/// As far behind as a tensor of 18 GiB reaches, in f64.
const FAR_SUM: usize = (1 << 31) + 5;

/// As many losses as there are counts, and a micro-batch of a number that no step has.
#[test]
fn losses_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let n = 300;
    let far = (1 << 32) - (1 << 16) - 1 - n;
    for counted in [true, false] {
        alike(|side| {
            let stats = Arg::Rows {
                rows: 2,
                row: 32,
                stride: [32, 32 + 8 * FAR_SUM],
                at: [0; 2],
                values: Some([figures(), f64s([0.0; 4])].concat()),
                compared: true,
            };
            let correct = if counted { read(f32s(2, n), 4, far) } else { Arg::Null };
            let args = vec![stats, read(f32s(1, n), 4, far), correct, U32([n, far + n]), U32([0, FAR_SUM])];
            one_block(from_element("stats_add_loss", side * far), args)
        });
    }
}

#[test]
fn sums_of_squares_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let n = 300;
    let sums = || f64s(normal(1, n).into_iter().map(|x| f64::from(x) * f64::from(x)));
    let stats = || whole(figures()).changed();
    alike(|side| {
        let args = vec![stats(), read(sums(), 8, FAR_SUM), U32([n, FAR_SUM + n])];
        one_block(from_element("stats_norm2", side * FAR_SUM), args)
    });
    let order = (0..n).map(|i| Number([i, FAR_SUM + i])).collect();
    let args = vec![stats(), read(sums(), 8, FAR_SUM), table(Vec::new(), Vec::new(), 0, order), both(n)];
    one_block(of_stats("stats_norm2_in_order"), args).holds();
}

/// These have no index: figures that lie behind 16 GiB of other memory.
#[test]
fn figures_themselves_far_behind_the_beginning() {
    if !is_promised() {
        return;
    }
    let at = [0, 8 * FAR_SUM];
    let stats = || {
        let rows = Arg::Rows { rows: 1, row: 32, stride: [32; 2], at, values: Some(figures()), compared: true };
        Arg::Behind(Box::new(rows), at)
    };
    one_block(of_stats("stats_begin"), vec![stats()]).holds();
    let limit = U64([1.5f64.to_bits() as usize; 2]);
    one_block(of_stats("stats_clip"), vec![stats(), limit, both(1)]).holds();
}
