//! What the C API has for CUDA, as far as it can be seen on any machine: contexts, device errors, records.

use crate::support::{Block, Context, blocks, init, message, ok, refused, uniform};
use mustafar::capi::context::{
    mustafar_context_backend, mustafar_context_config, mustafar_context_create,
    mustafar_context_take_device_errors, mustafar_device_errors,
};
use mustafar::capi::format::mustafar_format;
use mustafar::capi::ops::validate::{mustafar_validate, mustafar_validate_args, mustafar_validate_record};
use mustafar::capi::pool::{mustafar_pool, mustafar_sequences};
use mustafar::capi::status::mustafar_status::{
    self, CorruptData, InvalidArgument, Misaligned, NullPointer, Success, Unavailable,
};
use std::ptr;

/// A CUDA context on a device, or why there is none.
fn create(device: u32) -> Result<Context, mustafar_status> {
    let config = mustafar_context_config { backend: 1, device, ..init() };
    let mut context = ptr::null_mut();
    // SAFETY: both pointers are to locals.
    let status = unsafe { mustafar_context_create(&config, &mut context) };
    assert_eq!(status == Success, !context.is_null(), "a handle exactly if it worked");
    if status == Success { Ok(Context(context)) } else { Err(status) }
}

#[test]
fn contexts_exist_or_say_why_not() {
    match create(0) {
        Ok(context) => {
            let mut backend = 9;
            // SAFETY: the handle is live, the output a local.
            ok(unsafe { mustafar_context_backend(context.0, &mut backend) });
            assert_eq!(backend, 1);
            assert_eq!(taken(&context), [0; 4]);
            assert_eq!(create(9999).err(), Some(InvalidArgument));
            assert!(message().contains("device is 9999"), "{}", message());
        }
        Err(status) => {
            let message = message();
            assert_eq!(status, Unavailable, "{message}");
            assert!(message.starts_with("backend unavailable: "), "{message}");
            assert_ne!(std::env::var("MUSTAFAR_REQUIRE_GPU").as_deref(), Ok("1"), "{message}");
        }
    }
}

#[test]
fn configurations_that_make_no_sense_are_refused_on_every_machine() {
    let good = mustafar_context_config { backend: 1, ..init() };
    for (config, part) in [
        (
            mustafar_context_config { threads: 1, ..good },
            "config.threads is 1; allowed: 0 on the CUDA backend",
        ),
        (mustafar_context_config { backend: 2, ..good }, "config.backend is 2; allowed: 0 (CPU), 1 (CUDA)"),
        (mustafar_context_config { reserved: 1, ..good }, "config.reserved is 1"),
    ] {
        let mut context = ptr::null_mut();
        // SAFETY: both pointers are to locals.
        let status = unsafe { mustafar_context_create(&config, &mut context) };
        refused(status, InvalidArgument, &[part]);
        assert!(context.is_null());
    }
}

/// append, compress, read, reserved.
fn taken(context: &Context) -> [u32; 4] {
    let mut errors = mustafar_device_errors { append: 7, compress: 7, read: 7, reserved: 7, ..init() };
    // SAFETY: the handle is live, the output a local.
    ok(unsafe { mustafar_context_take_device_errors(context.0, &mut errors) });
    assert_eq!(errors.struct_size, size_of::<mustafar_device_errors>());
    [errors.append, errors.compress, errors.read, errors.reserved]
}

#[test]
fn the_cpu_has_no_device_errors() {
    let context = Context::new();
    assert_eq!(taken(&context), [0; 4]);
    // SAFETY: each is refused before it is used.
    unsafe {
        let status = mustafar_context_take_device_errors(context.0, ptr::null_mut());
        refused(status, NullPointer, &["errors is null"]);
        let mut errors = init::<mustafar_device_errors>();
        let status = mustafar_context_take_device_errors(ptr::null(), &mut errors);
        refused(status, NullPointer, &["context is null"]);
        let odd = ptr::from_mut(&mut errors).wrapping_byte_add(4);
        refused(mustafar_context_take_device_errors(context.0, odd), Misaligned, &["errors"]);
        errors.struct_size = 8;
        let status = mustafar_context_take_device_errors(context.0, &mut errors);
        refused(status, InvalidArgument, &["struct_size is 8 in errors (mustafar_device_errors)"]);
    }
}

