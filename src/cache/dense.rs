//! Dense tokens of all layers and sequences: the windows, and the sinks.

use super::buffer::Buffer;
use super::config::CacheConfig;
use crate::backend::Context;
use crate::error::Result;
use crate::format::PageFormat;
use crate::tensor::{Shape, Tensor, TensorMut};

/// K and V of up to `capacity` tokens per layer and row. Token 0 of a row is its oldest.
#[derive(Debug)]
pub(super) struct DenseTokens {
    pub(super) k: Side,
    pub(super) v: Side,
}

/// One side: `[layers][rows][capacity][kv_heads][head_dim]` in the value type.
#[derive(Debug)]
pub(super) struct Side {
    argument: &'static str,
    buffer: Buffer,
    format: PageFormat,
    /// One layer.
    shape: Shape,
}

impl DenseTokens {
    pub(super) fn new(
        context: &Context,
        config: &CacheConfig,
        [k, v]: [&'static str; 2],
        capacity: usize,
    ) -> Result<Self> {
        Ok(Self {
            k: Side::new(context, config, k, config.k, capacity)?,
            v: Side::new(context, config, v, config.v, capacity)?,
        })
    }

    fn sides_mut(&mut self) -> [&mut Side; 2] {
        [&mut self.k, &mut self.v]
    }

    /// Copies K and V tokens (batch 1) into a row from token `at` on.
    pub(super) fn store(
        &mut self,
        layer: usize,
        row: usize,
        at: usize,
        [k, v]: [Tensor<'_>; 2],
    ) -> Result<()> {
        self.k.store(layer, row, at, k)?;
        self.v.store(layer, row, at, v)
    }

    /// Drops the first `drop` of a row's `len` tokens.
    pub(super) fn drop_front(&mut self, layer: usize, row: usize, drop: usize, len: usize) {
        for side in self.sides_mut() {
            let (start, token) = (side.at(layer, row), side.token_bytes());
            side.buffer.copy_within(start + drop * token, start, (len - drop) * token);
        }
    }

    /// Copies the first `len` tokens of one row to another.
    pub(super) fn copy_row(&mut self, layer: usize, from: usize, to: usize, len: usize) {
        for side in self.sides_mut() {
            let bytes = len * side.token_bytes();
            side.buffer.copy_within(side.at(layer, from), side.at(layer, to), bytes);
        }
    }

    /// Appends the first `len` tokens of a row: all K, then all V.
    pub(super) fn read(&self, layer: usize, row: usize, len: usize, out: &mut Vec<u8>) {
        for side in [&self.k, &self.v] {
            side.buffer.read(side.at(layer, row), len * side.token_bytes(), out);
        }
    }

    /// Stores what [`DenseTokens::read`] gave.
    pub(super) fn write(&mut self, layer: usize, row: usize, len: usize, bytes: &[u8]) {
        let (k, v) = bytes.split_at(len * self.k.token_bytes());
        for (side, bytes) in self.sides_mut().into_iter().zip([k, v]) {
            side.buffer.write(side.at(layer, row), bytes);
        }
    }
}

impl Side {
    fn new(
        context: &Context,
        config: &CacheConfig,
        argument: &'static str,
        format: PageFormat,
        capacity: usize,
    ) -> Result<Self> {
        let shape = Shape::contiguous(config.max_sequences, capacity, config.kv_heads, format.head_dim())?;
        // `CacheConfig::check` has shown that all sizes together fit.
        let bytes = config.layers * shape.batch * shape.batch_stride * format.dtype().bytes();
        Ok(Self { argument, buffer: Buffer::zeroed(context, bytes)?, format, shape })
    }

    fn token_bytes(&self) -> usize {
        self.shape.token_stride * self.format.dtype().bytes()
    }

    /// Byte offset of token 0 of a row.
    fn at(&self, layer: usize, row: usize) -> usize {
        (layer * self.shape.batch + row) * self.shape.tokens * self.token_bytes()
    }

    /// One layer, `[rows, capacity, kv_heads, head_dim]`.
    pub(super) fn tensor(&self, layer: usize) -> Result<Tensor<'_>> {
        let mem = self.buffer.mem().skip(self.argument, self.at(layer, 0))?;
        Tensor::new(self.argument, mem, self.format.dtype(), self.shape)
    }

    fn store(&mut self, layer: usize, row: usize, at: usize, x: Tensor<'_>) -> Result<()> {
        let first = self.at(layer, 0);
        let mem = self.buffer.mem_mut().skip(self.argument, first)?;
        let rows = TensorMut::new(self.argument, mem, self.format.dtype(), self.shape)?;
        copy_tokens(self.argument, x, rows.tokens(self.argument, row, at, at + x.shape.tokens)?)
    }
}

/// Copies tensors of 16-bit elements of the same type and sizes.
fn copy_tokens(argument: &'static str, from: Tensor<'_>, mut to: TensorMut<'_>) -> Result<()> {
    let from = from.rows::<u16>(argument)?;
    let shape = from.shape;
    let mut to = to.rows_mut::<u16>(argument)?;
    for b in 0..shape.batch {
        for t in 0..shape.tokens {
            for h in 0..shape.heads {
                to.row_mut(b, t, h).copy_from_slice(from.row(b, t, h));
            }
        }
    }
    Ok(())
}
