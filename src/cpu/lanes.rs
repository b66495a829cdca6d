//! The order in which scores are summed, on every backend: row r goes to lane r % 32, rows in rising order; then the upper
//! half of the lanes is added to the lower one until one is left.

use std::ops::Add;

/// Partial sums.
pub(super) const LANES: usize = 32;

/// Adds up the lanes of `columns` sums each, into the first of them.
#[inline(always)]
pub(super) fn halve<T: Copy + Add<Output = T>>(lanes: &mut [T], columns: usize) {
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = lanes.split_at_mut(half * columns);
        low.iter_mut().zip(high).for_each(|(low, high)| *low = *low + *high);
        half /= 2;
    }
}

/// Sums of rows in float64.
pub(super) struct LaneSums {
    /// `[LANES][columns]`.
    lanes: Vec<f64>,
    columns: usize,
    rows: usize,
}

impl LaneSums {
    pub(super) fn new(columns: usize) -> Self {
        Self { lanes: vec![0.0; LANES * columns], columns, rows: 0 }
    }

    /// Adds `f` of the next row.
    pub(super) fn add(&mut self, row: &[f32], f: fn(f64) -> f64) {
        let lane = &mut self.lanes[self.rows % LANES * self.columns..][..self.columns];
        lane.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f(f64::from(x)));
        self.rows += 1;
    }

    /// The sum of each column.
    pub(super) fn finish(mut self) -> Vec<f64> {
        halve(&mut self.lanes, self.columns);
        self.lanes.truncate(self.columns);
        self.lanes
    }
}
