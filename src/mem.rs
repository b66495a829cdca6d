//! Views of caller-owned memory: where it is, how long it is, and (with the row and page writers of `tensor` and
//! `pool`) the only place where raw addresses become slices.
//!
//! A view borrows; only `HostBuffer` owns what it points at. Host views are made safely from slices. Views of
//! device memory, and views an engine makes from raw pointers, come from the `unsafe` constructors, whose
//! contracts are what every op relies on.
#![allow(unsafe_code)]

use crate::error::{Error, Result};
use crate::format::PAGE_ALIGN;
use half::{bf16, f16};
use std::alloc::Layout;
use std::marker::PhantomData;
use std::ptr::NonNull;

/// Which address space a view lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Ordinary memory of this process.
    Host,
    /// Memory of a CUDA device. The address is never dereferenced on the host.
    Device,
}

mod sealed {
    pub trait Sealed {}
}

/// Plain element types a view can be made from: any bit pattern is a value, and there is no padding.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {}

macro_rules! element {
    ($($t:ty),*) => {$(
        impl sealed::Sealed for $t {}
        impl Element for $t {}
    )*};
}
element!(u8, u16, u32, u64, i32, i64, f32, f16, bf16);

/// Read-only view of caller memory.
#[derive(Debug, Clone, Copy)]
pub struct Mem<'a> {
    address: u64,
    bytes: usize,
    place: Place,
    _life: PhantomData<&'a [u8]>,
}

/// Writable view of caller memory.
#[derive(Debug)]
pub struct MemMut<'a> {
    address: u64,
    bytes: usize,
    place: Place,
    _life: PhantomData<&'a mut [u8]>,
}

impl<'a> Mem<'a> {
    /// View of a host slice.
    #[must_use]
    pub fn host<T: Element>(slice: &'a [T]) -> Self {
        Self {
            address: slice.as_ptr() as u64,
            bytes: size_of_val(slice),
            place: Place::Host,
            _life: PhantomData,
        }
    }

    /// View of `bytes` bytes at `address`.
    ///
    /// # Safety
    /// For the whole of `'a`, and for device memory until the work submitted with it has finished, the range
    /// must be readable in its address space. Host memory must be initialised, and no one may write to it while
    /// a call reads it.
    #[must_use]
    pub unsafe fn from_raw(address: u64, bytes: usize, place: Place) -> Self {
        Self { address, bytes, place, _life: PhantomData }
    }

    /// Address of the first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address space.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }

    /// The view without its first `bytes` bytes.
    pub fn skip(self, argument: &'static str, bytes: usize) -> Result<Self> {
        if bytes > self.bytes {
            return Err(Error::BufferTooSmall { argument, bytes: self.bytes, needed: bytes });
        }
        Ok(Self { address: self.address + bytes as u64, bytes: self.bytes - bytes, ..self })
    }

    /// The first `count` elements as a slice. Errors name `argument`: wrong place, misaligned or too short.
    pub(crate) fn slice<T: Element>(&self, argument: &'static str, count: usize) -> Result<&'a [T]> {
        if check::<T>(self.address, self.bytes, self.place, Place::Host, argument, count)? {
            return Ok(&[]);
        }
        // SAFETY: `check` established host memory, alignment and length; the constructor's contract (a slice
        // borrow, or `from_raw`) gives readability, initialisation and the lifetime; any bits are a valid `T`.
        Ok(unsafe { std::slice::from_raw_parts(self.address as *const T, count) })
    }

    /// Address of the first `count` elements on a device; 0 if there are none. Errors as [`Mem::slice`].
    pub(crate) fn device_address<T: Element>(&self, argument: &'static str, count: usize) -> Result<u64> {
        let empty = check::<T>(self.address, self.bytes, self.place, Place::Device, argument, count)?;
        Ok(if empty { 0 } else { self.address })
    }
}

impl<'a> MemMut<'a> {
    /// View of a host slice.
    #[must_use]
    pub fn host<T: Element>(slice: &'a mut [T]) -> Self {
        Self {
            address: slice.as_mut_ptr() as u64,
            bytes: size_of_val(slice),
            place: Place::Host,
            _life: PhantomData,
        }
    }

