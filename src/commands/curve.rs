//! The loss curve of a run, drawn from its `metrics.jsonl` as `loss.svg`, `loss.png` and `loss-dark.png` in the colours of the report. The
//! SVG turns dark where its reader's page is; a PNG has two pixels for each of the SVG's.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::report::{parse_metrics, shown, smooth};
use crate::error::{Context, Error, Result};
use crate::files::write_bytes;

/// Width and height of the SVG.
const SIZE: (u32, u32) = (1000, 600);
/// Pixels of the PNG for each of them.
const SCALE: u32 = 2;

/// The colours of a picture.
#[derive(Clone, Copy, Debug)]
struct Colours {
    paper: RGBColor,
    train: RGBColor,
    eval: RGBColor,
    grid: RGBColor,
    ink: RGBColor,
}

/// Those of the report's page.css: its cards, its first two lines, its grid and its small print.
const LIGHT: Colours = Colours {
    paper: RGBColor(0xff, 0xff, 0xff),
    train: RGBColor(0x25, 0x63, 0xeb),
    eval: RGBColor(0xd9, 0x66, 0x0a),
    grid: RGBColor(0xec, 0xef, 0xf2),
    ink: RGBColor(0x5c, 0x65, 0x70),
};
/// Those of its dark style.
const DARK: Colours = Colours {
    paper: RGBColor(0x17, 0x1b, 0x21),
    train: RGBColor(0x6e, 0xa4, 0xff),
    eval: RGBColor(0xff, 0xa0, 0x4d),
    grid: RGBColor(0x23, 0x29, 0x30),
    ink: RGBColor(0x9a, 0xa4, 0xb0),
};
/// The pictures of pixels, with their colours.
const PNGS: [(&str, Colours); 2] = [("loss.png", LIGHT), ("loss-dark.png", DARK)];

impl Colours {
    fn all(self) -> [RGBColor; 5] {
        [self.paper, self.train, self.eval, self.grid, self.ink]
    }
}

/// As plotters writes a colour in SVG.
fn name(colour: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", colour.0, colour.1, colour.2)
}

/// What the chart shows: points of (step, loss).
struct Curve {
    train: Vec<(f64, f64)>,
    eval: Vec<(f64, f64)>,
}

impl Curve {
    /// Reads `metrics.jsonl`; a last line that a crash cut off is left out.
    fn read(path: &Path) -> Result<Self> {
        let metrics = parse_metrics(&std::fs::read(path).context(|| path.display().to_string())?);
        let finite = |p: &(f64, f64)| p.1.is_finite();
        Ok(Self {
            train: metrics.steps.iter().map(|s| (s.step, s.loss)).filter(finite).collect(),
            eval: metrics.evals.iter().map(|e| (e.step, e.loss)).filter(finite).collect(),
        })
    }
}

/// Draws `dir/metrics.jsonl` into `dir/loss.svg`, `dir/loss.png` and `dir/loss-dark.png`; does nothing for a run of less than two points, or one that keeps
/// no metrics.
///
/// # Errors
/// If the metrics cannot be read or a picture cannot be written.
pub fn write(dir: &Path, title: &str) -> Result<bool> {
    let metrics = dir.join("metrics.jsonl");
    if !metrics.exists() {
        return Ok(false);
    }
    let curve = Curve::read(&metrics)?;
    if curve.train.len() < 2 {
        return Ok(false);
    }
    // The font is inside the program, so that a machine without fonts draws the same picture.
    register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| Error::new("the built-in font is not readable"))?;
    let mut svg = String::new();
    draw(SVGBackend::with_string(&mut svg, SIZE).into_drawing_area(), &curve, title, (LIGHT, 1))?;
    write_bytes(&dir.join("loss.svg"), with_dark_style(&svg).as_bytes())?;
    let size = (SIZE.0 * SCALE, SIZE.1 * SCALE);
    for (file, colours) in PNGS {
        let png = dir.join(file);
        let area = BitMapBackend::new(&png, size).into_drawing_area();
        draw(area, &curve, title, (colours, SCALE)).context(|| png.display().to_string())?;
    }
    Ok(true)
}

