//! The cache through C: life of sequences, what they hold, snapshots, refusals.

use crate::support::{Context, F16, F32, init, ok, refused, tensor, tensor_mut, uniform, values};
use mustafar::capi::cache::attend::{mustafar_cache_attend, mustafar_cache_attend_args};
use mustafar::capi::cache::config::{MUSTAFAR_SINKS_NONE, mustafar_cache_config};
use mustafar::capi::cache::sequence::{
    mustafar_cache_append, mustafar_cache_append_batch, mustafar_cache_len, mustafar_cache_sequence_bytes,
    mustafar_cache_sequence_create, mustafar_cache_sequence_fork, mustafar_cache_sequence_free,
    mustafar_cache_sequence_truncate,
};
use mustafar::capi::cache::snapshot::{
    mustafar_cache_restore, mustafar_cache_save, mustafar_cache_save_size,
};
use mustafar::capi::cache::{
    mustafar_cache, mustafar_cache_bytes, mustafar_cache_bytes_info, mustafar_cache_create,
    mustafar_cache_destroy,
};
use mustafar::capi::format::mustafar_format;
use mustafar::capi::status::mustafar_status::{
    self, BufferTooSmall, CacheFull, CorruptData, InvalidArgument, NullPointer, OutOfRange, Unsupported,
    VersionMismatch,
};
use std::ptr;

const D: usize = 64;
const KV: usize = 2;
const Q: usize = 4;

struct Cache(*mut mustafar_cache);

impl Drop for Cache {
    fn drop(&mut self) {
        // SAFETY: made by `create`, ended here only.
        ok(unsafe { mustafar_cache_destroy(self.0) });
    }
}

/// 1 layer, R = 8, groups of 16, 2 sinks, room for 128 compressed tokens and 2 sequences; after `change`.
fn create(
    change: impl FnOnce(&mut mustafar_cache_config, &mut mustafar_format),
) -> Result<Cache, mustafar_status> {
    let context = Context::new();
    let mut k = uniform(D as u32, 16, 20);
    let mut config = mustafar_cache_config {
        max_tokens: 128,
        layers: 1,
        q_heads: Q as u32,
        kv_heads: KV as u32,
        max_sequences: 2,
        window: 8,
        group: 16,
        sinks: 2,
        ..init()
    };
    change(&mut config, &mut k);
    (config.k, config.v) = (&k, &k);
    let mut cache = ptr::null_mut();
    // SAFETY: structures and output are locals.
    match unsafe { mustafar_cache_create(context.0, &config, &mut cache) } {
        mustafar_status::Success => Ok(Cache(cache)),
        status => {
            assert!(cache.is_null());
            Err(status)
        }
    }
}

impl Cache {
    fn good() -> Self {
        create(|_, _| ()).unwrap()
    }

    fn sequence(&self) -> u64 {
        let mut id = u64::MAX;
        // SAFETY: a live handle, an output on the stack.
        ok(unsafe { mustafar_cache_sequence_create(self.0, &mut id) });
        id
    }

    fn append(&self, sequence: u64, tokens: usize) -> mustafar_status {
        let x = values(tokens * KV * D);
        let t = tensor(x.as_ptr().cast(), F16, [1, tokens as i64, KV as i64, D as i64]);
        // SAFETY: a live handle; the tensor describes `x`.
        unsafe { mustafar_cache_append(self.0, 0, sequence, &t, &t, ptr::null_mut()) }
    }

    fn len(&self, sequence: u64) -> (i64, i64) {
        let (mut tokens, mut compressed) = (-1, -1);
        // SAFETY: a live handle, outputs on the stack.
        ok(unsafe { mustafar_cache_len(self.0, 0, sequence, &mut tokens, &mut compressed) });
        (tokens, compressed)
    }

    fn attend(&self, sequences: &[u64], layer: u32) -> (mustafar_status, Vec<f32>) {
        let n = sequences.len();
        let q = values(Q * D).repeat(n);
        let mut out = vec![7.0f32; n * Q * D];
        let q_tensor = tensor(q.as_ptr().cast(), F16, [1, n as i64, Q as i64, D as i64]);
        let out_tensor = tensor_mut(out.as_mut_ptr().cast(), F32, [1, n as i64, Q as i64, D as i64]);
        let args = mustafar_cache_attend_args {
            sequences: sequences.as_ptr(),
            num_sequences: n as i64,
            q: &q_tensor,
            out: &out_tensor,
            layer,
            ..init()
        };
        // SAFETY: a live handle; structures describe locals.
        let status = unsafe { mustafar_cache_attend(self.0, &args, ptr::null_mut()) };
        (status, out)
    }

