//! Plots as SVG.

use crate::llama::error::{Error, Result};
use crate::recipe::Recipe;
use std::fmt::Write;
use std::path::Path;

/// One recipe at one sparsity.
pub(crate) struct Point {
    pub(crate) recipe: Recipe,
    pub(crate) sparsity: f64,
    /// Mean KL in nats.
    pub(crate) value: f64,
    /// Its standard error.
    pub(crate) error: f64,
}

pub(crate) fn write(path: &Path, svg: &str) -> Result<()> {
    std::fs::write(path, svg).map_err(|e| Error::io(format!("plot {}", path.display()), e))
}

const COLORS: [&str; 8] =
    ["#0b5fa5", "#d1495b", "#2e933c", "#8f5bb5", "#e08e0b", "#008d8d", "#6b4f3a", "#555555"];

fn document(width: f64, height: f64, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>");
}

/// Mean KL (logarithmic, with standard errors) over sparsity, a panel for each set of sides that is pruned.
pub(crate) fn lines(points: &[Point]) -> String {
    const WIDTH: f64 = 300.0;
    const HEIGHT: f64 = 260.0;
    const TOP: f64 = 26.0;
    const LEFT: f64 = 46.0;
    let panels: Vec<&str> =
        ["K", "V", "K and V"].into_iter().filter(|s| points.iter().any(|p| p.recipe.sides() == *s)).collect();
    let positive = || points.iter().map(|p| p.value).filter(|v| *v > 0.0);
    let low = positive().fold(f64::INFINITY, f64::min).log10().floor();
    let high = positive().fold(f64::NEG_INFINITY, f64::max).log10().ceil().max(low + 1.0);
    let mut recipes: Vec<Recipe> = Vec::new();
    points.iter().for_each(|p| {
        if !recipes.contains(&p.recipe) {
            recipes.push(p.recipe);
        }
    });
    let most = panels.iter().map(|s| recipes.iter().filter(|r| r.sides() == *s).count()).max().unwrap_or(0);
    let mut svg = String::new();
    for (i, sides) in panels.iter().enumerate() {
        let left = LEFT + i as f64 * (WIDTH + LEFT);
        let x = |sparsity: f64| left + sparsity * WIDTH;
        let y = |value: f64| TOP + (high - value.max(10f64.powf(low)).log10()) / (high - low) * HEIGHT;
        text(
            &mut svg,
            left + WIDTH / 2.0,
            TOP - 10.0,
            "middle",
            &format!("{sides} pruned: KL in nats over sparsity"),
        );
        for tick in 0..=10 {
            let at = x(f64::from(tick) / 10.0);
            let _ = writeln!(svg, "<path d=\"M{at:.1} {TOP}V{:.1}\" stroke=\"#eee\"/>", TOP + HEIGHT);
            if tick % 2 == 0 {
                text(&mut svg, at, TOP + HEIGHT + 14.0, "middle", &format!("{}", f64::from(tick) / 10.0));
            }
        }
        for power in low as i32..=high as i32 {
            let at = y(10f64.powi(power));
            let _ = writeln!(svg, "<path d=\"M{left:.1} {at:.1}H{:.1}\" stroke=\"#ccc\"/>", left + WIDTH);
            text(&mut svg, left - 4.0, at + 4.0, "end", &format!("1e{power}"));
        }
        for (n, recipe) in recipes.iter().filter(|r| r.sides() == *sides).enumerate() {
            let color = COLORS[n % COLORS.len()];
            let mut path = String::new();
            for p in points.iter().filter(|p| p.recipe == *recipe) {
                let (px, py) = (x(p.sparsity), y(p.value));
                let _ = write!(path, "{}{px:.1} {py:.1}", if path.is_empty() { "M" } else { "L" });
                let _ = writeln!(
                    svg,
                    "<path d=\"M{px:.1} {:.1}V{:.1}\" stroke=\"{color}\"/><circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"2.5\" fill=\"{color}\"/>",
                    y(p.value - p.error),
                    y(p.value + p.error)
                );
            }
            let _ =
                writeln!(svg, "<path d=\"{path}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.5\"/>");
            let at = TOP + HEIGHT + 34.0 + n as f64 * 15.0;
            let _ =
                writeln!(svg, "<path d=\"M{left:.1} {at:.1}h18\" stroke=\"{color}\" stroke-width=\"3\"/>");
            text(&mut svg, left + 24.0, at + 4.0, "start", &recipe.to_string());
        }
    }
    let width = panels.len() as f64 * (WIDTH + LEFT) + 20.0;
    document(width, TOP + HEIGHT + 40.0 + most as f64 * 15.0, &svg)
}

/// A map of right answers for each name, depth downwards and length to the right: `found[name][depth][length]` of `trials`.
pub(crate) fn heat_maps(
    names: &[String],
    found: &[Vec<Vec<usize>>],
    depths: &[f64],
    lengths: &[usize],
    trials: usize,
) -> String {
    const CELL: f64 = 34.0;
    const LEFT: f64 = 40.0;
    const TOP: f64 = 20.0;
    const COLUMNS: usize = 4;
    let width = (LEFT + lengths.len() as f64 * CELL + 16.0).max(190.0);
    let height = TOP + depths.len() as f64 * CELL + 26.0;
    let mut svg = String::new();
    for (i, (name, map)) in names.iter().zip(found).enumerate() {
        let (left, top) = ((i % COLUMNS) as f64 * width + LEFT, (i / COLUMNS) as f64 * height + TOP);
        text(&mut svg, left, top - 6.0, "start", name);
        for (row, (cells, depth)) in map.iter().zip(depths).enumerate() {
            let y = top + row as f64 * CELL;
            text(&mut svg, left - 4.0, y + CELL / 2.0 + 4.0, "end", &depth.to_string());
            for (column, &right) in cells.iter().enumerate() {
                let x = left + column as f64 * CELL;
                // From red (none) over yellow to green (all).
                let hue = 120.0 * right as f64 / trials.max(1) as f64;
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"hsl({hue:.0},60%,65%)\"/>",
                    CELL - 1.0,
                    CELL - 1.0
                );
                text(&mut svg, x + CELL / 2.0, y + CELL / 2.0 + 4.0, "middle", &format!("{right}/{trials}"));
            }
        }
        for (column, length) in lengths.iter().enumerate() {
            let x = left + (column as f64 + 0.5) * CELL;
            text(&mut svg, x, top + depths.len() as f64 * CELL + 12.0, "middle", &length.to_string());
        }
    }
    let rows = names.len().div_ceil(COLUMNS);
    document(COLUMNS.min(names.len()) as f64 * width, rows as f64 * height, &svg)
}
