//! Whatever is wrong with a call: a status of its own, a message with argument, value and what is allowed, and outputs
//! as they were.

use crate::support::{Block, Context, F16, blocks, init, ok, refused, tensor, uniform, values};
use mustafar::capi::context::mustafar_context;
use mustafar::capi::format::mustafar_format;
use mustafar::capi::ops::append::{mustafar_append, mustafar_append_args, mustafar_append_side};
use mustafar::capi::pool::{mustafar_center, mustafar_pool_mut};
use mustafar::capi::status::mustafar_status::{
    self, InvalidArgument, Misaligned, NullPointer, OutOfRange, Overflow, Unsupported, VersionMismatch,
};
use mustafar::capi::tensor::mustafar_tensor;
use std::ffi::c_void;
use std::ptr;

/// A good append of keys. Boxed, so that the structures can point to each other.
struct Call {
    context: *const mustafar_context,
    stream: *mut c_void,
    args: mustafar_append_args,
    side: mustafar_append_side,
    x: mustafar_tensor,
    pool: mustafar_pool_mut,
    format: mustafar_format,
    center: mustafar_center,
    slots: Vec<i64>,
    data: Vec<u16>,
    memory: Vec<Block>,
    weights: Vec<f32>,
}

/// The good call after `change`; its status, and whether the pages stayed as they were.
fn append(context: &Context, change: impl FnOnce(&mut Call)) -> (mustafar_status, bool) {
    // 3 tokens, 2 heads, D = 64; 4 pages of 16 tokens that keep 8.
    let mut call = Box::new(Call {
        context: context.0,
        stream: ptr::null_mut(),
        args: init(),
        side: init(),
        x: init(),
        pool: init(),
        format: uniform(64, 16, 8),
        center: init(),
        slots: vec![0, 17, 63],
        data: values(3 * 2 * 64),
        memory: blocks(4 * 2 * 16 * (8 + 16), 0xa5),
        weights: vec![1.0; 2 * 64],
    });
    let c = &mut *call;
    c.x = tensor(c.data.as_ptr().cast(), F16, [1, 3, 2, 64]);
    c.pool = mustafar_pool_mut {
        data: c.memory.as_mut_ptr().cast(),
        format: &c.format,
        num_pages: 4,
        kv_heads: 2,
        ..init()
    };
    c.side = mustafar_append_side { x: &c.x, pool: &c.pool, ..init() };
    c.args = mustafar_append_args { k: &c.side, slots: c.slots.as_ptr(), ..init() };
    change(c);
    // SAFETY: `change` only makes the call worse in ways that are refused before memory is touched.
    let status = unsafe { mustafar_append(c.context, &c.args, c.stream) };
    (status, c.memory.iter().all(|block| block.0 == [0xa5; 16]))
}

/// Every row: what is done to the good call, the status, parts of the message.
type Case = (fn(&mut Call), mustafar_status, &'static [&'static str]);

#[track_caller]
fn check(cases: &[Case]) {
    let context = Context::new();
    for (i, (change, status, parts)) in cases.iter().enumerate() {
        let (found, untouched) = append(&context, change);
        assert_ne!(found, mustafar_status::Success, "case {i}, {parts:?}, was accepted");
        refused(found, *status, parts);
        assert!(untouched, "case {i}, {parts:?}, wrote to the pages");
    }
    // The process goes on: the same context still serves good calls.
    let (status, untouched) = append(&context, |_| ());
    ok(status);
    assert!(!untouched);
}

#[test]
fn pointers() {
    check(&[
        (|c| c.context = ptr::null(), NullPointer, &["context is null"]),
        (|c| c.context = c.context.wrapping_byte_add(1), Misaligned, &["context"]),
        (|c| c.args.k = ptr::null(), InvalidArgument, &["k and v"]),
        (|c| c.args.k = c.args.k.wrapping_byte_add(2), Misaligned, &["k is 0x", "multiple of 8"]),
        (|c| c.side.x = ptr::null(), NullPointer, &["k.x is null"]),
        (|c| c.x.data = ptr::null(), NullPointer, &["k.x.data is null"]),
        (|c| c.x.data = c.x.data.wrapping_byte_add(1), Misaligned, &["k.x", "multiple of 2"]),
        (|c| c.side.pool = ptr::null(), NullPointer, &["k.pool is null"]),
        (|c| c.pool.data = ptr::null_mut(), NullPointer, &["k.pool.data is null"]),
        (|c| c.pool.data = c.pool.data.wrapping_byte_add(8), Misaligned, &["k.pool", "multiple of 16"]),
        (|c| c.pool.format = ptr::null(), NullPointer, &["k.pool.format is null"]),
        (|c| c.args.slots = ptr::null(), NullPointer, &["slots is null"]),
        (|c| c.args.slots = c.args.slots.wrapping_byte_add(4), Misaligned, &["slots", "multiple of 8"]),
        (
            |c| c.side.weights = c.weights.as_ptr().wrapping_byte_add(2),
            Misaligned,
            &["k.weights", "multiple of 4"],
        ),
        (
            |c| {
                c.center.batch = 1;
                c.side.center = &c.center;
            },
            NullPointer,
            &["center.values is null"],
        ),
        (|c| c.x.data = ptr::without_provenance(usize::MAX - 127), Overflow, &["k.x.data does not fit"]),
        (|c| c.stream = ptr::without_provenance_mut(64), InvalidArgument, &["stream is 0x40", "null"]),
    ]);
}

