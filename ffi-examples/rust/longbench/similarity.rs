//! How alike two strings are, by the method of Ratcliff and Obershelp as Python's `difflib` implements it.
//!
//! `fuzzywuzzy` uses `difflib` unless an optional package replaces it; the published scorer does not ask for that one.

use std::collections::HashMap;
use std::ops::Range;

/// `fuzzywuzzy.fuzz.ratio`: 0 to 100, in whole numbers.
pub fn ratio(a: &str, b: &str) -> f64 {
    if a == b {
        return 100.0;
    }
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    if a.is_empty() || b.is_empty() {
        return 0.0;
    }
    let share = 2.0 * matching(&a, &b) as f64 / (a.len() + b.len()) as f64;
    (100.0 * share).round_ties_even()
}

/// Characters in matching blocks: the longest common substring, and so on to its left and to its right.
fn matching(a: &[char], b: &[char]) -> usize {
    let mut places: HashMap<char, Vec<usize>> = HashMap::new();
    for (j, c) in b.iter().enumerate() {
        places.entry(*c).or_default().push(j);
    }
    // In long strings frequent characters start no match; they only extend one.
    if b.len() >= 200 {
        places.retain(|_, at| at.len() <= b.len() / 100 + 1);
    }
    let mut total = 0;
    let mut open = vec![(0..a.len(), 0..b.len())];
    while let Some((left, right)) = open.pop() {
        let (i, j, size) = longest(a, b, &places, left.clone(), right.clone());
        if size > 0 {
            total += size;
            open.push((left.start..i, right.start..j));
            open.push((i + size..left.end, j + size..right.end));
        }
    }
    total
}

/// Start in `a`, start in `b` and size of the longest common block within the ranges; the first of equals.
fn longest(
    a: &[char],
    b: &[char],
    places: &HashMap<char, Vec<usize>>,
    left: Range<usize>,
    right: Range<usize>,
) -> (usize, usize, usize) {
    let (mut start_a, mut start_b, mut size) = (left.start, right.start, 0);
    // Sizes of the blocks that end at the previous character of a, by where they end in b.
    let mut ending: HashMap<usize, usize> = HashMap::new();
    for i in left.clone() {
        let mut next = HashMap::new();
        for &j in places.get(&a[i]).into_iter().flatten().filter(|j| right.contains(j)) {
            let n = 1 + j.checked_sub(1).and_then(|j| ending.get(&j)).unwrap_or(&0);
            next.insert(j, n);
            if n > size {
                (start_a, start_b, size) = (i + 1 - n, j + 1 - n, n);
            }
        }
        ending = next;
    }
    while start_a > left.start && start_b > right.start && a[start_a - 1] == b[start_b - 1] {
        (start_a, start_b, size) = (start_a - 1, start_b - 1, size + 1);
    }
    while start_a + size < left.end && start_b + size < right.end && a[start_a + size] == b[start_b + size] {
        size += 1;
    }
    (start_a, start_b, size)
}
