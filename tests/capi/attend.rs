//! `mustafar_attend` and what it is made of: the fused answer equals the unfused one, partial answers merge to the whole,
//! the workspace is asked for without data and checked.

use crate::allocations::counted;
use crate::support::{
    Block, Context, F16, F32, blocks, init, ok, refused, tensor, tensor_mut, uniform, values,
};
use mustafar::capi::format::{mustafar_format, mustafar_format_page_bytes};
use mustafar::capi::ops::append::{mustafar_append, mustafar_append_args, mustafar_append_side};
use mustafar::capi::ops::attend::{
    mustafar_attend, mustafar_attend_args, mustafar_attend_workspace_size, mustafar_compressed,
    mustafar_dense,
};
use mustafar::capi::ops::merge::{mustafar_merge, mustafar_merge_args};
use mustafar::capi::ops::spmv::{
    mustafar_spmv_key, mustafar_spmv_key_args, mustafar_spmv_value, mustafar_spmv_value_args,
};
use mustafar::capi::pool::{mustafar_pool, mustafar_pool_mut, mustafar_sequences};
use mustafar::capi::status::mustafar_status::{
    self, BufferTooSmall, InvalidArgument, Misaligned, NullPointer, OutOfRange, VersionMismatch,
};
use mustafar::capi::tensor::mustafar_tensor;
use std::ptr;

const D: usize = 64;
const KV: usize = 2;
const Q: usize = 6;
const LEN: usize = 37;
const WINDOW: usize = 5;

/// One sequence: `LEN` tokens in pages, `WINDOW` dense, one query token. Boxed: structures point to each other.
struct Data {
    context: Context,
    format: mustafar_format,
    memory: [Vec<Block>; 2],
    pools: [mustafar_pool; 2],
    lens: [i32; 1],
    window_lens: [i32; 1],
    sequences: mustafar_sequences,
    compressed: mustafar_compressed,
    window_data: Vec<u16>,
    window_tensor: mustafar_tensor,
    window: mustafar_dense,
    q_data: Vec<u16>,
    q: mustafar_tensor,
}

impl Data {
    fn new() -> Box<Self> {
        let format = uniform(D as u32, 16, 20);
        let mut page = 0;
        // SAFETY: both pointers are to locals.
        ok(unsafe { mustafar_format_page_bytes(&format, &mut page) });
        let mut data = Box::new(Self {
            context: Context::new(),
            format,
            memory: [blocks(3 * KV * page, 0xff), blocks(3 * KV * page, 0xff)],
            pools: [init(); 2],
            lens: [LEN as i32],
            window_lens: [WINDOW as i32],
            sequences: init(),
            compressed: init(),
            window_data: values(WINDOW * KV * D),
            window_tensor: init(),
            window: init(),
            q_data: values(Q * D),
            q: init(),
        });
        let d = &mut *data;
        let x = values(LEN * KV * D);
        let slots: Vec<i64> = (0..LEN as i64).collect();
        let x_tensor = tensor(x.as_ptr().cast(), F16, [1, LEN as i64, KV as i64, D as i64]);
        for (memory, pool) in d.memory.iter_mut().zip(&mut d.pools) {
            let to = mustafar_pool_mut {
                data: memory.as_mut_ptr().cast(),
                format: &d.format,
                num_pages: 3,
                kv_heads: KV as i64,
                ..init()
            };
            let side = mustafar_append_side { x: &x_tensor, pool: &to, ..init() };
            let args = mustafar_append_args { k: &side, slots: slots.as_ptr(), ..init() };
            // SAFETY: the structures describe locals and `memory`.
            ok(unsafe { mustafar_append(d.context.0, &args, ptr::null_mut()) });
            let data = to.data.cast_const();
            *pool = mustafar_pool { data, format: &d.format, num_pages: 3, kv_heads: KV as i64, ..init() };
        }
        let lens = d.lens.as_ptr();
        d.sequences = mustafar_sequences { batch: 1, max_len: LEN as i64, lens, ..init() };
        let [k, v] = [&raw const d.pools[0], &raw const d.pools[1]];
        d.compressed = mustafar_compressed { k, v, sequences: &d.sequences, ..init() };
        let sizes = [1, WINDOW as i64, KV as i64, D as i64];
        d.window_tensor = tensor(d.window_data.as_ptr().cast(), F16, sizes);
        let [k, v] = [&raw const d.window_tensor; 2];
        d.window = mustafar_dense { k, v, lens: d.window_lens.as_ptr(), ..init() };
        d.q = tensor(d.q_data.as_ptr().cast(), F16, [1, 1, Q as i64, D as i64]);
        data
    }

