//! How devices add products up, and what a sum can lose by it.

/// How a device adds products up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sums {
    /// One after the other, each sum rounded to nearest: what it loses is held to twice what plain arithmetic loses.
    Rounded,
    /// As tensor cores do: the sum so far and `group` products, which are exact, are cut off `extra` bits below the last bit that an f32
    /// has at the largest exponent among them, added, and the sum is cut off to f32.
    ///
    /// Sources: Fasi, Higham, Mikaitis and Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"; Khattak and Mikaitis 2025,
    /// arXiv:2512.07004, for the figures by architecture.
    Cut { group: usize, extra: i32 },
}

/// A unit in the last place of an f32 at 1.
const UNIT: f64 = 1.0 / (1 << 23) as f64;

impl Sums {
    /// The most, per group, that is cut off of terms up to `top`, and of a sum of magnitude `sum`: each of `group + 1` terms loses less
    /// than a unit of its grid, which is `2^-extra` units of f32 at the largest exponent, and that is a unit at most of the largest term;
    /// the sum loses less than one of its own.
    fn of_group(group: usize, extra: i32, top: f64, sum: f64) -> f64 {
        UNIT * ((group + 1) as f64 * 0.5f64.powi(extra) * top + sum)
    }

    /// The most that the sum of these products, in this order, loses beyond plain arithmetic's rule.
    pub fn lose(self, products: &[f64]) -> f64 {
        let Self::Cut { group, extra } = self else { return 0.0 };
        let (mut sum, mut lost) = (0.0f64, 0.0);
        for part in products.chunks(group) {
            let top = part.iter().fold(sum.abs() + lost, |top, p| top.max(p.abs()));
            sum += part.iter().sum::<f64>();
            lost += Self::of_group(group, extra, top, sum.abs() + lost);
        }
        lost
    }

    /// The same for any `k` products in any order, whose magnitudes have the sum 1: no term, and no sum, is larger.
    pub fn lose_at_most(self, k: usize) -> f64 {
        let Self::Cut { group, extra } = self else { return 0.0 };
        (0..k.div_ceil(group)).fold(0.0, |lost, _| lost + Self::of_group(group, extra, 1.0 + lost, 1.0 + lost))
    }
}

/// The largest relative error of many f32 sums of `k` products, in the Euclidean norm. Up to 1024 products roundings and cuts scatter;
/// beyond, what is cut off, always towards zero, adds up: half a unit of the sum so far for each group.
pub fn relative(k: usize) -> f64 {
    let share = k as f64 / 1024.0;
    2e-6 * share.max(share.sqrt())
}
