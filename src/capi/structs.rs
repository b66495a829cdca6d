//! Structures that can grow. The caller states the size it was compiled with; older callers send less, newer ones
//! more, and both work as long as nobody uses a field the other side does not know.

use crate::capi::handle::check_pointer;
use crate::error::{Error, Result};
use std::mem::MaybeUninit;

/// Structures above this are refused: no version will need it, and an uninitialised size would otherwise decide how
/// much memory is read.
const MAX_SIZE: usize = 4096;

/// A C structure whose first field is `size_t struct_size`.
///
/// # Safety
/// `repr(C)`, no padding, all-zero bytes are a value, and every bit pattern is. `extensible!` checks the layout.
pub unsafe trait Extensible: Copy + 'static {
    /// C name.
    const NAME: &'static str;
    /// Size in the first release that had the structure. Smaller ones never existed.
    const FIRST_SIZE: usize;
    /// Name, offset and size in bytes of each field, in order.
    const FIELDS: &'static [(&'static str, usize, usize)];
}

/// Implements [`Extensible`]. Arguments: the last field of the first release, then all fields in order.
macro_rules! extensible {
    ($name:ident, first_release_ends_with $last:ident, { $($field:ident),+ $(,)? }) => {
        // SAFETY: the assertion below establishes that the fields are all there is; they are integers, floats and
        // raw pointers, for which zero and every other bit pattern is a value.
        unsafe impl $crate::capi::structs::Extensible for $name {
            const NAME: &'static str = stringify!($name);
            const FIRST_SIZE: usize = std::mem::offset_of!($name, $last)
                + $crate::capi::structs::field_bytes(|s: &$name| &s.$last);
            const FIELDS: &'static [(&'static str, usize, usize)] = &[$((
                stringify!($field),
                std::mem::offset_of!($name, $field),
                $crate::capi::structs::field_bytes(|s: &$name| &s.$field),
            )),+];
        }
        #[cfg(target_pointer_width = "64")]
        const _: () = assert!($crate::capi::structs::is_dense(
            <$name as $crate::capi::structs::Extensible>::FIELDS,
            size_of::<$name>(),
        ));
    };
}
pub(super) use extensible;

/// Size of the field that an accessor returns.
pub(super) const fn field_bytes<S, F>(_: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

/// Whether the fields, in order, fill `bytes` without gap and the first is `struct_size`.
pub(super) const fn is_dense(fields: &[(&str, usize, usize)], bytes: usize) -> bool {
    let mut end = 0;
    let mut i = 0;
    while i < fields.len() {
        if fields[i].1 != end {
            return false;
        }
        end += fields[i].2;
        i += 1;
    }
    end == bytes && fields[0].2 == size_of::<usize>()
}

fn stated_size<T: Extensible>(argument: &'static str, size: usize) -> Result<usize> {
    if size < T::FIRST_SIZE || size > MAX_SIZE {
        return Err(Error::invalid(
            "struct_size",
            format!("{size} in {argument} ({})", T::NAME),
            format!("{} to {MAX_SIZE}; set it to sizeof({})", T::FIRST_SIZE, T::NAME),
        ));
    }
    Ok(size)
}

/// A copy of the caller's structure. Fields that an older caller does not have are zero, which means "default";
/// fields that this version does not have must be zero.
///
/// # Safety
/// A non-null `pointer` points to `struct_size` readable bytes, of which the first hold `struct_size`.
pub(super) unsafe fn read<T: Extensible>(argument: &'static str, pointer: *const T) -> Result<T> {
    check_pointer(argument, pointer)?;
    // SAFETY: non-null, aligned for `T` and so for its first field, which the caller promises to be readable.
    let size = stated_size::<T>(argument, unsafe { pointer.cast::<usize>().read() })?;
    let known = size.min(size_of::<T>());
    let mut value = MaybeUninit::<T>::zeroed();
    let bytes = pointer.cast::<u8>();
    // SAFETY: `known` is within the caller's structure and within `value`, which is a local.
    unsafe { std::ptr::copy_nonoverlapping(bytes, value.as_mut_ptr().cast::<u8>(), known) };
    // SAFETY: the caller promises `size` readable bytes, and `known <= size`.
    let newer = unsafe { std::slice::from_raw_parts(bytes.add(known), size - known) };
    if newer.iter().any(|byte| *byte != 0) {
        return Err(Error::VersionMismatch {
            what: argument,
            found: format!("a {} of {size} bytes that uses fields of a newer version", T::NAME),
            supported: format!("its first {known} bytes; the rest must be zero"),
        });
    }
    // SAFETY: fully initialised, by zeroing and by bytes of the caller; every bit pattern is a `T`.
    Ok(unsafe { value.assume_init() })
}

/// As [`read`], and `None` for null.
///
/// # Safety
/// As [`read`].
pub(super) unsafe fn read_optional<T: Extensible>(
    argument: &'static str,
    pointer: *const T,
) -> Result<Option<T>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    unsafe { read(argument, pointer) }.map(Some)
}

/// Fills the caller's structure, which states its size: an older caller gets the fields it has, a newer one zero in
/// those that this version lacks. `struct_size` stays as it is.
///
/// # Safety
/// A non-null `pointer` points to `struct_size` readable and writable bytes.
pub(super) unsafe fn write<T: Extensible>(argument: &'static str, pointer: *mut T, value: &T) -> Result<()> {
    check_pointer(argument, pointer)?;
    // SAFETY: as in `read`.
    let size = stated_size::<T>(argument, unsafe { pointer.cast::<usize>().read() })?;
    let (head, known) = (size_of::<usize>(), size.min(size_of::<T>()));
    let (from, to) = (std::ptr::from_ref(value).cast::<u8>(), pointer.cast::<u8>());
    // SAFETY: `head..known` is within both structures, which are different objects.
    unsafe { std::ptr::copy_nonoverlapping(from.add(head), to.add(head), known - head) };
    // SAFETY: `known..size` is within the caller's structure.
    unsafe { to.add(known).write_bytes(0, size - known) };
    Ok(())
}
