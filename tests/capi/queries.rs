//! Functions that need no data: versions, formats, keep counts, contexts.

use crate::support::{Context, init, ok, refused, uniform};
use mustafar::capi::context::{
    mustafar_context_backend, mustafar_context_config, mustafar_context_create, mustafar_context_destroy,
};
use mustafar::capi::format::{
    mustafar_format, mustafar_format_layout, mustafar_format_page_bytes, mustafar_format_validate_page,
    mustafar_keep_for_sparsity, mustafar_page_layout, mustafar_reference_keep,
};
use mustafar::capi::ops::advice::{mustafar_advice, mustafar_attend_advice};
use mustafar::capi::status::mustafar_status;
use mustafar::capi::version::{mustafar_version, mustafar_version_number};
use std::ffi::CStr;
use std::ptr;

#[test]
fn version_is_the_crates() {
    // SAFETY: a static string.
    let text = unsafe { CStr::from_ptr(mustafar_version()) }.to_str().unwrap();
    assert_eq!(text, env!("CARGO_PKG_VERSION"));
    let parts: Vec<u32> = text.split('.').map(|part| part.parse().unwrap()).collect();
    assert_eq!(mustafar_version_number(), parts[0] * 1_000_000 + parts[1] * 1_000 + parts[2]);
}

#[test]
fn page_sizes_are_those_of_the_format() {
    let mut bytes = 0;
    // 64 tokens of 16 B bitmap and 39 values of 2 B.
    let format = uniform(128, 64, 39);
    // SAFETY: both pointers are to locals.
    ok(unsafe { mustafar_format_page_bytes(&format, &mut bytes) });
    assert_eq!(bytes, 64 * (16 + 78));
    // page_tokens 0 is 64.
    let format = uniform(128, 0, 39);
    // SAFETY: as above.
    ok(unsafe { mustafar_format_page_bytes(&format, &mut bytes) });
    assert_eq!(bytes, 64 * (16 + 78));

    let ragged =
        mustafar_format { rows: 1, value_type: 2, head_dim: 64, page_tokens: 32, capacity: 1000, ..init() };
    let mut layout = init::<mustafar_page_layout>();
    // SAFETY: as above.
    ok(unsafe { mustafar_format_layout(&ragged, &mut layout) });
    // Bitmap 32 * 8; 33 offsets of 2 B padded to 80.
    assert_eq!((layout.bitmap_bytes, layout.offsets_offset, layout.values_offset), (256, 256, 336));
    assert_eq!((layout.page_bytes, layout.dense_bytes), (336 + 2000, 32 * 64 * 2));
    assert_eq!((layout.capacity, layout.alignment, layout.scales_offset), (1000, 16, 0));

    let scaled = mustafar_format { value_type: 17, ..uniform(128, 16, 39) };
    // SAFETY: as above.
    ok(unsafe { mustafar_format_layout(&scaled, &mut layout) });
    // Bitmap 16 * 16; 16 scales of 2 B; 16 * 39 values of 1 B.
    assert_eq!((layout.scales_offset, layout.values_offset, layout.page_bytes), (256, 288, 912));
    assert_eq!(layout.dense_bytes, 16 * 128 * 2);
}

