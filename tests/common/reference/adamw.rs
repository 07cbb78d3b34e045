//! AdamW in f64.

use ringtune::backend::{AdamWSlot, AdamWStep};

use super::{Reference, f, f_mut};

pub(super) fn adamw(slot: &mut AdamWSlot<'_, Reference>, s: AdamWStep, clip: f64) {
    slot.check("adamw");
    let (lr, weight_decay) = slot.rates(&s);
    let AdamWSlot { p, master, m, v, g, first_row, range, .. } = slot;
    assert_eq!(*range, 0..g.len(), "the reference has one rank");
    let start = *first_row * p.cols();
    let wide = |x: f32| f64::from(x);
    for i in 0..g.len() {
        let grad = f(g)[i] * clip;
        let (m, v) = (&mut f_mut(m)[i], &mut f_mut(v)[i]);
        *m = wide(s.beta1) * *m + wide(s.one_minus_beta1) * grad;
        *v = wide(s.beta2) * *v + wide(s.one_minus_beta2) * grad * grad;
        let root = (*v / wide(s.bias_correction2)).sqrt() + wide(s.eps);
        let w = &mut f_mut(p)[start + i];
        *w *= 1.0 - wide(lr) * wide(weight_decay);
        *w -= wide(lr) * (*m / wide(s.bias_correction1)) / root;
    }
    if let Some(master) = master {
        let end = start + g.len();
        f_mut(master).copy_from_slice(&f(p)[start..end]);
    }
}
