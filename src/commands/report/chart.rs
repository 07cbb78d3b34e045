//! Line charts as SVG: axes with round ticks, a faint line of every value and a bold one of their running mean, markers.

use std::fmt::Write;

/// Points drawn for a line; a screen shows no more.
const POINTS: usize = 500;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 36.0;
/// Colours of lines in the style sheet; later runs take them again.
pub const COLOURS: usize = 8;

/// How a line is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Every value, faint; with a running mean over it.
    Noisy,
    /// Every value.
    Plain,
    /// Values joined by a dashed line, with a marker each.
    Marked,
}

/// A line of a run.
#[derive(Clone, Debug)]
pub struct Line {
    /// Which run it belongs to.
    pub run: usize,
    /// How it is drawn.
    pub kind: Kind,
    /// `(x, y)`; points that are not finite are left out.
    pub points: Vec<(f64, f64)>,
}

/// What a chart shows.
#[derive(Clone, Debug)]
pub struct Chart<'a> {
    /// Name of the figure, in the page's data and in the description.
    pub key: &'a str,
    /// What is plotted.
    pub title: &'a str,
    /// What is across: `step` or `tokens`.
    pub x: &'a str,
    /// Width and height.
    pub size: (f64, f64),
    /// The lines.
    pub lines: Vec<Line>,
}

/// The running mean of a noisy line: exponential, unbiased at the start, over a twentieth of the line.
pub fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 20.0).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let finite = points.iter().filter(|p| p.0.is_finite() && p.1.is_finite());
    finite
        .map(|&(x, y)| {
            sum = keep * sum + y;
            weight = keep * weight + 1.0;
            (x, sum / weight)
        })
        .collect()
}

/// At most about `n` points with the same outline: the lowest and highest of each stretch.
pub fn thin(points: &[(f64, f64)], n: usize) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> = points.iter().copied().filter(|p| p.0.is_finite() && p.1.is_finite()).collect();
    if finite.len() <= n {
        return finite;
    }
    let stretch = finite.len().div_ceil(n / 2);
    let mut out = Vec::new();
    for part in finite.chunks(stretch) {
        let low = (0..part.len()).min_by(|&a, &b| part[a].1.total_cmp(&part[b].1)).unwrap_or(0);
        let high = (0..part.len()).max_by(|&a, &b| part[a].1.total_cmp(&part[b].1)).unwrap_or(0);
        out.push(part[low.min(high)]);
        if low != high {
            out.push(part[low.max(high)]);
        }
    }
    out
}

/// Round numbers from about `low` to about `high`, some six of them.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let span = high - low;
    if !(span > 0.0 && span.is_finite()) {
        return vec![low];
    }
    let rough = span / 6.0;
    let unit = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|m| m * unit).find(|&s| s >= rough).unwrap_or(unit);
    let first = (low / step).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last.min(first + 20)).map(|i| i as f64 * step).collect()
}

/// A number as short as it is clear: `0.0002`, `1.5e-5`, `2.31`, `12,000`, `1.2M`.
pub fn number(v: f64) -> String {
    if !v.is_finite() {
        return "–".into();
    }
    let a = v.abs();
    let trim = |s: String| {
        if s.contains('.') { s.trim_end_matches('0').trim_end_matches('.').to_string() } else { s }
    };
    match a {
        0.0 => "0".into(),
        a if a < 1e-3 => {
            let text = format!("{v:.2e}");
            let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            format!("{}e{exponent}", trim(mantissa.into()))
        }
        a if a < 1.0 => trim(format!("{v:.4}")),
        a if a < 100.0 => trim(format!("{v:.3}")),
        a if a < 1e4 => trim(format!("{v:.1}")),
        a if a < 1e6 => format!("{}k", trim(format!("{:.1}", v / 1e3))),
        a if a < 1e9 => format!("{}M", trim(format!("{:.2}", v / 1e6))),
        a if a < 1e12 => format!("{}G", trim(format!("{:.2}", v / 1e9))),
        _ => format!("{v:.2e}"),
    }
}

