//! A loss that grows: said once, while there is time to stop.

/// Steps whose losses are taken for the start.
const FIRST: u32 = 5;
/// Steps in a row above it before anything is said.
const IN_A_ROW: u32 = 5;
/// How far above: this many times the start, and by at least this many nats.
const FACTOR: f64 = 1.5;
const NATS: f64 = 0.5;

/// The losses of a process's first steps, and how long they have been left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Divergence {
    seen: u32,
    start: f64,
    above: u32,
    said: bool,
}

impl Divergence {
    /// Takes the loss of a step; the one warning, where it has been far above the start for some steps.
    pub fn observe(&mut self, loss: f64, peak_lr: f64) -> Option<String> {
        if self.seen < FIRST {
            self.seen += 1;
            self.start = self.start.max(loss);
            return None;
        }
        let far = loss > self.start * FACTOR && loss > self.start + NATS;
        self.above = if far { self.above + 1 } else { 0 };
        if self.above < IN_A_ROW || self.said {
            return None;
        }
        self.said = true;
        Some(format!(
            "the loss diverges: {loss:.2}, and at most {:.2} in the first steps; stop and try --learning-rate {:e}",
            self.start,
            rounded(peak_lr / 10.0)
        ))
    }
}

/// To two digits.
fn rounded(x: f64) -> f64 {
    format!("{x:.1e}").parse().unwrap_or(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(losses: &[f64]) -> Vec<(usize, String)> {
        let mut d = Divergence::default();
        losses.iter().enumerate().filter_map(|(i, &loss)| Some((i, d.observe(loss, 3e-3)?))).collect()
    }

    #[test]
    fn a_loss_that_grows_is_said_once() {
        let mut losses = vec![2.0, 2.5, 2.2, 2.0, 2.1];
        losses.extend([4.0; 20]);
        let said = warnings(&losses);
        assert_eq!(said.len(), 1);
        assert_eq!(said[0].0, 9);
        let expected =
            "the loss diverges: 4.00, and at most 2.50 in the first steps; stop and try --learning-rate 3e-4";
        assert_eq!(said[0].1, expected);
    }

    #[test]
    fn noise_and_small_losses_are_nothing() {
        let noisy: Vec<f64> = (0..50).map(|i| if i % 4 == 0 { 9.0 } else { 2.0 }).collect();
        assert!(warnings(&noisy).is_empty());
        let small: Vec<f64> = (0..50).map(|i| 0.01 * f64::from(i)).collect();
        assert!(warnings(&small).is_empty());
        assert!(warnings(&[5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]).is_empty());
    }
}