    /// Attention over pages, window or both, after `change`; status, output and LSE.
    fn attend(
        &self,
        pages: bool,
        window: bool,
        change: impl FnOnce(&mut mustafar_attend_args, &mut (*mut Block, usize)),
    ) -> (mustafar_status, Vec<f32>, Vec<f32>) {
        let (mut out, mut lse) = (vec![7.0f32; Q * D], vec![7.0f32; Q]);
        let out_tensor = tensor_mut(out.as_mut_ptr().cast(), F32, [1, 1, Q as i64, D as i64]);
        let lse_tensor = tensor_mut(lse.as_mut_ptr().cast(), F32, [1, 1, Q as i64, 1]);
        let mut args = mustafar_attend_args {
            q: &self.q,
            out: &out_tensor,
            lse: &lse_tensor,
            batch: 1,
            compressed: if pages { &self.compressed } else { ptr::null() },
            window: if window { &self.window } else { ptr::null() },
            ..init()
        };
        let mut bytes = 0;
        // SAFETY: the structures describe memory of `self` and of this function.
        let status = unsafe { mustafar_attend_workspace_size(self.context.0, &args, &mut bytes) };
        if status != mustafar_status::Success {
            return (status, out, lse);
        }
        let mut workspace = blocks(bytes, 0xff);
        let mut given = (workspace.as_mut_ptr(), bytes);
        change(&mut args, &mut given);
        // SAFETY: as above; `change` only makes the call worse in ways that are refused.
        let (status, allocations) = counted(|| unsafe {
            mustafar_attend(self.context.0, &args, given.0.cast(), given.1, ptr::null_mut())
        });
        assert!(status != mustafar_status::Success || allocations == 0, "attend allocated");
        (status, out, lse)
    }
}

#[track_caller]
fn close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 1e-5, "{a} and {b}");
    }
}

#[test]
fn fused_equals_unfused() {
    let data = Data::new();
    let (status, out, lse) = data.attend(true, false, |_, _| ());
    ok(status);

    let mut scores = vec![f32::NAN; Q * LEN];
    let scores_mut = tensor_mut(scores.as_mut_ptr().cast(), F32, [1, 1, Q as i64, LEN as i64]);
    let args = mustafar_spmv_key_args {
        q: &data.q,
        pool: &data.pools[0],
        sequences: &data.sequences,
        scores: &scores_mut,
        ..init()
    };
    // SAFETY: the structures describe memory of `data` and of this function.
    ok(unsafe { mustafar_spmv_key(data.context.0, &args, ptr::null_mut()) });
    let sums: Vec<f32> = scores.chunks(LEN).map(|row| row.iter().map(|s| s.exp()).sum()).collect();
    close(&lse, &sums.iter().map(|s| s.ln()).collect::<Vec<_>>());
    for (row, sum) in scores.chunks_mut(LEN).zip(&sums) {
        row.iter_mut().for_each(|s| *s = s.exp() / sum);
    }
    let weights = tensor(scores.as_ptr().cast(), F32, [1, 1, Q as i64, LEN as i64]);
    let mut unfused = vec![f32::NAN; Q * D];
    let to = tensor_mut(unfused.as_mut_ptr().cast(), F32, [1, 1, Q as i64, D as i64]);
    let args = mustafar_spmv_value_args {
        weights: &weights,
        pool: &data.pools[1],
        sequences: &data.sequences,
        out: &to,
        ..init()
    };
    // SAFETY: as above.
    ok(unsafe { mustafar_spmv_value(data.context.0, &args, ptr::null_mut()) });
    close(&out, &unfused);
}

#[test]
fn parts_merge_to_the_whole() {
    let data = Data::new();
    let (status, whole, whole_lse) = data.attend(true, true, |_, _| ());
    ok(status);
    let (status, a, a_lse) = data.attend(true, false, |_, _| ());
    ok(status);
    let (status, b, b_lse) = data.attend(false, true, |_, _| ());
    ok(status);
    let of = |x: &[f32], dim: usize| tensor(x.as_ptr().cast(), F32, [1, 1, Q as i64, dim as i64]);
    let (mut out, mut lse) = (vec![f32::NAN; Q * D], vec![f32::NAN; Q]);
    let out_tensor = tensor_mut(out.as_mut_ptr().cast(), F32, [1, 1, Q as i64, D as i64]);
    let lse_tensor = tensor_mut(lse.as_mut_ptr().cast(), F32, [1, 1, Q as i64, 1]);
    let args = mustafar_merge_args {
        a: &of(&a, D),
        a_lse: &of(&a_lse, 1),
        b: &of(&b, D),
        b_lse: &of(&b_lse, 1),
        out: &out_tensor,
        lse: &lse_tensor,
        ..init()
    };
    // SAFETY: the structures describe locals.
    ok(unsafe { mustafar_merge(data.context.0, &args, ptr::null_mut()) });
    close(&out, &whole);
    close(&lse, &whole_lse);
}

#[test]
fn zero_options_are_the_defaults() {
    let data = Data::new();
    let (status, default, _) = data.attend(true, true, |_, _| ());
    ok(status);
    let (status, explicit, _) = data.attend(true, true, |args, _| {
        (args.scale, args.max_q_len, args.sliding_window) =
            (1.0 / (D as f32).sqrt(), 1, (LEN + WINDOW) as i64);
    });
    ok(status);
    close(&default, &explicit);
    let (status, other, _) = data.attend(true, true, |args, _| args.scale = 1.0);
    ok(status);
    assert_ne!(default, other);
    let (status, last_only, _) = data.attend(true, true, |args, _| args.sliding_window = 1);
    ok(status);
    let last: Vec<f32> = data.window_data[(WINDOW - 1) * KV * D..]
        .iter()
        .map(|bits| half::f16::from_bits(*bits).to_f32())
        .collect();
    for h in 0..Q {
        close(&last_only[h * D..][..D], &last[h / (Q / KV) * D..][..D]);
    }
}

