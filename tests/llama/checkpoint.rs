//! Hugging Face checkpoints: a folder with config.json and safetensors files, in one piece or in shards.
#![allow(unsafe_code, reason = "files are mapped into memory")]

use super::config::Config;
use super::error::{Error, Result};
use super::hf_config::{self, HfConfig};
use super::quant::TensorType;
use super::source::Source;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

/// The name under which GGUF files hold RoPE factors; here they follow from config.json.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    config: HfConfig,
    shards: Vec<(PathBuf, Mmap)>,
    /// By GGUF name: shard, and name in it.
    tensors: BTreeMap<String, (usize, String)>,
}

/// Reads a JSON file.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(|e| Error::io(path.display(), e))?;
    serde_json::from_slice(&text).map_err(|e| Error::damaged(path.display(), e))
}

impl Checkpoint {
    pub fn open(folder: &Path) -> Result<Self> {
        let mut config = hf_config::parse(&read_json(&folder.join("config.json"))?)?;
        let index = folder.join("model.safetensors.index.json");
        let mut promised = Vec::new();
        let mut files = BTreeSet::new();
        if index.is_file() {
            let json = read_json(&index)?;
            let map = json.get("weight_map").and_then(Value::as_object);
            for (name, file) in map.ok_or_else(|| Error::damaged(index.display(), "it has no weight_map"))? {
                let file = file.as_str().ok_or_else(|| {
                    Error::damaged(index.display(), format!("weight_map.{name} is {file}, not a file name"))
                })?;
                promised.push((name.clone(), file.to_string()));
                files.insert(file.to_string());
            }
        } else {
            files.insert("model.safetensors".to_string());
        }
        let mut shards = Vec::new();
        let mut tensors = BTreeMap::new();
        for file in files {
            let path = folder.join(file);
            let named = |e| Error::io(path.display(), e);
            let file = File::open(&path).map_err(named)?;
            // SAFETY: nobody is to change a checkpoint while it is read; the map is only ever read from.
            let map = unsafe { Mmap::map(&file) }.map_err(named)?;
            for name in deserialize(&path, &map)?.names() {
                // A buffer that old checkpoints carry; it follows from rope_theta.
                if name.ends_with("rotary_emb.inv_freq") {
                    continue;
                }
                let place = (shards.len(), name.to_string());
                if tensors.insert(gguf_name(name), place).is_some() {
                    return Err(Error::damaged(
                        path.display(),
                        format!("tensor {name} occurs in another file too"),
                    ));
                }
            }
            shards.push((path, map));
        }
        for (name, file) in promised {
            let held = tensors.get(&gguf_name(&name)).map(|(shard, _)| &shards[*shard].0);
            if held != Some(&folder.join(&file)) && !name.ends_with("rotary_emb.inv_freq") {
                return Err(Error::damaged(folder.join(file).display(), format!("tensor {name} is missing")));
            }
        }
        // Written out or not, a tied output matrix is the embedding.
        config.config.tied &= !tensors.contains_key("output.weight");
        Ok(Self { config, shards, tensors })
    }
}

fn deserialize<'a>(path: &Path, map: &'a Mmap) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(map).map_err(|e| Error::damaged(path.display(), e))
}

/// The name of a tensor in GGUF files; names that are not Llama's stay.
fn gguf_name(name: &str) -> String {
    let parts = [
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let of_layer = || {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let part = rest.strip_suffix(".weight")?;
        let (_, to) = parts.iter().find(|(from, _)| *from == part)?;
        Some(format!("blk.{layer}.{to}.weight"))
    };
    match name {
        "model.embed_tokens.weight" => "token_embd.weight".to_string(),
        "model.norm.weight" => "output_norm.weight".to_string(),
        "lm_head.weight" => "output.weight".to_string(),
        _ => of_layer().unwrap_or_else(|| name.to_string()),
    }
}

impl Source for Checkpoint {
    fn config(&self) -> Result<Config> {
        Ok(self.config.config.clone())
    }

    fn tensor_names(&self) -> Vec<String> {
        let factors = self.config.rope_factors.as_ref().map(|_| ROPE_FACTORS.to_string());
        self.tensors.keys().cloned().chain(factors).collect()
    }

    fn read_tensor(&mut self, name: &str, dims: &[usize]) -> Result<(TensorType, Vec<u8>)> {
        if let (ROPE_FACTORS, Some(factors)) = (name, &self.config.rope_factors) {
            return Ok((TensorType::F32, factors.iter().flat_map(|f| f.to_le_bytes()).collect()));
        }
        let (shard, own) = self.tensors.get(name).ok_or_else(|| {
            Error::damaged("checkpoint", format!("tensor {name} (by its GGUF name) is missing"))
        })?;
        let (path, map) = &self.shards[*shard];
        let file = deserialize(path, map)?;
        let tensor = file.tensor(own).map_err(|e| Error::damaged(path.display(), e))?;
        let shape: Vec<usize> = dims.iter().rev().copied().collect();
        if tensor.shape() != shape {
            return Err(Error::damaged(
                format!("tensor {own}"),
                format!("its shape is {:?}, config.json asks for {shape:?}", tensor.shape()),
            ));
        }
        let kind = match tensor.dtype() {
            Dtype::F32 => TensorType::F32,
            Dtype::F16 => TensorType::F16,
            Dtype::BF16 => TensorType::Bf16,
            other => {
                let found = format!("{other:?}");
                return Err(Error::unsupported(format!("type of tensor {own}"), found, "F32, F16, BF16"));
            }
        };
        let rotates = name.ends_with("attn_q.weight") || name.ends_with("attn_k.weight");
        let data = match rotates {
            true => interleave(tensor.data(), self.config.config.head_dim, tensor.data().len() / shape[0]),
            false => tensor.data().to_vec(),
        };
        Ok((kind, data))
    }
}

/// Puts the rows of each head that rotate together, i and i + dim / 2, next to each other.
fn interleave(rows: &[u8], dim: usize, row_bytes: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows.len());
    for head in rows.chunks_exact(dim * row_bytes) {
        let (first, second) = head.split_at(dim / 2 * row_bytes);
        for (a, b) in first.chunks_exact(row_bytes).zip(second.chunks_exact(row_bytes)) {
            out.extend_from_slice(a);
            out.extend_from_slice(b);
        }
    }
    out
}
