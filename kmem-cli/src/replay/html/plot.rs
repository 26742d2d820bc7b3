//! Plots: numbers over the page events, as SVG.
//!
//! # Concepts
//! A [`Plot`] is data: series over one x axis, marks and lines to draw across. Its SVG names no font file and
//! needs none; text is left to the browser. Colours of axes and text are ones the style sheet knows and
//! replaces where the reader prefers a dark page; those of series are legible on both.
//!
//! Beside the SVG goes what the page's script needs to tell the values under the pointer: where the plot
//! area lies in the picture, and the numbers themselves.

use plotters::{
    coord::{
        Shift,
        ranged1d::{AsRangedCoord, ValueFormatter},
    },
    prelude::*,
};
use serde_json::{Value, json};

/// Width of a plot in SVG units; the page scales it.
const WIDTH: u32 = 1040;
/// Height of a plot.
const HEIGHT: u32 = 330;
/// Axes and their text; see `style.css`.
const INK: RGBColor = RGBColor(0x5a, 0x64, 0x70);
/// Grid lines; see `style.css`.
const GRID: RGBColor = RGBColor(0xdd, 0xe1, 0xe6);
/// Marks of phases; see `style.css`.
const PHASE: RGBColor = RGBColor(0xa9, 0xb1, 0xbb);
/// What a logarithmic axis shows for 0.
const LOG_ZERO: f64 = 0.5;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// One series.
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its colour.
    pub colour: RGBColor,
    /// A value for each x.
    pub values: Vec<f64>,
}

/// How series are drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Lines.
    Lines,
    /// Lines on a logarithmic axis.
    LogLines,
    /// Areas, each on top of those before.
    Stacked,
}

/// One plot over the page events.
pub struct Plot {
    /// What the y axis counts, with its unit.
    pub unit: &'static str,
    /// How to draw the series.
    pub style: Style,
    /// The series.
    pub series: Vec<Series>,
    /// Single points of Linux's: position, value, colour.
    pub points: Vec<(f64, f64, RGBColor)>,
    /// Levels drawn across, with their names in the legend.
    pub levels: Vec<(f64, &'static str)>,
    /// Least and greatest y, where the values do not settle them.
    pub range: Option<(f64, f64)>,
}

/// The x axis that all plots share.
pub struct Axis {
    /// Position of each sample among the page events.
    pub x: Vec<f64>,
    /// Page events in all.
    pub events: f64,
    /// Number and position of each phase.
    pub phases: Vec<(u64, f64)>,
}

/// A drawn plot.
pub struct Drawn {
    /// The SVG element.
    pub svg: String,
    /// What the page's script needs.
    pub data: Value,
}

impl Plot {
    /// Draws the plot.
    pub fn draw(&self, axis: &Axis) -> anyhow::Result<Drawn> {
        let (least, most) = self.range.unwrap_or_else(|| (0.0, self.most()));
        let mut svg = String::new();
        let area = {
            let root = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
            let x = 0.0..axis.events.max(1.0);
            let area = if self.style == Style::LogLines {
                self.draw_on(&root, axis, x, (LOG_ZERO..most.max(10.0)).log_scale())?
            } else {
                self.draw_on(&root, axis, x, least..most)?
            };
            root.present()?;
            area
        };
        let series = self.series.iter().map(|s| {
            let values: Vec<Value> = s.values.iter().map(|v| json!(rounded(*v))).collect();
            json!({ "name": s.name, "colour": css(s.colour), "values": values })
        });
        let data = json!({
            "area": area, "events": axis.events, "unit": self.unit,
            "series": series.collect::<Vec<_>>(),
        });
        Ok(Drawn { svg: scalable(svg), data })
    }

    /// The highest value there is to show, with a little air.
    fn most(&self) -> f64 {
        let columns = self.series.iter().map(|s| s.values.len()).max().unwrap_or(0);
        let at =
            |i: usize| self.series.iter().map(move |s| s.values.get(i).copied().unwrap_or(0.0));
        let stacked = self.style == Style::Stacked;
        let columns = (0..columns)
            .map(|i| if stacked { at(i).sum::<f64>() } else { at(i).fold(0.0, f64::max) });
        let others = self.points.iter().map(|p| p.1).chain(self.levels.iter().map(|l| l.0));
        (columns.chain(others).fold(0.0, f64::max) * 1.05).max(1.0)
    }

    fn draw_on<Y>(
        &self,
        root: &Area<'_>,
        axis: &Axis,
        x: std::ops::Range<f64>,
        y: Y,
    ) -> anyhow::Result<[i32; 4]>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let mut chart = ChartBuilder::on(root)
            .margin_top(18)
            .margin_right(22)
            .margin_left(6)
            .margin_bottom(4)
            .x_label_area_size(46)
            .y_label_area_size(70)
            .build_cartesian_2d(x, y)?;
        let text = ("sans-serif", 14).into_font().color(&INK);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .max_light_lines(0)
            .bold_line_style(GRID)
            .axis_style(PHASE)
            .label_style(text.clone())
            .axis_desc_style(text.clone())
            .x_labels(9)
            .y_labels(6)
            .x_label_formatter(&|v| number(*v))
            .y_label_formatter(&|v| number(*v))
            .x_desc("page events of the recording so far")
            .y_desc(self.unit)
            .draw()?;
        let (xs, ys) = chart.plotting_area().get_pixel_range();
        let area = [xs.start, xs.end, ys.start, ys.end];

