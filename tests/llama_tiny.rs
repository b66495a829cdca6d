//! The decode loop on small random models: no file, no network.
//!
//! What it is checked against is written here from the definition, in f64 and one token at a time.
#![allow(clippy::unwrap_used)]

mod llama;

use half::f16;
use llama::config::Config;
use llama::evaluate;
use llama::matmul::Matrix;
use llama::model::{Meter, Model};
use llama::sample::{Sampler, argmax, log_softmax};
use llama::store::{KvStore, Policy};
use llama::tiny::{config, tokens};
use llama::vector;
use mustafar::CenterMode;

/// Logits may differ by this much between f32 sums in one order and f64 sums in another. The larger part of it is
/// keys and values that lie between two f16 numbers and fall to different sides.
const TOLERANCE: f64 = 5e-3;

fn times(matrix: &Matrix, x: &[f64]) -> Vec<f64> {
    (0..matrix.rows).map(|r| matrix.row(r).iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum()).collect()
}

fn norm(x: &[f64], weight: &[f32], eps: f64) -> Vec<f64> {
    let rms = (x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64 + eps).sqrt();
    x.iter().zip(weight).map(|(x, w)| x / rms * f64::from(*w)).collect()
}

fn rotated(head: &[f64], position: usize, c: &Config) -> Vec<f64> {
    let mut out = head.to_vec();
    for i in 0..c.rope_dim / 2 {
        let angle = position as f64 * c.rope_base.powf(-2.0 * i as f64 / c.rope_dim as f64);
        let (a, b) = (head[2 * i], head[2 * i + 1]);
        out[2 * i] = a * angle.cos() - b * angle.sin();
        out[2 * i + 1] = a * angle.sin() + b * angle.cos();
    }
    out
}

fn rounded(x: &[f64]) -> Vec<f64> {
    x.iter().map(|v| f16::from_f64(*v).to_f64()).collect()
}

/// Logits after every token, from the definition.
fn naive(model: &Model, tokens: &[u32]) -> Vec<Vec<f64>> {
    let (c, w) = (&model.config, &model.weights);
    let eps = f64::from(c.rms_eps);
    // Per layer, the keys and values of the tokens so far: [token][kv head][channel].
    let mut cache: Vec<Vec<[Vec<Vec<f64>>; 2]>> = vec![Vec::new(); c.layers];
    let mut logits = Vec::new();
    for (position, &token) in tokens.iter().enumerate() {
        let mut x: Vec<f64> = w.embedding.row(token as usize).iter().map(|v| f64::from(*v)).collect();
        for (layer, seen) in w.layers.iter().zip(&mut cache) {
            let qkv = times(&layer.qkv, &norm(&x, &layer.attention_norm.data, eps));
            let heads: Vec<&[f64]> = qkv.chunks(c.head_dim).collect();
            let (q, kv) = heads.split_at(c.heads);
            let (k, v) = kv.split_at(c.kv_heads);
            let k = k.iter().map(|head| rounded(&rotated(head, position, c))).collect();
            seen.push([k, v.iter().map(|head| rounded(head)).collect()]);
            let mut attended = Vec::new();
            for (h, q) in q.iter().enumerate() {
                let q = rotated(q, position, c);
                let kv_head = h / (c.heads / c.kv_heads);
                let score =
                    |k: &[f64]| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / (c.head_dim as f64).sqrt();
                let weights: Vec<f64> = seen.iter().map(|[k, _]| score(&k[kv_head]).exp()).collect();
                let total: f64 = weights.iter().sum();
                attended.extend((0..c.head_dim).map(|d| {
                    weights.iter().zip(seen.iter()).map(|(p, [_, v])| p * v[kv_head][d]).sum::<f64>() / total
                }));
            }
            let delta = times(&layer.attention_out, &attended);
            x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
            let gate_up = times(&layer.gate_up, &norm(&x, &layer.ffn_norm.data, eps));
            let (gate, up) = gate_up.split_at(c.ffn);
            let inner: Vec<f64> = gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            let delta = times(&layer.down, &inner);
            x.iter_mut().zip(delta).for_each(|(x, d)| *x += d);
        }
        logits.push(times(w.output(), &norm(&x, &w.final_norm.data, eps)));
    }
    logits
}

