//! Memory that is asked for while the block before it is computed.
//!
//! Pages lie anywhere, and a hardware prefetcher stops at the end of each: without asking ahead, every page starts
//! with misses of cache and TLB that nothing hides.

use super::BLOCK;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

const LINE: usize = 64;

/// Rows of a block between two calls of [`Ahead::step`].
pub(super) const STEP_ROWS: usize = 4;

/// Byte ranges that the next block will read.
///
/// Invariant: ranges below `len` are initialised.
#[derive(Debug)]
pub(crate) struct Ahead<'a> {
    ranges: [MaybeUninit<(*const u8, *const u8)>; BLOCK],
    len: usize,
    lines: usize,
    next: usize,
    at: *const u8,
    end: *const u8,
    _life: PhantomData<&'a [u8]>,
}

impl<'a> Ahead<'a> {
    /// Nothing to ask for.
    pub(crate) fn new() -> Self {
        let nowhere = std::ptr::null();
        let ranges = [MaybeUninit::uninit(); BLOCK];
        Self { ranges, len: 0, lines: 0, next: 0, at: nowhere, end: nowhere, _life: PhantomData }
    }

    /// Adds a range; those beyond [`BLOCK`] are left out.
    pub(crate) fn push<T>(&mut self, memory: &'a [T]) {
        if self.len < BLOCK && !memory.is_empty() {
            let ends = memory.as_ptr_range();
            self.ranges[self.len].write((ends.start.cast(), ends.end.cast()));
            self.len += 1;
            self.lines += size_of_val(memory) / LINE + 1;
        }
    }

    /// Asks for the next lines: so many that a full block's steps cover everything.
    #[inline(always)]
    pub(super) fn step(&mut self) {
        for _ in 0..self.lines.div_ceil(BLOCK / STEP_ROWS) {
            if self.at >= self.end {
                if self.next == self.len {
                    return;
                }
                // SAFETY: `next < len`, and ranges below `len` are initialised.
                (self.at, self.end) = unsafe { self.ranges[self.next].assume_init() };
                self.next += 1;
            }
            prefetch(self.at);
            self.at = self.at.wrapping_add(LINE);
        }
    }

    /// Asks for everything at once.
    pub(crate) fn all(mut self) {
        while self.next < self.len || self.at < self.end {
            self.step();
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch never faults, whatever the address; SSE belongs to x86-64.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: *const u8) {}
