//! A GPU for the tests, if there is one, and memory on it.
#![allow(unsafe_code, clippy::print_stderr)]

use super::bytes::POISON;
use cudarc::driver::{result, sys};
use mustafar::{Context, Error, Mem, MemMut, Place, Stream};
use std::sync::{Mutex, MutexGuard, OnceLock};

/// The CUDA backend on device 0. Without a GPU the tests say so and go on without it, unless MUSTAFAR_REQUIRE_GPU=1.
pub fn cuda() -> Option<&'static Context> {
    static CONTEXT: OnceLock<Option<Context>> = OnceLock::new();
    let open = || match Context::cuda(0) {
        Ok(context) => Some(context),
        Err(Error::Unavailable { reason }) if std::env::var("MUSTAFAR_REQUIRE_GPU").as_deref() != Ok("1") => {
            eprintln!("SKIPPED on CUDA: {reason}");
            None
        }
        Err(e) => panic!("no CUDA backend: {e}"),
    };
    CONTEXT.get_or_init(open).as_ref()
}

/// Makes the primary context of device 0 current where nothing is, as an application does, so that the functions here
/// can allocate.
pub fn make_current() {
    if result::ctx::get_current().expect("a driver").is_none() {
        make_primary_current();
    }
}

pub fn make_primary_current() {
    static PRIMARY: OnceLock<usize> = OnceLock::new();
    let primary = *PRIMARY.get_or_init(|| {
        let device = result::device::get(0).expect("a device");
        // SAFETY: the driver gave the handle; the context is kept for the whole process.
        unsafe { result::primary_ctx::retain(device) }.expect("a primary context").addr()
    });
    // SAFETY: retained above and never released.
    unsafe { result::ctx::set_current(primary as sys::CUcontext) }.expect("a current context");
}

/// A stream of its own that does not wait for the default stream.
#[derive(Debug)]
pub struct TestStream(sys::CUstream);

impl TestStream {
    pub fn new() -> Self {
        make_current();
        Self(result::stream::create(result::stream::StreamKind::NonBlocking).expect("a stream"))
    }

    pub fn stream(&self) -> Stream {
        // SAFETY: the stream lives as long as `self`, which tests keep until they have synchronised.
        unsafe { Stream::from_raw(self.0.cast()) }
    }

    pub fn raw(&self) -> sys::CUstream {
        self.0
    }

    pub fn synchronize(&self) {
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.0) }.expect("the stream ends without a fault");
    }
}

impl Drop for TestStream {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}

/// Device memory that holds a copy of host memory, on an address that is as little aligned as that is.
#[derive(Debug)]
pub struct DeviceCopy {
    base: sys::CUdeviceptr,
    address: u64,
    bytes: usize,
}

impl DeviceCopy {
    pub fn new(host: &[u8]) -> Self {
        let new = Self::allocated(host.len(), host.as_ptr().addr() % 16);
        new.write_at(0, host);
        new
    }

    /// `bytes` bytes of poison.
    pub fn poisoned(bytes: usize) -> Self {
        let new = Self::allocated(bytes, 0);
        new.poison();
        new
    }

    fn allocated(bytes: usize, shift: usize) -> Self {
        make_current();
        // SAFETY: the size is not 0; freed in `drop`.
        let base = unsafe { result::malloc_sync(shift + bytes.max(1)) }.expect("device memory");
        Self { base, address: base + shift as u64, bytes }
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn mem(&self) -> Mem<'static> {
        // SAFETY: device memory of this size; tests keep the value until the stream has ended.
        unsafe { Mem::from_raw(self.address, self.bytes, Place::Device) }
    }

    pub fn mem_mut(&self) -> MemMut<'static> {
        // SAFETY: as in `mem`.
        unsafe { MemMut::from_raw(self.address, self.bytes, Place::Device) }
    }

    pub fn read(&self) -> Vec<u8> {
        let mut host = vec![0u8; self.bytes];
        self.read_at(0, &mut host);
        host
    }

    pub fn read_at(&self, at: usize, host: &mut [u8]) {
        assert!(at + host.len() <= self.bytes);
        if !host.is_empty() {
            // SAFETY: the allocation holds as many bytes.
            unsafe { result::memcpy_dtoh_sync(host, self.address + at as u64) }
                .expect("a copy from the device");
        }
    }

    pub fn write_at(&self, at: usize, host: &[u8]) {
        assert!(at + host.len() <= self.bytes);
        if !host.is_empty() {
            // SAFETY: the allocation holds as many bytes.
            unsafe { result::memcpy_htod_sync(self.address + at as u64, host) }
                .expect("a copy to the device");
            wait_for_default_stream();
        }
    }

    /// Fills it with poison.
    pub fn poison(&self) {
        if self.bytes > 0 {
            // SAFETY: the allocation holds as many bytes.
            unsafe { result::memset_d8_sync(self.address, POISON, self.bytes) }.expect("poison");
            wait_for_default_stream();
        }
    }
}

/// Copies from pageable memory and memset may end before their effect is there, and test streams do not wait for it.
fn wait_for_default_stream() {
    // SAFETY: null is the default stream.
    unsafe { result::stream::synchronize(std::ptr::null_mut()) }.expect("the default stream ends");
}

impl Drop for DeviceCopy {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed once. After a fault nothing can be freed any more.
        let _ = unsafe { result::free_sync(self.base) };
    }
}

/// Tests of one process share one context, and so its error counts: one op at a time.
pub fn exclusive() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
