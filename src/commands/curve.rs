//! The loss curve of a run, drawn from its `metrics.jsonl` as `loss.svg` and `loss.png`.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use super::report::{parse_metrics, smooth};
use crate::error::{Context, Error, Result};

const SIZE: (u32, u32) = (1000, 600);
const TRAIN: RGBColor = RGBColor(31, 95, 160);
const EVAL: RGBColor = RGBColor(200, 80, 20);
const GRID: RGBColor = RGBColor(225, 225, 225);
const INK: RGBColor = RGBColor(60, 60, 60);

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

/// Draws `dir/metrics.jsonl` into `dir/loss.svg` and `dir/loss.png`; does nothing for a run of less than two points.
///
/// # Errors
/// If the metrics cannot be read or a picture cannot be written.
pub fn write(dir: &Path, title: &str) -> Result<bool> {
    let curve = Curve::read(&dir.join("metrics.jsonl"))?;
    if curve.train.len() < 2 {
        return Ok(false);
    }
    // The font is inside the program, so that a machine without fonts draws the same picture.
    register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_| Error::new("the built-in font is not readable"))?;
    let svg = dir.join("loss.svg");
    draw(SVGBackend::new(&svg, SIZE).into_drawing_area(), &curve, title).context(|| svg.display().to_string())?;
    let png = dir.join("loss.png");
    draw(BitMapBackend::new(&png, SIZE).into_drawing_area(), &curve, title).context(|| png.display().to_string())?;
    Ok(true)
}

fn draw<D: DrawingBackend>(area: DrawingArea<D, Shift>, curve: &Curve, title: &str) -> Result<()> {
    plot(area, curve, title).map_err(|e| Error::new(format!("cannot draw the loss curve: {e}")))
}

fn plot<D: DrawingBackend>(
    area: DrawingArea<D, Shift>,
    curve: &Curve,
    title: &str,
) -> Result<(), DrawingAreaErrorKind<D::ErrorType>> {
    let mean = smooth(&curve.train);
    let last_step = curve.train.iter().chain(&curve.eval).map(|p| p.0).fold(1.0, f64::max);
    let first_step = curve.train.iter().chain(&curve.eval).map(|p| p.0).fold(last_step, f64::min);
    let losses = || curve.train.iter().chain(&curve.eval).map(|p| p.1);
    let (low, high) = (losses().fold(f64::INFINITY, f64::min), losses().fold(0.0, f64::max));
    let margin = 0.05 * (high - low).max(0.1);
    let text = |size: u32| ("sans-serif", size).into_font().color(&INK);

    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, text(24))
        .margin(16)
        .margin_right(28)
        .x_label_area_size(52)
        .y_label_area_size(72)
        .build_cartesian_2d(first_step..last_step, (low - margin).max(0.0)..high + margin)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(GRID)
        .axis_style(INK)
        .label_style(text(16))
        .axis_desc_style(text(18))
        .x_desc("optimiser step")
        .y_desc("loss (nats per token)")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.2}"))
        .draw()?;
    chart.draw_series(LineSeries::new(curve.train.iter().copied(), TRAIN.mix(0.25)))?;
    chart
        .draw_series(LineSeries::new(mean, TRAIN.stroke_width(2)))?
        .label("training, smoothed")
        .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], TRAIN.stroke_width(2)));
    if !curve.eval.is_empty() {
        chart
            .draw_series(LineSeries::new(curve.eval.iter().copied(), EVAL.stroke_width(2)))?
            .label("validation")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 24, y)], EVAL.stroke_width(2)));
        chart.draw_series(curve.eval.iter().map(|&p| Circle::new(p, 4, EVAL.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(12)
        .legend_area_size(36)
        .background_style(WHITE.mix(0.85))
        .border_style(GRID)
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
        assert_eq!(&std::fs::read(dir.path().join("loss.png")).unwrap()[1..4], b"PNG");
    }

    #[test]
    fn the_mean_starts_at_the_first_loss() {
        let train: Vec<_> = (0..40).map(|i| (f64::from(i), 5.0)).collect();
        assert!(smooth(&train).iter().all(|p| (p.1 - 5.0).abs() < 1e-12));
    }
}
