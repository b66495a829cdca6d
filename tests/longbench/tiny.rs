//! A model and a tokenizer small enough for every test: one token per byte, random weights.

use crate::gguf_writer::{STRING, array, entry, file, int, string, text};
use crate::llama::config::Config;
use crate::llama::gguf::Gguf;
use crate::llama::model::Model;
use crate::llama::tokenizer::Tokenizer;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// What byte-level vocabularies write for a line break.
const NEWLINE: &str = "Ċ";
pub(crate) const TEMPLATE: &str =
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %} [answer] ";

/// Token 0 is the line break, the last two are `<bos>`, put before every text, and `<eos>`.
pub(crate) fn tokenizer(template: Option<&str>) -> Tokenizer {
    let mut tokens: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    tokens.sort_by_key(|token| (token != NEWLINE, token.clone()));
    tokens.extend(["<bos>", "<eos>"].map(String::from));
    let (n, strings) = (tokens.len(), tokens.iter().flat_map(|t| text(t)).collect::<Vec<u8>>());
    let types: Vec<u8> = (0..n).flat_map(|i| if i < 256 { 1i32 } else { 3 }.to_le_bytes()).collect();
    let mut entries = vec![
        string("tokenizer.ggml.model", "gpt2"),
        string("tokenizer.ggml.pre", "gpt-2"),
        array("tokenizer.ggml.tokens", STRING, n, &strings),
        array("tokenizer.ggml.token_type", 5, n, &types),
        array("tokenizer.ggml.merges", STRING, 0, &[]),
        int("tokenizer.ggml.bos_token_id", 256),
        int("tokenizer.ggml.eos_token_id", 257),
        entry("tokenizer.ggml.add_bos_token", 7, &[1]),
    ];
    entries.extend(template.map(|template| string("tokenizer.chat_template", template)));
    let bytes = file(&entries, &[]);
    Tokenizer::from_gguf(&Gguf::read(Cursor::new(&bytes), bytes.len() as u64).unwrap()).unwrap()
}

pub(crate) fn model() -> Model {
    let config = Config {
        layers: 1,
        hidden: 64,
        ffn: 64,
        heads: 2,
        kv_heads: 1,
        head_dim: 64,
        vocab: 258,
        context: 2048,
        rms_eps: 1e-5,
        rope_base: 10_000.0,
        rope_dim: 64,
        tied: true,
    };
    Model::random(config, 7, 1).unwrap()
}

/// A model that finds every token equally likely, so that the first one always comes next.
pub(crate) fn indifferent() -> Model {
    let mut model = model();
    model.weights.final_norm.data.fill(0.0);
    model
}

/// An empty directory of this test's own.
pub(crate) fn directory(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("longbench").join(name);
    if path.exists() {
        std::fs::remove_dir_all(&path).unwrap();
    }
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// A line of a data file.
pub(crate) fn line(id: &str, context: &str, answers: &[&str], length: u64) -> String {
    let classes = ["Food", "Animal"];
    let item = serde_json::json!({
        "input": "Which?", "context": context, "answers": answers, "length": length, "dataset": "tiny",
        "language": "en", "all_classes": classes, "_id": id,
    });
    format!("{item}\n")
}
