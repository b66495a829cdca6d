//! The boundary every call goes through, and the message of the last error.

use crate::capi::status::mustafar_status;
use crate::error::{Error, Result};
use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static LAST_MESSAGE: RefCell<CString> = RefCell::default();
}

/// Runs the body of a C function: errors become a status and this thread's message, and so does a panic, which
/// must not unwind into C.
pub(super) fn boundary(body: impl FnOnce() -> Result<()>) -> mustafar_status {
    // Unwind safety: a panic is a defect of ours; what the body was writing is documented as undefined then, and
    // objects stay memory-safe because nothing here relies on their invariants for that.
    let outcome = catch_unwind(AssertUnwindSafe(body));
    let error = match outcome {
        Ok(Ok(())) => return mustafar_status::Success,
        Ok(Err(error)) => error,
        Err(payload) => Error::Internal { reason: panic_reason(payload) },
    };
    set_message(&error.to_string());
    mustafar_status::from(&error)
}

fn panic_reason(payload: Box<dyn Any + Send>) -> String {
    let payload = match payload.downcast::<String>() {
        Ok(text) => return *text,
        Err(payload) => payload,
    };
    match payload.downcast::<&'static str>() {
        Ok(text) => (*text).to_owned(),
        Err(payload) => {
            // Dropping a payload of unknown type could panic again, this time outside `catch_unwind`.
            std::mem::forget(payload);
            "panic without a message".to_owned()
        }
    }
}

fn set_message(text: &str) {
    let text = CString::new(text.replace('\0', "?")).unwrap_or_default();
    // A thread that is being torn down has no message any more; the status still says what happened.
    let _ = LAST_MESSAGE.try_with(|last| *last.borrow_mut() = text);
}

/// What went wrong in the last call of this thread that did not return MUSTAFAR_STATUS_SUCCESS: the argument, the
/// value found and what is allowed, as one line of UTF-8 without a final newline.
///
/// @return Never NULL; empty if no call of this thread has failed. Valid until the next failing call of this
///         thread, or its end; copy it to keep it. A successful call leaves it alone.
///
/// Async: no. Graph capture: yes. Workspace: none. Deterministic: yes. Thread-safe: yes.
#[unsafe(no_mangle)]
pub extern "C" fn mustafar_last_error_message() -> *const c_char {
    LAST_MESSAGE.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn message() -> String {
        // SAFETY: never null, and nothing fails on this thread before the copy is made.
        unsafe { CStr::from_ptr(mustafar_last_error_message()) }.to_string_lossy().into_owned()
    }

    /// As an exported function is called: through a C function pointer, which aborts if a panic gets past.
    fn call(f: extern "C" fn() -> mustafar_status) -> mustafar_status {
        f()
    }

    extern "C" fn panics_with_text() -> mustafar_status {
        boundary(|| panic!("index {} of {}", 7, 3))
    }

    extern "C" fn panics_with_static_text() -> mustafar_status {
        boundary(|| panic!("no such thing"))
    }

    extern "C" fn panics_with_hostile_payload() -> mustafar_status {
        struct Hostile;
        impl Drop for Hostile {
            fn drop(&mut self) {
                panic!("panics while being dropped");
            }
        }
        boundary(|| std::panic::panic_any(Hostile))
    }

    #[test]
    fn a_panic_becomes_a_status_and_the_thread_goes_on() {
        assert_eq!(call(panics_with_text), mustafar_status::Internal);
        assert_eq!(message(), "internal error: index 7 of 3");
        assert_eq!(call(panics_with_static_text), mustafar_status::Internal);
        assert_eq!(message(), "internal error: no such thing");
        assert_eq!(call(panics_with_hostile_payload), mustafar_status::Internal);
        assert_eq!(message(), "internal error: panic without a message");
        assert_eq!(boundary(|| Ok(())), mustafar_status::Success);
        assert_eq!(message(), "internal error: panic without a message");
    }

    #[test]
    fn messages_belong_to_their_thread() {
        boundary(|| Err(Error::Overflow { argument: "here" }));
        std::thread::spawn(|| {
            assert_eq!(message(), "");
            boundary(|| Err(Error::Overflow { argument: "there" }));
            assert_eq!(message(), "there does not fit in 64 bits");
        })
        .join()
        .expect("the thread does not panic");
        assert_eq!(message(), "here does not fit in 64 bits");
    }

    #[test]
    fn a_nul_inside_a_message_does_not_cut_it() {
        boundary(|| Err(Error::Internal { reason: "a\0b".to_owned() }));
        assert_eq!(message(), "internal error: a?b");
    }
}