    fn save(&self, sequence: u64) -> Vec<u8> {
        let (mut size, mut written) = (0, 0);
        // SAFETY: a live handle, an output on the stack.
        ok(unsafe { mustafar_cache_save_size(self.0, sequence, &mut size) });
        let mut buffer = vec![0xa5u8; size + 8];
        let to = buffer.as_mut_ptr().cast();
        // SAFETY: the buffer is as long as stated.
        refused(
            unsafe { mustafar_cache_save(self.0, sequence, to, size - 1, &mut written) },
            BufferTooSmall,
            &["buffer", &size.to_string()],
        );
        assert!(written == 0 && buffer.iter().all(|b| *b == 0xa5));
        // SAFETY: as above.
        ok(unsafe { mustafar_cache_save(self.0, sequence, to, size, &mut written) });
        assert!(written == size && buffer[size..].iter().all(|b| *b == 0xa5));
        buffer.truncate(size);
        buffer
    }

    fn restore(&self, snapshot: &[u8]) -> (mustafar_status, u64) {
        let mut id = u64::MAX;
        // SAFETY: the length is the slice's.
        let status =
            unsafe { mustafar_cache_restore(self.0, snapshot.as_ptr().cast(), snapshot.len(), &mut id) };
        (status, id)
    }
}

#[test]
fn sequences_live_and_end() {
    let cache = Cache::good();
    let a = cache.sequence();
    ok(cache.append(a, 50));
    // 2 sinks, 8 to 23 in the window: two groups of 16 are compressed.
    assert_eq!(cache.len(a), (50, 32));
    let mut b = u64::MAX;
    // SAFETY: a live handle, an output on the stack.
    ok(unsafe { mustafar_cache_sequence_fork(cache.0, a, &mut b) });
    assert_eq!(cache.len(b), (50, 32));
    let (status, out) = cache.attend(&[a, b], 0);
    ok(status);
    assert_eq!(out[..Q * D], out[Q * D..], "a fork answers as its origin");
    assert!(out.iter().all(|x| x.is_finite()) && out.iter().any(|x| *x != 0.0));

    let mut c = 99;
    // SAFETY: as above.
    let status = unsafe { mustafar_cache_sequence_create(cache.0, &mut c) };
    refused(status, CacheFull, &["sequences", "free: 0"]);
    assert_eq!(c, 99);

    // SAFETY: a live handle.
    ok(unsafe { mustafar_cache_sequence_truncate(cache.0, b, 40) });
    assert_eq!((cache.len(a), cache.len(b)), ((50, 32), (40, 32)));
    // SAFETY: as above.
    let status = unsafe { mustafar_cache_sequence_truncate(cache.0, b, 41) };
    refused(status, OutOfRange, &["41", "40"]);
    // SAFETY: as above.
    let status = unsafe { mustafar_cache_sequence_truncate(cache.0, b, -1) };
    refused(status, InvalidArgument, &["len is -1"]);

    // SAFETY: as above.
    ok(unsafe { mustafar_cache_sequence_free(cache.0, a) });
    // SAFETY: as above.
    let status = unsafe { mustafar_cache_sequence_free(cache.0, a) };
    refused(status, InvalidArgument, &["sequence"]);
    assert_ne!(cache.sequence(), a, "numbers are not used again");
}

#[test]
fn bytes_are_those_of_the_format() {
    let cache = Cache::good();
    let a = cache.sequence();
    ok(cache.append(a, 50));
    let token = 2 * KV * D * 2;
    let mut whole = init::<mustafar_cache_bytes_info>();
    // SAFETY: a live handle, an output on the stack.
    ok(unsafe { mustafar_cache_bytes(cache.0, &mut whole) });
    assert_eq!((whole.dense_equivalent, whole.window), (50 * token, 18 * token));
    // 2 pages of 16 tokens, K and V, 2 heads: 16 * (8 + 40) bytes each.
    assert_eq!(whole.pages, 2 * 2 * KV * 16 * 48);
    assert!(whole.allocated > whole.pages + whole.window);
    let mut one = init::<mustafar_cache_bytes_info>();
    // SAFETY: as above.
    ok(unsafe { mustafar_cache_sequence_bytes(cache.0, a, &mut one) });
    assert_eq!((one.dense_equivalent, one.pages, one.window), (50 * token, whole.pages, whole.window));
}

#[test]
fn snapshots_come_back_and_foreign_ones_do_not() {
    let cache = Cache::good();
    let a = cache.sequence();
    ok(cache.append(a, 50));
    let snapshot = cache.save(a);
    let other = Cache::good();
    let (status, b) = other.restore(&snapshot);
    ok(status);
    assert_eq!(other.len(b), (50, 32));
    assert_eq!(cache.attend(&[a], 0).1, other.attend(&[b], 0).1);

    for cut in [0, 1, 7, snapshot.len() / 2, snapshot.len() - 1] {
        let (status, id) = other.restore(&snapshot[..cut]);
        refused(status, CorruptData, &["snapshot"]);
        assert_eq!(id, u64::MAX);
    }
    let mut damaged = snapshot.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 4;
    refused(other.restore(&damaged).0, CorruptData, &["snapshot"]);
    let foreign = create(|config, _| config.sinks = 1).unwrap();
    refused(foreign.restore(&snapshot).0, VersionMismatch, &["sinks"]);
    assert_eq!(other.len(b), (50, 32));
}