impl Chart<'_> {
    /// The chart as SVG; empty where there is nothing to draw.
    pub fn svg(&self) -> String {
        let all = || self.lines.iter().flat_map(|l| &l.points).filter(|p| p.0.is_finite() && p.1.is_finite());
        let range = |of: fn(&(f64, f64)) -> f64| {
            let values = || all().map(of);
            (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max))
        };
        let ((x0, x1), (y0, y1)) = (range(|p| p.0), range(|p| p.1));
        if !(x0 <= x1 && y0 <= y1) {
            return String::new();
        }
        let x1 = if x1 > x0 { x1 } else { x0 + 1.0 };
        // A flat line stands in the middle; others get a little air.
        let margin = if y1 > y0 { 0.06 * (y1 - y0) } else { 0.5 * y1.abs().max(1e-9) };
        let bottom = if y0 >= 0.0 { (y0 - margin).max(0.0) } else { y0 - margin };
        let top = y1 + margin;
        let (width, height) = self.size;
        let place = |(x, y): (f64, f64)| {
            let across = LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT);
            let down = height - BOTTOM - (y - bottom) / (top - bottom) * (height - TOP - BOTTOM);
            (across, down)
        };
        let mut out = format!(
            "<svg class=\"chart\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{} by {}\" data-key=\"{}\" \
             data-x=\"{}\" data-box=\"{x0},{x1},{bottom},{top}\">",
            self.title, self.x, self.key, self.x
        );
        for y in ticks(bottom, top) {
            let (_, down) = place((x0, y));
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{down:.1}\" y2=\"{down:.1}\"/>\
                 <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                width - RIGHT,
                LEFT - 8.0,
                down + 4.0,
                number(y)
            );
        }
        let floor = height - BOTTOM;
        let _ =
            write!(out, "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{floor}\" y2=\"{floor}\"/>", width - RIGHT);
        for x in ticks(x0, x1) {
            let (across, _) = place((x, bottom));
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{across:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                floor + 18.0,
                number(x)
            );
        }
        for line in &self.lines {
            self.draw(&mut out, line, &place);
        }
        out += "</svg>";
        out
    }

    fn draw(&self, out: &mut String, line: &Line, place: &dyn Fn((f64, f64)) -> (f64, f64)) {
        let _ = write!(out, "<g class=\"r{} c{}\">", line.run, line.run % COLOURS);
        let path = |points: &[(f64, f64)]| {
            let mut d = String::new();
            for (i, &p) in points.iter().enumerate() {
                let (x, y) = place(p);
                let _ = write!(d, "{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' });
            }
            d
        };
        let shown = thin(&line.points, POINTS);
        match line.kind {
            Kind::Noisy => {
                let _ = write!(out, "<path class=\"raw\" d=\"{}\"/>", path(&shown));
                let mean = thin(&smooth(&line.points), POINTS);
                let _ = write!(out, "<path class=\"mean\" d=\"{}\"/>", path(&mean));
            }
            Kind::Plain => {
                let _ = write!(out, "<path class=\"plain\" d=\"{}\"/>", path(&shown));
            }
            Kind::Marked => {
                let _ = write!(out, "<path class=\"dashed\" d=\"{}\"/>", path(&shown));
                for &p in &shown {
                    let (x, y) = place(p);
                    let _ = write!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"/>");
                }
            }
        }
        // A single step is a point.
        if line.kind != Kind::Marked && shown.len() == 1 {
            let (x, y) = place(shown[0]);
            let _ = write!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
        }
        *out += "</g>";
    }
}

/// A loss: four decimals.
pub fn fixed(v: f64) -> String {
    if v.is_finite() { format!("{v:.4}") } else { "–".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let check = |v: f64, expected: &str| assert_eq!(number(v), expected);
        check(0.0, "0");
        check(2e-4, "2e-4");
        check(1.5e-5, "1.5e-5");
        check(0.25, "0.25");
        check(2.5, "2.5");
        check(1024.0, "1024");
        check(12_000.0, "12k");
        check(1_234_567.0, "1.23M");
        check(f64::NAN, "–");
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(5.0, 5.0), [5.0]);
        assert!(ticks(0.0, f64::INFINITY).len() == 1);
        let t = ticks(1.93, 7.21);
        assert!(t.len() >= 3 && t[0] >= 1.93 && t[t.len() - 1] <= 7.22);
    }

    #[test]
    fn thinning_keeps_the_outline() {
        let points: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i), f64::from(i % 100))).collect();
        let thinned = thin(&points, 500);
        assert!(thinned.len() <= 502 && thinned.len() > 200);
        assert!(thinned.iter().any(|p| p.1 == 99.0) && thinned.iter().any(|p| p.1 == 0.0));
        assert!(thinned.windows(2).all(|w| w[0].0 < w[1].0));
        assert_eq!(thin(&[(1.0, f64::NAN), (2.0, 1.0)], 500), [(2.0, 1.0)]);
    }

    #[test]
    fn nothing_finite_draws_nothing() {
        let chart = |points: Vec<(f64, f64)>| Chart {
            key: "loss",
            title: "Loss",
            x: "step",
            size: (640.0, 280.0),
            lines: vec![Line { run: 0, kind: Kind::Noisy, points }],
        };
        assert_eq!(chart(vec![]).svg(), "");
        assert_eq!(chart(vec![(1.0, f64::NAN)]).svg(), "");
        let one = chart(vec![(1.0, 2.0)]).svg();
        assert!(one.contains("<circle") && !one.contains("NaN"), "{one}");
        let extreme = chart(vec![(0.0, -1e300), (1e18, 1e300)]).svg();
        assert!(!extreme.contains("NaN") && !extreme.contains("inf"), "{extreme}");
    }
}
