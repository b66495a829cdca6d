//! ROUGE-L as the Python package `rouge` 1.0.1 computes it: over sets of words, at the level of sentences.

use super::text::words;
use std::collections::HashSet;

/// F1 of the longest common subsequences of two texts. 0 where either has no sentence.
///
/// Sentences end at full stops, words are separated by white space. Of each pair of sentences one longest common
/// subsequence is taken; the words of all of them together, each counted once, are what the texts share.
pub fn rouge_l(prediction: &str, truth: &str) -> f64 {
    let (found, expected) = (sentences(prediction), sentences(truth));
    if found.is_empty() || expected.is_empty() {
        return 0.0;
    }
    let mut shared = HashSet::new();
    for expected in &expected {
        for found in &found {
            common_subsequence(expected, found, &mut shared);
        }
    }
    let distinct = |sentences: &[Vec<&str>]| sentences.iter().flatten().collect::<HashSet<_>>().len() as f64;
    let recall = shared.len() as f64 / distinct(&expected);
    let precision = shared.len() as f64 / distinct(&found);
    // The package avoids a division by zero this way.
    2.0 * (precision * recall / (precision + recall + 1e-8))
}

/// A sentence of nothing but white space has one empty word.
fn sentences(text: &str) -> Vec<Vec<&str>> {
    let mut all: Vec<Vec<&str>> =
        text.split('.').filter(|s| !s.is_empty()).map(|s| words(s).collect()).collect();
    all.iter_mut().filter(|s| s.is_empty()).for_each(|s| s.push(""));
    all
}

/// Adds the words of a longest common subsequence. Where several exist the package's is the one that is found from
/// the end, leaving out words of `b` first.
fn common_subsequence<'a>(a: &[&'a str], b: &[&'a str], words: &mut HashSet<&'a str>) {
    let width = b.len() + 1;
    // lengths[i * width + j]: of the first i words of a and the first j of b.
    let mut lengths = vec![0u32; (a.len() + 1) * width];
    for (i, x) in a.iter().enumerate() {
        for (j, y) in b.iter().enumerate() {
            let at = i * width + j;
            lengths[at + width + 1] =
                if x == y { lengths[at] + 1 } else { lengths[at + 1].max(lengths[at + width]) };
        }
    }
    let (mut i, mut j) = (a.len(), b.len());
    while i > 0 && j > 0 {
        if a[i - 1] == b[j - 1] {
            words.insert(a[i - 1]);
            (i, j) = (i - 1, j - 1);
        } else if lengths[(i - 1) * width + j] > lengths[i * width + j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
}
