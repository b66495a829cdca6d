//! The tasks of LongBench: prompts, longest answers and metrics.
//!
//! Prompts, answer lengths and the choice of metrics are data of LongBench (Bai et al., arXiv 2308.14508;
//! github.com/THUDM/LongBench, config/ and eval.py) and must stay as published, "asconcisely" included. They come under
//! this licence:
//!
//! > MIT License
//! >
//! > Copyright (c) 2023 THU-KEG & Zhipu AI
//! >
//! > Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
//! > documentation files (the "Software"), to deal in the Software without restriction, including without limitation
//! > the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and
//! > to permit persons to whom the Software is furnished to do so, subject to the following conditions:
//! >
//! > The above copyright notice and this permission notice shall be included in all copies or substantial portions of
//! > the Software.
//! >
//! > THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO
//! > THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
//! > AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
//! > CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS
//! > IN THE SOFTWARE.

use super::data::Item;
use super::metrics::Metric;
use crate::llama::error::{Error, Result};

/// One task.
#[derive(Debug)]
pub struct Task {
    pub name: &'static str,
    /// With `{context}` and `{input}` where those of an item go.
    template: &'static str,
    /// Tokens of an answer at most.
    pub max_new: usize,
    pub metric: Metric,
    /// Answered after examples in the prompt: without the chat template, and the first line of the answer counts.
    pub few_shot: bool,
    /// Part of LongBench-E.
    pub in_e: bool,
}

impl Task {
    /// Chat models continue examples and code better as plain text.
    pub fn uses_chat_template(&self) -> bool {
        !self.few_shot && self.metric != Metric::CodeSimilarity
    }

    /// The prompt of an item, before truncation and chat template.
    pub fn prompt(&self, item: &Item) -> String {
        // In one pass: a context may hold "{input}" itself.
        let (before, rest) = self.template.split_once("{context}").expect("every template has a context");
        let after = rest.split("{input}").collect::<Vec<_>>().join(&item.input);
        [before, &item.context, &after].concat()
    }
}

/// The tasks of these names, of LongBench-E if `e`; all of them if no name is given.
pub fn select(names: &[String], e: bool) -> Result<Vec<&'static Task>> {
    let known = || TASKS.iter().filter(|task| task.in_e || !e);
    if names.is_empty() {
        return Ok(known().collect());
    }
    names
        .iter()
        .map(|name| {
            known().find(|task| task.name == name).ok_or_else(|| {
                let all: Vec<&str> = known().map(|task| task.name).collect();
                Error::Invalid(format!("task is {name:?}; allowed: {}", all.join(", ")))
            })
        })
        .collect()
}

const fn task(name: &'static str, max_new: usize, metric: Metric, template: &'static str) -> Task {
    Task { name, template, max_new, metric, few_shot: false, in_e: false }
}

const fn few_shot(task: Task) -> Task {
    Task { few_shot: true, ..task }
}

const fn in_e(task: Task) -> Task {
    Task { in_e: true, ..task }
}

const PASSAGES: &str = "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on the given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:";

pub const TASKS: [Task; 21] = [
    task(
        "narrativeqa",
        128,
        Metric::QaF1,
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {context}\n\nNow, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    ),
    in_e(task(
        "qasper",
        128,
        Metric::QaF1,
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on the information in the article, write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    )),
    in_e(task(
        "multifieldqa_en",
        64,
        Metric::QaF1,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    )),
    task(
        "multifieldqa_zh",
        64,
        Metric::QaF1Zh,
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
    ),
    in_e(task("hotpotqa", 32, Metric::QaF1, PASSAGES)),
    in_e(task("2wikimqa", 32, Metric::QaF1, PASSAGES)),
    task("musique", 32, Metric::QaF1, PASSAGES),
    task(
        "dureader",
        128,
        Metric::RougeLZh,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
    ),
    in_e(task(
        "gov_report",
        512,
        Metric::RougeL,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    )),
    task(
        "qmsum",
        512,
        Metric::RougeL,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:",
    ),
    in_e(task(
        "multi_news",
        512,
        Metric::RougeL,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    )),
    task(
        "vcsum",
        512,
        Metric::RougeLZh,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
    ),
    few_shot(in_e(task(
        "trec",
        64,
        Metric::Classification,
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    ))),
    few_shot(in_e(task(
        "triviaqa",
        32,
        Metric::QaF1,
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The following are some examples.\n\n{context}\n\n{input}",
    ))),
    few_shot(in_e(task(
        "samsum",
        128,
        Metric::RougeL,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
    ))),
    few_shot(task(
        "lsht",
        64,
        Metric::Classification,
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
    )),
    in_e(task(
        "passage_count",
        32,
        Metric::Count,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
    )),
    in_e(task(
        "passage_retrieval_en",
        32,
        Metric::Retrieval,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is from. The answer format must be like \"Paragraph 1\", \"Paragraph 2\", etc.\n\nThe answer is: ",
    )),
    task(
        "passage_retrieval_zh",
        32,
        Metric::RetrievalZh,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是\"段落1\"，\"段落2\"等格式\n\n答案是：",
    ),
    in_e(task(
        "lcc",
        64,
        Metric::CodeSimilarity,
        "Please complete the code given below. \n{context}Next line of code:\n",
    )),
    in_e(task(
        "repobench-p",
        64,
        Metric::CodeSimilarity,
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
    )),
];
