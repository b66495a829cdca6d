//! Reading of GGUF files: a small model that this test writes itself, whole and damaged in many ways.
#![allow(clippy::unwrap_used)]

mod gguf_writer;
mod llama;

use gguf_writer::{ARRAY, Entry, STRING, array, entry, file, float, int, string, tensor, text};
use half::{bf16, f16};
use llama::config::Config;
use llama::gguf::{Gguf, Value};
use llama::model::{Meter, Model};
use llama::quant::TensorType;
use llama::sample::Rng;
use llama::store::KvStore;
use llama::tokenizer::Tokenizer;
use std::io::Cursor;

fn config() -> Config {
    Config {
        layers: 1,
        hidden: 64,
        ffn: 96,
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        vocab: 40,
        context: 128,
        rms_eps: 1e-5,
        rope_base: 10_000.0,
        rope_dim: 32,
        tied: true,
    }
}

fn metadata() -> Vec<Entry> {
    vec![
        string("general.architecture", "llama"),
        int("llama.block_count", 1),
        int("llama.context_length", 128),
        int("llama.embedding_length", 64),
        int("llama.feed_forward_length", 96),
        int("llama.attention.head_count", 2),
        int("llama.attention.head_count_kv", 1),
        int("llama.rope.dimension_count", 32),
        float("llama.rope.freq_base", 10_000.0),
        float("llama.attention.layer_norm_rms_epsilon", 1e-5),
    ]
}

