//! From views of device memory to the pointers, strides and counts that kernels take.

use super::Device;
use super::driver::{AddressOf, address_of};
use super::params::SequencesParams;
use crate::error::{Error, Result};
use crate::mem::{Element, Mem, MemMut};
use crate::ops::attend::Center;
use crate::pool::{PoolLayout, Sequences};
use crate::tensor::{Tensor, TensorMut};
use std::ffi::c_void;
use std::ptr::{null, null_mut};

impl Device {
    /// `count` elements for reading. A context must be current, as in all functions here.
    pub(super) fn read<T: Element>(
        &self,
        argument: &'static str,
        mem: &Mem<'_>,
        count: usize,
    ) -> Result<*const T> {
        let address = mem.device_address::<T>(argument, count)?;
        self.check(argument, address)?;
        Ok(address as usize as *const T)
    }

    /// As [`Device::read`]; null where nothing is given.
    pub(super) fn read_optional<T: Element>(
        &self,
        argument: &'static str,
        mem: Option<&Mem<'_>>,
        count: usize,
    ) -> Result<*const T> {
        mem.map_or(Ok(null()), |mem| self.read(argument, mem, count))
    }

    /// `count` elements for writing.
    pub(super) fn write<T: Element>(
        &self,
        argument: &'static str,
        mem: &mut MemMut<'_>,
        count: usize,
    ) -> Result<*mut T> {
        Ok(self.read::<T>(argument, &mem.as_ref(), count)?.cast_mut())
    }

    /// As [`Device::write`]; null where nothing is given.
    pub(super) fn write_optional<T: Element>(
        &self,
        argument: &'static str,
        mem: Option<&mut MemMut<'_>>,
        count: usize,
    ) -> Result<*mut T> {
        mem.map_or(Ok(null_mut()), |mem| self.write(argument, mem, count))
    }

    /// Elements of a tensor, aligned for its dtype.
    pub(super) fn tensor(&self, argument: &'static str, tensor: &Tensor<'_>) -> Result<*const c_void> {
        // Again, since dtype and shape are public fields.
        Tensor::new(argument, tensor.mem, tensor.dtype, tensor.shape)?;
        let bytes = tensor.shape.extent(argument)?.checked_mul(tensor.dtype.bytes());
        let bytes = bytes.ok_or(Error::Overflow { argument })?;
        Ok(self.read::<u8>(argument, &tensor.mem, bytes)?.cast())
    }

    /// As [`Device::tensor`], for writing.
    pub(super) fn tensor_mut(
        &self,
        argument: &'static str,
        tensor: &mut TensorMut<'_>,
    ) -> Result<*mut c_void> {
        tensor.shape.check_disjoint(argument)?;
        let view = Tensor { mem: tensor.mem.as_ref(), dtype: tensor.dtype, shape: tensor.shape };
        Ok(self.tensor(argument, &view)?.cast_mut())
    }

    /// Where a log-sum-exp goes, null if nowhere, and its strides over tokens and heads.
    pub(super) fn lse(&self, lse: Option<&mut TensorMut<'_>>) -> Result<(*mut f32, i64, i64)> {
        let Some(lse) = lse else { return Ok((null_mut(), 0, 0)) };
        let shape = lse.shape;
        let token_stride = stride("lse", shape.tokens, shape.token_stride)?;
        let head_stride = stride("lse", shape.heads, shape.head_stride)?;
        Ok((self.tensor_mut("lse", lse)?.cast(), token_stride, head_stride))
    }

    /// Refuses a tensor that no op could read.
    pub(crate) fn check_tensor(&self, argument: &'static str, tensor: &Tensor<'_>) -> Result<()> {
        let _entered = self.context.enter()?;
        self.tensor(argument, tensor).map(|_| ())
    }

    /// First page of a pool.
    pub(super) fn pages(
        &self,
        argument: &'static str,
        mem: &Mem<'_>,
        layout: &PoolLayout,
    ) -> Result<*const u8> {
        // Again, since the layout is a public field.
        layout.check(argument, mem.address(), mem.bytes())?;
        self.read(argument, mem, layout.extent(argument)?)
    }

    /// Centres `[batch, heads, dim]`; null where there are none.
    pub(super) fn center(
        &self,
        argument: &'static str,
        center: Option<&Center<'_>>,
        heads: usize,
        dim: usize,
    ) -> Result<*const f32> {
        let Some(center) = center else { return Ok(null()) };
        self.read(argument, &center.values, center.count(argument, heads, dim)?)
    }

    /// Page table and lengths.
    pub(super) fn sequences(
        &self,
        sequences: &Sequences<'_>,
        layout: &PoolLayout,
    ) -> Result<SequencesParams> {
        let page_tokens = layout.format.page_tokens();
        let (entries, lens) = (sequences.table_len(page_tokens)?, sequences.lens_len(layout.kv_heads)?);
        Ok(SequencesParams {
            table: self.read_optional("sequences.table", sequences.table.as_ref(), entries)?,
            lens: self.read("sequences.lens", &sequences.lens, lens)?,
            table_stride: int64("sequences.table_stride", sequences.page_stride(page_tokens))?,
            lens_per_head: i32::from(sequences.lens_per_head),
            page_tokens: int32("page_tokens", page_tokens)?,
        })
    }

    /// Refuses what the driver knows to lie elsewhere than on this device.
    fn check(&self, argument: &'static str, address: u64) -> Result<()> {
        if address == 0 {
            return Ok(()); // nothing is read there
        }
        let allowed = || format!("memory of CUDA device {}", self.ordinal());
        match address_of(address)? {
            AddressOf::Device(ordinal) if ordinal == self.ordinal() => Ok(()),
            AddressOf::Device(ordinal) => {
                Err(Error::invalid(argument, format!("memory of CUDA device {ordinal}"), allowed()))
            }
            AddressOf::Host => Err(Error::invalid(argument, "host memory", allowed())),
        }
    }
}

/// A count or size that kernels hold in 32 bits.
pub(super) fn int32(argument: &'static str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::unsupported(argument, value, format!("at most {}", i32::MAX)))
}

/// A count or offset that kernels hold in 64 bits.
pub(super) fn int64(argument: &'static str, value: usize) -> Result<i64> {
    i64::try_from(value).map_err(|_| Error::Overflow { argument })
}

/// Elements from one of `n` to the next; a stride over one element is never used and may be anything.
pub(super) fn stride(argument: &'static str, n: usize, stride: usize) -> Result<i64> {
    if n > 1 { int64(argument, stride) } else { Ok(0) }
}
