//! A plot with both axes logarithmic, a table, and the exponent that fits.

use std::path::Path;

use anyhow::{Context, anyhow};
use plotters::prelude::*;

use crate::compare::short;

const SIZE: (u32, u32) = (760, 460);

const COLOURS: [RGBColor; 5] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(140, 86, 75),
];

/// One question: figures at some points.
pub(super) struct Growth {
    pub(super) title: String,
    /// What grows.
    by: &'static str,
    points: Vec<f64>,
    series: Vec<Series>,
}

/// One figure at every point.
pub(super) struct Series {
    what: &'static str,
    unit: &'static str,
    pub(super) figures: Vec<f64>,
}

impl Series {
    pub(super) fn new(what: &'static str, unit: &'static str) -> Self {
        Self { what, unit, figures: Vec::new() }
    }

    fn name(&self) -> String {
        if self.unit.is_empty() {
            self.what.into()
        } else {
            format!("{} ({})", self.what, self.unit)
        }
    }
}

impl Growth {
    pub(super) fn new(
        title: impl Into<String>,
        by: &'static str,
        points: Vec<usize>,
        series: impl Into<Vec<Series>>,
    ) -> Self {
        let points = points.into_iter().map(|point| point as f64).collect();
        Self { title: title.into(), by, points, series: series.into() }
    }

    /// What a logarithm can show of a series.
    fn shown<'a>(&'a self, series: &'a Series) -> impl Iterator<Item = (f64, f64)> + Clone + 'a {
        let pairs = self.points.iter().copied().zip(series.figures.iter().copied());
        pairs.filter(|(x, y)| *x > 0.0 && *y > 0.0)
    }

    /// A line of the legend and of the table's head.
    fn legend(&self, series: &Series) -> String {
        let fitted = exponent(self.shown(series)).map(|it| format!(", grows as ^{it:.2}"));
        format!("{}{}", series.name(), fitted.unwrap_or_default())
    }

    /// Markdown: a row for each point, with the exponents below.
    pub(super) fn table(&self) -> String {
        let row = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
        let with = |first: &str, cell: &dyn Fn(&Series) -> String| {
            let cells = self.series.iter().map(cell);
            row(std::iter::once(first.to_owned()).chain(cells).collect())
        };
        let mut table =
            with(self.by, &Series::name) + &"|---".repeat(self.series.len() + 1) + "|\n";
        for (at, point) in self.points.iter().enumerate() {
            table += &with(&format!("{point}"), &|series| {
                series.figures.get(at).map(|figure| short(*figure)).unwrap_or_default()
            });
        }
        let fitted = |series: &Series| exponent(self.shown(series)).map(|it| format!("{it:.2}"));
        table + &with("exponent", &|series| fitted(series).unwrap_or_default())
    }

    pub(super) fn draw(&self, file: &Path) -> anyhow::Result<()> {
        self.try_draw(file).map_err(|error| anyhow!("cannot draw {}: {error}", file.display()))
    }

    fn try_draw(&self, file: &Path) -> anyhow::Result<()> {
        let shown = self.series.iter().flat_map(|series| self.shown(series));
        let range = |of: fn((f64, f64)) -> f64| -> anyhow::Result<_> {
            let values = shown.clone().map(of);
            let least = values.clone().reduce(f64::min).context("nothing to show")?;
            let most = values.reduce(f64::max).context("nothing to show")?;
            Ok((least / 1.5, most * 1.5))
        };
        let ((left, right), (low, high)) = (range(|(x, _)| x)?, range(|(_, y)| y)?);
        // The upper part is the legend's.
        let high = high * (high / low).powf(0.4);
        let area = SVGBackend::new(file, SIZE).into_drawing_area();
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(&self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(70)
            .build_cartesian_2d((left..right).log_scale(), (low..high).log_scale())?;
        let format = |figure: &f64| match *figure {
            figure if figure < 1.0 => short(figure),
            figure => format!("{figure:.0}"),
        };
        chart
            .configure_mesh()
            .x_desc(self.by)
            .y_desc("units as named")
            .x_label_formatter(&format)
            .y_label_formatter(&format)
            .light_line_style(WHITE)
            .draw()?;
        for (series, colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            chart
                .draw_series(
                    LineSeries::new(self.shown(series), colour.stroke_width(2)).point_size(3),
                )?
                .label(self.legend(series))
                .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        Ok(area.present()?)
    }
}

/// The exponent of the power that fits best: least squares between logarithms. `None` of fewer than two
/// points.
fn exponent(points: impl Iterator<Item = (f64, f64)> + Clone) -> Option<f64> {
    let logs = points.map(|(x, y)| (x.ln(), y.ln()));
    let count = logs.clone().count() as f64;
    let sum = |of: fn((f64, f64)) -> f64| logs.clone().map(of).sum::<f64>();
    let (x, y, xx, xy) =
        (sum(|(x, _)| x), sum(|(_, y)| y), sum(|(x, _)| x * x), sum(|(x, y)| x * y));
    let below = count * xx - x * x;
    (count >= 2.0 && below > 0.0).then(|| (count * xy - x * y) / below)
}

#[cfg(test)]
mod tests {
    use super::{Growth, Series, exponent};

    #[test]
    fn exponents_are_found() {
        let of = |power: f64| {
            let points = [1.0_f64, 10.0, 1000.0].map(|x| (x, 7.0 * x.powf(power)));
            exponent(points.into_iter()).unwrap()
        };
        for power in [0.0, 0.5, 1.0, 2.0] {
            assert!((of(power) - power).abs() < 1e-9, "{power}");
        }
        assert_eq!(exponent([(1.0, 1.0)].into_iter()), None);
    }

    #[test]
    fn a_table_has_what_a_logarithm_has_not() {
        let mut series = Series::new("time", "ms");
        series.figures = vec![3.0, 1.0, 10.0];
        let growth = Growth::new("It grows", "keys", vec![0, 1, 10], [series]);
        let table = growth.table();
        assert!(
            table.contains("| 0 | 3.000 |") && table.ends_with("| exponent | 1.00 |\n"),
            "{table}"
        );
    }
}
