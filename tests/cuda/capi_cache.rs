//! The cache through the C ABI on device memory, against the same calls on the CPU backend.

use crate::common::device::DeviceCopy;
use crate::common::{Rng, Tolerance, assert_close};
use crate::support::{F16, F32, init, ok, tensor, tensor_mut, uniform};
use mustafar::capi::cache::attend::{mustafar_cache_attend, mustafar_cache_attend_args};
use mustafar::capi::cache::config::mustafar_cache_config;
use mustafar::capi::cache::sequence::{
    mustafar_cache_append, mustafar_cache_append_with_queries, mustafar_cache_len, mustafar_cache_queries,
    mustafar_cache_sequence_create, mustafar_cache_sequence_fork,
};
use mustafar::capi::cache::snapshot::{
    mustafar_cache_restore, mustafar_cache_save, mustafar_cache_save_size,
};
use mustafar::capi::cache::{mustafar_cache, mustafar_cache_create, mustafar_cache_destroy};
use mustafar::capi::context::{
    mustafar_context, mustafar_context_config, mustafar_context_create, mustafar_context_destroy,
};
use mustafar::{DType, Strategy};
use std::ptr;

const D: usize = 128;
const KV: usize = 2;
const Q: usize = 8;

/// A cache of one layer, R = 16, groups of 64, 4 sinks, and where its tensors lie.
struct Decode {
    context: *mut mustafar_context,
    cache: *mut mustafar_cache,
    on_device: bool,
}

impl Decode {
    fn new(backend: u32, [k_strategy, v_strategy]: [Strategy; 2]) -> Self {
        let format = uniform(D as u32, 64, 50);
        let config = mustafar_cache_config {
            k: &format,
            v: &format,
            k_strategy: k_strategy as u32,
            v_strategy: v_strategy as u32,
            max_tokens: 1024,
            layers: 1,
            q_heads: Q as u32,
            kv_heads: KV as u32,
            max_sequences: 3,
            window: 16,
            group: 64,
            sinks: 4,
            ..init()
        };
        let (mut context, mut cache) = (ptr::null_mut(), ptr::null_mut());
        let context_config = mustafar_context_config { backend, ..init() };
        // SAFETY: structures and outputs are locals.
        unsafe {
            ok(mustafar_context_create(&context_config, &mut context));
            ok(mustafar_cache_create(context, &config, &mut cache));
        }
        Self { context, cache, on_device: backend == 1 }
    }

    /// Calls `with` with the address of the bytes where the backend reads them, and gives what stands there after.
    fn placed(&self, bytes: &[u8], with: impl FnOnce(u64)) -> Vec<u8> {
        if self.on_device {
            let copy = DeviceCopy::new(bytes);
            with(copy.address());
            copy.read()
        } else {
            let mut copy = bytes.to_vec();
            with(copy.as_mut_ptr() as u64);
            copy
        }
    }

    fn sequence(&self) -> u64 {
        let mut id = u64::MAX;
        // SAFETY: a live handle, an output on the stack.
        ok(unsafe { mustafar_cache_sequence_create(self.cache, &mut id) });
        id
    }

    fn append(&self, sequence: u64, k: &[u8], v: &[u8]) {
        let tokens = (k.len() / (2 * KV * D)) as i64;
        let tensor = |data: u64| tensor(data as *const _, F16, [1, tokens, KV as i64, D as i64]);
        self.placed(k, |k| {
            self.placed(v, |v| {
                let (k, v) = (tensor(k), tensor(v));
                // SAFETY: a live handle; the tensors describe the copies, which outlive the synchronous read after.
                ok(unsafe { mustafar_cache_append(self.cache, 0, sequence, &k, &v, ptr::null_mut()) });
            });
        });
    }

    /// As [`Decode::append`], with the queries of the last tokens.
    fn prompt(&self, sequence: u64, k: &[u8], v: &[u8], q: &[u8]) {
        let tokens = |bytes: &[u8], heads: usize| (bytes.len() / (2 * heads * D)) as i64;
        let sizes = [1, tokens(k, KV), KV as i64, D as i64];
        let of_queries = [1, tokens(q, Q), Q as i64, D as i64];
        self.placed(k, |k| {
            self.placed(v, |v| {
                self.placed(q, |q| {
                    let [k, v] = [k, v].map(|data| tensor(data as *const _, F16, sizes));
                    let q = tensor(q as *const _, F16, of_queries);
                    let queries = mustafar_cache_queries { q: &q, ..init() };
                    let (cache, stream) = (self.cache, ptr::null_mut());
                    // SAFETY: as in `append`.
                    ok(unsafe {
                        mustafar_cache_append_with_queries(cache, 0, &sequence, 1, &k, &v, &queries, stream)
                    });
                });
            });
        });
    }

