//! Scores of a folder of predictions.

use super::data::{self, Prediction};
use super::tasks::{Task, select};
use crate::llama::error::{Error, Result};
use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Bounds of the length buckets of LongBench-E.
const BUCKETS: [(&str, u64); 3] = [("0-4k", 4000), ("4-8k", 8000), ("8k+", u64::MAX)];

/// Scores every `TASK.jsonl` of a folder: per task 0 to 100 with two decimals, or one such number per length bucket
/// (null for an empty one) if `e`.
pub fn score_folder(folder: &Path, e: bool) -> Result<Map<String, Value>> {
    let named = |e| Error::io(folder.display(), e);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(named)? {
        paths.push(entry.map_err(named)?.path());
    }
    paths.retain(|path| path.extension().is_some_and(|x| x == "jsonl"));
    if paths.is_empty() {
        return Err(Error::Invalid(format!("{} has no predictions (TASK.jsonl)", folder.display())));
    }
    paths.iter().map(|path| score_file(path, e)).collect()
}

fn score_file(path: &Path, e: bool) -> Result<(String, Value)> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let task = select(std::slice::from_ref(&name), e)?[0];
    let mut scores = Vec::new();
    for line in data::read::<Prediction>(path)? {
        let prediction = line.map_err(Error::Invalid)?;
        let length = prediction.length;
        let score = score(task, &prediction).map_err(|e| Error::damaged(path.display(), e))?;
        scores.push((length, score));
    }
    if scores.is_empty() {
        return Err(Error::Invalid(format!("{} has no predictions", path.display())));
    }
    if !e {
        return Ok((name, mean(scores.iter().map(|(_, score)| *score))));
    }
    let mut buckets = BUCKETS.map(|_| Vec::new());
    for (length, score) in scores {
        let length = length.ok_or_else(|| {
            Error::damaged(path.display(), "a prediction has no length, which LongBench-E needs")
        })?;
        let bucket = BUCKETS.iter().position(|(_, end)| length < *end).unwrap_or(BUCKETS.len() - 1);
        buckets[bucket].push(score);
    }
    let scored =
        BUCKETS.iter().zip(buckets).map(|((name, _), scores)| (name.to_string(), mean(scores.into_iter())));
    Ok((name, Value::Object(scored.collect())))
}

/// Score of a prediction against the answer that suits it best.
pub fn score(task: &Task, prediction: &Prediction) -> Result<f64> {
    let mut text = prediction.pred.as_str();
    if task.few_shot {
        text = text.trim_start_matches('\n').split('\n').next().unwrap_or("");
    }
    let classes = prediction.all_classes.as_deref().unwrap_or(&[]);
    let mut best = 0.0;
    for answer in &prediction.answers {
        best = task.metric.score(text, answer, classes)?.max(best);
    }
    Ok(best)
}

/// The mean in percent, with two decimals; null for none.
fn mean(scores: impl ExactSizeIterator<Item = f64>) -> Value {
    let n = scores.len() as f64;
    let percent = 100.0 * scores.sum::<f64>() / n;
    if n == 0.0 { Value::Null } else { json!(round(percent)) }
}

/// Two decimals of the exact value, as Python's `round` gives them.
pub fn round(x: f64) -> f64 {
    format!("{x:.2}").parse().expect("what was printed as a number is one")
}

/// Writes `result.json` into the folder; returns its text.
pub fn write_result(folder: &Path, result: &Map<String, Value>) -> Result<(PathBuf, String)> {
    let mut text = Vec::new();
    // Indented as the published file is.
    let mut writer = Serializer::with_formatter(&mut text, PrettyFormatter::with_indent(b"    "));
    result.serialize(&mut writer).expect("numbers and names are JSON");
    let text = String::from_utf8(text).expect("JSON is UTF-8");
    let path = folder.join("result.json");
    std::fs::write(&path, &text).map_err(|e| Error::io(path.display(), e))?;
    Ok((path, text))
}
