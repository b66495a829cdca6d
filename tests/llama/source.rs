//! What a model is read from.

use super::config::Config;
use super::error::Result;
use super::gguf::Gguf;
use super::quant::TensorType;
use std::io::{Read, Seek};

/// A file or folder that holds a model. Tensors go by the names of GGUF files, and have their layout.
pub trait Source {
    /// The shape of the model, checked.
    fn config(&self) -> Result<Config>;

    /// Names of all tensors.
    fn tensor_names(&self) -> Vec<String>;

    /// The coded bytes of a tensor whose dimensions (innermost first) must be `dims`.
    fn read_tensor(&mut self, name: &str, dims: &[usize]) -> Result<(TensorType, Vec<u8>)>;
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