    /// View of `bytes` bytes at `address`.
    ///
    /// # Safety
    /// For the whole of `'a`, and for device memory until the work submitted with it has finished, the range
    /// must be readable and writable in its address space, host memory must be initialised, and nothing else may
    /// access it while a call runs. Two writable views of one call may interleave (K and V pages of one slot)
    /// as long as the strided elements they describe are disjoint.
    #[must_use]
    pub unsafe fn from_raw(address: u64, bytes: usize, place: Place) -> Self {
        Self { address, bytes, place, _life: PhantomData }
    }

    /// Address of the first byte.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address space.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }

    /// A shorter borrow of the same view.
    #[must_use]
    pub fn reborrow(&mut self) -> MemMut<'_> {
        MemMut { address: self.address, bytes: self.bytes, place: self.place, _life: PhantomData }
    }

    /// The view read-only.
    #[must_use]
    pub fn as_ref(&self) -> Mem<'_> {
        Mem { address: self.address, bytes: self.bytes, place: self.place, _life: PhantomData }
    }

    /// The view without its first `bytes` bytes.
    pub fn skip(self, argument: &'static str, bytes: usize) -> Result<Self> {
        if bytes > self.bytes {
            return Err(Error::BufferTooSmall { argument, bytes: self.bytes, needed: bytes });
        }
        Ok(Self { address: self.address + bytes as u64, bytes: self.bytes - bytes, ..self })
    }

    /// The first `bytes` bytes, and the rest.
    pub(crate) fn split_at(self, argument: &'static str, bytes: usize) -> Result<(Self, Self)> {
        if bytes > self.bytes {
            return Err(Error::BufferTooSmall { argument, bytes: self.bytes, needed: bytes });
        }
        let rest = Self { address: self.address + bytes as u64, bytes: self.bytes - bytes, ..self };
        Ok((Self { bytes, ..self }, rest))
    }

    /// The first `count` elements as a slice. Errors name `argument`: wrong place, misaligned or too short.
    pub(crate) fn slice_mut<T: Element>(&mut self, argument: &'static str, count: usize) -> Result<&mut [T]> {
        if check::<T>(self.address, self.bytes, self.place, Place::Host, argument, count)? {
            return Ok(&mut []);
        }
        // SAFETY: as in `Mem::slice`; `&mut self` keeps a second slice of this view from existing.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.address as *mut T, count) })
    }
}

/// Checks a view against `count` elements of `T` where the backend wants them; true when there is nothing to point
/// at.
pub(crate) fn check<T>(
    address: u64,
    bytes: usize,
    place: Place,
    expected: Place,
    argument: &'static str,
    count: usize,
) -> Result<bool> {
    match (place, expected) {
        (Place::Device, Place::Host) => {
            return Err(Error::invalid(argument, "device memory", "host memory on the CPU backend"));
        }
        (Place::Host, Place::Device) => {
            return Err(Error::invalid(argument, "host memory", "device memory on the CUDA backend"));
        }
        _ => {}
    }
    let needed = count.checked_mul(size_of::<T>()).ok_or(Error::Overflow { argument })?;
    if needed > bytes {
        return Err(Error::BufferTooSmall { argument, bytes, needed });
    }
    if needed == 0 {
        return Ok(true);
    }
    if address == 0 {
        return Err(Error::NullPointer { argument });
    }
    if !address.is_multiple_of(align_of::<T>() as u64) {
        return Err(Error::Misaligned { argument, value: address, required: align_of::<T>() });
    }
    Ok(false)
}

/// Zeroed host memory of the library's own, aligned for pages and for every element type.
///
/// The pages of a large one are committed by the system when they are first touched.
#[derive(Debug)]
pub(crate) struct HostBuffer {
    first: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a `HostBuffer` owns plain bytes, as a `Box<[u8]>` does.
unsafe impl Send for HostBuffer {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for HostBuffer {}

impl HostBuffer {
    /// `bytes` zero bytes, or [`Error::OutOfMemory`].
    pub(crate) fn zeroed(bytes: usize) -> Result<Self> {
        // Larger alignments would make the allocator clear the memory itself, which commits all of it.
        let layout = Layout::from_size_align(bytes, PAGE_ALIGN).map_err(|_| Error::OutOfMemory { bytes })?;
        let first = if bytes == 0 {
            NonNull::<u128>::dangling().cast()
        } else {
            // SAFETY: the layout has a size above 0.
            let address = unsafe { std::alloc::alloc_zeroed(layout) };
            NonNull::new(address).ok_or(Error::OutOfMemory { bytes })?
        };
        Ok(Self { first, layout })
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `first` points at `len()` initialised bytes that this value owns.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len()) }
    }

