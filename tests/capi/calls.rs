//! Results through the C functions equal those of the Rust ones.

use crate::allocations::counted;
use crate::support::{
    Block, Context, F16, F32, blocks, init, ok, refused, tensor, tensor_mut, uniform, values,
};
use mustafar::capi::format::{mustafar_format, mustafar_format_page_bytes};
use mustafar::capi::ops::append::{mustafar_append, mustafar_append_args, mustafar_append_side};
use mustafar::capi::ops::compress::{mustafar_compress, mustafar_compress_args};
use mustafar::capi::ops::decompress::{mustafar_decompress, mustafar_decompress_args};
use mustafar::capi::ops::prune::{mustafar_prune, mustafar_prune_args};
use mustafar::capi::ops::validate::{mustafar_validate, mustafar_validate_args};
use mustafar::capi::pool::{mustafar_pool, mustafar_pool_mut, mustafar_sequences};
use mustafar::capi::status::mustafar_status;
use std::ffi::c_void;
use std::ptr;

const TOKENS: usize = 24;
const HEADS: usize = 2;
const D: usize = 64;
const PAGES: i64 = 3;

/// The op succeeded without allocating.
#[track_caller]
fn ok_in_place(op: impl FnOnce() -> mustafar_status) {
    let (status, allocations) = counted(op);
    ok(status);
    assert_eq!(allocations, 0, "an op allocated");
}

fn page_bytes(format: &mustafar_format) -> usize {
    let mut bytes = 0;
    // SAFETY: both pointers are valid.
    ok(unsafe { mustafar_format_page_bytes(format, &mut bytes) });
    bytes
}

/// The `keep` largest of each row, as `mustafar_prune` leaves them.
fn pruned(context: &Context, x: &[u16], keep: u32) -> Vec<u16> {
    let mut x = x.to_vec();
    let sizes = [1, (x.len() / HEADS / D) as i64, HEADS as i64, D as i64];
    let t = tensor_mut(x.as_mut_ptr().cast(), F16, sizes);
    let args = mustafar_prune_args { x: &t, keep, ..init() };
    // SAFETY: the tensor describes `x`.
    ok_in_place(|| unsafe { mustafar_prune(context.0, &args, ptr::null_mut()) });
    x
}

fn sequences(lens: &[i32], table: &[i32]) -> mustafar_sequences {
    mustafar_sequences {
        batch: lens.len() as i64,
        max_len: TOKENS as i64,
        table: table.as_ptr(),
        lens: lens.as_ptr(),
        ..init()
    }
}

/// Dense form of `len` tokens of one sequence.
fn dense(context: &Context, pool: &mustafar_pool, table: &[i32], len: i32) -> Vec<u16> {
    let mut out = vec![0xffffu16; TOKENS * HEADS * D];
    let lens = [len];
    let sequences = sequences(&lens, table);
    let out_tensor = tensor_mut(out.as_mut_ptr().cast(), F16, [1, TOKENS as i64, HEADS as i64, D as i64]);
    let args = mustafar_decompress_args { pool, sequences: &sequences, out: &out_tensor, ..init() };
    // SAFETY: every structure describes memory of this function or of the caller.
    ok_in_place(|| unsafe { mustafar_decompress(context.0, &args, ptr::null_mut()) });
    out
}

