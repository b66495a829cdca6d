//! Reading of Hugging Face checkpoints: small ones that this test writes, against the same model as a GGUF file.
#![allow(clippy::unwrap_used)]

mod gguf_writer;
mod llama;

use gguf_writer::{Entry, file, float, int, string, tensor};
use half::{bf16, f16};
use llama::checkpoint::Checkpoint;
use llama::config::Config;
use llama::gguf::Gguf;
use llama::hf_config::{self, HfConfig};
use llama::model::{Meter, Model};
use llama::shapes::{SHAPES, named};
use llama::store::KvStore;
use llama::tokenizer::{Message, Tokenizer};
use safetensors::{Dtype, View};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

const DIM: usize = 16;

fn config() -> Config {
    Config {
        layers: 2,
        hidden: 64,
        ffn: 96,
        heads: 4,
        kv_heads: 2,
        head_dim: DIM,
        vocab: 40,
        context: 128,
        rms_eps: 1e-5,
        rope_base: 10_000.0,
        rope_dim: DIM,
        tied: false,
    }
}

fn json_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 40, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_scaling": null, "tie_word_embeddings": false, "attention_bias": false, "torch_dtype": "bfloat16",
    })
}

/// A tensor under both names; rows and columns, 0 rows for a vector.
struct Part {
    gguf: String,
    hf: String,
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

/// All tensors of a model, rounded to bf16, which F32, F16 (for values of this size, nearly all) and BF16 files share.
fn parts(model: &Model) -> Vec<Part> {
    let (c, w) = (&model.config, &model.weights);
    let mut all = Vec::new();
    let mut add = |gguf: String, hf: String, rows: usize, cols: usize, data: &[f32]| {
        let data = data.iter().map(|x| bf16::from_f32(*x).to_f32()).collect();
        all.push(Part { gguf: format!("{gguf}.weight"), hf: format!("{hf}.weight"), rows, cols, data });
    };
    add("token_embd".into(), "model.embed_tokens".into(), c.vocab, c.hidden, &w.embedding.data);
    add("output_norm".into(), "model.norm".into(), 0, c.hidden, &w.final_norm.data);
    add("output".into(), "lm_head".into(), c.vocab, c.hidden, &w.output().data);
    for (i, l) in w.layers.iter().enumerate() {
        let (q, kv, up) = (c.q_width() * c.hidden, c.kv_width() * c.hidden, c.ffn * c.hidden);
        let mut of = |gguf: &str, hf: &str, rows, cols, data: &[f32]| {
            add(format!("blk.{i}.{gguf}"), format!("model.layers.{i}.{hf}"), rows, cols, data);
        };
        of("attn_norm", "input_layernorm", 0, c.hidden, &l.attention_norm.data);
        of("attn_q", "self_attn.q_proj", c.q_width(), c.hidden, &l.qkv.data[..q]);
        of("attn_k", "self_attn.k_proj", c.kv_width(), c.hidden, &l.qkv.data[q..q + kv]);
        of("attn_v", "self_attn.v_proj", c.kv_width(), c.hidden, &l.qkv.data[q + kv..]);
        of("attn_output", "self_attn.o_proj", c.hidden, c.q_width(), &l.attention_out.data);
        of("ffn_norm", "post_attention_layernorm", 0, c.hidden, &l.ffn_norm.data);
        of("ffn_gate", "mlp.gate_proj", c.ffn, c.hidden, &l.gate_up.data[..up]);
        of("ffn_up", "mlp.up_proj", c.ffn, c.hidden, &l.gate_up.data[up..]);
        of("ffn_down", "mlp.down_proj", c.hidden, c.ffn, &l.down.data);
    }
    all
}

/// A tensor of a safetensors file.
#[derive(Clone)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for &Tensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        (&self.bytes[..]).into()
    }
    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

/// As published checkpoints hold them: rows 2i and 2i + 1 of a head of q and k are at i and i + DIM / 2.
fn tensors(parts: &[Part], dtype: Dtype) -> Vec<(String, Tensor)> {
    let encode = |x: f32| match dtype {
        Dtype::F32 => x.to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        _ => bf16::from_f32(x).to_le_bytes().to_vec(),
    };
    let published = |part: &Part| {
        let turns = part.hf.contains("q_proj") || part.hf.contains("k_proj");
        let row = |r: usize| {
            let (head, i) = (r / DIM * DIM, r % DIM);
            let from = if turns { head + i % (DIM / 2) * 2 + i / (DIM / 2) } else { r };
            &part.data[from * part.cols..][..part.cols]
        };
        let bytes = (0..part.rows.max(1)).flat_map(row).flat_map(|x| encode(*x)).collect();
        let shape = if part.rows == 0 { vec![part.cols] } else { vec![part.rows, part.cols] };
        (part.hf.clone(), Tensor { dtype, shape, bytes })
    };
    parts.iter().map(published).collect()
}

