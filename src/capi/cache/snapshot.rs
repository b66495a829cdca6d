//! Saving a sequence to bytes and bringing it back.

use crate::cache::SequenceId;
use crate::capi::cache::{change, look, mustafar_cache};
use crate::capi::handle::{check_pointer, put};
use crate::capi::status::mustafar_status;
use crate::capi::views::Pointers;
use crate::mem::Place;
use std::ffi::c_void;

/// Bytes that mustafar_cache_save writes for a sequence as it is now.
///
/// @param cache     The cache.
/// @param sequence  The sequence.
/// @param bytes     Receives the size in bytes.
/// @return SUCCESS; INVALID_ARGUMENT for an unknown sequence or layers of different length; NULL_POINTER, MISALIGNED.
///
/// Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: with other calls that take the cache
/// const.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_save_size(
    cache: *const mustafar_cache,
    sequence: u64,
    bytes: *mut usize,
) -> mustafar_status {
    let body = |cache: &crate::Cache| {
        let size = cache.save_bytes(SequenceId::from_raw(sequence))?;
        // SAFETY: the contract of this module.
        unsafe { put("bytes", bytes, size) }
    };
    // SAFETY: the contract of this module.
    unsafe { look(cache, body) }
}

/// Writes a sequence as bytes that mustafar_cache_restore reads in another process, on any backend.
///
/// @param cache         The cache.
/// @param sequence      The sequence.
/// @param buffer        Host memory, any alignment.
/// @param buffer_bytes  Bytes at `buffer`, at least what mustafar_cache_save_size says.
/// @param written       Receives how many bytes were written; may be NULL.
/// @return SUCCESS; BUFFER_TOO_SMALL; INVALID_ARGUMENT for an unknown sequence or layers of different length;
///         NULL_POINTER, MISALIGNED.
///
/// Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: with other calls that take the cache
/// const.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_save(
    cache: *const mustafar_cache,
    sequence: u64,
    buffer: *mut c_void,
    buffer_bytes: usize,
    written: *mut usize,
) -> mustafar_status {
    let body = |cache: &crate::Cache| {
        if !written.is_null() {
            check_pointer("written", written)?;
        }
        // SAFETY: the contract of this module.
        let mut to =
            unsafe { Pointers::Into(Place::Host).mem_mut("buffer", buffer.cast::<u8>(), buffer_bytes)? };
        let id = SequenceId::from_raw(sequence);
        let needed = cache.save_bytes(id)?;
        to.slice_mut::<u8>("buffer", needed)?.copy_from_slice(&cache.save(id)?);
        match written.is_null() {
            true => Ok(()),
            // SAFETY: the contract of this module.
            false => unsafe { put("written", written, needed) },
        }
    };
    // SAFETY: the contract of this module.
    unsafe { look(cache, body) }
}

/// A new sequence from the bytes of mustafar_cache_save.
///
/// @param cache           A cache of the same shape and formats.
/// @param snapshot        Host memory, any alignment; may come from an untrusted source.
/// @param snapshot_bytes  Bytes at `snapshot`.
/// @param sequence        Receives the number of the new sequence.
/// @return SUCCESS; VERSION_MISMATCH for another version or configuration, with the field; CORRUPT_DATA; CACHE_FULL;
///         NULL_POINTER, MISALIGNED.
///
/// Async: no. Graph capture: no. Workspace: none. Deterministic: yes. Thread-safe: one call at a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mustafar_cache_restore(
    cache: *mut mustafar_cache,
    snapshot: *const c_void,
    snapshot_bytes: usize,
    sequence: *mut u64,
) -> mustafar_status {
    let body = |cache: &mut crate::Cache, _| {
        check_pointer("sequence", sequence)?;
        // SAFETY: the contract of this module.
        let from =
            unsafe { Pointers::Into(Place::Host).mem("snapshot", snapshot.cast::<u8>(), snapshot_bytes)? };
        let new = cache.restore(from.slice("snapshot", snapshot_bytes)?)?;
        // SAFETY: the contract of this module.
        unsafe { put("sequence", sequence, new.to_raw()) }
    };
    // SAFETY: the contract of this module.
    unsafe { change(cache, body) }
}