#[test]
fn bad_formats_are_refused() {
    let good = uniform(128, 64, 39);
    let cases = [
        (mustafar_format { keep: 129, ..good }, mustafar_status::InvalidArgument, "keep is 129"),
        (mustafar_format { keep: 0, ..good }, mustafar_status::InvalidArgument, "keep is 0"),
        (
            mustafar_format { value_type: 0, ..good },
            mustafar_status::InvalidArgument,
            "format.value_type is 0",
        ),
        (
            mustafar_format { value_type: 77, ..good },
            mustafar_status::InvalidArgument,
            "format.value_type is 77",
        ),
        (mustafar_format { value_type: 3, ..good }, mustafar_status::InvalidArgument, "16 (e4m3), 17 (int8)"),
        (mustafar_format { head_dim: 80, ..good }, mustafar_status::Unsupported, "head_dim is 80"),
        (mustafar_format { head_dim: u32::MAX, ..good }, mustafar_status::Unsupported, "4294967295"),
        (mustafar_format { page_tokens: 8, ..good }, mustafar_status::Unsupported, "page_tokens is 8"),
        (mustafar_format { rows: 2, ..good }, mustafar_status::InvalidArgument, "format.rows is 2"),
        (mustafar_format { capacity: 1, ..good }, mustafar_status::InvalidArgument, "format.capacity is 1"),
        (mustafar_format { rows: 1, ..good }, mustafar_status::InvalidArgument, "format.keep is 39"),
        (
            mustafar_format { rows: 1, keep: 0, capacity: 8193, ..good },
            mustafar_status::InvalidArgument,
            "capacity is 8193",
        ),
    ];
    for (format, status, part) in cases {
        let mut bytes = 12345;
        // SAFETY: both pointers are to locals.
        refused(unsafe { mustafar_format_page_bytes(&format, &mut bytes) }, status, &[part]);
        assert_eq!(bytes, 12345, "outputs stay as they are");
    }
    // SAFETY: null is refused before use.
    let status = unsafe { mustafar_format_page_bytes(&good, ptr::null_mut()) };
    refused(status, mustafar_status::NullPointer, &["bytes"]);
}

#[test]
fn keep_counts() {
    let mut keep = 0;
    for (sparsity, expected, reference) in [(0.5, 64, 65), (0.7, 39, 40), (0.0, 128, 128)] {
        // SAFETY: the output is a local.
        ok(unsafe { mustafar_keep_for_sparsity(128, sparsity, &mut keep) });
        assert_eq!(keep, expected);
        // SAFETY: as above.
        ok(unsafe { mustafar_reference_keep(128, sparsity, &mut keep) });
        assert_eq!(keep, reference);
    }
    for sparsity in [1.0, -0.1, f64::NAN, f64::INFINITY] {
        keep = 7;
        // SAFETY: as above.
        let status = unsafe { mustafar_keep_for_sparsity(128, sparsity, &mut keep) };
        refused(status, mustafar_status::InvalidArgument, &["sparsity"]);
        assert_eq!(keep, 7);
    }
}

const CPU: u32 = 0;
const CUDA: u32 = 1;

#[test]
fn advice_needs_no_gpu() {
    let mut advice = init::<mustafar_advice>();
    for (backend, value_type, keep, speeds, bytes) in [
        (CUDA, 1, 39, 1..=1, 188.0),
        (CUDA, 1, 105, 2..=2, 452.0),
        (CUDA, 1, 128, 3..=3, 544.0),
        (CUDA, 17, 128, 1..=1, 292.0),
        (CPU, 1, 39, 1..=3, 188.0),
    ] {
        let format = mustafar_format { value_type, ..uniform(128, 64, keep) };
        // SAFETY: all pointers are to locals.
        ok(unsafe { mustafar_attend_advice(backend, &format, &format, &mut advice) });
        assert!(speeds.contains(&advice.speed) && advice.reserved == 0, "{value_type}, keep {keep}");
        assert_eq!((advice.bytes_per_token, advice.dense_bytes_per_token), (bytes, 512.0));
        // SAFETY: a static string.
        let reason = unsafe { CStr::from_ptr(advice.reason) }.to_str().unwrap();
        assert_eq!(reason.contains("store int8"), advice.speed == 3 && backend == CUDA, "{reason}");
    }
}