fn gguf_model(parts: &[Part], extra: &[Entry]) -> Model {
    let metadata = [
        string("general.architecture", "llama"),
        int("llama.block_count", 2),
        int("llama.context_length", 128),
        int("llama.embedding_length", 64),
        int("llama.feed_forward_length", 96),
        int("llama.attention.head_count", 4),
        int("llama.attention.head_count_kv", 2),
        float("llama.attention.layer_norm_rms_epsilon", 1e-5),
    ];
    let f32s = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut tensors: Vec<Entry> = parts
        .iter()
        .map(|p| {
            let dims = if p.rows == 0 { vec![p.cols] } else { vec![p.cols, p.rows] };
            tensor(&p.gguf, &dims, 0, f32s(&p.data))
        })
        .collect();
    tensors.extend_from_slice(extra);
    let bytes = file(&metadata, &tensors);
    let mut gguf = Gguf::read(Cursor::new(&bytes), bytes.len() as u64).unwrap();
    Model::load(&mut gguf, 1, &mut |_, _| {}).unwrap()
}

fn directory(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("checkpoint").join(name);
    if path.exists() {
        fs::remove_dir_all(&path).unwrap();
    }
    fs::create_dir_all(&path).unwrap();
    path
}

fn write_json(folder: &Path, name: &str, value: &Value) {
    fs::write(folder.join(name), value.to_string()).unwrap();
}

fn write(folder: &Path, name: &str, tensors: &[(String, Tensor)]) {
    let bytes = safetensors::serialize(tensors.iter().map(|(name, t)| (name, t)), None).unwrap();
    fs::write(folder.join(name), bytes).unwrap();
}

fn load(folder: &Path) -> llama::error::Result<Model> {
    Model::load(&mut Checkpoint::open(folder)?, 1, &mut |_, _| {})
}

fn refusal(folder: &Path) -> String {
    load(folder).map(|_| ()).unwrap_err().to_string()
}

fn logits(model: &Model) -> Vec<f32> {
    let mut store = KvStore::dense(&model.config);
    model.prefill(&[3, 1, 4, 1, 5, 9, 2, 6], &mut store, &mut Meter::default()).unwrap()
}

#[test]
fn both_formats_give_the_same_model() {
    let parts = parts(&Model::random(config(), 1, 1).unwrap());
    let reference = gguf_model(&parts, &[]);
    assert_eq!(reference.config, config());
    let folder = directory("whole");
    write_json(&folder, "config.json", &json_config());
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        write(&folder, "model.safetensors", &tensors(&parts, dtype));
        let model = load(&folder).unwrap();
        assert_eq!(model.config, reference.config);
        let (found, expected) = (logits(&model), logits(&reference));
        // bf16 numbers below 2^-14 lose bits in f16.
        let tolerance = if dtype == Dtype::F16 { 1e-4 } else { 0.0 };
        let near = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= tolerance);
        assert!(near, "{dtype:?}: {found:?} {expected:?}");
    }
}

#[test]
fn rope_scaling_equals_the_factors_of_a_gguf_file() {
    let parts = parts(&Model::random(config(), 2, 1).unwrap());
    // 2^-1 .. turns over the original context of 32: 5.1, 1.6, 0.5, ...; 4 and more stay, 1 and fewer become an eighth.
    let factors: Vec<f32> = (0..DIM / 2)
        .map(|i| {
            let turns = 32.0 * 10_000f64.powf(-(i as f64) / 8.0) / std::f64::consts::TAU;
            match turns {
                t if t >= 4.0 => 1.0,
                t if t <= 1.0 => 8.0,
                t => (1.0 / ((1.0 - (t - 1.0) / 3.0) / 8.0 + (t - 1.0) / 3.0)) as f32,
            }
        })
        .collect();
    assert!(factors[0] == 1.0 && (1.1..7.9).contains(&factors[1]) && factors[2..] == [8.0; 6], "{factors:?}");
    let bytes = factors.iter().flat_map(|x| x.to_le_bytes()).collect();
    let reference = gguf_model(&parts, &[tensor("rope_freqs.weight", &[DIM / 2], 0, bytes)]);
    let scaling = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32 });
    let folder = directory("scaled");
    write(&folder, "model.safetensors", &tensors(&parts, Dtype::BF16));
    let mut config = json_config();
    config["rope_scaling"] = scaling.clone();
    write_json(&folder, "config.json", &config);
    assert_eq!(logits(&load(&folder).unwrap()), logits(&reference));
    // The newer spelling.
    config["rope_scaling"] = Value::Null;
    config["rope_theta"] = Value::Null;
    config["rope_parameters"] = scaling;
    config["rope_parameters"]["rope_theta"] = 10_000.into();
    write_json(&folder, "config.json", &config);
    assert_eq!(logits(&load(&folder).unwrap()), logits(&reference));
}

