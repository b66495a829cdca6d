//! Which CUDA context is current on the calling thread, before and after.

use crate::gpu;
use crate::step::{PACKED, State, Step, alone};
use cudarc::driver::{result, sys};
use mustafar::{Context, Stream};

fn current() -> Option<sys::CUcontext> {
    result::ctx::get_current().unwrap()
}

#[test]
fn a_thread_without_a_context_stays_without() {
    let Some((context, _lock)) = gpu() else { return };
    let step = Step::new(context, &State::random(1, [100, 64, 3]), PACKED);
    let submitted = std::thread::scope(|scope| {
        let submit = || {
            assert_eq!(current(), None);
            let own = Context::cuda(0).unwrap();
            assert_eq!(current(), None, "after making a context");
            step.submit(&own, Stream::NONE);
            assert_eq!(current(), None, "after an op");
            assert!(own.take_device_errors().unwrap().is_empty());
            assert_eq!(current(), None, "after reading errors");
            drop(own);
            assert_eq!(current(), None, "after dropping the context");
        };
        scope.spawn(submit).join()
    });
    submitted.unwrap();
}

#[test]
fn a_context_of_the_callers_is_used_and_stays_current() {
    let Some((primary, _lock)) = gpu() else { return };
    let state = State::random(2, [100, 64, 700]);
    let expected = alone(primary, &state, PACKED);
    let mine = || {
        let device = result::device::get(0).unwrap();
        // SAFETY: the device exists; the context, which becomes current, is destroyed below.
        let handle = unsafe { result::ctx::create_v4(std::ptr::null_mut(), 0, device) }.unwrap();
        assert_eq!(current(), Some(handle));
        let context = Context::cuda(0).unwrap();
        assert_eq!(current(), Some(handle), "after making a context");
        // Memory of this context, which kernels of the primary one could not use.
        let step = Step::new(&context, &state, PACKED);
        step.submit(&context, Stream::NONE);
        assert_eq!(current(), Some(handle), "after an op");
        result::ctx::synchronize().unwrap();
        assert!(step.results().same_bits(&expected));

        // From a thread where nothing is current.
        step.poison();
        std::thread::scope(|scope| scope.spawn(|| step.submit(&context, Stream::NONE)).join()).unwrap();
        result::ctx::synchronize().unwrap();
        assert!(step.results().same_bits(&expected), "from another thread");

        // With another context current: that one stays.
        crate::common::device::make_primary_current();
        let other = current();
        step.submit(&context, Stream::NONE);
        assert_eq!(current(), other);
        // SAFETY: alive until below.
        unsafe { result::ctx::set_current(handle) }.unwrap();
        result::ctx::synchronize().unwrap();
        drop((step, context));
        // SAFETY: nothing of the context is in use any more.
        unsafe { sys::cuCtxDestroy_v2(handle) }.result().unwrap();
    };
    // On a thread of its own, so that the others keep theirs.
    std::thread::scope(|scope| scope.spawn(mine).join()).unwrap();
}
