//! The one list of cases, of `ringtune bench kernels`, `cargo bench` and gpu_check.

use super::case::{Case, Setup};
use super::{attention, copies, decode, head, optimiser, products, project, project_weights, rows};
use crate::backend::Backend;

/// Every case of a setup.
pub fn all<B: Backend + 'static>(s: &Setup) -> Vec<Case<B>> {
    let parts = [
        products::cases(s),
        project::cases(s),
        project_weights::cases(s),
        attention::cases(s),
        decode::cases(s),
        rows::cases(s),
        copies::cases(s),
        head::cases(s),
        optimiser::cases(s),
    ];
    parts.into_iter().flatten().collect()
}
