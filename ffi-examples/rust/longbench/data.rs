//! The benchmark's files: one JSON object per line.

use crate::llama::error::{Error, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A question of a task.
#[derive(Debug, Clone, Deserialize)]
pub struct Item {
    #[serde(rename = "_id")]
    pub id: String,
    pub input: String,
    pub context: String,
    /// Any of them is right.
    pub answers: Vec<String>,
    /// Names to choose from, in classification.
    pub all_classes: Option<Vec<String>>,
    /// Words of the item, characters in Chinese tasks.
    pub length: u64,
}

/// An answer of a model, with what is needed to score it. `_id` is ours: it tells which items are done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    pub pred: String,
    pub answers: Vec<String>,
    pub all_classes: Option<Vec<String>>,
    pub length: Option<u64>,
    #[serde(rename = "_id", default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// Reads the lines of a file. A line that is no `T` becomes a message that names file and line; blank lines do not
/// count.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<std::result::Result<T, String>>> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path.display(), e))?;
    Ok(parse(path, &bytes))
}

/// As [`read`], from the bytes of a file.
pub fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Vec<std::result::Result<T, String>> {
    let lines = bytes.split(|b| *b == b'\n').zip(1..);
    let parse = |(line, number)| {
        serde_json::from_slice(line).map_err(|e: serde_json::Error| {
            let text = e.to_string();
            // Its own place counts from the start of the line.
            let reason = text.split(" at line ").next().unwrap_or(&text);
            format!("{}, line {number}, column {}: {reason}", path.display(), e.column())
        })
    };
    lines.filter(|(line, _): &(&[u8], usize)| !line.trim_ascii().is_empty()).map(parse).collect()
}