#[test]
fn bad_configurations_are_refused() {
    type Change = fn(&mut mustafar_cache_config, &mut mustafar_format);
    let cases: [(Change, mustafar_status, &[&str]); 13] = [
        (|c, _| c.struct_size = 8, InvalidArgument, &["struct_size is 8 in config"]),
        (|c, _| c.center = 2, InvalidArgument, &["config.center is 2", "1 (median)"]),
        (|c, _| c.scaled_from = 9, InvalidArgument, &["config.scaled_from is 9", "2 (bf16)"]),
        (|c, _| c.scaled_from = 3, InvalidArgument, &["scaled_from is f32", "f16, bf16"]),
        (|c, _| c.reserved = 1, InvalidArgument, &["config.reserved is 1"]),
        (|c, _| c.max_tokens = -5, InvalidArgument, &["config.max_tokens is -5"]),
        (|c, _| c.layers = 0, InvalidArgument, &["layers is 0"]),
        (|c, _| c.kv_heads = 0, InvalidArgument, &["kv_heads is 0"]),
        (|c, _| c.q_heads = 5, InvalidArgument, &["q_heads is 5"]),
        (|c, _| c.group = 24, InvalidArgument, &["group is 24", "16"]),
        (|_, k| k.keep = 65, InvalidArgument, &["keep is 65"]),
        (|_, k| (k.rows, k.keep, k.capacity) = (1, 0, 99), InvalidArgument, &["uniform"]),
        (|_, k| k.head_dim = 100, Unsupported, &["head_dim is 100"]),
    ];
    for (change, status, parts) in cases {
        let Err(found) = create(change) else { panic!("{parts:?} was accepted") };
        refused(found, status, parts);
    }
    // Zero is the default, and no sinks at all can be asked for.
    let all_dense = create(|c, _| (c.window, c.group, c.sinks) = (0, 0, MUSTAFAR_SINKS_NONE)).unwrap();
    let a = all_dense.sequence();
    ok(all_dense.append(a, 287));
    assert_eq!(all_dense.len(a), (287, 0), "R = 32 and a group of 256");
    // Pages of 8-bit values are made from f16 unless something else is asked for.
    let in_8_bits = create(|_, k| k.value_type = 17).unwrap();
    let a = in_8_bits.sequence();
    ok(in_8_bits.append(a, 50));
    assert_eq!(in_8_bits.len(a), (50, 32));
    let from_bf16 = create(|c, k| (c.scaled_from, k.value_type) = (2, 16)).unwrap();
    let a = from_bf16.sequence();
    refused(from_bf16.append(a, 1), InvalidArgument, &["bf16"]);
}

#[test]
fn bad_calls_change_nothing() {
    let cache = Cache::good();
    let a = cache.sequence();
    ok(cache.append(a, 30));
    refused(cache.append(a + 1, 1), InvalidArgument, &["sequence"]);
    refused(cache.append(a, 500), CacheFull, &["pages"]);
    refused(cache.attend(&[a, a], 0).0, InvalidArgument, &["sequences"]);
    let (status, out) = cache.attend(&[a], 3);
    refused(status, OutOfRange, &["layer", "3"]);
    assert!(out.iter().all(|x| *x == 7.0));

    let x = values(KV * D);
    let t = tensor(x.as_ptr().cast(), F16, [1, 1, KV as i64, D as i64]);
    // SAFETY: null is refused before use; the tensor describes `x`.
    let status = unsafe { mustafar_cache_append(cache.0, 0, a, &t, ptr::null(), ptr::null_mut()) };
    refused(status, NullPointer, &["v is null"]);
    // SAFETY: as above.
    let status = unsafe { mustafar_cache_append(ptr::null_mut(), 0, a, &t, &t, ptr::null_mut()) };
    refused(status, NullPointer, &["cache is null"]);
    // SAFETY: as above.
    let status = unsafe { mustafar_cache_append_batch(cache.0, 0, ptr::null(), 1, &t, &t, ptr::null_mut()) };
    refused(status, NullPointer, &["sequences is null"]);
    // SAFETY: as above.
    let status = unsafe { mustafar_cache_append_batch(cache.0, 0, &a, -1, &t, &t, ptr::null_mut()) };
    refused(status, InvalidArgument, &["num_sequences is -1"]);
    // SAFETY: as above.
    ok(unsafe { mustafar_cache_append_batch(cache.0, 0, &a, 1, &t, &t, ptr::null_mut()) });
    assert_eq!(cache.len(a).0, 31);
}