#[test]
fn shards_and_tied_embeddings() {
    let parts = parts(&Model::random(config(), 3, 1).unwrap());
    let all = tensors(&parts, Dtype::BF16);
    let whole = directory("pieces-whole");
    write_json(&whole, "config.json", &json_config());
    write(&whole, "model.safetensors", &all);
    let folder = directory("pieces");
    write_json(&folder, "config.json", &json_config());
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let (first, second) = all.split_at(9);
    let mut second = second.to_vec();
    let buffer = Tensor { dtype: Dtype::F32, shape: vec![8], bytes: vec![0; 32] };
    second.push(("model.layers.0.self_attn.rotary_emb.inv_freq".into(), buffer));
    write(&folder, names[0], first);
    write(&folder, names[1], &second);
    let mut map = serde_json::Map::new();
    map.extend(first.iter().map(|(name, _)| (name.clone(), names[0].into())));
    map.extend(second.iter().map(|(name, _)| (name.clone(), names[1].into())));
    let index = |map: &serde_json::Map<String, Value>| {
        write_json(&folder, "model.safetensors.index.json", &json!({ "metadata": {}, "weight_map": map }));
    };
    index(&map);
    assert_eq!(logits(&load(&folder).unwrap()), logits(&load(&whole).unwrap()));

    map.insert("model.norm.weight".into(), names[1].into());
    index(&map);
    assert!(refusal(&folder).ends_with("00002.safetensors is damaged: tensor model.norm.weight is missing"));
    map.insert("model.norm.weight".into(), 3.into());
    index(&map);
    assert!(refusal(&folder).contains("weight_map.model.norm.weight is 3, not a file name"));
    map.insert("model.norm.weight".into(), "none.safetensors".into());
    index(&map);
    assert!(refusal(&folder).contains("none.safetensors"), "{}", refusal(&folder));
    write_json(&folder, "model.safetensors.index.json", &json!({}));
    assert!(refusal(&folder).contains("it has no weight_map"));

    let mut tied = json_config();
    tied["tie_word_embeddings"] = true.into();
    write_json(&whole, "config.json", &tied);
    assert!(!load(&whole).unwrap().config.tied, "an output matrix that is there is used");
    let without: Vec<_> = all.into_iter().filter(|(name, _)| name != "lm_head.weight").collect();
    write(&whole, "model.safetensors", &without);
    assert!(load(&whole).unwrap().config.tied);
    write_json(&whole, "config.json", &json_config());
    assert!(refusal(&whole).contains("tensor output.weight (by its GGUF name) is missing"));
}

#[test]
fn damaged_checkpoints_say_what_is_wrong() {
    let parts = parts(&Model::random(config(), 1, 1).unwrap());
    let good = tensors(&parts, Dtype::BF16);
    let folder = directory("damaged");
    assert!(refusal(&folder).contains("config.json"));
    fs::write(folder.join("config.json"), "{").unwrap();
    assert!(refusal(&folder).contains("config.json is damaged: EOF"));
    write_json(&folder, "config.json", &json_config());
    assert!(refusal(&folder).contains("model.safetensors"));
    let with = |name: &str, dtype, shape: &[usize], bytes: usize| {
        let mut all = good.clone();
        all.retain(|(old, _)| old != name);
        all.push((name.into(), Tensor { dtype, shape: shape.to_vec(), bytes: vec![0; bytes] }));
        write(&folder, "model.safetensors", &all);
        refusal(&folder)
    };
    let norm = "model.norm.weight";
    assert_eq!(
        with(norm, Dtype::BF16, &[63], 126),
        "tensor model.norm.weight is damaged: its shape is [63], config.json asks for [64]"
    );
    assert_eq!(
        with(norm, Dtype::I64, &[64], 512),
        "type of tensor model.norm.weight is I64; supported: F32, F16, BF16"
    );
    let bias = with("model.layers.0.self_attn.q_proj.bias", Dtype::BF16, &[64], 128);
    assert!(bias.contains("one with tensor model.layers.0.self_attn.q_proj.bias"), "{bias}");
    write(&folder, "model.safetensors", &good);
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    for len in [0, 7, 8, 100, bytes.len() - 1] {
        fs::write(folder.join("model.safetensors"), &bytes[..len]).unwrap();
        let message = refusal(&folder);
        assert!(message.contains("model.safetensors"), "cut to {len}: {message}");
    }
}