/// Largest difference between two sets of logits.
fn distance(a: &[f32], b: impl IntoIterator<Item = f64>) -> f64 {
    let mut b = b.into_iter();
    let d = a.iter().map(|a| (f64::from(*a) - b.next().unwrap()).abs()).fold(0.0, f64::max);
    assert!(b.next().is_none(), "lengths differ");
    assert!(d.is_finite());
    d
}

fn wide(x: &[f32]) -> impl Iterator<Item = f64> {
    x.iter().map(|v| f64::from(*v))
}

/// Prefills and then greedily decodes `steps` tokens; returns them with the logits they were picked from.
fn generate(model: &Model, store: &mut KvStore, prompt: &[u32], steps: usize) -> (Vec<u32>, Vec<Vec<f32>>) {
    let mut meter = Meter::default();
    let mut logits = model.prefill(prompt, store, &mut meter).unwrap();
    let (mut picked, mut all) = (Vec::new(), Vec::new());
    for _ in 0..steps {
        let token = argmax(&logits);
        picked.push(token);
        all.push(std::mem::replace(&mut logits, model.decode(&[token], &mut [store], &mut meter).unwrap()));
    }
    (picked, all)
}

#[test]
fn dense_decoding_equals_a_naive_implementation() {
    // (heads, KV heads, tied, prompt): GQA groups of 1, 2, 4 and 3; prompts around the query block of 64.
    for (heads, kv_heads, tied, prompt) in
        [(2, 2, true, 1), (4, 2, false, 63), (4, 1, true, 64), (3, 1, true, 130)]
    {
        let model = Model::random(config(heads, kv_heads, tied), 7, 2).unwrap();
        let prompt = tokens(prompt, 11);
        let mut store = KvStore::dense(&model.config);
        let (picked, logits) = generate(&model, &mut store, &prompt, 24);
        let all: Vec<u32> = prompt.iter().chain(&picked).copied().collect();
        let expected = naive(&model, &all);
        let mut decided = 0;
        for ((token, logits), expected) in picked.iter().zip(&logits).zip(&expected[prompt.len() - 1..]) {
            let d = distance(logits, expected.iter().copied());
            assert!(d < TOLERANCE, "logits differ by {d} with {heads} heads, {} tokens", prompt.len());
            let mut ranked: Vec<(f64, u32)> = expected.iter().copied().zip(0..).collect();
            ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
            // Two candidates closer than the tolerance are a draw.
            if ranked[0].0 - ranked[1].0 > 2.0 * TOLERANCE {
                assert_eq!(*token, ranked[0].1);
                decided += 1;
            }
        }
        assert!(decided >= 20, "only {decided} of 24 steps were clear");
    }
}

/// Pages of 16 tokens from position 2 on, so that a hundred tokens cross many compressions.
fn small_groups(sparsity: f64, center: CenterMode) -> Policy {
    Policy { window: 8, group: 16, sinks: 2, center, ..Policy::at(sparsity) }
}

#[test]
fn cache_at_sparsity_zero_equals_dense() {
    // A centre is subtracted and rounded to f16, which costs up to half a unit in the last place of each key.
    for (center, tolerance) in [(CenterMode::None, 1e-3), (CenterMode::Median, 2e-2)] {
        for (heads, kv_heads) in [(4, 2), (3, 1), (2, 2)] {
            let model = Model::random(config(heads, kv_heads, true), 3, 2).unwrap();
            let prompt = tokens(70, 5);
            let mut dense = KvStore::dense(&model.config);
            let mut pruned =
                KvStore::pruned(&model.config, &small_groups(0.0, center), 200, model.context()).unwrap();
            let (mut a, mut b) = (Meter::default(), Meter::default());
            let first = model.prefill(&prompt, &mut dense, &mut a).unwrap();
            let same = model.prefill(&prompt, &mut pruned, &mut b).unwrap();
            assert_eq!(first, same, "the prompt's own attention does not depend on the store");
            let before = pruned.compressed().unwrap();
            assert!(before > 0);
            for token in tokens(60, 6) {
                let expected = model.decode(&[token], &mut [&mut dense], &mut a).unwrap();
                let found = model.decode(&[token], &mut [&mut pruned], &mut b).unwrap();
                let d = distance(&found, wide(&expected));
                assert!(d < tolerance, "{center:?}: logits differ by {d} at {} tokens", dense.len());
            }
            assert!(pruned.compressed().unwrap() > before, "decoding compresses too");
        }
    }
}