const MAX_LEN: u64 = 40; // 3 pages of 16 tokens
const HEADS: u64 = 2;

fn pool(format: &mustafar_format) -> mustafar_pool {
    mustafar_pool { format, num_pages: 9, kv_heads: HEADS as i64, ..init() }
}

fn record(format: &mustafar_format, record: u64) -> mustafar_status {
    // SAFETY: the pool is a local whose memory is not looked at.
    unsafe { mustafar_validate_record(record, &pool(format), MAX_LEN as i64) }
}

#[test]
fn records_become_the_status_of_the_check() {
    let (uniform, ragged) = (
        uniform(64, 16, 8),
        mustafar_format { rows: 1, value_type: 1, head_dim: 64, page_tokens: 16, capacity: 300, ..init() },
    );
    // Sequence 5, head 1, its page 2, row 7.
    let row = ((5 * HEADS + 1) * 3 + 2) * 16 + 7;
    let place = "sequence 5, head 1, its page 2, row 7: ";
    for (format, rule, parts) in [
        (&uniform, 1, ["sequence 5, head 1: ", "length outside 0 to 40"]),
        (&uniform, 2, [place, "page number outside 0 to 8"]),
        (&uniform, 3, [place, "bits set in the bitmap differ from keep"]),
        (&ragged, 3, [place, "bits set in the bitmap differ from the row's span of values"]),
        (&ragged, 4, [place, "the first offset is not 0"]),
        (&ragged, 5, [place, "the row ends past the capacity of 300 values"]),
    ] {
        refused(record(format, 8 * row + rule), CorruptData, &parts);
    }
    ok(record(&uniform, u64::MAX));
    for rule in [0, 6, 7] {
        let found = format!("record is {}", 8 * row + rule);
        refused(record(&ragged, 8 * row + rule), InvalidArgument, &[&found, "what a validate has written"]);
    }
}

#[test]
fn records_need_their_pool() {
    let format = uniform(64, 16, 8);
    let good = pool(&format);
    // SAFETY: each is refused before it is used.
    unsafe {
        refused(mustafar_validate_record(3, ptr::null(), 40), NullPointer, &["pool is null"]);
        refused(mustafar_validate_record(3, &good, -1), InvalidArgument, &["max_len is -1"]);
        let no_format = mustafar_pool { format: ptr::null(), ..good };
        refused(mustafar_validate_record(3, &no_format, 40), NullPointer, &["pool.format is null"]);
        let odd = ptr::from_ref(&good).wrapping_byte_add(1);
        refused(mustafar_validate_record(3, odd, 40), Misaligned, &["pool"]);
    }
}

#[test]
fn the_cpu_has_no_records() {
    let context = Context::new();
    let format = uniform(64, 16, 8);
    let memory: Vec<Block> = blocks(9 * 2 * 16 * (8 + 16), 0);
    let pool = mustafar_pool { data: memory.as_ptr().cast(), ..pool(&format) };
    let lens = [0i32];
    let sequences = mustafar_sequences { batch: 1, max_len: 40, lens: lens.as_ptr(), ..init() };
    let mut record = u64::MAX;
    let args = mustafar_validate_args { pool: &pool, sequences: &sequences, record: &mut record, ..init() };
    // SAFETY: every structure describes memory of this function.
    let status = unsafe { mustafar_validate(context.0, &args, ptr::null_mut()) };
    refused(status, InvalidArgument, &["record is given", "absent on the CPU backend"]);
    assert_eq!(record, u64::MAX);
    let args = mustafar_validate_args { record: ptr::null_mut(), ..args };
    // SAFETY: as above.
    ok(unsafe { mustafar_validate(context.0, &args, ptr::null_mut()) });
}
