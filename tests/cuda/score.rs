//! Scores through the C ABI: captured once, replayed for other contents, equal to the bit to the CPU backend's.

use crate::common::Rng;
use crate::common::device::{DeviceCopy, TestStream};
use crate::gpu;
use crate::graph::Graph;
use crate::support::{F16, F32, init, ok, tensor};
use mustafar::capi::context::{
    mustafar_context, mustafar_context_config, mustafar_context_create, mustafar_context_destroy,
};
use mustafar::capi::ops::score::{
    mustafar_query_weights, mustafar_query_weights_args, mustafar_structured_weights,
    mustafar_structured_weights_args, mustafar_token_weights, mustafar_token_weights_args,
};
use std::ffi::c_void;
use std::ptr;

const D: usize = 128;
const KV: usize = 2;
const Q: usize = 8;
const QUERIES: usize = 32;
const TOKENS: usize = 300;

/// Bytes of queries, log-sum-exps, keys, and of what the three scores give.
const INPUTS: [usize; 3] = [QUERIES * Q * D * 4, QUERIES * Q * 4, TOKENS * KV * D * 2];
const OUTPUTS: [usize; 3] = [KV * D * 4, KV * D * 4, TOKENS * KV * 4];

struct Context(*mut mustafar_context);

impl Context {
    fn new(backend: u32) -> Self {
        let (config, mut context) = (mustafar_context_config { backend, ..init() }, ptr::null_mut());
        // SAFETY: the structure and the output are locals.
        ok(unsafe { mustafar_context_create(&config, &mut context) });
        Self(context)
    }

    /// All scores once. The addresses are of memory of the backend.
    fn submit(&self, [q, lse, k]: [u64; 3], [channels, chosen, tokens]: [u64; 3], stream: *mut c_void) {
        let of = |data: u64, dtype, sizes: [usize; 4]| {
            tensor(data as usize as *const c_void, dtype, sizes.map(|n| n as i64))
        };
        let q = of(q, F32, [1, QUERIES, Q, D]);
        let lse = of(lse, F32, [1, QUERIES, Q, 1]);
        let k = of(k, F16, [1, TOKENS, KV, D]);
        let out = |address: u64| address as usize as *mut f32;
        let by_queries =
            mustafar_query_weights_args { q: &q, kv_heads: KV as i64, out: out(channels), ..init() };
        let structured =
            mustafar_structured_weights_args { x: &k, q: &q, keep: 50, out: out(chosen), ..init() };
        let by_attention = mustafar_token_weights_args {
            q: &q,
            lse: &lse,
            q_position: TOKENS as i64 - 1,
            k: &k,
            softcap: 30.0,
            out: out(tokens),
            ..init()
        };
        // SAFETY: the tensors describe the memory that the addresses were taken from.
        unsafe {
            ok(mustafar_query_weights(self.0, &by_queries, stream));
            ok(mustafar_structured_weights(self.0, &structured, stream));
            ok(mustafar_token_weights(self.0, &by_attention, stream));
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: made by `new`, ended here only.
        ok(unsafe { mustafar_context_destroy(self.0) });
    }
}

fn random(seed: u64) -> [Vec<u8>; 3] {
    let rng = &mut Rng::new(seed);
    let floats = |rng: &mut Rng, bytes: usize, mean: f32| -> Vec<u8> {
        (0..bytes / 4).flat_map(|_| (mean + rng.normal() as f32).to_le_bytes()).collect()
    };
    let k = (0..INPUTS[2] / 2).flat_map(|_| half::f16::from_f64(rng.normal()).to_le_bytes()).collect();
    [floats(rng, INPUTS[0], 0.0), floats(rng, INPUTS[1], 6.0), k]
}

#[test]
fn captured_scores_are_those_of_the_cpu() {
    let Some(_gpu) = gpu() else { return };
    let (host, device, stream) = (Context::new(0), Context::new(1), TestStream::new());
    let inputs = INPUTS.map(DeviceCopy::poisoned);
    let outputs = OUTPUTS.map(DeviceCopy::poisoned);
    let addresses = |copies: &[DeviceCopy; 3]| copies.each_ref().map(DeviceCopy::address);
    let graph = Graph::capture(&stream, || {
        device.submit(addresses(&inputs), addresses(&outputs), stream.raw().cast());
    });
    for seed in 1..4 {
        let contents = random(seed);
        inputs.iter().zip(&contents).for_each(|(copy, bytes)| copy.write_at(0, bytes));
        outputs.iter().for_each(DeviceCopy::poison);
        graph.launch(&stream);
        // Addresses are integers here: the vectors stay alive and are read after the call.
        let mut expected = OUTPUTS.map(|bytes| vec![0f32; bytes / 4]);
        let at = contents.each_ref().map(|bytes| bytes.as_ptr() as u64);
        host.submit(at, expected.each_mut().map(|out| out.as_mut_ptr() as u64), ptr::null_mut());
        for (copy, expected) in outputs.iter().zip(&expected) {
            let expected: Vec<u8> = expected.iter().flat_map(|x| x.to_le_bytes()).collect();
            assert!(copy.read() == expected, "seed {seed}");
        }
    }
}
