//! Rotary position embedding on adjacent pairs.
//!
//! llama.cpp's converter permutes the rows of the query and key projections so that channels 2i and 2i + 1 of a
//! head form the pair that rotates together; the published weights pair i with i + D/2. Scores are the same, as
//! queries and keys are permuted alike.

/// Frequencies of the pairs.
#[derive(Debug, Clone)]
pub struct Rope {
    frequencies: Vec<f64>,
}

impl Rope {
    /// Pair i of `dim / 2` turns by `position * base^(-2i / dim) / factors[i]`.
    pub fn new(base: f64, dim: usize, factors: Option<&[f32]>) -> Self {
        let frequencies = (0..dim / 2)
            .map(|i| {
                let factor = factors.map_or(1.0, |f| f64::from(f[i]));
                base.powf(-2.0 * i as f64 / dim as f64) / factor
            })
            .collect();
        Self { frequencies }
    }

    /// `[positions, pairs]` of (cos, sin): computed once per forward pass, used by every layer.
    pub fn table(&self, positions: &[usize]) -> Vec<(f32, f32)> {
        positions
            .iter()
            .flat_map(|&p| {
                self.frequencies.iter().map(move |f| {
                    let (sin, cos) = (p as f64 * f).sin_cos();
                    (cos as f32, sin as f32)
                })
            })
            .collect()
    }

    /// The part of a table that belongs to the i-th of its positions.
    pub fn row<'a>(&self, table: &'a [(f32, f32)], i: usize) -> &'a [(f32, f32)] {
        &table[i * self.frequencies.len()..][..self.frequencies.len()]
    }
}

/// Rotates each head of `heads`; channels beyond the table's pairs stay.
pub fn rotate(heads: &mut [f32], head_dim: usize, turns: &[(f32, f32)]) {
    for head in heads.chunks_exact_mut(head_dim) {
        for (pair, &(cos, sin)) in head.chunks_exact_mut(2).zip(turns) {
            let (a, b) = (pair[0], pair[1]);
            pair[0] = a * cos - b * sin;
            pair[1] = a * sin + b * cos;
        }
    }
}