#[test]
fn k_and_v_pages_share_slots() {
    let context = Context::new();
    let (k_format, v_format) = (uniform(D as u32, 16, 20), uniform(D as u32, 16, 33));
    let (k_bytes, v_bytes) = (page_bytes(&k_format), page_bytes(&v_format));
    // Slot: [K page | V page] of each head, heads next to each other.
    let head_stride = k_bytes + v_bytes;
    let page_stride = HEADS * head_stride;
    let mut memory = blocks(PAGES as usize * page_stride, 0xa5);
    let base: *mut c_void = memory.as_mut_ptr().cast();
    let pool = |format, offset: usize| mustafar_pool_mut {
        // SAFETY: inside the slot.
        data: unsafe { base.byte_add(offset) },
        format,
        num_pages: PAGES,
        kv_heads: HEADS as i64,
        page_stride: page_stride as i64,
        head_stride: head_stride as i64,
        ..init()
    };
    let (k_pool, v_pool) = (pool(&k_format, 0), pool(&v_format, k_bytes));
    let k = values(TOKENS * HEADS * D);
    // V is laid out [heads, tokens, dim]: strides do the rest.
    let v = values(TOKENS * HEADS * D + 1)[1..].to_vec();
    let sizes = [1, TOKENS as i64, HEADS as i64, D as i64];
    let k_tensor = tensor(k.as_ptr().cast(), F16, sizes);
    let mut v_tensor = tensor(v.as_ptr().cast(), F16, sizes);
    (v_tensor.token_stride, v_tensor.head_stride) = (D as i64, (TOKENS * D) as i64);
    v_tensor.batch_stride = v.len() as i64;
    let k_side = mustafar_append_side { x: &k_tensor, pool: &k_pool, ..init() };
    let v_side = mustafar_append_side { x: &v_tensor, pool: &v_pool, ..init() };
    // Tokens go to pages 2 and 0; token 5 is skipped, so its slot keeps what it had.
    let table = [2, 0];
    let slots: Vec<i64> = (0..TOKENS)
        .map(|t| if t == 5 { -1 } else { i64::from(table[t / 16]) * 16 + (t % 16) as i64 })
        .collect();
    let args = mustafar_append_args { k: &k_side, v: &v_side, slots: slots.as_ptr(), ..init() };
    // SAFETY: every structure describes memory of this function.
    ok_in_place(|| unsafe { mustafar_append(context.0, &args, ptr::null_mut()) });

    let read = |pool: &mustafar_pool_mut| mustafar_pool {
        data: pool.data,
        format: pool.format,
        num_pages: pool.num_pages,
        kv_heads: pool.kv_heads,
        page_stride: pool.page_stride,
        head_stride: pool.head_stride,
        ..init()
    };
    // Token 5 was never stored: stop before it, and look at the second page on its own.
    let expected = pruned(&context, &k, 20);
    let found = dense(&context, &read(&k_pool), &table, 5);
    assert_eq!(found[..5 * HEADS * D], expected[..5 * HEADS * D]);
    let found = dense(&context, &read(&k_pool), &[0, 2], 8);
    assert_eq!(found[..8 * HEADS * D], expected[16 * HEADS * D..]);
    assert!(found[8 * HEADS * D..].iter().all(|x| *x == 0xffff), "tokens past the length are not written");

    let mut v_tokens_first = Vec::new();
    for t in 0..TOKENS {
        for h in 0..HEADS {
            v_tokens_first.extend_from_slice(&v[(h * TOKENS + t) * D..][..D]);
        }
    }
    let expected = pruned(&context, &v_tokens_first, 33);
    let found = dense(&context, &read(&v_pool), &[0, 2], 8);
    assert_eq!(found[..8 * HEADS * D], expected[16 * HEADS * D..]);

    // Page 1 was no one's: untouched.
    let bytes = bytes_of(&memory);
    assert!(bytes[page_stride..2 * page_stride].iter().all(|b| *b == 0xa5));
}

fn bytes_of(memory: &[Block]) -> Vec<u8> {
    memory.iter().flat_map(|block| block.0).collect()
}

