//! Comparison with the float64 reference.

use mustafar::{DType, PageFormat, ValueType};

/// How far a result may be from the reference. `docs/testing.md` derives the numbers.
#[derive(Debug, Clone, Copy)]
pub struct Tolerance {
    /// Absolute, in units of the result.
    pub abs: f64,
    /// Relative to the expected element.
    pub rel: f64,
    /// What the stored type cannot resolve; part of `abs`.
    pub smallest: f64,
    /// Of the cosine distance over all elements.
    pub cosine: f64,
}

impl Tolerance {
    /// For results stored in `dtype` after float32 accumulation of terms of magnitude up to `scale`.
    pub fn new(dtype: DType, scale: f64) -> Self {
        // Half a unit in the last place of the stored type, with room for a rounding tie that falls the other way.
        let rel = match dtype {
            DType::F16 => 1.1 * 2f64.powi(-11),
            DType::Bf16 => 1.1 * 2f64.powi(-8),
            _ => 1e-5,
        };
        // Half the smallest subnormal of the stored type, plus that of the float32 sum it is rounded from.
        let smallest = match dtype {
            DType::F16 => 1.1 * 2f64.powi(-25),
            DType::Bf16 => 1.1 * 2f64.powi(-134),
            _ => 2f64.powi(-140),
        };
        Self { abs: 2e-5 * scale + smallest, rel, smallest, cosine: rel * rel + 1e-9 }
    }
}

impl Tolerance {
    /// For attention over pages of K and V and values of `types`, on CUDA if they are [`super::coarse`].
    pub fn of_attention(
        coarse: bool,
        pages: [PageFormat; 2],
        types: [DType; 2],
        stored: DType,
        scale: f64,
    ) -> Self {
        let pages_and_dense = types.map(Some).into_iter().chain([pages[0].value_type().dtype()]);
        let has_bf16 = pages_and_dense.into_iter().any(|dtype| dtype == Some(DType::Bf16));
        match coarse {
            true if has_bf16 => Self::on_cuda(DType::Bf16, stored, scale),
            true => Self::on_cuda(DType::F16, stored, scale),
            false => Self::new(stored, scale).over(&pages, scale),
        }
    }

    /// For an operation on `pages`: what meets int8 values may be rounded.
    pub fn over(self, pages: &[PageFormat], scale: f64) -> Self {
        match pages.iter().any(|page| page.value_type() == ValueType::Int8) {
            true => self.with_inputs_rounded_to(2f64.powi(-11), scale),
            false => self,
        }
    }

    /// For attention on CUDA with pages, or dense tokens, of `values`: probabilities are rounded to that type before
    /// they meet the tensor cores. Queries and dense tokens are too; see [`super::coarse`].
    pub fn on_cuda(values: DType, stored: DType, scale: f64) -> Self {
        let unit = if values == DType::Bf16 { 2f64.powi(-8) } else { 2f64.powi(-11) };
        Self::new(stored, scale).with_inputs_rounded_to(unit, scale)
    }

    fn with_inputs_rounded_to(self, unit: f64, scale: f64) -> Self {
        Self {
            abs: self.abs + 4.0 * unit * scale,
            rel: self.rel + unit,
            cosine: self.cosine + 4.0 * unit * unit,
            ..self
        }
    }
}

/// 1 - cosine of the angle between two vectors; 0 for two zero vectors.
pub fn cosine_distance(a: &[f64], b: &[f64]) -> f64 {
    let dot = |x: &[f64], y: &[f64]| -> f64 { x.iter().zip(y).map(|(x, y)| x * y).sum() };
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms == 0.0 {
        f64::from(u8::from(dot(a, a) != dot(b, b)))
    } else {
        (1.0 - dot(a, b) / norms).max(0.0)
    }
}

/// NaN and infinities must stand at the same places, the rest be close element by element and as a whole.
pub fn assert_close(what: &str, got: &[f64], want: &[f64], tolerance: Tolerance) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    let kind = |x: f64| {
        if x.is_nan() {
            "nan"
        } else if x.is_finite() {
            "finite"
        } else if x > 0.0 {
            "+inf"
        } else {
            "-inf"
        }
    };
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        assert_eq!(kind(g), kind(w), "{what}: element {i} is {g}, expected {w}");
        let allowed = tolerance.abs + tolerance.rel * w.abs();
        assert!(
            !w.is_finite() || (g - w).abs() <= allowed,
            "{what}: element {i} is {g}, expected {w}; off by {:e}, allowed {allowed:e}",
            (g - w).abs()
        );
    }
    let finite = |x: &[f64]| -> Vec<f64> { x.iter().copied().filter(|x| x.is_finite()).collect() };
    let (g, w) = (finite(got), finite(want));
    // A vector inside the absolute tolerance has no direction to compare.
    if w.iter().any(|x| x.abs() > 100.0 * tolerance.abs) {
        let distance = cosine_distance(&g, &w);
        let mean_square = w.iter().map(|x| x * x).sum::<f64>() / w.len() as f64;
        let allowed = tolerance.cosine + tolerance.smallest.powi(2) / mean_square;
        assert!(distance <= allowed, "{what}: cosine distance {distance:e}, allowed {allowed:e}");
    }
}