/// Adds the style by which a reader in a dark page sees other colours: rules of CSS go before the colours of elements.
fn with_dark_style(svg: &str) -> String {
    let rule = |(light, dark): (RGBColor, RGBColor)| {
        let (light, dark) = (name(light), name(dark));
        format!("[fill=\"{light}\"] {{ fill: {dark}; }} [stroke=\"{light}\"] {{ stroke: {dark}; }} ")
    };
    let rules: String = LIGHT.all().into_iter().zip(DARK.all()).map(rule).collect();
    let style = format!("<style>@media (prefers-color-scheme: dark) {{ {}}}</style>", rules);
    match svg.find("<svg").and_then(|at| svg[at..].find('>').map(|end| at + end + 1)) {
        Some(open) => format!("{}\n{style}{}", &svg[..open], &svg[open..]),
        None => svg.to_string(),
    }
}

fn draw<D: DrawingBackend>(
    area: DrawingArea<D, Shift>,
    curve: &Curve,
    title: &str,
    look: (Colours, u32),
) -> Result<()> {
    plot(area, curve, title, look).map_err(|e| Error::new(format!("cannot draw the loss curve: {e}")))
}

fn plot<D: DrawingBackend>(
    area: DrawingArea<D, Shift>,
    curve: &Curve,
    title: &str,
    (colours, scale): (Colours, u32),
) -> Result<(), DrawingAreaErrorKind<D::ErrorType>> {
    let Colours { paper, train, eval, grid, ink } = colours;
    let mean = smooth(&curve.train);
    let steps = || curve.train.iter().chain(&curve.eval).map(|p| p.0);
    let (first_step, last_step) = (steps().fold(f64::INFINITY, f64::min), steps().fold(1.0, f64::max));
    let ranges = || [&curve.train, &curve.eval].into_iter().filter_map(|line| shown(line.iter().map(|p| p.1)));
    let low = ranges().map(|r| r.start).fold(f64::INFINITY, f64::min);
    let high = ranges().map(|r| r.end).fold(f64::NEG_INFINITY, f64::max);
    let margin = 0.05 * (high - low).max(0.1);
    let (bottom, top) = ((low - margin).max(0.0), high + margin);
    // A value far beyond the others stands at the edge, with a mark.
    let inside =
        |line: &[(f64, f64)]| -> Vec<(f64, f64)> { line.iter().map(|p| (p.0, p.1.clamp(bottom, top))).collect() };
    let s = |n: u32| n * scale;
    let text = |size: u32| ("sans-serif", s(size)).into_font().color(&ink);

    area.fill(&paper)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, text(24))
        .margin(s(16))
        .margin_right(s(28))
        .x_label_area_size(s(52))
        .y_label_area_size(s(72))
        .build_cartesian_2d(first_step..last_step, bottom..top)?;
    chart
        .configure_mesh()
        .light_line_style(paper)
        .bold_line_style(grid.stroke_width(scale))
        .axis_style(ink.stroke_width(scale))
        .label_style(text(16))
        .axis_desc_style(text(18))
        .x_desc("optimiser step")
        .y_desc("loss (nats per token)")
        // Between whole steps nothing is written.
        .x_label_formatter(&|x| if x.fract() == 0.0 { format!("{x:.0}") } else { String::new() })
        .y_label_formatter(&|y| format!("{y:.2}"))
        .draw()?;
    chart.draw_series(LineSeries::new(inside(&curve.train), train.mix(0.3).stroke_width(scale)))?;
    let bold = |colour: RGBColor| colour.stroke_width(s(2));
    let key =
        move |colour: RGBColor| move |(x, y)| PathElement::new([(x, y), (x + 24 * scale as i32, y)], bold(colour));
    chart.draw_series(LineSeries::new(inside(&mean), bold(train)))?.label("training, mean").legend(key(train));
    if !curve.eval.is_empty() {
        let points = inside(&curve.eval);
        chart.draw_series(LineSeries::new(points.clone(), bold(eval)))?.label("validation").legend(key(eval));
        chart.draw_series(points.iter().map(|&p| Circle::new(p, s(4), eval.filled())))?;
    }
    for (line, colour) in [(&curve.train, train), (&curve.eval, eval)] {
        let beyond = line.iter().filter(|p| p.1 > top || p.1 < bottom);
        chart.draw_series(beyond.map(|p| TriangleMarker::new((p.0, p.1.clamp(bottom, top)), s(6), colour.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(s(12))
        .legend_area_size(s(36))
        .background_style(paper)
        .border_style(grid.stroke_width(scale))
        .label_font(text(16))
        .draw()?;
    area.present()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_last_line_is_left_out_and_both_pictures_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut lines = String::new();
        for step in 1..=40 {
            lines += &format!("{{\"step\": {step}, \"loss\": {}}}\n", 2.0 + 3.0 / f64::from(step));
        }
        lines += "{\"step\": 40, \"eval_loss\": 2.25}\n{\"step\": 41, \"lo";
        std::fs::write(dir.path().join("metrics.jsonl"), lines).unwrap();
        let curve = Curve::read(&dir.path().join("metrics.jsonl")).unwrap();
        assert_eq!((curve.train.len(), curve.eval.as_slice()), (40, [(40.0, 2.25)].as_slice()));
        assert!(write(dir.path(), "a run").unwrap());
        let svg = std::fs::read_to_string(dir.path().join("loss.svg")).unwrap();
        assert!(svg.contains("validation") && svg.contains("optimiser step"));
        assert!(svg.contains("[stroke=\"#2563EB\"] { stroke: #6EA4FF; }"), "no dark style");
        for colour in LIGHT.all() {
            assert!(
                svg.split("</style>").nth(1).unwrap().contains(&format!("\"{}\"", name(colour))),
                "nothing is {colour:?}"
            );
        }
        for (file, colours) in PNGS {
            let png = std::fs::read(dir.path().join(file)).unwrap();
            let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
            assert_eq!((&png[1..4], number(16), number(20)), (&b"PNG"[..], 2000, 1200), "{file}");
            assert_eq!(corner(&png), colours.paper, "{file}");
        }
    }

    /// The first pixel of a PNG of eight bits and three colours, whose first line is filtered by nothing, by its left or by what is above: of
    /// the first pixel these are all zero.
    fn corner(png: &[u8]) -> RGBColor {
        use std::io::Read;
        let data = png.windows(4).position(|w| w == b"IDAT").unwrap() + 4;
        let mut line = [0; 4];
        flate2::read::ZlibDecoder::new(&png[data..]).read_exact(&mut line).unwrap();
        RGBColor(line[1], line[2], line[3])
    }

    /// The colours are those of the report's style sheet.
    #[test]
    fn the_colours_are_those_of_the_report() {
        let css = include_str!("report/page.css");
        let (light, dark) = css.split_once("prefers-color-scheme: dark").unwrap();
        for (style, colours) in [(light, LIGHT), (dark, DARK)] {
            let value = |name: &str| {
                let text = style.split(&format!("{name}: #")).nth(1).unwrap().split(';').next().unwrap().to_string();
                if text.len() == 3 { text.chars().flat_map(|c| [c, c]).collect() } else { text }
            };
            let of_page =
                ["--card", "--c0", "--c1", "--grid", "--soft"].map(|n| format!("#{}", value(n).to_uppercase()));
            assert_eq!(of_page, colours.all().map(name));
        }
    }

    #[test]
    fn the_mean_starts_at_the_first_loss() {
        let train: Vec<_> = (0..40).map(|i| (f64::from(i), 5.0)).collect();
        assert!(smooth(&train).iter().all(|p| (p.1 - 5.0).abs() < 1e-12));
    }
}
