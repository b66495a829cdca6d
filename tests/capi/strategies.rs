//! Strategies through C: names, formats, scores, and a cache that uses them.

use crate::support::{Context, F16, F32, init, ok, refused, tensor, tensor_mut, values};
use mustafar::capi::cache::attend::{mustafar_cache_attend, mustafar_cache_attend_args};
use mustafar::capi::cache::config::{mustafar_cache_config, mustafar_cache_head_formats};
use mustafar::capi::cache::sequence::{
    mustafar_cache_append, mustafar_cache_append_with_queries, mustafar_cache_len, mustafar_cache_queries,
    mustafar_cache_sequence_create,
};
use mustafar::capi::cache::{mustafar_cache_create, mustafar_cache_destroy};
use mustafar::capi::format::{mustafar_format, mustafar_rows};
use mustafar::capi::ops::prune::{mustafar_prune, mustafar_prune_args, mustafar_selection};
use mustafar::capi::ops::score::{
    mustafar_query_weights, mustafar_query_weights_args, mustafar_structured_weights,
    mustafar_structured_weights_args, mustafar_token_weights, mustafar_token_weights_args,
};
use mustafar::capi::status::mustafar_status::{InvalidArgument, NullPointer};
use mustafar::capi::strategy::{mustafar_strategy, mustafar_strategy_format, mustafar_strategy_from_name};
use mustafar::{Strategy, reference};
use std::ffi::{CStr, CString};
use std::ptr;

const D: usize = 64;
const KV: usize = 2;
const Q: usize = 4;

fn format(strategy: Strategy, sparsity: f64) -> mustafar_format {
    let mut format = init();
    // SAFETY: an initialised structure on the stack.
    ok(unsafe { mustafar_strategy_format(strategy as u32, F16, D as u32, 32, sparsity, &mut format) });
    format
}

#[test]
fn names_become_codes() {
    for strategy in Strategy::ALL {
        let name = CString::new(strategy.name()).unwrap();
        let mut code = 0;
        // SAFETY: a terminated string, an output on the stack.
        ok(unsafe { mustafar_strategy_from_name(name.as_ptr(), &mut code) });
        assert_eq!(code, strategy as u32);
    }
    let from_name = |name: Option<&CStr>| {
        let mut code = 77;
        // SAFETY: as above, or null.
        let status =
            unsafe { mustafar_strategy_from_name(name.map_or(ptr::null(), CStr::as_ptr), &mut code) };
        assert_eq!(code, 77);
        status
    };
    refused(from_name(Some(c"Kt_Max")), InvalidArgument, &["\"Kt_Max\"", "Kt_Mag, Kt_Opa", "thinv"]);
    refused(from_name(None), NullPointer, &["name"]);
}

#[test]
fn formats_follow_from_strategy_and_sparsity() {
    let f = format(Strategy::KtOpa, 0.7);
    assert_eq!((f.rows, f.keep, f.capacity, f.page_tokens), (mustafar_rows::Uniform as u32, 20, 0, 32));
    let f = format(Strategy::VcOpa, 0.7);
    assert_eq!((f.rows, f.keep, f.capacity, f.head_dim), (mustafar_rows::Ragged as u32, 0, 10 * 64, 64));
    let refuse = |strategy, page_tokens, sparsity, parts: &[&str]| {
        let mut format: mustafar_format = init();
        // SAFETY: an initialised structure on the stack.
        let status =
            unsafe { mustafar_strategy_format(strategy, F16, 64, page_tokens, sparsity, &mut format) };
        refused(status, InvalidArgument, parts);
        assert_eq!((format.head_dim, format.keep), (0, 0));
    };
    refuse(0, 32, 0.5, &["strategy is 0", "1 to 9"]);
    refuse(10, 32, 0.5, &["strategy is 10", "0 (default), 1 (Kt_Mag)", "9 (thinv)"]);
    refuse(Strategy::VcMag as u32, 16, 0.5, &["page_tokens is 16", "32 for Vc_Mag"]);
    refuse(1, 32, 1.0, &["sparsity is 1"]);
}