#[test]
fn structures() {
    check(&[
        (|c| c.args.struct_size = 0, InvalidArgument, &["struct_size is 0 in args"]),
        (|c| c.side.struct_size -= 8, InvalidArgument, &["struct_size is 32 in k", "40 to 4096"]),
        (|c| c.x.struct_size = 79, InvalidArgument, &["struct_size is 79 in k.x", "mustafar_tensor"]),
        (|c| c.pool.struct_size = 1 << 40, InvalidArgument, &["struct_size is 1099511627776 in k.pool"]),
        (|c| c.format.struct_size = 31, InvalidArgument, &["struct_size is 31 in k.pool.format"]),
        // The side lies before the tensor, whose bytes are not zero: a newer caller that uses a newer field.
        (
            |c| c.side.struct_size = size_of::<mustafar_append_side>() + 8,
            VersionMismatch,
            &["k is a mustafar_append_side of 48 bytes", "40 bytes"],
        ),
        (|c| c.x.reserved = 5, InvalidArgument, &["k.x.reserved is 5", "0"]),
    ]);
}

#[test]
fn types_and_formats() {
    check(&[
        (|c| c.x.dtype = 0, InvalidArgument, &["k.x.dtype is 0", "1 (f16)"]),
        (|c| c.x.dtype = 99, InvalidArgument, &["k.x.dtype is 99"]),
        (|c| c.x.dtype = 2, InvalidArgument, &["bf16"]),
        (|c| c.format.value_type = 3, InvalidArgument, &["format.value_type is 3", "17 (int8)"]),
        (|c| c.format.keep = 65, InvalidArgument, &["keep is 65", "1 to head_dim (64)"]),
        (|c| c.format.keep = 0, InvalidArgument, &["keep is 0"]),
        (|c| c.format.head_dim = 72, Unsupported, &["head_dim is 72", "64, 96, 128, 256"]),
        (|c| c.format.page_tokens = 17, Unsupported, &["page_tokens is 17"]),
        (|c| c.format.rows = 4, InvalidArgument, &["format.rows is 4"]),
        (
            |c| (c.format.rows, c.format.keep, c.format.capacity) = (1, 0, 8),
            InvalidArgument,
            &["ragged", "uniform"],
        ),
    ]);
}

#[test]
fn sizes_and_strides() {
    check(&[
        (|c| c.x.batch = 2, InvalidArgument, &["batch", "2"]),
        (|c| c.x.tokens = -3, InvalidArgument, &["k.x.tokens is -3", "0 or more"]),
        (|c| c.x.heads = i64::MIN, InvalidArgument, &["k.x.heads is -9223372036854775808"]),
        (|c| c.x.heads = 3, InvalidArgument, &["heads"]),
        (|c| c.x.dim = 128, InvalidArgument, &["128", "64"]),
        (|c| c.x.tokens = i64::MAX, Overflow, &["does not fit in 64 bits"]),
        (|c| c.x.tokens = i64::MAX / 128, Overflow, &["does not fit in 64 bits"]),
        (
            |c| (c.x.token_stride, c.x.head_stride) = (-128, 64),
            InvalidArgument,
            &["k.x.token_stride is -128", "0 or more"],
        ),
        (
            |c| (c.x.token_stride, c.x.head_stride) = (i64::MAX, i64::MAX),
            Overflow,
            &["k.x does not fit in 64 bits"],
        ),
        (|c| c.pool.num_pages = -1, InvalidArgument, &["k.pool.num_pages is -1"]),
        (|c| c.pool.num_pages = i64::MAX, Overflow, &["k.pool"]),
        (|c| c.pool.kv_heads = i64::MAX, Overflow, &["page_stride"]),
        (|c| c.pool.page_stride = -768, InvalidArgument, &["k.pool.page_stride is -768"]),
        (|c| c.pool.head_stride = -16, InvalidArgument, &["k.pool.head_stride is -16"]),
        (
            |c| (c.pool.page_stride, c.pool.head_stride) = (760, 384),
            Misaligned,
            &["k.pool", "multiple of 16"],
        ),
        (
            |c| (c.pool.page_stride, c.pool.head_stride) = (384, 384),
            InvalidArgument,
            &["k.pool", "page_stride 384", "do not overlap"],
        ),
    ]);
}

#[test]
fn contents() {
    check(&[
        (|c| c.slots[1] = 64, OutOfRange, &["slots[1] is 64", "63"]),
        (|c| c.slots[2] = -2, OutOfRange, &["slots[2] is -2", "-1"]),
        (|c| c.slots[0] = i64::MAX, OutOfRange, &["slots[0] is 9223372036854775807"]),
        (
            |c| {
                c.weights[70] = -1.0;
                c.side.weights = c.weights.as_ptr();
            },
            InvalidArgument,
            &["weights", "-1"],
        ),
        (
            |c| {
                c.weights[127] = f32::NAN;
                c.side.weights = c.weights.as_ptr();
            },
            InvalidArgument,
            &["weights", "NaN"],
        ),
        (
            |c| {
                (c.center.batch, c.center.values) = (2, c.weights.as_ptr());
                c.weights.resize(2 * 2 * 64, 0.0);
                c.center.values = c.weights.as_ptr();
                c.side.center = &c.center;
            },
            InvalidArgument,
            &["sequence"],
        ),
    ]);
}

#[test]
fn nothing_to_do_needs_no_memory() {
    let context = Context::new();
    let (status, untouched) = append(&context, |c| {
        c.x.tokens = 0;
        c.x.data = ptr::null();
        c.args.slots = ptr::null();
    });
    ok(status);
    assert!(untouched);
}