#[test]
fn workspace_size_needs_no_data() {
    let mut data = Data::new();
    let size = |data: &Data, batch: i64| {
        let (q, out) = (
            mustafar_tensor { data: ptr::null(), tokens: batch, ..data.q },
            tensor_mut(ptr::null_mut(), F32, [1, batch, Q as i64, D as i64]),
        );
        let args = mustafar_attend_args {
            q: &q,
            out: &out,
            batch,
            compressed: &data.compressed,
            window: &data.window,
            ..init()
        };
        let mut bytes = usize::MAX;
        // SAFETY: data pointers of the structures may be null here.
        ok(unsafe { mustafar_attend_workspace_size(data.context.0, &args, &mut bytes) });
        bytes
    };
    let with_data = size(&data, 1);
    for pool in &mut data.pools {
        pool.data = ptr::null();
    }
    (data.sequences.lens, data.window.lens) = (ptr::null(), ptr::null());
    data.window_tensor.data = ptr::null();
    assert_eq!(size(&data, 1), with_data);
    assert!(with_data > 0);
    let mut last = with_data;
    for batch in [2, 3, 8, 64] {
        data.sequences.batch = batch;
        data.window_tensor.batch = batch;
        data.pools.iter_mut().for_each(|pool| pool.num_pages = 3 * batch);
        let bytes = size(&data, batch);
        assert!(bytes >= last, "{bytes} for a batch of {batch}, {last} for a smaller one");
        last = bytes;
    }
}

#[test]
fn bad_calls_leave_the_outputs_alone() {
    type Change = fn(&mut mustafar_attend_args, &mut (*mut Block, usize));
    let data = Data::new();
    let cases: [(Change, mustafar_status, &[&str]); 12] = [
        (|_, w| w.1 -= 1, BufferTooSmall, &["workspace has", "needed"]),
        (|_, w| w.0 = w.0.wrapping_byte_add(4), Misaligned, &["workspace", "16"]),
        (|_, w| w.0 = ptr::null_mut(), NullPointer, &["workspace is null"]),
        (|_, w| w.1 = usize::MAX, mustafar_status::Overflow, &["workspace"]),
        (|a, _| a.struct_size -= 8, InvalidArgument, &["struct_size", "in args"]),
        (|a, _| a.q = ptr::null(), NullPointer, &["q is null"]),
        (|a, _| a.batch = -1, InvalidArgument, &["batch is -1"]),
        (|a, _| a.batch = 2, InvalidArgument, &["batch"]),
        (|a, _| a.sliding_window = -7, InvalidArgument, &["sliding_window is -7"]),
        (|a, _| a.softcap = -1.0, InvalidArgument, &["softcap is -1"]),
        (|a, _| a.scale = f32::NAN, InvalidArgument, &["scale is NaN"]),
        (|a, _| a.split_tokens = i64::MIN, InvalidArgument, &["split_tokens is -9223372036854775808"]),
    ];
    for (change, status, parts) in cases {
        let (found, out, lse) = data.attend(true, true, change);
        refused(found, status, parts);
        assert!(out.iter().chain(&lse).all(|x| *x == 7.0), "{parts:?}: outputs were written");
    }
}

#[test]
fn bad_contents_leave_the_outputs_alone() {
    type Change = fn(&mut Data);
    let table = [0i32, 3, 1];
    let cases: [(Change, mustafar_status, &[&str]); 7] = [
        (|d| d.lens[0] = LEN as i32 + 1, OutOfRange, &["lens[0] is 38", "37"]),
        (|d| d.lens[0] = -1, OutOfRange, &["lens[0] is -1"]),
        (|d| d.window_lens[0] = 6, OutOfRange, &["window.lens[0] is 6"]),
        (|d| d.sequences.table = ptr::null(), mustafar_status::Success, &[]),
        (|d| d.sequences.reserved = 1, InvalidArgument, &["sequences.reserved is 1"]),
        (|d| d.sequences.lens_per_head = 2, InvalidArgument, &["lens_per_head is 2"]),
        (
            |d| d.compressed.struct_size = size_of::<mustafar_compressed>() + 8,
            VersionMismatch,
            &["compressed is a mustafar_compressed of 48 bytes"],
        ),
    ];
    for (change, status, parts) in cases {
        let mut data = Data::new();
        change(&mut data);
        let (found, out, _) = data.attend(true, true, |_, _| ());
        if status == mustafar_status::Success {
            ok(found);
            continue;
        }
        refused(found, status, parts);
        assert!(out.iter().all(|x| *x == 7.0), "{parts:?}: outputs were written");
    }
    let mut data = Data::new();
    data.sequences.table = table.as_ptr();
    let (found, ..) = data.attend(true, true, |_, _| ());
    refused(found, OutOfRange, &["table[1] is 3", "2"]);
}
