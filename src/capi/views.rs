//! From raw pointers to the views of `crate::mem`, and from C integers to sizes.

use crate::backend::{Backend, Context};
use crate::error::{Error, Result};
use crate::format::PAGE_ALIGN;
use crate::mem::{Mem, MemMut, Place};

/// How the pointers of a call are to be taken.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pointers {
    /// They point into this address space.
    Into(Place),
    /// The call asks for a size only: pointers are not looked at and required ones may be null.
    Unread,
}

impl Pointers {
    /// Into the memory that ops of `context` work on.
    pub(super) fn of(context: &Context) -> Self {
        match context.backend() {
            Backend::Cpu => Self::Into(Place::Host),
            Backend::Cuda => Self::Into(Place::Device),
        }
    }

    /// `count` elements at `pointer`. Null is refused unless `count` is 0.
    ///
    /// # Safety
    /// Unless the mode is `Unread`, the range is as [`Mem::from_raw`] wants it for `'a`.
    pub(super) unsafe fn mem<'a, T>(
        self,
        argument: &'static str,
        pointer: *const T,
        count: usize,
    ) -> Result<Mem<'a>> {
        let (address, bytes, place) = self.range(argument, pointer.cast(), size_of::<T>(), count)?;
        // SAFETY: the caller's promise. In `Unread` mode the place is `Device`, whose addresses the host never
        // dereferences, and a size query submits nothing to a device.
        Ok(unsafe { Mem::from_raw(address, bytes, place) })
    }

    /// As [`Pointers::mem`], for writing.
    ///
    /// # Safety
    /// Unless the mode is `Unread`, the range is as [`MemMut::from_raw`] wants it for `'a`.
    pub(super) unsafe fn mem_mut<'a, T>(
        self,
        argument: &'static str,
        pointer: *mut T,
        count: usize,
    ) -> Result<MemMut<'a>> {
        let (address, bytes, place) =
            self.range(argument, pointer.cast_const().cast(), size_of::<T>(), count)?;
        // SAFETY: as in `mem`.
        Ok(unsafe { MemMut::from_raw(address, bytes, place) })
    }

    /// As [`Pointers::mem`] where null means "not given".
    ///
    /// # Safety
    /// As [`Pointers::mem`].
    pub(super) unsafe fn mem_optional<'a, T>(
        self,
        argument: &'static str,
        pointer: *const T,
        count: usize,
    ) -> Result<Option<Mem<'a>>> {
        if pointer.is_null() {
            return Ok(None);
        }
        // SAFETY: the caller's promise.
        unsafe { self.mem(argument, pointer, count) }.map(Some)
    }

    /// As [`Pointers::mem_mut`] where null means "not given".
    ///
    /// # Safety
    /// As [`Pointers::mem_mut`].
    pub(super) unsafe fn mem_mut_optional<'a, T>(
        self,
        argument: &'static str,
        pointer: *mut T,
        count: usize,
    ) -> Result<Option<MemMut<'a>>> {
        if pointer.is_null() {
            return Ok(None);
        }
        // SAFETY: the caller's promise.
        unsafe { self.mem_mut(argument, pointer, count) }.map(Some)
    }

    /// Address, length in bytes and place of `count` elements, checked to be a range that can exist.
    /// `element` is 1 for untyped data, whose alignment the tensor or pool checks.
    fn range(
        self,
        argument: &'static str,
        pointer: *const u8,
        element: usize,
        count: usize,
    ) -> Result<(u64, usize, Place)> {
        let overflow = || Error::Overflow { argument };
        let bytes =
            count.checked_mul(element).filter(|n| isize::try_from(*n).is_ok()).ok_or_else(overflow)?;
        let Self::Into(place) = self else {
            return Ok((PAGE_ALIGN as u64, bytes, Place::Device));
        };
        if bytes > 0 && pointer.is_null() {
            return Err(Error::NullPointer { argument });
        }
        let address = pointer.addr() as u64;
        address.checked_add(bytes as u64).ok_or_else(overflow)?;
        if bytes > 0 && !address.is_multiple_of(element as u64) {
            return Err(Error::Misaligned { argument, value: address, required: element });
        }
        Ok((address, bytes, place))
    }
}

/// A size, count or stride: C's signed 64 bits, so that a negative number is caught and not taken for a huge one.
pub(super) fn size(argument: &'static str, value: i64) -> Result<usize> {
    if value < 0 {
        return Err(Error::invalid(argument, value, "0 or more"));
    }
    usize::try_from(value).map_err(|_| Error::Overflow { argument })
}

/// As [`size`] for an option that is off at 0.
pub(super) fn size_optional(argument: &'static str, value: i64) -> Result<Option<usize>> {
    Ok(Some(size(argument, value)?).filter(|n| *n != 0))
}

/// A number that is off at 0. Everything else, NaN too, is for the op to judge.
pub(super) fn number_optional(value: f32) -> Option<f32> {
    (value != 0.0).then_some(value)
}

/// A size as C gets it back.
pub(super) fn to_i64(argument: &'static str, value: usize) -> Result<i64> {
    i64::try_from(value).map_err(|_| Error::Overflow { argument })
}

/// Product of sizes.
pub(super) fn product(argument: &'static str, factors: &[usize]) -> Result<usize> {
    factors.iter().try_fold(1usize, |n, f| n.checked_mul(*f)).ok_or(Error::Overflow { argument })
}

/// A 0/1 switch.
pub(super) fn switch(argument: &'static str, value: u32) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::invalid(argument, value, "0 or 1")),
    }
}

/// A field that a later version may give a meaning.
pub(super) fn reserved(argument: &'static str, value: u32) -> Result<()> {
    if value == 0 { Ok(()) } else { Err(Error::invalid(argument, value, "0")) }
}