#[test]
fn configurations_are_read_and_others_refused_by_field() {
    let parse = |value: &Value| hf_config::parse(value);
    assert_eq!(parse(&json_config()).unwrap(), HfConfig { config: config(), rope_factors: None });
    let with = |key: &str, value: Value| {
        let mut json = json_config();
        json[key] = value;
        parse(&json).map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(
        with("model_type", "qwen2".into()),
        "model_type of config.json is \"qwen2\"; supported: llama, mistral"
    );
    assert!(with("hidden_act", "gelu".into()).starts_with("hidden_act of config.json is \"gelu\""));
    assert!(with("attention_bias", true.into()).starts_with("attention_bias of config.json is true"));
    assert!(with("mlp_bias", true.into()).starts_with("mlp_bias of config.json is true"));
    assert!(
        with("quantization_config", json!({ "bits": 4 })).starts_with("quantization_config of config.json")
    );
    assert!(with("partial_rotary_factor", 0.5.into()).ends_with("is 0.5; supported: 1"));
    assert!(with("sliding_window", 64.into()).ends_with("is 64; supported: null (full attention)"));
    assert!(with("num_hidden_layers", 0.into()).ends_with("is 0; supported: 1 to 1024"));
    assert!(with("num_hidden_layers", "2".into()).contains("is \"2\""));
    assert!(with("num_key_value_heads", 5.into()).ends_with("is 5; supported: 1 to 4"));
    assert!(with("num_key_value_heads", 3.into()).contains("4 query heads are no multiple of 3 KV heads"));
    assert!(
        with("hidden_size", 63.into()).contains("hidden_size 63 is no multiple of num_attention_heads 4")
    );
    assert!(with("head_dim", 15.into()).contains("RoPE over 15 channels"));
    assert!(with("rms_norm_eps", Value::Null).ends_with("rms_norm_eps is missing"));
    assert!(with("rope_theta", "x".into()).contains("rope_theta of config.json is \"x\""));
    let yarn = with("rope_scaling", json!({ "type": "yarn" }));
    assert_eq!(yarn, "rope_scaling.type of config.json is \"yarn\"; supported: llama3, default");
    let part = with("rope_scaling", json!({ "rope_type": "llama3", "factor": 8 }));
    assert!(part.ends_with("rope_scaling.low_freq_factor is missing"), "{part}");
    let mut mistral = json_config();
    mistral["model_type"] = "mistral".into();
    mistral["sliding_window"] = 128.into();
    parse(&mistral).expect("a window as long as the context is none");
}

/// Fields of the published files.
#[test]
fn named_shapes_are_the_published_ones() {
    let published = [
        json!({ "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "rope_scaling": null, "pretraining_tp": 1 }),
        json!({ "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192, "rope_theta": 500000.0, "attention_bias": false }),
        json!({ "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": null }),
    ];
    let parameters = [6_738_415_616usize, 8_030_261_248, 7_241_732_096];
    for (((name, shape), json), parameters) in SHAPES.iter().zip(published).zip(parameters) {
        assert_eq!(hf_config::parse(&json).unwrap().config, *shape, "{name}");
        assert_eq!(named(name).unwrap(), *shape);
        let matrices = 2 * shape.q_width() + 2 * shape.kv_width() + 3 * shape.ffn;
        let layer = (matrices + 2) * shape.hidden;
        assert_eq!(shape.layers * layer + (2 * shape.vocab + 1) * shape.hidden, parameters, "{name}");
    }
    let unknown = named("llama-4").unwrap_err().to_string();
    assert_eq!(
        unknown,
        "model shape is \"llama-4\"; allowed: llama-2-7b, llama-3-8b, mistral-7b-instruct-v0.2, tiny"
    );
}

/// Byte-level BPE of a few letters with a beginning-of-sequence token, as Llama 3's file is built.
fn write_tokenizer(folder: &Path, settings: &Value) {
    let special = |id: u32, content: &str| {
        json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true })
    };
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(0, "<bos>"), special(1, "<eos>"), special(2, "<eot>")],
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        "post_processor": { "type": "TemplateProcessing", "single": [{ "SpecialToken": { "id": "<bos>", "type_id": 0 } },
            { "Sequence": { "id": "A", "type_id": 0 } }], "pair": [{ "Sequence": { "id": "A", "type_id": 0 } },
            { "Sequence": { "id": "B", "type_id": 0 } }],
            "special_tokens": { "<bos>": { "id": "<bos>", "ids": [0], "tokens": ["<bos>"] } } },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "vocab": { "<bos>": 0, "<eos>": 1, "<eot>": 2, "a": 3, "b": 4, "c": 5, "Ġ": 6,
            "ab": 7, "abc": 8 }, "merges": ["a b", "ab c"] },
    });
    write_json(folder, "tokenizer.json", &tokenizer);
    write_json(folder, "tokenizer_config.json", settings);
}

