//! The live sequences: how far each layer has come, and which pages hold it.

use super::SequenceId;
use super::config::CacheConfig;
use super::pages::Pages;
use crate::error::{Error, Result};
use crate::ops::RECENT_QUERIES;
use std::collections::BTreeMap;

/// How many tokens of a sequence one layer has. In order: sinks, compressed tokens, window.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Progress {
    /// All tokens.
    pub(super) tokens: usize,
    /// Tokens in pages.
    pub(super) compressed: usize,
    /// Queries that scores are made of.
    pub(super) recent: Recent,
}

/// How the scores of queries were formed; as in [`crate::CacheAttend`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Scoring {
    pub(super) scale: Option<f32>,
    pub(super) softcap: Option<f32>,
    pub(super) sliding_window: Option<usize>,
}

/// Which queries of one layer are remembered: those at consecutive positions, at most [`RECENT_QUERIES`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Recent {
    /// One past the newest.
    end: usize,
    count: usize,
    /// Of the newest.
    scoring: Scoring,
}

impl Recent {
    /// None if a snapshot could not hold it.
    pub(super) fn new(end: usize, count: usize, scoring: Scoring) -> Option<Self> {
        (count <= end.min(RECENT_QUERIES)).then_some(Self { end, count, scoring })
    }

    /// Adds the queries of the `n` positions before `end`; earlier ones stay if they join on.
    pub(super) fn add(&mut self, end: usize, n: usize, scoring: Scoring) {
        let n = n.min(end);
        self.truncate(end - n);
        let before = if self.end == end - n { self.count } else { 0 };
        *self = Self { end, count: (before + n).min(RECENT_QUERIES), scoring };
    }

    /// Forgets the queries from position `len` on.
    pub(super) fn truncate(&mut self, len: usize) {
        self.count = self.count.saturating_sub(self.end.saturating_sub(len));
        self.end = self.end.min(len);
    }

    pub(super) fn count(self) -> usize {
        self.count
    }

    pub(super) fn end(self) -> usize {
        self.end
    }

    pub(super) fn scoring(self) -> Scoring {
        self.scoring
    }

    /// Oldest first.
    pub(super) fn positions(self) -> std::ops::Range<usize> {
        self.end - self.count..self.end
    }
}

impl Progress {
    pub(super) fn sinks(self, config: &CacheConfig) -> usize {
        self.tokens.min(config.sinks)
    }

    pub(super) fn window(self, config: &CacheConfig) -> usize {
        self.tokens - self.sinks(config) - self.compressed
    }
}

/// A live sequence.
#[derive(Debug, Clone)]
pub(super) struct Sequence {
    /// Row of the window, sink and centre buffers.
    pub(super) row: usize,
    /// Pages in order, those of the layer that has compressed most.
    pub(super) pages: Vec<u32>,
    pub(super) layers: Vec<Progress>,
}

impl Sequence {
    /// Gives back the pages that no layer reaches.
    pub(super) fn trim(&mut self, pages: &mut Pages, page_tokens: usize) {
        let compressed = self.layers.iter().map(|l| l.compressed).max().unwrap_or(0);
        for page in self.pages.drain(compressed.div_ceil(page_tokens)..) {
            pages.release(page);
        }
    }
}

/// All live sequences, and the rows they occupy.
#[derive(Debug)]
pub(super) struct SequenceTable {
    live: BTreeMap<SequenceId, Sequence>,
    /// Ids count up and are never given out twice.
    next: u64,
    rows: usize,
    used_rows: usize,
    free_rows: Vec<usize>,
}

impl SequenceTable {
    pub(super) fn new(rows: usize) -> Self {
        Self { live: BTreeMap::new(), next: 1, rows, used_rows: 0, free_rows: Vec::new() }
    }

    pub(super) fn get(&self, argument: &'static str, id: SequenceId) -> Result<&Sequence> {
        self.live.get(&id).ok_or_else(|| unknown(argument, id))
    }

    pub(super) fn get_mut(&mut self, argument: &'static str, id: SequenceId) -> Result<&mut Sequence> {
        self.live.get_mut(&id).ok_or_else(|| unknown(argument, id))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.live.values()
    }

    /// Refuses an empty list, an unknown sequence, and one named twice.
    pub(super) fn check(&self, ids: &[SequenceId]) -> Result<()> {
        if ids.is_empty() {
            return Err(Error::invalid("sequences", "empty", "at least one sequence"));
        }
        for &id in ids {
            self.get("sequences", id)?;
        }
        let mut sorted = ids.to_vec();
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => {
                Err(Error::invalid("sequences", format!("{} twice", pair[0].0), "each sequence once"))
            }
            None => Ok(()),
        }
    }

    pub(super) fn check_room(&self) -> Result<()> {
        if self.live.len() == self.rows {
            return Err(Error::CacheFull { what: "sequences", needed: 1, free: 0 });
        }
        Ok(())
    }

    /// Adds a sequence in a row of its own.
    pub(super) fn insert(&mut self, pages: Vec<u32>, layers: Vec<Progress>) -> Result<SequenceId> {
        self.check_room()?;
        let row = self.free_rows.pop().unwrap_or_else(|| {
            self.used_rows += 1;
            self.used_rows - 1
        });
        let id = SequenceId(self.next);
        self.next += 1;
        self.live.insert(id, Sequence { row, pages, layers });
        Ok(id)
    }

    pub(super) fn remove(&mut self, argument: &'static str, id: SequenceId) -> Result<Sequence> {
        let sequence = self.live.remove(&id).ok_or_else(|| unknown(argument, id))?;
        self.free_rows.push(sequence.row);
        Ok(sequence)
    }
}

fn unknown(argument: &'static str, id: SequenceId) -> Error {
    Error::invalid(argument, id.0, "a live sequence of this cache")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_remembered_while_they_join_on() {
        let mut recent = Recent::default();
        let seen = |recent: Recent| recent.positions();
        recent.add(100, 40, Scoring::default());
        assert_eq!(seen(recent), 68..100);
        recent.add(101, 1, Scoring::default());
        assert_eq!(seen(recent), 69..101);
        // The same token again takes the place of the first.
        recent.add(101, 1, Scoring::default());
        assert_eq!(seen(recent), 69..101);
        recent.truncate(90);
        assert_eq!(seen(recent), 69..90);
        recent.add(92, 2, Scoring::default());
        assert_eq!(seen(recent), 69..92);
        // A gap: what came before is no longer the last.
        recent.add(95, 1, Scoring::default());
        assert_eq!(seen(recent), 94..95);
        // Before the first token there is none.
        recent.truncate(0);
        recent.add(2, 5, Scoring::default());
        assert_eq!(seen(recent), 0..2);
    }
}