#[test]
fn pruning_changes_logits_and_saves_bytes() {
    let model = Model::random(config(4, 2, true), 3, 1).unwrap();
    let prompt = tokens(300, 5);
    let mut dense = KvStore::dense(&model.config);
    let mut meter = Meter::default();
    model.prefill(&prompt, &mut dense, &mut meter).unwrap();
    let expected = |store: &mut KvStore| model.decode(&[1], &mut [store], &mut Meter::default()).unwrap();
    let mut last = 0.0;
    let mut bytes = usize::MAX;
    for sparsity in [0.0, 0.5, 0.9] {
        let mut store =
            KvStore::pruned(&model.config, &small_groups(sparsity, CenterMode::None), 400, model.context())
                .unwrap();
        store.fill_from(&dense).unwrap();
        let mut reference = KvStore::dense(&model.config);
        reference.fill_from(&dense).unwrap();
        let d = distance(&expected(&mut store), wide(&expected(&mut reference)));
        assert!(d >= last, "sparsity {sparsity} is closer to dense than less of it: {d}, {last}");
        let held = store.bytes().unwrap();
        assert!(held.held < bytes);
        assert_eq!(held.dense, reference.bytes().unwrap().held);
        (last, bytes) = (d, held.held);
    }
    assert!(last > TOLERANCE, "0.9 must show: {last}");
}

#[test]
fn prefill_in_one_call_equals_token_by_token() {
    let model = Model::random(config(4, 2, false), 9, 2).unwrap();
    let prompt = tokens(90, 1);
    let stores = || -> Vec<KvStore> {
        let policy = small_groups(0.0, CenterMode::None);
        vec![
            KvStore::dense(&model.config),
            KvStore::pruned(&model.config, &policy, 200, model.context()).unwrap(),
        ]
    };
    for (mut whole, mut single) in stores().into_iter().zip(stores()) {
        let mut meter = Meter::default();
        let expected = model.prefill(&prompt, &mut whole, &mut meter).unwrap();
        let mut found = Vec::new();
        for token in &prompt {
            found = model.decode(&[*token], &mut [&mut single], &mut meter).unwrap();
        }
        let d = distance(&found, wide(&expected));
        assert!(d < TOLERANCE, "logits differ by {d}");
        assert_eq!(whole.len(), single.len());
        assert_eq!(whole.compressed().unwrap(), single.compressed().unwrap());
        assert_eq!(whole.bytes().unwrap(), single.bytes().unwrap());
    }
}

#[test]
fn batch_and_threads_do_not_change_a_decode_step() {
    let prompt = tokens(600, 2);
    let mut results = Vec::new();
    for (threads, copies) in [(1, 1), (2, 1), (2, 3)] {
        let model = Model::random(Config { context: 1024, ..config(4, 2, true) }, 4, threads).unwrap();
        let mut stores: Vec<KvStore> = (0..copies).map(|_| KvStore::dense(&model.config)).collect();
        let mut meter = Meter::default();
        // Appended token by token: the prompt's own products may be split differently among threads.
        let mut references: Vec<&mut KvStore> = stores.iter_mut().collect();
        let mut logits = Vec::new();
        for token in &prompt {
            logits = model.decode(&vec![*token; copies], &mut references, &mut meter).unwrap();
        }
        results.extend(logits.chunks_exact(model.config.vocab).map(<[f32]>::to_vec));
    }
    assert_eq!(results.len(), 5);
    assert!(results.iter().all(|r| *r == results[0]));
}