fn f32s(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The tensors of a random model, as F32.
fn tensors(model: &Model) -> Vec<Entry> {
    let w = &model.weights;
    let l = &w.layers[0];
    let c = &model.config;
    let (q, kv) = (c.q_width() * c.hidden, c.kv_width() * c.hidden);
    let up = c.ffn * c.hidden;
    let f = |name: &str, dims: &[usize], data: &[f32]| tensor(name, dims, 0, f32s(data));
    vec![
        f("token_embd.weight", &[64, 40], &w.embedding.data),
        f("output_norm.weight", &[64], &w.final_norm.data),
        f("blk.0.attn_norm.weight", &[64], &l.attention_norm.data),
        f("blk.0.attn_q.weight", &[64, 64], &l.qkv.data[..q]),
        f("blk.0.attn_k.weight", &[64, 32], &l.qkv.data[q..q + kv]),
        f("blk.0.attn_v.weight", &[64, 32], &l.qkv.data[q + kv..]),
        f("blk.0.attn_output.weight", &[64, 64], &l.attention_out.data),
        f("blk.0.ffn_norm.weight", &[64], &l.ffn_norm.data),
        f("blk.0.ffn_gate.weight", &[64, 96], &l.gate_up.data[..up]),
        f("blk.0.ffn_up.weight", &[64, 96], &l.gate_up.data[up..]),
        f("blk.0.ffn_down.weight", &[96, 64], &l.down.data),
    ]
}

fn load(bytes: &[u8]) -> llama::error::Result<Model> {
    let mut file = Gguf::read(Cursor::new(bytes), bytes.len() as u64)?;
    Model::load(&mut file, 1, &mut |_, _| {})
}

fn logits(model: &Model) -> Vec<f32> {
    model.prefill(&[3, 1, 4, 1, 5], &mut KvStore::dense(&model.config), &mut Meter::default()).unwrap()
}

/// The message that loading ends with.
fn refusal(bytes: &[u8]) -> String {
    load(bytes).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_written_model_reads_back() {
    let model = Model::random(config(), 1, 1).unwrap();
    let bytes = file(&metadata(), &tensors(&model));
    let read = load(&bytes).unwrap();
    assert_eq!(read.config, model.config);
    assert_eq!(logits(&read), logits(&model));

    // Version 2 has the same layout.
    let mut old = bytes;
    old[4] = 2;
    assert_eq!(logits(&load(&old).unwrap()), logits(&model));

    // An output matrix of its own, and RoPE factors, change the result.
    let mut more = tensors(&model);
    more.push(tensor("output.weight", &[64, 40], 0, f32s(&vec![0.5; 64 * 40])));
    let untied = load(&file(&metadata(), &more)).unwrap();
    assert!(!untied.config.tied);
    let flat = logits(&untied);
    assert!(flat.iter().all(|x| (x - flat[0]).abs() < 1e-4), "equal rows give equal logits");
    let mut more = tensors(&model);
    more.push(tensor("rope_freqs.weight", &[16], 0, f32s(&[8.0; 16])));
    assert_ne!(logits(&load(&file(&metadata(), &more)).unwrap()), logits(&model));
}

#[test]
fn every_truncation_is_refused() {
    let model = Model::random(config(), 1, 1).unwrap();
    let bytes = file(&metadata(), &tensors(&model));
    let header = bytes.len() - tensors(&model).iter().map(|t| t.data.as_ref().unwrap().len()).sum::<usize>();
    // The last tensor's data ends the file, so every cut takes something away.
    for len in (0..header + 64).chain((header + 64..bytes.len()).step_by(997)) {
        let message = refusal(&bytes[..len]);
        assert!(message.contains("damaged"), "cut to {len} of {}: {message}", bytes.len());
    }
    assert!(refusal(&bytes[..bytes.len() - 1]).contains("truncated?"));
}

#[test]
fn damaged_headers_never_panic() {
    let model = Model::random(config(), 1, 1).unwrap();
    let bytes = file(&metadata(), &tensors(&model));
    let header = bytes.len() - tensors(&model).iter().map(|t| t.data.as_ref().unwrap().len()).sum::<usize>();
    let mut refused = 0;
    for at in 0..header {
        for flip in [0x01, 0x80, 0xff] {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            // Some damage is no damage (a context length, an epsilon); all that matters is that it ends well.
            refused += usize::from(load(&damaged).is_err());
        }
    }
    assert!(refused > header * 2, "{refused} of {} refused", header * 3);
}

#[test]
fn absurd_headers_say_what_is_wrong() {
    let model = Model::random(config(), 1, 1).unwrap();
    let good = file(&metadata(), &tensors(&model));
    let patched = |at: usize, value: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        refusal(&bytes)
    };
    let huge = u64::MAX.to_le_bytes();
    assert!(patched(0, b"GGML").contains("not \"GGUF\""));
    assert_eq!(patched(4, &[1]), "GGUF version is 1; supported: 2, 3 (little-endian)");
    assert!(patched(8, &huge).contains("tensor count is 18446744073709551615"));
    assert!(patched(16, &huge).contains("metadata count is 18446744073709551615"));
    assert!(patched(24, &huge).contains("length of key of metadata entry 0"));
    assert!(patched(24, &0xff_ffffu64.to_le_bytes()).contains("truncated?"));

    let with = |e: Entry| {
        let mut m = metadata();
        m.retain(|old| old.name != e.name);
        m.push(e);
        refusal(&file(&m, &tensors(&model)))
    };
    assert!(with(array("x", 4, 1 << 40, &[])).contains("length of x is 1099511627776"));
    assert!(with(array("x", 4, 1 << 20, &[])).contains("truncated?"));
    assert!(with(array("x", ARRAY, 1, &[0; 16])).contains("an array of arrays"));
    assert!(with(entry("x", 99, &[])).contains("type code 99"));
    assert!(with(entry("x", 7, &[2])).contains("bool x has byte 0x02"));
    assert!(with(entry("x", STRING, &[&1u64.to_le_bytes()[..], &[0xff]].concat())).contains("not UTF-8"));
    assert!(with(int("general.alignment", 24)).contains("power of two"));
    assert!(
        with(string("general.architecture", "gpt2"))
            .contains("general.architecture is gpt2; supported: llama")
    );
    assert!(
        with(int("general.architecture", 1)).contains("general.architecture is an integer, not a string")
    );
    assert!(with(int("llama.block_count", 0)).contains("llama.block_count is 0; allowed: 1 to 1024"));
    assert!(with(int("llama.block_count", 2)).contains("blk.1.attn_norm.weight is missing"));
    assert!(
        with(int("llama.attention.head_count", 3)).contains("no multiple of llama.attention.head_count 3")
    );
    assert!(with(int("llama.attention.head_count_kv", 5)).contains("allowed: 1 to 2"));
    assert!(with(int("llama.feed_forward_length", 97)).contains("blk.0.ffn_gate.weight"));
    assert!(with(int("llama.expert_count", 8)).contains("llama.expert_count is 8"));
    assert!(with(int("llama.attention.sliding_window", 64)).contains("sliding_window is 64"));
    assert!(with(int("llama.rope.dimension_count", 31)).contains("RoPE over 31 channels"));
    assert!(with(float("llama.rope.freq_base", f32::NAN)).contains("llama.rope.freq_base is NaN"));
    assert!(with(string("llama.rope.scaling.type", "yarn")).contains("yarn"));
    assert!(with(int("llama.vocab_size", 41)).contains("token_embd.weight"));
    let mut twice = metadata();
    twice.push(int("llama.block_count", 1));
    assert!(refusal(&file(&twice, &tensors(&model))).contains("llama.block_count occurs twice"));
}

#[test]
fn wrong_tensors_say_what_is_wrong() {
    let model = Model::random(config(), 1, 1).unwrap();
    let with = |t: Entry| {
        let mut all = tensors(&model);
        match all.iter_mut().find(|old| old.name == t.name) {
            Some(old) => *old = t,
            None => all.push(t),
        }
        refusal(&file(&metadata(), &all))
    };
    let q = "blk.0.attn_q.weight";
    assert_eq!(
        with(tensor(q, &[64, 64], 12, vec![0; 4096])),
        "type of tensor blk.0.attn_q.weight is Q4_K; supported: F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q6_K"
    );
    assert!(with(tensor(q, &[64, 64], 77, vec![0; 4096])).contains("is code 77; supported"));
    assert!(with(tensor(q, &[64, 63], 0, vec![0; 64 * 63 * 4])).contains("its shape is [64, 63]"));
    assert!(with(tensor(q, &[usize::MAX, 2], 0, vec![])).contains("overflows"));
    assert!(with(tensor(q, &[1 << 40, 2], 0, vec![])).contains("truncated?"));
    assert!(with(tensor(q, &[0, 64], 0, vec![])).contains("dimension of 0"));
    assert!(with(tensor(q, &[], 0, vec![])).contains("0 dimensions"));
    assert!(with(tensor(q, &[1; 5], 0, vec![])).contains("5 dimensions"));
    assert!(
        with(tensor(q, &[33, 64], 2, vec![0; 4096])).contains("its shape is [33, 64]"),
        "no whole blocks"
    );
    assert!(
        with(tensor("blk.0.attn_q.bias", &[64], 0, vec![0; 256]))
            .contains("one with tensor blk.0.attn_q.bias")
    );
    assert!(with(tensor("rope_freqs.weight", &[16], 0, f32s(&[0.0; 16]))).contains("not a positive number"));
    let mut missing = tensors(&model);
    missing.retain(|t| t.name != q);
    assert!(refusal(&file(&metadata(), &missing)).contains("blk.0.attn_q.weight is missing"));
    let mut twice = tensors(&model);
    twice.push(twice[0].clone());
    assert!(refusal(&file(&metadata(), &twice)).contains("token_embd.weight occurs twice"));
}

#[test]
fn files_that_cannot_be_opened_are_named() {
    let missing = Gguf::open("/nonexistent/model.gguf".as_ref()).unwrap_err().to_string();
    assert!(missing.contains("/nonexistent/model.gguf"), "{missing}");
    let directory = Gguf::open(env!("CARGO_MANIFEST_DIR").as_ref()).unwrap_err().to_string();
    assert!(directory.contains("not a regular file"), "{directory}");
}

#[test]
fn metadata_of_every_type_reads_back() {
    let entries = [
        entry("u8", 0, &[200]),
        entry("i8", 1, &(-3i8).to_le_bytes()),
        entry("u16", 2, &60000u16.to_le_bytes()),
        entry("i16", 3, &(-300i16).to_le_bytes()),
        entry("u32", 4, &u32::MAX.to_le_bytes()),
        entry("i32", 5, &(-70000i32).to_le_bytes()),
        entry("f32", 6, &1.5f32.to_le_bytes()),
        entry("bool", 7, &[1]),
        entry("u64", 10, &(1u64 << 40).to_le_bytes()),
        entry("i64", 11, &(-(1i64 << 40)).to_le_bytes()),
        entry("f64", 12, &0.1f64.to_le_bytes()),
        array("strings", STRING, 2, &[text("a"), text("")].concat()),
        array("ints", 3, 2, &[1, 0, 0xff, 0xff]),
        array("floats", 6, 1, &2.5f32.to_le_bytes()),
        array("bools", 7, 2, &[0, 1]),
        array("none", 4, 0, &[]),
    ];
    let bytes = file(&entries, &[]);
    let read = Gguf::read(Cursor::new(&bytes), bytes.len() as u64).unwrap();
    let expected = [
        ("u8", Value::Int(200)),
        ("i8", Value::Int(-3)),
        ("u16", Value::Int(60000)),
        ("i16", Value::Int(-300)),
        ("u32", Value::Int(i64::from(u32::MAX))),
        ("i32", Value::Int(-70000)),
        ("f32", Value::Float(1.5)),
        ("bool", Value::Bool(true)),
        ("u64", Value::Int(1 << 40)),
        ("i64", Value::Int(-(1 << 40))),
        ("f64", Value::Float(0.1)),
        ("strings", Value::Strs(vec!["a".into(), String::new()])),
        ("ints", Value::Ints(vec![1, -1])),
        ("floats", Value::Floats(vec![2.5])),
        ("bools", Value::Bools(vec![false, true])),
        ("none", Value::Ints(vec![])),
    ];
    for (key, value) in expected {
        assert_eq!(read.get(key), Some(&value), "{key}");
    }
}

/// Decodes one tensor and compares it with `expected(block bytes, element of block)`.
fn check_decoding(kind: TensorType, expected: impl Fn(&[u8], usize) -> f32) {
    let (elements, bytes) = kind.block();
    // More than one task's worth, and no whole number of tasks.
    let blocks = 4096 / elements + 3;
    let mut rng = Rng::new(bytes as u64);
    let mut data: Vec<u8> = (0..blocks * bytes).map(|_| rng.next_u64() as u8).collect();
    if elements > 1 {
        // Scales must be finite for a comparison: clear the top exponent bit of the halves that are scales.
        for block in data.chunks_exact_mut(bytes) {
            let scales: &[usize] = if kind == TensorType::Q6K { &[209] } else { &[1, 3] };
            scales.iter().for_each(|at| block[*at] &= 0xbf);
        }
    }
    let mut out = vec![f32::NAN; blocks * elements];
    kind.decode(&data, &mut out);
    for (i, found) in out.iter().enumerate() {
        let expected = expected(&data[i / elements * bytes..][..bytes], i % elements);
        let same = found.to_bits() == expected.to_bits() || (found - expected).abs() <= 1e-6 * expected.abs();
        assert!(same || found.is_nan() && expected.is_nan(), "{kind:?}[{i}] is {found}, not {expected}");
    }
}

#[test]
fn tensor_types_decode() {
    let half = |b: &[u8], at| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    let nibble = |b: &[u8], i: usize| f32::from(if i < 16 { b[i] & 15 } else { b[i - 16] >> 4 });
    check_decoding(TensorType::F32, |b, _| f32::from_le_bytes(b.try_into().unwrap()));
    check_decoding(TensorType::F16, |b, _| half(b, 0));
    check_decoding(TensorType::Bf16, |b, _| bf16::from_le_bytes([b[0], b[1]]).to_f32());
    check_decoding(TensorType::Q4_0, |b, i| half(b, 0) * (nibble(&b[2..], i) - 8.0));
    check_decoding(TensorType::Q4_1, |b, i| half(b, 0) * nibble(&b[4..], i) + half(b, 2));
    check_decoding(TensorType::Q8_0, |b, i| half(b, 0) * f32::from(b[2 + i] as i8));
    // Element by element, from the layout: 128 elements share 64 bytes of nibbles and 32 bytes of bit pairs.
    check_decoding(TensorType::Q6K, |b, i| {
        let (n, l) = (i / 128, i % 32);
        let (low, high) = (&b[64 * n..], b[128 + 32 * n + l]);
        let code = match i % 128 / 32 {
            0 => low[l] & 15 | (high & 3) << 4,
            1 => low[l + 32] & 15 | (high >> 2 & 3) << 4,
            2 => low[l] >> 4 | (high >> 4 & 3) << 4,
            _ => low[l + 32] >> 4 | (high >> 6) << 4,
        };
        half(b, 208) * f32::from(b[192 + i / 16] as i8) * (f32::from(code) - 32.0)
    });
}

/// Byte-level BPE with two merges, one special and one visible added token.
fn vocabulary() -> Vec<Entry> {
    let tokens = ["<end>", "<note>", "a", "b", "c", "1", "2", "Ġ", "ab", "abc", "12"];
    let strings = |all: &[&str]| all.iter().flat_map(|s| text(s)).collect::<Vec<u8>>();
    let types = [3i32, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1];
    let merges = ["a b", "ab c", "1 2"];
    vec![
        string("tokenizer.ggml.model", "gpt2"),
        string("tokenizer.ggml.pre", "smollm"),
        array("tokenizer.ggml.tokens", STRING, tokens.len(), &strings(&tokens)),
        array("tokenizer.ggml.token_type", 5, types.len(), &types.map(i32::to_le_bytes).concat()),
        array("tokenizer.ggml.merges", STRING, merges.len(), &strings(&merges)),
        int("tokenizer.ggml.eos_token_id", 0),
    ]
}

fn tokenizer(entries: &[Entry]) -> llama::error::Result<Tokenizer> {
    let bytes = file(entries, &[]);
    Tokenizer::from_gguf(&Gguf::read(Cursor::new(&bytes), bytes.len() as u64).unwrap())
}

#[test]
fn a_small_vocabulary_tokenizes() {
    let t = tokenizer(&vocabulary()).unwrap();
    assert_eq!(t.encode("abc ab").unwrap(), [9, 7, 8]);
    assert_eq!(t.encode("12").unwrap(), [5, 6], "digits are cut apart before merging");
    assert_eq!(t.encode("a<end>b<note>").unwrap(), [2, 0, 3, 1]);
    assert_eq!(
        t.decode(&[9, 7, 8, 0, 1]).unwrap(),
        "abc ab<note>",
        "special tokens are not shown, others are"
    );
    assert_eq!(t.ends(), [0]);
    assert!(t.chat(&[]).unwrap_err().to_string().contains("chat template is missing"));

    let mut entries = vocabulary();
    entries[1] = string("tokenizer.ggml.pre", "gpt-2");
    assert_eq!(tokenizer(&entries).unwrap().encode("12").unwrap(), [10], "GPT-2 merges digits");
    entries.push(entry("tokenizer.ggml.add_bos_token", 7, &[1]));
    entries.push(int("tokenizer.ggml.bos_token_id", 0));
    assert_eq!(tokenizer(&entries).unwrap().encode("a").unwrap(), [0, 2]);
}

#[test]
fn bad_vocabularies_are_refused() {
    let with = |index: usize, e: Entry| {
        let mut entries = vocabulary();
        entries[index] = e;
        tokenizer(&entries).unwrap_err().to_string()
    };
    assert!(
        with(0, string("tokenizer.ggml.model", "llama"))
            .contains("tokenizer.ggml.model is llama; supported: gpt2")
    );
    assert!(
        with(1, string("tokenizer.ggml.pre", "qwen2"))
            .contains("tokenizer.ggml.pre is qwen2; supported: smollm")
    );
    assert!(with(2, array("tokenizer.ggml.tokens", STRING, 0, &[])).contains("0 tokens and 11 token types"));
    let merges = |s: &str| array("tokenizer.ggml.merges", STRING, 1, &text(s));
    assert!(with(4, merges("ab")).contains("not two tokens"));
    assert!(with(4, merges("x y")).contains("tokenizer is damaged"), "merges of unknown tokens");
    assert!(with(5, int("tokenizer.ggml.eos_token_id", 11)).contains("eos_token_id is 11; allowed: 0 to 10"));
}