#[test]
fn tokenizers_come_from_their_json_files() {
    let folder = directory("tokenizer");
    let template = "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('only users') }}\
        {% endif %}{{ m['content'].strip() }}<eot>{% endfor %}";
    let mut settings =
        json!({ "bos_token": "<bos>", "eos_token": { "content": "<eos>" }, "chat_template": template });
    write_tokenizer(&folder, &settings);
    let t = Tokenizer::from_folder(&folder).unwrap();
    assert_eq!(t.encode("abc ab").unwrap(), [0, 8, 6, 7]);
    assert_eq!(t.decode(&[0, 8, 6, 7, 2]).unwrap(), "abc ab");
    assert_eq!(t.ends(), [1]);
    let chat = t.chat(&[Message { role: "user", content: " abc\n" }]).unwrap();
    assert_eq!(chat, "<bos>abc<eot>");
    assert_eq!(t.encode(&chat).unwrap(), [0, 8, 2], "one beginning");
    let refused = t.chat(&[Message { role: "system", content: "" }]).unwrap_err().to_string();
    assert!(refused.contains("only users"), "{refused}");

    write_json(&folder, "generation_config.json", &json!({ "eos_token_id": [1, 2] }));
    settings["chat_template"] =
        json!([{ "name": "tool_use", "template": "x" }, { "name": "default", "template": "y" }]);
    write_tokenizer(&folder, &settings);
    let t = Tokenizer::from_folder(&folder).unwrap();
    assert!(t.ends().contains(&1) && t.ends().contains(&2));
    assert_eq!(t.chat(&[]).unwrap(), "y");
    fs::write(folder.join("chat_template.jinja"), "z").unwrap();
    assert_eq!(Tokenizer::from_folder(&folder).unwrap().chat(&[]).unwrap(), "z");

    let refusal = || Tokenizer::from_folder(&folder).map(|_| ()).unwrap_err().to_string();
    settings["eos_token"] = "<none>".into();
    write_tokenizer(&folder, &settings);
    assert!(refusal().ends_with("eos_token \"<none>\" is not in the vocabulary"), "{}", refusal());
    settings["eos_token"] = Value::Null;
    write_tokenizer(&folder, &settings);
    assert!(refusal().ends_with("eos_token is missing"), "{}", refusal());
    fs::write(folder.join("tokenizer.json"), "{}").unwrap();
    assert!(refusal().contains("tokenizer.json is damaged"), "{}", refusal());
}

#[test]
fn a_folder_opens_with_its_tokenizer() {
    let folder = directory("open");
    write_json(&folder, "config.json", &json_config());
    write(
        &folder,
        "model.safetensors",
        &tensors(&parts(&Model::random(config(), 1, 1).unwrap()), Dtype::BF16),
    );
    write_tokenizer(&folder, &json!({ "bos_token": "<bos>", "eos_token": "<eos>" }));
    let (model, tokenizer) = Model::open(&folder, 1, &mut |_, _| {}).unwrap();
    assert_eq!(model.config, config());
    let prompt = tokenizer.encode("abc").unwrap();
    model.prefill(&prompt, &mut KvStore::dense(&model.config), &mut Meter::default()).unwrap();
}
