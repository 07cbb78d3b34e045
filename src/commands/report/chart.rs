//! Line charts as SVG: axes with round ticks, a faint line of every value and a bold one of their mean, markers. A value far beyond the
//! others is cut at the edge of the frame and marked there.

use std::fmt::Write;

use super::points::{shown, smooth, thin};

const RIGHT: f64 = 14.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 28.0;
/// Marks of values beyond the frame that a line gets.
const MARKS: usize = 40;
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
    /// Which of the [`COLOURS`] it has.
    pub colour: usize,
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
    /// Width left of the frame, for the labels.
    pub left: f64,
    /// The lines.
    pub lines: Vec<Line>,
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

/// What stands at the ticks: all of them with the decimals that tell them apart.
fn labels(ticks: &[f64]) -> Vec<String> {
    let most = ticks.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
    let step = ticks.windows(2).map(|w| w[1] - w[0]).fold(f64::INFINITY, f64::min);
    let (unit, name) = match most {
        m if m < 1e4 => (1.0, ""),
        m if m < 1e6 => (1e3, "k"),
        m if m < 1e9 => (1e6, "M"),
        _ => (1e9, "G"),
    };
    let is_whole = |d: i32| {
        let scaled = step / unit * 10f64.powi(d);
        (scaled - scaled.round()).abs() < 1e-6 * scaled
    };
    match (0..=4).find(|&d| is_whole(d)).filter(|_| most < 1e13) {
        Some(d) => ticks
            .iter()
            .map(|&v| if v == 0.0 { "0".into() } else { format!("{:.*}{name}", d as usize, v / unit) })
            .collect(),
        None => ticks.iter().map(|&v| number(v)).collect(),
    }
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

/// The frame of a chart, and the values at its edges.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
    left: f64,
    right: f64,
    floor: f64,
}

impl Frame {
    /// Where a value stands; one beyond the frame at its edge.
    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let across = self.left + (x - self.x.0) / (self.x.1 - self.x.0) * (self.right - self.left);
        let up = ((y - self.y.0) / (self.y.1 - self.y.0)).clamp(0.0, 1.0);
        (across, self.floor - up * (self.floor - TOP))
    }

    fn path(&self, points: &[(f64, f64)]) -> String {
        let mut d = String::new();
        for (i, &p) in points.iter().enumerate() {
            let (x, y) = self.place(p);
            let _ = write!(d, "{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' });
        }
        d
    }

    fn is_beyond(&self, y: f64) -> bool {
        y < self.y.0 || y > self.y.1
    }
}