#[test]
fn wrong_input_is_refused() {
    let model = Model::random(config(4, 2, true), 4, 1).unwrap();
    let mut store = KvStore::dense(&model.config);
    let mut meter = Meter::default();
    let mut refused = |tokens: &[u32]| model.prefill(tokens, &mut store, &mut meter).unwrap_err().to_string();
    assert_eq!(refused(&[]), "the prompt has no tokens");
    assert_eq!(refused(&[250]), "token 250 is not in the vocabulary of 250");
    assert_eq!(refused(&[0; 513]), "position 512 is beyond the model's context of 512 tokens");
    model.prefill(&[1, 2], &mut store, &mut meter).unwrap();
    let again = model.prefill(&[1], &mut store, &mut meter).unwrap_err().to_string();
    assert_eq!(again, "prefill into a store that holds 2 tokens");
    let score = |prefill, score| {
        let result = evaluate::perplexity(&model, &[0; 600], prefill, score, &[], &mut |_| {});
        result.map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(score(0, 5), "prefill is 0 and score 5; allowed: at least 1 each");
    assert_eq!(score(500, 101), "the text has 600 tokens; prefill 500 and score 101 need 601");
    assert_eq!(score(usize::MAX, 1), "prefill + score overflows");
    assert_eq!(score(500, 100), "prefill 500 and score 100 exceed the model's context of 512 tokens");
    let uneven = Model::random(config(3, 2, true), 0, 1).unwrap_err().to_string();
    assert_eq!(uneven, "3 query heads are no multiple of 2 KV heads");
    assert!(Model::random(config(2, 2, true), 0, 0).is_err(), "no threads");
    for (temperature, top_p) in [(-1.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, 1.5)] {
        assert!(Sampler::new(temperature, top_p, 0).is_err());
    }
}

#[test]
fn sampling_follows_the_distribution() {
    // Probabilities 1/2, 1/4, 1/8, 1/8.
    let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
    let draw = |temperature, top_p, seed| -> Vec<u32> {
        let mut sampler = Sampler::new(temperature, top_p, seed).unwrap();
        (0..4000).map(|_| sampler.pick(&logits)).collect()
    };
    let count =
        |draws: &[u32], token| draws.iter().filter(|t| **t == token).count() as f64 / draws.len() as f64;
    let draws = draw(1.0, 1.0, 1);
    for (token, p) in [(0, 0.5), (1, 0.25), (2, 0.125), (3, 0.125)] {
        // Four standard deviations of 4000 draws.
        assert!((count(&draws, token) - p).abs() < 0.032, "token {token}: {}", count(&draws, token));
    }
    let draws = draw(1.0, 0.7, 1);
    assert!((count(&draws, 0) - 2.0 / 3.0).abs() < 0.03);
    assert_eq!(count(&draws, 2) + count(&draws, 3), 0.0, "top-p 0.7 keeps two tokens");
    assert!(draw(0.0, 1.0, 1).iter().all(|t| *t == 0), "temperature 0 is greedy");
    assert!(count(&draw(0.25, 1.0, 1), 0) > 0.9, "cold draws concentrate");
    assert_eq!(draw(1.0, 1.0, 5), draw(1.0, 1.0, 5));
    assert_ne!(draw(1.0, 1.0, 5), draw(1.0, 1.0, 6));
    assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1, "the first of equals");
    let sum: f64 = log_softmax(&[1000.0, 999.0, -1000.0]).iter().map(|x| x.exp()).sum();
    assert!((sum - 1.0).abs() < 1e-12);
}

#[test]
fn vector_functions_match_f64() {
    let mut x = -90.0f32;
    while x < 88.0 {
        let (found, expected) = (f64::from(vector::exp(x)), f64::from(x).exp());
        // 1e-38 covers what is flushed to zero below -87.
        assert!((found - expected).abs() <= 3e-7 * expected + 2e-38, "exp({x}) = {found}, not {expected}");
        x += 0.0371;
    }
    assert_eq!(vector::exp(f32::NEG_INFINITY), 0.0);
    for n in [1, 15, 16, 17, 100] {
        let scores: Vec<f32> = (0..n).map(|i| (i * 37 % 23) as f32 - 11.0).collect();
        let mut p = scores.clone();
        let (max, sum) = vector::exp_scores(&mut p);
        assert_eq!(max, scores.iter().copied().fold(f32::MIN, f32::max));
        let expected: Vec<f64> = scores.iter().map(|s| f64::from(s - max).exp()).collect();
        assert!(distance(&p, expected.iter().copied()) < 1e-6);
        assert!((f64::from(sum) - expected.iter().sum::<f64>()).abs() < 1e-4);
    }
    assert_eq!(vector::exp_scores(&mut []), (f32::NEG_INFINITY, 0.0));
    let mut gate = [-100.0, -1.0, 0.0, 2.0];
    vector::silu_mul(&mut gate, &[3.0; 4]);
    let expected = [-100.0f64, -1.0, 0.0, 2.0].map(|g| 3.0 * g / (1.0 + (-g).exp()));
    assert!(distance(&gate, expected) < 1e-5);
}