        let mut below = vec![0.0; axis.x.len()];
        for s in &self.series {
            let points = axis.x.iter().copied().zip(s.values.iter().copied());
            if self.style == Style::Stacked {
                let top: Vec<f64> = s.values.iter().zip(&below).map(|(v, b)| v + b).collect();
                let up = axis.x.iter().copied().zip(top.iter().copied());
                let down = axis.x.iter().copied().zip(below.iter().copied()).rev();
                let outline: Vec<(f64, f64)> = up.chain(down).collect();
                chart.draw_series(std::iter::once(Polygon::new(outline, s.colour.filled())))?;
                below = top;
            } else {
                let floor = if self.style == Style::LogLines { LOG_ZERO } else { f64::MIN };
                let points = points.map(|(x, y)| (x, y.max(floor)));
                chart.draw_series(LineSeries::new(points, s.colour.stroke_width(2)))?;
            }
        }
        for (level, _) in &self.levels {
            let line = [(0.0, *level), (axis.events, *level)];
            chart.draw_series(DashedLineSeries::new(line, 7, 5, INK.stroke_width(1)))?;
        }
        let mut free = 0;
        for (phase, at) in &axis.phases {
            let x = chart.backend_coord(&(*at, self.range.map_or(LOG_ZERO, |r| r.1))).0;
            let line = PathElement::new(vec![(x, ys.start), (x, ys.end)], PHASE.stroke_width(1));
            root.draw(&line)?;
            // Phases can be shorter than their numbers are wide.
            if x >= free {
                root.draw(&Text::new(phase.to_string(), (x - 4, 2), text.clone()))?;
                free = x + 20;
            }
        }
        let points = self.points.iter();
        chart.draw_series(points.clone().map(|p| Circle::new((p.0, p.1), 5, p.2.filled())))?;
        chart.draw_series(points.map(|p| Circle::new((p.0, p.1), 5, INK.stroke_width(2))))?;
        Ok(area)
    }
}

/// Bars of two series beside each other, one pair for each name.
pub fn bars(names: &[String], series: &[Series; 2], unit: &str) -> anyhow::Result<String> {
    let most = series.iter().flat_map(|s| &s.values).copied().fold(0.0, f64::max) * 1.1;
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, HEIGHT)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin_top(18)
            .margin_right(22)
            .margin_left(6)
            .margin_bottom(4)
            .x_label_area_size(46)
            .y_label_area_size(70)
            .build_cartesian_2d(-0.5..names.len() as f64 - 0.5, 0.0..most.max(1.0))?;
        let text = ("sans-serif", 14).into_font().color(&INK);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .max_light_lines(0)
            .bold_line_style(GRID)
            .axis_style(PHASE)
            .label_style(text.clone())
            .axis_desc_style(text.clone())
            .x_labels(0)
            .y_labels(6)
            .y_label_formatter(&|v| number(*v))
            .y_desc(unit)
            .draw()?;
        for (i, s) in series.iter().enumerate() {
            let left = if i == 0 { -0.38 } else { 0.02 };
            let bars = s.values.iter().enumerate().map(|(at, v)| {
                let x = at as f64 + left;
                Rectangle::new([(x, 0.0), (x + 0.36, *v)], s.colour.filled())
            });
            chart.draw_series(bars)?;
        }
        for (at, name) in names.iter().enumerate() {
            let (x, y) = chart.backend_coord(&(at as f64, 0.0));
            let half = name.len() as i32 * 7 / 2;
            root.draw(&Text::new(name.clone(), (x - half, y + 10), text.clone()))?;
        }
        root.present()?;
    }
    Ok(scalable(svg))
}

/// Colour of block order `order` of `orders`: small blocks warm, large ones cool.
pub fn order_colour(order: usize, orders: usize) -> RGBColor {
    const STOPS: [(f64, f64, f64); 5] = [
        (196.0, 57.0, 84.0),
        (236.0, 146.0, 55.0),
        (206.0, 188.0, 76.0),
        (70.0, 166.0, 130.0),
        (70.0, 110.0, 205.0),
    ];
    let at = order as f64 / (orders.max(2) - 1) as f64 * (STOPS.len() - 1) as f64;
    let (i, part) = ((at as usize).min(STOPS.len() - 2), at.fract());
    let part = if at as usize > i { 1.0 } else { part };
    let mix = |a: f64, b: f64| (a + (b - a) * part).round() as u8;
    let (a, b) = (STOPS[i], STOPS[i + 1]);
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

/// The colour as the style sheet writes it.
pub fn css(c: RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", c.0, c.1, c.2)
}

/// Lets the page decide how large the picture is.
fn scalable(svg: String) -> String {
    svg.replacen(&format!("width=\"{WIDTH}\" height=\"{HEIGHT}\" "), "role=\"img\" ", 1)
}

/// A number with its thousands shortened, as axes show it.
fn number(v: f64) -> String {
    let short = |v: f64, unit: &str| format!("{}{unit}", rounded(v));
    match v.abs() {
        a if a >= 1e6 => short(v / 1e6, " M"),
        a if a >= 1e4 => short(v / 1e3, " k"),
        _ => short(v, ""),
    }
}

/// Four decimals at most: what a plot can show.
fn rounded(v: f64) -> f64 {
    (v * 1e4).round() / 1e4
}