impl Chart<'_> {
    /// Points that count for anything.
    fn finite(&self) -> impl Iterator<Item = &(f64, f64)> {
        self.lines.iter().flat_map(|l| &l.points).filter(|p| p.0.is_finite() && p.1.is_finite())
    }

    /// Whether no line has more than a point: then numbers say more than a frame.
    pub fn is_of_single_points(&self) -> bool {
        self.lines.iter().all(|l| l.points.iter().filter(|p| p.0.is_finite() && p.1.is_finite()).count() <= 1)
    }

    fn frame(&self) -> Option<Frame> {
        let of = |pick: fn(f64, f64) -> f64, start| self.finite().map(|p| p.0).fold(start, pick);
        let (x0, x1) = (of(f64::min, f64::INFINITY), of(f64::max, f64::NEG_INFINITY));
        // Each line for itself: the few points of a validation are no outliers of the training.
        let ranges =
            || self.lines.iter().filter_map(|l| shown(l.points.iter().filter(|p| p.0.is_finite()).map(|p| p.1)));
        let y0 = ranges().map(|r| r.start).fold(f64::INFINITY, f64::min);
        let y1 = ranges().map(|r| r.end).fold(f64::NEG_INFINITY, f64::max);
        if !(x0 <= x1 && y0 <= y1) {
            return None;
        }
        // A flat line stands in the middle; others get a little air.
        let margin = if y1 > y0 { 0.06 * (y1 - y0) } else { 0.5 * y1.abs().max(1e-9) };
        let bottom = if y0 >= 0.0 { (y0 - margin).max(0.0) } else { y0 - margin };
        let (width, height) = self.size;
        Some(Frame {
            x: (x0, if x1 > x0 { x1 } else { x0 + 1.0 }),
            y: (bottom, y1 + margin),
            left: self.left,
            right: width - RIGHT,
            floor: height - BOTTOM,
        })
    }

    /// What of the lines lies beyond the frame, in words; empty where nothing does.
    pub fn beyond(&self) -> String {
        let Some(frame) = self.frame() else { return String::new() };
        let out: Vec<&(f64, f64)> = self.finite().filter(|p| frame.is_beyond(p.1)).collect();
        let far = |p: &(f64, f64)| (p.1 - frame.y.1).max(frame.y.0 - p.1);
        let Some(worst) = out.iter().max_by(|a, b| far(a).total_cmp(&far(b))) else { return String::new() };
        let at = format!("{} at {} {}", number(worst.1), self.x, number(worst.0));
        match out.len() {
            1 => format!("beyond the frame, marked at its edge: {at}"),
            n => format!("{n} values beyond the frame, marked at its edge; the farthest: {at}"),
        }
    }

    /// The chart as SVG; empty where there is nothing to draw.
    pub fn svg(&self) -> String {
        let Some(frame) = self.frame() else { return String::new() };
        let ((x0, x1), (bottom, top), (left, right), floor) =
            (frame.x, frame.y, (frame.left, frame.right), frame.floor);
        let (width, height) = self.size;
        let mut out = format!(
            "<svg class=\"chart\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{} by {}\" data-key=\"{}\" \
             data-x=\"{}\" data-values=\"{x0},{x1},{bottom},{top}\" data-frame=\"{left},{right},{TOP},{floor}\">",
            self.title, self.x, self.key, self.x
        );
        let (across_ticks, up_ticks) = (ticks(x0, x1), ticks(bottom, top));
        for (&y, label) in up_ticks.iter().zip(labels(&up_ticks)) {
            let (_, down) = frame.place((x0, y));
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{left}\" x2=\"{right}\" y1=\"{down:.1}\" y2=\"{down:.1}\"/>\
                 <text class=\"tick\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                left - 8.0,
                down + 4.0,
                label
            );
        }
        let _ = write!(out, "<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{floor}\" y2=\"{floor}\"/>");
        for (&x, label) in across_ticks.iter().zip(labels(&across_ticks)) {
            let (across, _) = frame.place((x, bottom));
            // A label at the very edge would stand out of the picture.
            let anchor = if across > right - 10.0 { "end" } else { "middle" };
            let across = if anchor == "end" { width - 2.0 } else { across };
            let _ = write!(
                out,
                "<text class=\"tick\" x=\"{across:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{}</text>",
                floor + 18.0,
                label
            );
        }
        for line in &self.lines {
            self.draw(&mut out, line, &frame);
        }
        out += "</svg>";
        out
    }

    fn draw(&self, out: &mut String, line: &Line, frame: &Frame) {
        let _ = write!(out, "<g class=\"r{} c{}\">", line.run, line.colour);
        // A point for each pixel across is as many as a screen shows.
        let most = (frame.right - frame.left) as usize;
        let drawn = thin(&line.points, most.min(500));
        match line.kind {
            Kind::Noisy => {
                let _ = write!(out, "<path class=\"raw\" d=\"{}\"/>", frame.path(&drawn));
                let mean = thin(&smooth(&line.points), most.min(500));
                let _ = write!(out, "<path class=\"mean\" d=\"{}\"/>", frame.path(&mean));
            }
            Kind::Plain => {
                let _ = write!(out, "<path class=\"plain\" d=\"{}\"/>", frame.path(&drawn));
            }
            Kind::Marked => {
                let _ = write!(out, "<path class=\"dashed\" d=\"{}\"/>", frame.path(&drawn));
                for &p in &drawn {
                    let (x, y) = frame.place(p);
                    let _ = write!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"/>");
                }
            }
        }
        // A single step is a point.
        if line.kind != Kind::Marked && drawn.len() == 1 {
            let (x, y) = frame.place(drawn[0]);
            let _ = write!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>");
        }
        for &p in drawn.iter().filter(|p| frame.is_beyond(p.1)).take(MARKS) {
            let (x, y) = frame.place(p);
            let away = if p.1 > frame.y.1 { 7.0 } else { -7.0 };
            let _ = write!(
                out,
                "<path class=\"beyond\" d=\"M{:.1} {:.1}L{x:.1} {:.1}L{:.1} {:.1}Z\"><title>{} at {} {}</title></path>",
                x - 5.0,
                y + away,
                y - away.signum(),
                x + 5.0,
                y + away,
                number(p.1),
                self.x,
                number(p.0)
            );
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

    fn chart(points: Vec<(f64, f64)>) -> Chart<'static> {
        let lines = vec![Line { run: 0, colour: 0, kind: Kind::Noisy, points }];
        Chart { key: "loss", title: "Loss", x: "step", size: (640.0, 280.0), left: 62.0, lines }
    }

    #[test]
    fn a_spike_flattens_nothing_and_is_marked() {
        let usual = |i: u32| (f64::from(i), 2.0 + 1.0 / (1.0 + f64::from(i) / 20.0));
        let mut points: Vec<(f64, f64)> = (0..300).map(usual).collect();
        let (before, quiet) = (chart(points.clone()), 3.06);
        assert!(!before.svg().contains("beyond") && before.beyond().is_empty());
        points[200].1 = 480.0;
        let spiked = chart(points);
        let svg = spiked.svg();
        let top: f64 = svg.split("data-values=\"").nth(1).unwrap().split([',', '"']).nth(3).unwrap().parse().unwrap();
        assert!((top - quiet).abs() < 0.01, "the frame ends at {top}");
        assert_eq!(svg.matches("class=\"beyond\"").count(), 1);
        assert!(svg.contains("<title>480 at step 200</title>"));
        assert_eq!(spiked.beyond(), "beyond the frame, marked at its edge: 480 at step 200");
    }

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
    fn labels_of_ticks_differ() {
        assert_eq!(labels(&[80_950.0, 81_000.0, 81_050.0]), ["80.95k", "81.00k", "81.05k"]);
        assert_eq!(labels(&[0.0, 0.25, 0.5]), ["0", "0.25", "0.50"]);
        assert_eq!(labels(&[0.0, 50.0, 100.0]), ["0", "50", "100"]);
        assert_eq!(labels(&[0.0, 5e-5, 1e-4]), ["0", "5e-5", "1e-4"]);
        assert_eq!(labels(&[2e6, 4e6]), ["2M", "4M"]);
        assert_eq!(labels(&[7.0]), ["7"]);
    }

    #[test]
    fn nothing_finite_draws_nothing() {
        assert_eq!(chart(vec![]).svg(), "");
        assert_eq!(chart(vec![(1.0, f64::NAN)]).svg(), "");
        let one = chart(vec![(1.0, 2.0)]).svg();
        assert!(one.contains("<circle") && !one.contains("NaN"), "{one}");
        let extreme = chart(vec![(0.0, -1e300), (1e18, 1e300)]).svg();
        assert!(!extreme.contains("NaN") && !extreme.contains("inf"), "{extreme}");
    }
}
