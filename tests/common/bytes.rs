//! Memory that starts out as poison, faults when it is read or written past its end, and notices writes before it.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};

/// Every byte of fresh memory: NaN in f16, bf16 and f32, -1 in integers, all bits set in bitmaps.
pub const POISON: u8 = 0xFF;
const CANARY: u8 = 0xA5;
/// Strictest alignment any op asks for.
const ALIGN: usize = 16;

/// `len` bytes on a 16-byte boundary that end right before an inaccessible page (up to 15 bytes before, where `len` is
/// no multiple of 16). An access past the end kills the test. The page before is inaccessible too; between it and the
/// first byte, and after the last, lie canaries that are checked when the buffer is dropped.
#[derive(Debug)]
pub struct Bytes {
    mapping: *mut u8,
    mapped: usize,
    page: usize,
    start: usize,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for Bytes {}
// SAFETY: shared access only reads.
unsafe impl Sync for Bytes {}

impl Bytes {
    pub fn poisoned(len: usize) -> Self {
        // SAFETY: sysconf has no preconditions.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).expect("a page size");
        let room = len.next_multiple_of(ALIGN);
        let inside = room.next_multiple_of(page);
        let mapped = inside + 2 * page;
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
        let mapping = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), mapped, libc::PROT_NONE, flags, -1, 0)
        };
        assert_ne!(mapping, libc::MAP_FAILED, "no memory for {len} bytes");
        let mapping = mapping.cast::<u8>();
        if inside > 0 {
            // SAFETY: the range lies inside the mapping made above.
            let result = unsafe {
                libc::mprotect(mapping.add(page).cast(), inside, libc::PROT_READ | libc::PROT_WRITE)
            };
            assert_eq!(result, 0, "mprotect of {inside} bytes");
        }
        let mut new = Self { mapping, mapped, page, start: page + inside - room, len };
        new.accessible_mut().fill(CANARY);
        new.fill(POISON);
        new
    }

    /// All bytes that may be touched: canaries, buffer, canaries.
    fn accessible_mut(&mut self) -> &mut [u8] {
        let inside = self.mapped - 2 * self.page;
        // SAFETY: the range is readable and writable, initialised by the kernel, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.add(self.page), inside) }
    }

    /// What a write just before the first byte would do, for the test of the canaries; needs `len` to leave room.
    pub fn corrupt_canary(&mut self) {
        let before = self.start - self.page - 1;
        self.accessible_mut()[before] ^= 1;
    }
}

impl Clone for Bytes {
    fn clone(&self) -> Self {
        let mut new = Self::poisoned(self.len);
        new.copy_from_slice(self);
        new
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the range is readable, initialised, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.mapping.add(self.start), self.len) }
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.add(self.start), self.len) }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        let first = self.start - self.page;
        let (len, whole) = (self.len, self.accessible_mut());
        let mut canaries = whole[..first].iter().chain(&whole[first + len..]);
        let intact = canaries.all(|&b| b == CANARY);
        // SAFETY: the mapping was made in `poisoned`, and nothing uses it after this.
        let result = unsafe { libc::munmap(self.mapping.cast(), self.mapped) };
        if !std::thread::panicking() {
            assert!(intact, "bytes outside the buffer were written");
            assert_eq!(result, 0, "munmap");
        }
    }
}
