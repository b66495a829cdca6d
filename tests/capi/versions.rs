//! Structures of callers compiled with an older or a newer header.

use crate::support::{init, ok, refused, uniform};
use mustafar::capi::context::{mustafar_context_create, mustafar_context_destroy};
use mustafar::capi::format::{
    mustafar_format, mustafar_format_layout, mustafar_format_page_bytes, mustafar_page_layout,
};
use mustafar::capi::status::mustafar_status;
use std::ptr;

/// A structure as a later version might extend it.
#[repr(C)]
struct Newer<T> {
    known: T,
    more: [u64; 3],
}

fn newer(size: usize, more: [u64; 3]) -> Newer<mustafar_format> {
    Newer { known: mustafar_format { struct_size: size, ..uniform(64, 16, 8) }, more }
}

#[test]
fn newer_structures_work_while_their_new_fields_are_unused() {
    let size = size_of::<Newer<mustafar_format>>();
    let mut bytes = 0;
    let format = newer(size, [0; 3]);
    // SAFETY: `struct_size` bytes are there; a prefix of the structure is a `mustafar_format`.
    ok(unsafe { mustafar_format_page_bytes(ptr::from_ref(&format).cast(), &mut bytes) });
    assert_eq!(bytes, 16 * (8 + 16));

    for i in 0..3 {
        let mut more = [0; 3];
        more[i] = 1 << 63;
        let format = newer(size, more);
        // SAFETY: as above.
        let status = unsafe { mustafar_format_page_bytes(ptr::from_ref(&format).cast(), &mut bytes) };
        refused(
            status,
            mustafar_status::VersionMismatch,
            &["format", "mustafar_format of 56 bytes", "32 bytes"],
        );
    }
    // What lies behind the stated size is not looked at.
    let format = newer(size_of::<mustafar_format>(), [1; 3]);
    // SAFETY: as above.
    ok(unsafe { mustafar_format_page_bytes(ptr::from_ref(&format).cast(), &mut bytes) });
}

#[test]
fn impossible_sizes_are_refused() {
    let mut bytes = 0;
    for size in [0, 8, size_of::<mustafar_format>() - 1, 4097, usize::MAX] {
        let format = newer(size, [0; 3]);
        // SAFETY: sizes beyond the structure are refused before anything is read through them.
        let status = unsafe { mustafar_format_page_bytes(ptr::from_ref(&format).cast(), &mut bytes) };
        refused(
            status,
            mustafar_status::InvalidArgument,
            &[&format!("struct_size is {size} in format"), "32 to 4096", "sizeof(mustafar_format)"],
        );
    }
    assert_eq!(bytes, 0);
}

#[test]
fn outputs_fit_what_the_caller_has() {
    let mut layout = Newer { known: init::<mustafar_page_layout>(), more: [7; 3] };
    layout.known.struct_size = size_of::<Newer<mustafar_page_layout>>();
    let format = uniform(64, 16, 8);
    // SAFETY: `struct_size` bytes are there.
    ok(unsafe { mustafar_format_layout(&format, ptr::from_mut(&mut layout).cast()) });
    assert_eq!(layout.known.page_bytes, 16 * (8 + 16));
    assert_eq!(layout.known.struct_size, size_of::<Newer<mustafar_page_layout>>(), "the caller's size stays");
    assert_eq!(layout.more, [0; 3], "fields this version lacks read as zero");

    let mut layout = mustafar_page_layout { struct_size: 16, page_bytes: 99, ..init() };
    // SAFETY: refused before it is written.
    let status = unsafe { mustafar_format_layout(&format, &mut layout) };
    refused(status, mustafar_status::InvalidArgument, &["struct_size is 16 in layout"]);
    assert_eq!(layout.page_bytes, 99);
}

#[test]
fn misaligned_structures_and_handles_are_refused() {
    let format = [0u64; 6];
    let mut bytes = 0;
    // SAFETY: inside the array; refused before it is read.
    let status = unsafe {
        let odd = format.as_ptr().cast::<u8>().add(4).cast();
        mustafar_format_page_bytes(odd, &mut bytes)
    };
    refused(status, mustafar_status::Misaligned, &["format", "multiple of 8"]);
    // SAFETY: refused before it is written.
    let status = unsafe {
        let odd = ptr::from_mut(&mut bytes).cast::<u8>().add(1).cast();
        mustafar_format_page_bytes(&uniform(64, 16, 8), odd)
    };
    refused(status, mustafar_status::Misaligned, &["bytes"]);
    // SAFETY: refused before it is used.
    let status = unsafe { mustafar_context_destroy(ptr::without_provenance_mut(3)) };
    refused(status, mustafar_status::Misaligned, &["context", "0x3"]);
    // SAFETY: as above.
    let status = unsafe { mustafar_context_create(ptr::null(), ptr::without_provenance_mut(4)) };
    refused(status, mustafar_status::Misaligned, &["context"]);
}