    /// The bytes for writing.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes this the only slice.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len()) }
    }
}

impl Drop for HostBuffer {
    fn drop(&mut self) {
        if self.len() > 0 {
            // SAFETY: allocated in `zeroed` with this layout, and freed only here.
            unsafe { std::alloc::dealloc(self.first.as_ptr(), self.layout) }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A view whose address is checked but never dereferenced.
    fn view(address: u64, bytes: usize, place: Place) -> Mem<'static> {
        // SAFETY: the tests below only use it where a check fails or nothing is read.
        unsafe { Mem::from_raw(address, bytes, place) }
    }

    #[test]
    fn slices_come_back_as_they_were() {
        let mut numbers = [1.5f32, -2.0, 3.25];
        assert_eq!(Mem::host(&numbers).slice::<f32>("x", 3), Ok(&numbers[..]));
        assert_eq!(Mem::host(&numbers).slice::<f32>("x", 2), Ok(&numbers[..2]));
        let mut mem = MemMut::host(&mut numbers);
        assert_eq!((mem.bytes(), mem.place()), (12, Place::Host));
        mem.reborrow().slice_mut::<f32>("x", 3).unwrap()[1] = 7.0;
        assert_eq!(mem.as_ref().slice::<f32>("x", 3), Ok(&[1.5, 7.0, 3.25][..]));
        assert_eq!(mem.skip("x", 4).unwrap().as_ref().slice::<f32>("x", 2), Ok(&[7.0, 3.25][..]));
    }

    #[test]
    fn each_defect_has_its_error() {
        let host = |address, bytes| view(address, bytes, Place::Host);
        assert_eq!(host(0, 8).slice::<u32>("x", 2), Err(Error::NullPointer { argument: "x" }));
        let misaligned = Error::Misaligned { argument: "x", value: 0x1002, required: 4 };
        assert_eq!(host(0x1002, 8).slice::<u32>("x", 2), Err(misaligned));
        let short = Error::BufferTooSmall { argument: "x", bytes: 7, needed: 8 };
        assert_eq!(host(0x1000, 7).slice::<u32>("x", 2), Err(short));
        let overflow = Error::Overflow { argument: "x" };
        assert_eq!(host(0x1000, 8).slice::<u32>("x", usize::MAX / 2), Err(overflow));
        let device = view(0x1000, 8, Place::Device).slice::<u32>("x", 2).unwrap_err().to_string();
        assert_eq!(device, "x is device memory; allowed: host memory on the CPU backend");
        // Nothing is needed of memory of which nothing is used.
        assert_eq!(host(0, 0).slice::<u32>("x", 0), Ok(&[][..]));
        assert_eq!(host(0x1001, 8).slice::<u32>("x", 0), Ok(&[][..]));
    }

    #[test]
    fn skipping_stays_inside() {
        let mem = view(0x1000, 16, Place::Device);
        let rest = mem.skip("x", 16).unwrap();
        assert_eq!((rest.address(), rest.bytes(), rest.place()), (0x1010, 0, Place::Device));
        let short = Error::BufferTooSmall { argument: "x", bytes: 16, needed: 17 };
        assert_eq!(mem.skip("x", 17).map(|_| ()), Err(short));
    }
    #[test]
    fn owned_memory_is_zero_aligned_and_fallible() {
        for len in [0, 1, 16, 100_000] {
            let mut buffer = HostBuffer::zeroed(len).unwrap();
            assert!(buffer.len() == len && buffer.bytes() == vec![0; len]);
            assert!((buffer.bytes().as_ptr() as usize).is_multiple_of(PAGE_ALIGN));
            buffer.bytes_mut().fill(7);
            assert!(buffer.bytes().iter().all(|&b| b == 7));
        }
        for bytes in [usize::MAX, isize::MAX as usize - 15] {
            assert_eq!(HostBuffer::zeroed(bytes).map(|_| ()), Err(Error::OutOfMemory { bytes }));
        }
    }
}