    fn len(&self, sequence: u64) -> (i64, i64) {
        let (mut tokens, mut compressed) = (-1, -1);
        // SAFETY: a live handle, outputs on the stack.
        ok(unsafe { mustafar_cache_len(self.cache, 0, sequence, &mut tokens, &mut compressed) });
        (tokens, compressed)
    }

    fn attend(&self, sequences: &[u64], q: &[u8]) -> Vec<f64> {
        let n = sequences.len() as i64;
        let poison = vec![0xFFu8; sequences.len() * Q * D * 4];
        let mut out = Vec::new();
        self.placed(q, |q| {
            out = self.placed(&poison, |out| {
                let sizes = [1, n, Q as i64, D as i64];
                let (q, out) = (tensor(q as *const _, F16, sizes), tensor_mut(out as *mut _, F32, sizes));
                let args = mustafar_cache_attend_args {
                    sequences: sequences.as_ptr(),
                    num_sequences: n,
                    q: &q,
                    out: &out,
                    ..init()
                };
                // SAFETY: a live handle; structures describe the copies.
                ok(unsafe { mustafar_cache_attend(self.cache, &args, ptr::null_mut()) });
            });
        });
        out.chunks_exact(4).map(|x| f64::from(f32::from_le_bytes([x[0], x[1], x[2], x[3]]))).collect()
    }

    fn save(&self, sequence: u64) -> Vec<u8> {
        let (mut size, mut written) = (0, 0);
        // SAFETY: a live handle; the buffer is as long as stated.
        unsafe {
            ok(mustafar_cache_save_size(self.cache, sequence, &mut size));
            let mut buffer = vec![0u8; size];
            ok(mustafar_cache_save(self.cache, sequence, buffer.as_mut_ptr().cast(), size, &mut written));
            assert_eq!(written, size);
            buffer
        }
    }
}

impl Drop for Decode {
    fn drop(&mut self) {
        // SAFETY: made by `new`, ended here only.
        unsafe {
            ok(mustafar_cache_destroy(self.cache));
            ok(mustafar_context_destroy(self.context));
        }
    }
}

fn normal_f16(rng: &mut Rng, count: usize) -> Vec<u8> {
    (0..count).flat_map(|_| half::f16::from_f64(rng.normal()).to_le_bytes()).collect()
}

#[test]
fn a_cache_decodes_through_c_as_on_the_cpu() {
    let Some(_gpu) = crate::gpu() else { return };
    for strategies in [[Strategy::KtMag, Strategy::VtMag], [Strategy::KtOpa, Strategy::Thinv]] {
        decode(strategies);
    }
}

fn decode(strategies: [Strategy; 2]) {
    let (host, device) = (Decode::new(0, strategies), Decode::new(1, strategies));
    let mut rng = Rng::new(77);
    let (a, b) = (host.sequence(), device.sequence());
    // A prompt, then decoding across the next compression.
    for tokens in [150, 1, 1, 40, 1, 30, 1] {
        let (k, v) = (normal_f16(&mut rng, tokens * KV * D), normal_f16(&mut rng, tokens * KV * D));
        if tokens == 150 {
            let q = normal_f16(&mut rng, 20 * Q * D);
            host.prompt(a, &k, &v, &q);
            device.prompt(b, &k, &v, &q);
        } else {
            host.append(a, &k, &v);
            device.append(b, &k, &v);
        }
        assert_eq!(host.len(a), device.len(b));
        let q = normal_f16(&mut rng, Q * D);
        let tolerance = Tolerance::on_cuda(DType::F16, DType::F32, 4.0);
        assert_close("decode step", &device.attend(&[b], &q), &host.attend(&[a], &q), tolerance);
    }
    assert!(device.len(b).1 > 128);

    // Pages are the same bytes on both, and so a sequence can move from one to the other.
    let saved = device.save(b);
    assert_eq!(saved, host.save(a));
    let (mut restored, mut forked) = (u64::MAX, u64::MAX);
    // SAFETY: live handles, outputs on the stack; the length is the buffer's.
    unsafe {
        ok(mustafar_cache_restore(device.cache, saved.as_ptr().cast(), saved.len(), &mut restored));
        ok(mustafar_cache_sequence_fork(device.cache, b, &mut forked));
    }
    let q = normal_f16(&mut rng, Q * D);
    let all = device.attend(&[b, restored, forked], &q.repeat(3));
    assert!(all[..Q * D] == all[Q * D..2 * Q * D] && all[..Q * D] == all[2 * Q * D..]);
}
