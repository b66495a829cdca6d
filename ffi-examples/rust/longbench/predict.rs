//! Answers of a model to the items of LongBench.

use super::data::{self, Item, Prediction};
use super::predictions::Predictions;
use super::tasks::Task;
use crate::llama::error::{Error, Result};
use crate::llama::model::{Meter, Model};
use crate::llama::sample::argmax;
use crate::llama::store::{KvStore, Policy};
use crate::llama::tokenizer::{Message, Tokenizer};
use mustafar::ValueType;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What to run.
#[derive(Debug)]
pub struct Run<'a> {
    /// Folder with `TASK.jsonl`, or `TASK_e.jsonl`.
    pub data: &'a Path,
    /// Where the folder of predictions goes.
    pub out: &'a Path,
    /// Name of the model in that folder's name.
    pub name: &'a str,
    pub tasks: &'a [&'static Task],
    /// LongBench-E.
    pub e: bool,
    /// Tokens of a prompt at most, before the chat template.
    pub max_length: usize,
    pub policy: Policy,
}

/// What happens while predicting.
#[derive(Debug)]
pub enum Event<'a> {
    /// So many items are to be answered, and so many have been before.
    Start { left: usize, done: usize },
    /// An item of this task is next.
    Next(&'a Task),
    /// An item is answered and on the disk.
    Done,
    /// A line of the data is left out; the text names file and line.
    Damaged(&'a str),
}

/// The longest prompt for a model, by the rule that LongBench's own lengths follow: 3500 for a context of 4096, 7500
/// for 8192, 31500 for 32768.
pub fn default_max_length(context: usize) -> Result<usize> {
    (context / 1024 * 1000).checked_sub(500).ok_or_else(|| {
        Error::Invalid(format!(
            "the model's context is {context} tokens; give the longest prompt by --max-length"
        ))
    })
}

impl Run<'_> {
    /// The folder of the predictions.
    pub fn folder(&self) -> PathBuf {
        let Policy { k_strategy, v_strategy, k_sparsity: k, v_sparsity: v, .. } = self.policy;
        let plain = Policy::at(0.0);
        let other = match (k_strategy, v_strategy) == (plain.k_strategy, plain.v_strategy) {
            true => String::new(),
            false => format!("_{k_strategy}_{v_strategy}"),
        };
        // As Python prints floats: 0.0, 0.7.
        self.out.join(format!("{}_{}_K_{k:?}_V_{v:?}{other}", self.name, self.max_length))
    }

    /// Answers every item that has no answer yet. Returns how many lines of the data were left out.
    pub fn run(
        &self,
        model: &Model,
        tokenizer: &Tokenizer,
        report: &mut dyn FnMut(Event<'_>),
    ) -> Result<usize> {
        self.check(model)?;
        let mut damaged = 0;
        let mut work = Vec::new();
        let (mut left, mut done) = (0, 0);
        for &task in self.tasks {
            let suffix = if self.e { "_e" } else { "" };
            let items =
                read_items(&self.data.join(format!("{}{suffix}.jsonl", task.name)), &mut |message| {
                    damaged += 1;
                    report(Event::Damaged(message));
                })?;
            let path = self.folder().join(format!("{}.jsonl", task.name));
            let predictions = path.exists().then(|| Predictions::open(&path)).transpose()?;
            let is_done = |item: &&Item| predictions.as_ref().is_some_and(|p| p.contains(&item.id));
            let finished = items.iter().filter(is_done).count();
            (left, done) = (left + items.len() - finished, done + finished);
            work.push((task, items, path, predictions));
        }
        self.claim()?;
        report(Event::Start { left, done });
        for (task, items, path, predictions) in work {
            let mut predictions = predictions.map_or_else(|| Predictions::open(&path), Ok)?;
            for item in items {
                if predictions.contains(&item.id) {
                    continue;
                }
                report(Event::Next(task));
                let pred = self.answer(model, tokenizer, task, &item)?;
                predictions.push(&Prediction {
                    pred,
                    answers: item.answers,
                    all_classes: item.all_classes,
                    length: Some(item.length),
                    id: Some(item.id),
                })?;
                report(Event::Done);
            }
        }
        Ok(damaged)
    }

    fn check(&self, model: &Model) -> Result<()> {
        if self.max_length < 2 {
            return Err(Error::Invalid(format!("--max-length is {}; allowed: 2 or more", self.max_length)));
        }
        let longest = self.tasks.iter().map(|task| task.max_new).max().unwrap_or(0);
        if self.max_length + longest > model.config.context {
            return Err(Error::Invalid(format!(
                "--max-length {} and answers of {longest} tokens exceed the model's context of {}",
                self.max_length, model.config.context
            )));
        }
        Ok(())
    }

    /// Writes down the settings that the folder's name leaves out, and refuses a folder made with others.
    fn claim(&self) -> Result<()> {
        let folder = self.folder();
        let path = folder.join("run.json");
        let named = |e| Error::io(path.display(), e);
        let own = json!({ "policy": format!("{:?}", self.policy), "longbench_e": self.e });
        if path.exists() {
            let text = fs::read_to_string(&path).map_err(named)?;
            let found: Value = serde_json::from_str(&text).map_err(|e| Error::damaged(path.display(), e))?;
            if found != own {
                return Err(Error::Invalid(format!(
                    "{} has predictions of other settings: {found}, now {own}; name another folder with --out",
                    folder.display()
                )));
            }
            return Ok(());
        }
        fs::create_dir_all(&folder).map_err(|e| Error::io(folder.display(), e))?;
        // Under another name first: a run that is killed here must not leave half of it.
        let unfinished = folder.join("run.json.part");
        fs::write(&unfinished, own.to_string()).and_then(|()| fs::rename(&unfinished, &path)).map_err(named)
    }

    fn answer(&self, model: &Model, tokenizer: &Tokenizer, task: &Task, item: &Item) -> Result<String> {
        let prompt = prompt(tokenizer, task, item, self.max_length)?;
        let tokens = prompt.len() + task.max_new;
        if tokens > model.config.context {
            return Err(Error::Invalid(format!(
                "item {} of {}: a prompt of {} tokens and {} new ones exceed the model's context of {}; lower --max-length",
                item.id,
                task.name,
                prompt.len(),
                task.max_new,
                model.config.context
            )));
        }
        let Policy { k_sparsity, v_sparsity, values, .. } = self.policy;
        let dense = k_sparsity == 0.0 && v_sparsity == 0.0 && values == ValueType::F16;
        let mut store = match dense {
            true => KvStore::dense(&model.config),
            false => KvStore::pruned(&model.config, &self.policy, tokens, model.context())?,
        };
        let answer = generate(model, tokenizer, task, &prompt, &mut store)?;
        tokenizer.decode(&answer)
    }
}

/// The items of a file. `damaged` hears of lines that are none, or that repeat an earlier `_id`.
fn read_items(path: &Path, damaged: &mut dyn FnMut(&str)) -> Result<Vec<Item>> {
    let mut ids = HashSet::new();
    let mut items = Vec::new();
    for line in data::read::<Item>(path)? {
        match line {
            Ok(item) if ids.insert(item.id.clone()) => items.push(item),
            Ok(item) => damaged(&format!("{}: _id {} occurs twice", path.display(), item.id)),
            Err(message) => damaged(&message),
        }
    }
    Ok(items)
}

/// Token ids of an item's prompt: cut in the middle to `max_length` tokens, then put into the chat template if the
/// task uses it and the model has one.
pub fn prompt(tokenizer: &Tokenizer, task: &Task, item: &Item, max_length: usize) -> Result<Vec<u32>> {
    let mut text = task.prompt(item);
    let ids = tokenizer.encode(&text)?;
    if ids.len() > max_length {
        let half = max_length / 2;
        text = tokenizer.decode(&ids[..half])? + &tokenizer.decode(&ids[ids.len() - half..])?;
    }
    if task.uses_chat_template() && tokenizer.has_chat_template() {
        text = tokenizer.chat(&[Message { role: "user", content: &text }])?;
    }
    tokenizer.encode(&text)
}

/// The likeliest tokens after a prompt, up to the task's limit or the token that ends the answer, which is included.
fn generate(
    model: &Model,
    tokenizer: &Tokenizer,
    task: &Task,
    prompt: &[u32],
    store: &mut KvStore,
) -> Result<Vec<u32>> {
    let mut ends = tokenizer.ends().to_vec();
    // A model would go on with the next dialogue after its summary.
    if task.name == "samsum" {
        ends.extend(tokenizer.encode("\n")?.last());
    }
    let mut meter = Meter::default();
    let mut logits = model.prefill(prompt, store, &mut meter)?;
    if task.name == "samsum" {
        ends.iter().for_each(|end| logits[*end as usize] = f32::NEG_INFINITY);
    }
    let mut answer = vec![argmax(&logits)];
    while answer.len() < task.max_new && !ends.contains(&answer[answer.len() - 1]) {
        let logits = model.decode(&answer[answer.len() - 1..], &mut [store], &mut meter)?;
        answer.push(argmax(&logits));
    }
    Ok(answer)
}