#[test]
fn advice_refuses_what_attend_would() {
    let good = uniform(128, 64, 39);
    for (backend, v, status, part) in [
        (2, good, mustafar_status::InvalidArgument, "backend is 2; allowed: 0 (CPU), 1 (CUDA)"),
        (CPU, uniform(128, 64, 129), mustafar_status::InvalidArgument, "keep is 129"),
        (CPU, uniform(128, 16, 39), mustafar_status::InvalidArgument, "v.page_tokens is 16; allowed: 64"),
        (
            CPU,
            mustafar_format { struct_size: 8, ..good },
            mustafar_status::InvalidArgument,
            "struct_size is 8 in v",
        ),
        (
            CUDA,
            mustafar_format { value_type: 17, ..good },
            mustafar_status::Unsupported,
            "v.value_type is int8",
        ),
        (CUDA, uniform(64, 64, 39), mustafar_status::Unsupported, "v.head_dim is 64; supported: 128"),
    ] {
        let mut advice = mustafar_advice { speed: 77, ..init() };
        // SAFETY: all pointers are to locals.
        refused(unsafe { mustafar_attend_advice(backend, &good, &v, &mut advice) }, status, &[part]);
        assert_eq!(advice.speed, 77, "outputs stay as they are");
    }
    // SAFETY: pointers are null, which is refused before use, or to locals.
    let call = |k, v, advice| unsafe { mustafar_attend_advice(CPU, k, v, advice) };
    refused(call(ptr::null(), &good, &mut init()), mustafar_status::NullPointer, &["k is null"]);
    refused(call(&good, ptr::null(), &mut init()), mustafar_status::NullPointer, &["v is null"]);
    refused(call(&good, &good, ptr::null_mut()), mustafar_status::NullPointer, &["advice is null"]);
    let mut unset = mustafar_advice { struct_size: 0, ..init() };
    refused(
        call(&good, &good, &mut unset),
        mustafar_status::InvalidArgument,
        &["struct_size is 0 in advice"],
    );
}

#[test]
fn damaged_pages_are_found() {
    let format = uniform(64, 16, 8);
    let mut bytes = 0;
    // SAFETY: both pointers are to locals.
    ok(unsafe { mustafar_format_page_bytes(&format, &mut bytes) });
    let mut page = vec![0u8; bytes];
    for row in 0..16 {
        page[row * 8] = 0xff;
    }
    // SAFETY: the length is the page's.
    let check = |page: &[u8], rows| unsafe {
        mustafar_format_validate_page(&format, page.as_ptr().cast(), page.len(), rows)
    };
    ok(check(&page, 16));
    page[5 * 8 + 3] = 1;
    refused(check(&page, 16), mustafar_status::CorruptData, &["row 5", "9 bits"]);
    ok(check(&page, 5));
    refused(check(&page, 17), mustafar_status::InvalidArgument, &["rows is 17"]);
    refused(check(&page[1..], 5), mustafar_status::BufferTooSmall, &["page", &bytes.to_string()]);
    // SAFETY: null is refused before use.
    let status = unsafe { mustafar_format_validate_page(&format, ptr::null(), bytes, 1) };
    refused(status, mustafar_status::NullPointer, &["page"]);
}

#[test]
fn contexts_are_made_and_checked() {
    let context = Context::new();
    let mut backend = 9;
    // SAFETY: the handle is live, the output a local.
    ok(unsafe { mustafar_context_backend(context.0, &mut backend) });
    assert_eq!(backend, 0);
    // SAFETY: destroying nothing.
    ok(unsafe { mustafar_context_destroy(ptr::null_mut()) });

    let good = init::<mustafar_context_config>();
    for (config, part) in [
        (mustafar_context_config { backend: 9, ..good }, "config.backend is 9"),
        (mustafar_context_config { threads: 1025, ..good }, "threads is 1025"),
        (mustafar_context_config { device: 1, ..good }, "config.device is 1"),
        (mustafar_context_config { reserved: 1, ..good }, "config.reserved is 1"),
    ] {
        let mut context = ptr::null_mut();
        // SAFETY: both pointers are to locals.
        let status = unsafe { mustafar_context_create(&config, &mut context) };
        refused(status, mustafar_status::InvalidArgument, &[part]);
        assert!(context.is_null());
    }
    // SAFETY: null is refused before use.
    let status = unsafe { mustafar_context_create(&good, ptr::null_mut()) };
    refused(status, mustafar_status::NullPointer, &["context"]);
}