#[test]
fn ragged_pages_hold_any_pattern_or_say_how_much_too_much() {
    let context = Context::new();
    let x = pruned(&context, &values(TOKENS * HEADS * D), 30);
    let kept = x.iter().filter(|bits| **bits & 0x7fff != 0).count();
    assert_eq!(kept, TOKENS * HEADS * 30, "the values have no zeros of their own");
    let sizes = [1, TOKENS as i64, HEADS as i64, D as i64];
    let x_tensor = tensor(x.as_ptr().cast(), F16, sizes);
    let pages = [1i32, 0];
    let mut needed = [0u32; 4];
    // The first page needs 16 * 30 values.
    for (capacity, fits) in [(480, true), (479, false)] {
        let format = mustafar_format {
            rows: 1,
            value_type: F16,
            head_dim: D as u32,
            page_tokens: 16,
            capacity,
            ..init()
        };
        let mut memory = blocks(2 * HEADS * page_bytes(&format), 0xa5);
        let pool = mustafar_pool_mut {
            data: memory.as_mut_ptr().cast(),
            format: &format,
            num_pages: 2,
            kv_heads: HEADS as i64,
            ..init()
        };
        let args = mustafar_compress_args {
            x: &x_tensor,
            pool: &pool,
            pages: pages.as_ptr(),
            needed: needed.as_mut_ptr(),
            ..init()
        };
        // SAFETY: every structure describes memory of this function.
        let (status, allocations) =
            counted(|| unsafe { mustafar_compress(context.0, &args, ptr::null_mut()) });
        // The list in which it looks for repeated pages.
        assert!(!fits || allocations <= 1, "compress allocated {allocations} times");
        assert_eq!(needed, [480, 480, 240, 240]);
        if !fits {
            refused(status, mustafar_status::PageOverflow, &["480", "479", "1 too few"]);
            assert!(bytes_of(&memory).iter().all(|b| *b == 0xa5), "no page was written");
            continue;
        }
        ok(status);
        let pool = mustafar_pool {
            data: memory.as_ptr().cast(),
            format: &format,
            num_pages: 2,
            kv_heads: HEADS as i64,
            ..init()
        };
        assert_eq!(dense(&context, &pool, &pages, TOKENS as i32), x);
        let lens = [TOKENS as i32];
        let sequences = sequences(&lens, &pages);
        let args = mustafar_validate_args { pool: &pool, sequences: &sequences, ..init() };
        // SAFETY: as above.
        ok_in_place(|| unsafe { mustafar_validate(context.0, &args, ptr::null_mut()) });
        // One bit too many in row 3 of page 1, head 0.
        memory[page_bytes(&format) * HEADS / 16 + 3 * 8 / 16].0[3 * 8 % 16] ^= 1;
        let pool = mustafar_pool { data: memory.as_ptr().cast(), ..pool };
        let args = mustafar_validate_args { pool: &pool, ..args };
        // SAFETY: as above.
        let status = unsafe { mustafar_validate(context.0, &args, ptr::null_mut()) };
        refused(status, mustafar_status::CorruptData, &["row 3"]);
    }
}

#[test]
fn masks_and_weights_reach_the_op() {
    let context = Context::new();
    let mut x = values(2 * D);
    // Weights that make the first 4 channels win whatever they hold.
    let weights: Vec<f32> = (0..D).map(|c| if c < 4 { 1.0 } else { 0.0 }).collect();
    let mut mask = [0u8; 2 * D / 8];
    let t = tensor_mut(x.as_mut_ptr().cast(), F16, [1, 2, 1, D as i64]);
    let args =
        mustafar_prune_args { x: &t, keep: 4, weights: weights.as_ptr(), mask: mask.as_mut_ptr(), ..init() };
    // SAFETY: the structures describe locals of the sizes the op expects.
    ok(unsafe { mustafar_prune(context.0, &args, ptr::null_mut()) });
    for row in mask.chunks(D / 8) {
        assert_eq!(row, [0b1111, 0, 0, 0, 0, 0, 0, 0]);
    }
    let args = mustafar_prune_args { selection: 3, ..args };
    // SAFETY: as above.
    let status = unsafe { mustafar_prune(context.0, &args, ptr::null_mut()) };
    refused(status, mustafar_status::InvalidArgument, &["selection is 3"]);
    let args = mustafar_prune_args { selection: 0, dropped: 2, ..args };
    // SAFETY: as above.
    let status = unsafe { mustafar_prune(context.0, &args, ptr::null_mut()) };
    refused(status, mustafar_status::InvalidArgument, &["dropped is 2"]);
    let f32_tensor = tensor_mut(x.as_mut_ptr().cast(), F32, [1, 1, 1, D as i64]);
    let args = mustafar_prune_args { x: &f32_tensor, dropped: 0, mask: ptr::null_mut(), ..args };
    // SAFETY: as above; half as many elements of twice the size.
    let status = unsafe { mustafar_prune(context.0, &args, ptr::null_mut()) };
    refused(status, mustafar_status::Unsupported, &["f32"]);
}
