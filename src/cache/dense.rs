//! Dense tokens of all layers and sequences: the windows, and the sinks.

use super::buffer::{Buffer, Staging};
use super::config::CacheConfig;
use super::copy::{Place, copy_tokens};
use crate::backend::{Context, Stream};
use crate::dtype::DType;
use crate::error::Result;
use crate::format::PageFormat;
use crate::tensor::{Shape, Tensor, TensorMut};

/// K and V of up to `capacity` tokens per layer and row. Token 0 of a row is its oldest.
#[derive(Debug)]
pub(super) struct DenseTokens {
    pub(super) k: Side,
    pub(super) v: Side,
}

/// One side: `[layers][rows][capacity][kv_heads][head_dim]`.
#[derive(Debug)]
pub(super) struct Side {
    argument: &'static str,
    buffer: Buffer,
    dtype: DType,
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

    /// Copies runs of the caller's tokens, K and V, into rows of a layer.
    pub(super) fn store(
        &mut self,
        context: &Context,
        staging: &mut Staging,
        stream: Stream,
        layer: usize,
        [k, v]: [Tensor<'_>; 2],
        places: &[Place],
    ) -> Result<()> {
        if places.is_empty() {
            return Ok(());
        }
        let mut sides = [(k, self.k.tensor_mut(layer)?), (v, self.v.tensor_mut(layer)?)];
        copy_tokens(context, staging, stream, &mut sides, places)
    }

    /// Drops the first `drop` of a row's `len` tokens.
    pub(super) fn drop_front(
        &mut self,
        stream: Stream,
        layer: usize,
        row: usize,
        drop: usize,
        len: usize,
    ) -> Result<()> {
        self.sides_mut().into_iter().try_for_each(|side| {
            let (start, token) = (side.at(layer, row), side.token_bytes());
            side.buffer.copy_within(stream, start + drop * token, start, (len - drop) * token)
        })
    }

    /// Copies the first `len` tokens of one row to another.
    pub(super) fn copy_row(
        &mut self,
        stream: Stream,
        layer: usize,
        from: usize,
        to: usize,
        len: usize,
    ) -> Result<()> {
        self.sides_mut().into_iter().try_for_each(|side| {
            let bytes = len * side.token_bytes();
            side.buffer.copy_within(stream, side.at(layer, from), side.at(layer, to), bytes)
        })
    }

    /// Appends the first `len` tokens of a row: all K, then all V.
    pub(super) fn read(&self, layer: usize, row: usize, len: usize, out: &mut Vec<u8>) -> Result<()> {
        let mut sides = [&self.k, &self.v].into_iter();
        sides.try_for_each(|side| side.buffer.read(side.at(layer, row), len * side.token_bytes(), out))
    }

    /// Stores what [`DenseTokens::read`] gave.
    pub(super) fn write(&mut self, layer: usize, row: usize, len: usize, bytes: &[u8]) -> Result<()> {
        let (k, v) = bytes.split_at(len * self.k.token_bytes());
        let mut sides = self.sides_mut().into_iter().zip([k, v]);
        sides.try_for_each(|(side, bytes)| side.buffer.write(side.at(layer, row), bytes))
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
        let dtype = config.dtype(format);
        let bytes = config.layers * shape.batch * shape.batch_stride * dtype.bytes();
        Ok(Self { argument, buffer: Buffer::zeroed(context, bytes)?, dtype, shape })
    }

    fn token_bytes(&self) -> usize {
        self.shape.token_stride * self.dtype.bytes()
    }

    /// Byte offset of token 0 of a row.
    fn at(&self, layer: usize, row: usize) -> usize {
        (layer * self.shape.batch + row) * self.shape.tokens * self.token_bytes()
    }

    /// One layer, `[rows, capacity, kv_heads, head_dim]`.
    pub(super) fn tensor(&self, layer: usize) -> Result<Tensor<'_>> {
        let mem = self.buffer.mem().skip(self.argument, self.at(layer, 0))?;
        Tensor::new(self.argument, mem, self.dtype, self.shape)
    }

    /// The first `len` tokens of a row.
    pub(super) fn front(&self, layer: usize, row: usize, len: usize) -> Result<Tensor<'_>> {
        self.tensor(layer)?.tokens(self.argument, row, 0, len)
    }

    fn tensor_mut(&mut self, layer: usize) -> Result<TensorMut<'_>> {
        let first = self.at(layer, 0);
        let mem = self.buffer.mem_mut().skip(self.argument, first)?;
        TensorMut::new(self.argument, mem, self.dtype, self.shape)
    }
}