/// Every score once, through C, and a mask made of the last.
#[test]
fn scores_reach_selection() {
    let context = Context::new();
    let f32s = |n: usize| (0..n).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect::<Vec<f32>>();
    let (q, lse) = (f32s(3 * Q * D), vec![1.0f32; 3 * Q]);
    let q_tensor = tensor(q.as_ptr().cast(), F32, [1, 3, Q as i64, D as i64]);
    let lse_tensor = tensor(lse.as_ptr().cast(), F32, [1, 3, Q as i64, 1]);
    let mut x = values(32 * KV * D);
    let x_tensor = tensor(x.as_ptr().cast(), F16, [1, 32, KV as i64, D as i64]);

    let mut weights = vec![f32::NAN; KV * D];
    let args = mustafar_query_weights_args {
        q: &q_tensor,
        kv_heads: KV as i64,
        out: weights.as_mut_ptr(),
        ..init()
    };
    // SAFETY: tensors and outputs describe memory of this test.
    ok(unsafe { mustafar_query_weights(context.0, &args, ptr::null_mut()) });
    let row =
        |t: usize, h: usize| -> Vec<f64> { q[(t * Q + h) * D..][..D].iter().map(|&x| x.into()).collect() };
    let of_head_0: Vec<_> = (0..3).flat_map(|t| [row(t, 0), row(t, 1)]).collect();
    assert_eq!(weights[..D], reference::score::query_weights(&of_head_0, 3));

    let args = mustafar_structured_weights_args {
        x: &x_tensor,
        q: &q_tensor,
        keep: 20,
        out: weights.as_mut_ptr(),
        ..init()
    };
    // SAFETY: as above.
    ok(unsafe { mustafar_structured_weights(context.0, &args, ptr::null_mut()) });
    assert!(weights.chunks(D).all(|head| head.iter().filter(|w| w.is_infinite()).count() == 20));

    let mut of_tokens = vec![f32::NAN; 32 * KV];
    let args = mustafar_token_weights_args {
        q: &q_tensor,
        lse: &lse_tensor,
        q_position: 40,
        k: &x_tensor,
        k_position: 10,
        out: of_tokens.as_mut_ptr(),
        ..init()
    };
    // SAFETY: as above.
    ok(unsafe { mustafar_token_weights(context.0, &args, ptr::null_mut()) });
    // Queries stand at 38 to 40, keys at 10 to 41: the last sees nothing of the last key.
    assert!(of_tokens[..30 * KV].iter().all(|w| *w > 0.0) && of_tokens[31 * KV..] == [0.0; KV]);

    let group: Vec<Vec<u16>> = (0..32).map(|t| x[t * KV * D..][..D].to_vec()).collect();
    let of_head: Vec<f32> = of_tokens.iter().copied().step_by(KV).collect();
    let expected = reference::prune_channel(mustafar::DType::F16, &group, 10, Some(&of_head));
    let x_mut = tensor_mut(x.as_mut_ptr().cast(), F16, [1, 32, KV as i64, D as i64]);
    let args = mustafar_prune_args {
        x: &x_mut,
        selection: mustafar_selection::Channel as u32,
        keep: 10,
        token_weights: of_tokens.as_ptr(),
        ..init()
    };
    // SAFETY: as above.
    ok(unsafe { mustafar_prune(context.0, &args, ptr::null_mut()) });
    for (t, row) in expected.iter().enumerate() {
        assert_eq!(x[t * KV * D..][..D], row.bits);
    }
}

