//! What a model is read from.

use super::checkpoint::Checkpoint;
use super::config::Config;
use super::error::Result;
use super::gguf::Gguf;
use super::quant::TensorType;
use super::tokenizer::Tokenizer;
use std::io::{Read, Seek};
use std::path::Path;

/// A file or folder that holds a model. Tensors go by the names of GGUF files, and have their layout.
pub trait Source {
    /// The shape of the model, checked.
    fn config(&self) -> Result<Config>;

    /// Names of all tensors.
    fn tensor_names(&self) -> Vec<String>;

    /// The coded bytes of a tensor whose dimensions (innermost first) must be `dims`.
    fn read_tensor(&mut self, name: &str, dims: &[usize]) -> Result<(TensorType, Vec<u8>)>;
}

/// Opens a GGUF file, or the folder of a Hugging Face checkpoint, with its tokenizer.
pub fn open(path: &Path) -> Result<(Box<dyn Source + Send>, Tokenizer)> {
    if path.is_dir() {
        let tokenizer = Tokenizer::from_folder(path)?;
        return Ok((Box::new(Checkpoint::open(path)?), tokenizer));
    }
    let file = Gguf::open(path)?;
    let tokenizer = Tokenizer::from_gguf(&file)?;
    Ok((Box::new(file), tokenizer))
}

impl<R: Read + Seek> Source for Gguf<R> {
    fn config(&self) -> Result<Config> {
        Config::from_gguf(self)
    }

    fn tensor_names(&self) -> Vec<String> {
        Gguf::tensor_names(self).map(str::to_string).collect()
    }

    fn read_tensor(&mut self, name: &str, dims: &[usize]) -> Result<(TensorType, Vec<u8>)> {
        Gguf::read_tensor(self, name, dims)
    }
}
