//! Text as the published scorer sees it: Python's notion of words, and jieba's.

use jieba_rs::Jieba;
use regex::Regex;
use std::sync::LazyLock;

/// Whether Python's `str.split()` splits here: it also takes the four ASCII separators for white space.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Words between white space.
pub fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// Runs of decimal digits, of any script.
pub fn numbers(text: &str) -> impl Iterator<Item = &str> {
    static DIGITS: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\d+").expect("a valid pattern"));
    DIGITS.find_iter(text).map(|m| m.as_str())
}

/// Chinese words, as Python's `jieba.cut` gives them, white space and punctuation included.
///
/// The crate's dictionary and model are jieba's. Three rules differ and are applied here: which characters belong to a
/// block that is looked up, what becomes of the others (each one a word), and where runs of letters and digits end.
pub fn segment(text: &str) -> Vec<&str> {
    static JIEBA: LazyLock<Jieba> = LazyLock::new(Jieba::new);
    static BLOCK: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"[\u{4E00}-\u{9FD5}a-zA-Z0-9+#&._%\-]+|\r\n|(?s:.)").expect("a valid pattern")
    });
    static ALPHANUMERIC: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"[a-zA-Z0-9]+(?:\.[0-9]+)?%?").expect("a valid pattern"));
    let mut out = Vec::new();
    for block in BLOCK.find_iter(text) {
        for token in JIEBA.cut(block.as_str(), true) {
            let word = token.word;
            if !word.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-%".contains(&b)) {
                out.push(word);
                continue;
            }
            // The crate also joins runs by . _ and -, jieba only a number by its decimal point.
            let mut end = 0;
            for m in ALPHANUMERIC.find_iter(word) {
                out.extend((m.start() > end).then(|| &word[end..m.start()]));
                out.push(m.as_str());
                end = m.end();
            }
            out.extend((end < word.len()).then(|| &word[end..]));
        }
    }
    out
}
