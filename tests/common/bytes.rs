//! Aligned memory that starts out as poison and notices writes around it.

use std::ops::{Deref, DerefMut};

/// Every byte of fresh memory: NaN in f16, bf16 and f32, -1 in integers, all bits set in bitmaps.
pub const POISON: u8 = 0xFF;
const CANARY: u8 = 0xA5;
/// Also the number of canary bytes on either side. Strictest alignment any op asks for is 16.
const ALIGN: usize = 64;

/// `len` bytes on a 64-byte boundary with canaries before and after, checked when dropped.
#[derive(Debug)]
pub struct Bytes {
    raw: Vec<u8>,
    start: usize,
    len: usize,
}

impl Bytes {
    pub fn poisoned(len: usize) -> Self {
        let mut raw = vec![CANARY; len + 3 * ALIGN];
        let start = ALIGN + (ALIGN - (raw.as_ptr() as usize + ALIGN) % ALIGN) % ALIGN;
        raw[start..start + len].fill(POISON);
        Self { raw, start, len }
    }

    /// What a write one past the end would do; for the test of the canaries.
    pub fn corrupt_canary(&mut self) {
        self.raw[self.start + self.len] ^= 1;
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
        &self.raw[self.start..self.start + self.len]
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.raw[self.start..self.start + self.len]
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let outside = self.raw[..self.start].iter().chain(&self.raw[self.start + self.len..]);
            assert!(outside.copied().all(|b| b == CANARY), "bytes outside the buffer were written");
        }
    }
}
