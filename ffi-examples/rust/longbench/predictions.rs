//! A file of predictions that a run can be resumed from.

use super::data::{Prediction, parse};
use crate::llama::error::{Error, Result};
use std::collections::HashSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// An open file. Predictions are written as whole lines; what a killed run left of a line is dropped when the file is
/// opened, and its item is asked again.
#[derive(Debug)]
pub struct Predictions {
    path: PathBuf,
    file: File,
    done: HashSet<String>,
}

impl Predictions {
    /// Opens the file, or creates an empty one. Another run must not have it open.
    pub fn open(path: &Path) -> Result<Self> {
        let named = |e| Error::io(path.display(), e);
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(named)?;
        file.try_lock().map_err(|e| match e {
            TryLockError::WouldBlock => {
                Error::Invalid(format!("{} is in use by another run", path.display()))
            }
            TryLockError::Error(e) => named(e),
        })?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(named)?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(named)?;
        }
        let mut done = HashSet::new();
        for line in parse::<Prediction>(path, &bytes[..whole]) {
            let prediction = line.map_err(Error::Invalid)?;
            done.insert(prediction.id.ok_or_else(|| {
                Error::unsupported(path.display(), "a file without _id", "files that this program wrote")
            })?);
        }
        Ok(Self { path: path.to_owned(), file, done })
    }

    /// Whether the item with this id is done.
    pub fn contains(&self, id: &str) -> bool {
        self.done.contains(id)
    }

    /// Writes a prediction through to the disk.
    pub fn push(&mut self, prediction: &Prediction) -> Result<()> {
        let line = serde_json::to_string(prediction).expect("strings and numbers are JSON") + "\n";
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|e| Error::io(self.path.display(), e))?;
        self.done.extend(prediction.id.clone());
        Ok(())
    }
}
