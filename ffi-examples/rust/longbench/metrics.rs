//! The metrics of LongBench: how well a prediction meets one answer, 0 to 1.
//!
//! They give the numbers of the published scorer, oddities included; docs/longbench.md names those.

use super::rouge::rouge_l;
use super::similarity;
use super::text::{is_space, numbers, segment, words};
use crate::llama::error::{Error, Result};
use std::collections::HashMap;

/// How a task is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// F1 of the words, without articles and punctuation.
    QaF1,
    /// The same of Chinese words.
    QaF1Zh,
    RougeL,
    RougeLZh,
    /// 1 over the number of class names found, if the right one is among them.
    Classification,
    /// Share of the numbers found that name the right paragraph ("Paragraph 7").
    Retrieval,
    /// The same ("段落7").
    RetrievalZh,
    /// Share of the numbers found that are the right one.
    Count,
    /// Similarity of the first line of code.
    CodeSimilarity,
}

impl Metric {
    /// Score of a prediction against one answer. `classes` matters to [`Metric::Classification`] alone.
    pub fn score(self, prediction: &str, truth: &str, classes: &[String]) -> Result<f64> {
        Ok(match self {
            Self::QaF1 => f1(&plain_words(prediction), &plain_words(truth)),
            Self::QaF1Zh => f1(&plain_words_zh(prediction), &plain_words_zh(truth)),
            Self::RougeL => rouge_l(prediction, truth),
            Self::RougeLZh => rouge_l(&segment(prediction).join(" "), &segment(truth).join(" ")),
            Self::Classification => classification(prediction, truth, classes),
            Self::Retrieval => share_of_numbers(prediction, number_after("Paragraph ", truth)?),
            Self::RetrievalZh => share_of_numbers(prediction, number_after("段落", truth)?),
            Self::Count => share_of_numbers(prediction, truth),
            Self::CodeSimilarity => similarity::ratio(code_line(prediction), truth) / 100.0,
        })
    }
}

/// Words in lower case, without ASCII punctuation, then without articles.
fn plain_words(text: &str) -> Vec<String> {
    let text: Vec<char> = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let mut out = String::new();
    for run in text.chunk_by(|a, b| a.is_alphanumeric() == b.is_alphanumeric()) {
        match run {
            ['a'] | ['a', 'n'] | ['t', 'h', 'e'] => out.push(' '),
            run => out.extend(run),
        }
    }
    words(&out).map(str::to_string).collect()
}

/// What a Chinese answer is compared without, beside ASCII punctuation. LongBench's own list; 《 is not in it.
const PUNCTUATION_ZH: &str = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.";

fn plain_words_zh(text: &str) -> Vec<String> {
    let kept = |c: &char| !c.is_ascii_punctuation() && !PUNCTUATION_ZH.contains(*c) && !is_space(*c);
    let plain = |word: &str| word.to_lowercase().chars().filter(kept).collect::<String>();
    segment(text).into_iter().map(plain).filter(|word| !word.is_empty()).collect()
}

fn f1(found: &[String], expected: &[String]) -> f64 {
    let mut left: HashMap<&String, usize> = HashMap::new();
    expected.iter().for_each(|word| *left.entry(word).or_default() += 1);
    let mut same = 0.0;
    for word in found {
        if let Some(n) = left.get_mut(word).filter(|n| **n > 0) {
            *n -= 1;
            same += 1.0;
        }
    }
    if same == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (same / found.len() as f64, same / expected.len() as f64);
    2.0 * precision * recall / (precision + recall)
}

fn classification(prediction: &str, truth: &str, classes: &[String]) -> f64 {
    let mut found: Vec<&String> = classes.iter().filter(|class| prediction.contains(*class)).collect();
    // Class names that are part of the right one do not count against it. The published loop removes from the list
    // that it walks, and so passes over the name after each one it removes.
    let mut i = 0;
    while i < found.len() {
        if truth.contains(found[i]) && found[i] != truth {
            found.remove(i);
        }
        i += 1;
    }
    if found.iter().any(|class| *class == truth) { 1.0 / found.len() as f64 } else { 0.0 }
}

fn number_after<'a>(word: &str, truth: &'a str) -> Result<&'a str> {
    truth
        .match_indices(word)
        .find_map(|(at, _)| {
            let rest = &truth[at + word.len()..];
            numbers(rest).next().filter(|number| rest.starts_with(number))
        })
        .ok_or_else(|| {
            Error::damaged(format!("answer {truth:?}"), format!("it holds no {word:?} with a number"))
        })
}

fn share_of_numbers(prediction: &str, truth: &str) -> f64 {
    let all = numbers(prediction).count();
    let right = numbers(prediction).filter(|number| *number == truth).count();
    if all == 0 { 0.0 } else { right as f64 / all as f64 }
}

/// The first line without a comment or a code fence; line breaks before the text do not count as lines.
fn code_line(prediction: &str) -> &str {
    let code = |line: &&str| !["`", "#", "//"].iter().any(|mark| line.contains(mark));
    prediction.trim_start_matches('\n').split('\n').find(code).unwrap_or("")
}