#[test]
fn a_cache_uses_them() {
    let context = Context::new();
    let (k, v) = (format(Strategy::KtOpa, 0.5), format(Strategy::VcOpa, 0.7));
    let (dense_k, dense_v) = (format(Strategy::KtOpa, 0.0), format(Strategy::VcOpa, 0.0));
    let head_1 = mustafar_cache_head_formats {
        k: &dense_k,
        v: &dense_v,
        num_layers: 1,
        first_head: 1,
        num_heads: 1,
        ..init()
    };
    let overrides = [ptr::from_ref(&head_1)];
    let mut config = mustafar_cache_config {
        k: &k,
        v: &v,
        max_tokens: 128,
        layers: 1,
        q_heads: Q as u32,
        kv_heads: KV as u32,
        window: 8,
        group: 32,
        k_strategy: mustafar_strategy::KtOpa as u32,
        v_strategy: mustafar_strategy::VcOpa as u32,
        overrides: overrides.as_ptr(),
        num_overrides: 1,
        ..init()
    };
    let mut cache = ptr::null_mut();
    // SAFETY: structures are locals.
    ok(unsafe { mustafar_cache_create(context.0, &config, &mut cache) });
    let mut id = 0;
    // SAFETY: a live handle, an output on the stack.
    ok(unsafe { mustafar_cache_sequence_create(cache, &mut id) });

    let x = values(60 * KV * D);
    let kv = tensor(x.as_ptr().cast(), F16, [1, 60, KV as i64, D as i64]);
    // SAFETY: a live handle; the tensor describes `x`.
    let status = unsafe { mustafar_cache_append(cache, 0, id, &kv, &kv, ptr::null_mut()) };
    refused(status, InvalidArgument, &["queries is absent", "Kt_Opa"]);
    let (q, lse) = (values(5 * Q * D), vec![2.0f32; 5 * Q]);
    let q_tensor = tensor(q.as_ptr().cast(), F16, [1, 5, Q as i64, D as i64]);
    let lse_tensor = tensor(lse.as_ptr().cast(), F32, [1, 5, Q as i64, 1]);
    let append = |queries: &mustafar_cache_queries| {
        // SAFETY: as above.
        unsafe { mustafar_cache_append_with_queries(cache, 0, &id, 1, &kv, &kv, queries, ptr::null_mut()) }
    };
    let mut queries = mustafar_cache_queries { q: &q_tensor, ..init() };
    refused(append(&queries), InvalidArgument, &["queries.lse is absent", "Vc_Opa"]);
    queries.lse = &lse_tensor;
    ok(append(&queries));
    let (mut tokens, mut compressed) = (0, 0);
    // SAFETY: a live handle, outputs on the stack.
    ok(unsafe { mustafar_cache_len(cache, 0, id, &mut tokens, &mut compressed) });
    assert_eq!((tokens, compressed), (60, 32));

    let mut out = vec![f32::NAN; Q * D];
    let newest = tensor(q.as_ptr().cast(), F16, [1, 1, Q as i64, D as i64]);
    let out_tensor = tensor_mut(out.as_mut_ptr().cast(), F32, [1, 1, Q as i64, D as i64]);
    let args = mustafar_cache_attend_args {
        sequences: &id,
        num_sequences: 1,
        q: &newest,
        out: &out_tensor,
        ..init()
    };
    // SAFETY: as above.
    ok(unsafe { mustafar_cache_attend(cache, &args, ptr::null_mut()) });
    assert!(out.iter().all(|x| x.is_finite()));
    // SAFETY: made above, ended here only.
    ok(unsafe { mustafar_cache_destroy(cache) });

    config.v_strategy = mustafar_strategy::Think as u32;
    // SAFETY: structures are locals.
    let status = unsafe { mustafar_cache_create(context.0, &config, &mut cache) };
    refused(status, InvalidArgument, &["v_strategy is think, which prunes K", "Vt_Mag, Vt_Opa"]);
    config.v_strategy = 99;
    // SAFETY: structures are locals.
    let status = unsafe { mustafar_cache_create(context.0, &config, &mut cache) };
    refused(status, InvalidArgument, &["config.v_strategy is 99", "8 (Vc_Opa)"]);
}
