//! Opaque handles: boxes that C holds by address.

use crate::error::{Error, Result};

/// Refuses null and misaligned pointers.
pub(super) fn check_pointer<T>(argument: &'static str, pointer: *const T) -> Result<()> {
    if pointer.is_null() {
        return Err(Error::NullPointer { argument });
    }
    if !pointer.is_aligned() {
        let value = pointer.addr() as u64;
        return Err(Error::Misaligned { argument, value, required: align_of::<T>() });
    }
    Ok(())
}

/// The object behind a handle.
///
/// # Safety
/// A non-null `handle` comes from [`store`], has not been destroyed, and nobody writes to the object during `'a`.
pub(super) unsafe fn borrow<'a, T>(argument: &'static str, handle: *const T) -> Result<&'a T> {
    check_pointer(argument, handle)?;
    // SAFETY: non-null and aligned as just checked; the caller's promise covers the rest.
    Ok(unsafe { &*handle })
}

/// The object behind a handle, for changing it.
///
/// # Safety
/// As [`borrow`], and nobody else uses the object during `'a`.
pub(super) unsafe fn borrow_mut<'a, T>(argument: &'static str, handle: *mut T) -> Result<&'a mut T> {
    check_pointer(argument, handle)?;
    // SAFETY: as in `borrow`.
    Ok(unsafe { &mut *handle })
}

/// Writes one output value.
///
/// # Safety
/// A non-null `out` may be written to.
pub(super) unsafe fn put<T>(argument: &'static str, out: *mut T, value: T) -> Result<()> {
    check_pointer(argument, out)?;
    // SAFETY: non-null and aligned as just checked, writable by the caller's promise. `write` does not drop what
    // was there, which may be uninitialised.
    unsafe { out.write(value) };
    Ok(())
}

/// Hands a new object to C.
///
/// # Safety
/// A non-null `out` may be written to.
pub(super) unsafe fn store<T>(argument: &'static str, out: *mut *mut T, object: T) -> Result<()> {
    // Checked first so that the box cannot leak.
    check_pointer(argument, out)?;
    // SAFETY: the caller's promise.
    unsafe { put(argument, out, Box::into_raw(Box::new(object))) }
}

/// Takes an object back from C and drops it; null is nothing to do.
///
/// # Safety
/// A non-null `handle` comes from [`store`], has not been destroyed, and is not in use.
pub(super) unsafe fn destroy<T>(argument: &'static str, handle: *mut T) -> Result<()> {
    if handle.is_null() {
        return Ok(());
    }
    check_pointer(argument, handle)?;
    // SAFETY: by the caller's promise this is the address `Box::into_raw` gave, not freed since.
    drop(unsafe { Box::from_raw(handle) });
    Ok(())
}
