//! predict and score, end to end on the tiny model.

use crate::llama::model::Model;
use crate::llama::store::Policy;
use crate::llama::tokenizer::Tokenizer;
use crate::longbench::data::{Prediction, read};
use crate::longbench::predict::{Event, Run};
use crate::longbench::score::score_folder;
use crate::longbench::tasks::{TASKS, Task, select};
use crate::tiny::{TEMPLATE, directory, indifferent, line, model, tokenizer};
use std::fs;
use std::path::{Path, PathBuf};

const MAX_LENGTH: usize = 600;

/// Runs; how many items were done before, which tasks were asked, and what was said of damaged lines.
fn predict(
    run: &Run<'_>,
    model: &Model,
    tokenizer: &Tokenizer,
) -> Result<(usize, Vec<&'static str>, Vec<String>), String> {
    let (mut before, mut asked, mut damaged) = (0, Vec::new(), Vec::new());
    let left_out = run
        .run(model, tokenizer, &mut |event| match event {
            Event::Start { done, .. } => before = done,
            Event::Next(task) => asked.push(task.name),
            Event::Done => {}
            Event::Damaged(message) => damaged.push(message.to_string()),
        })
        .map_err(|e| e.to_string())?;
    assert_eq!(left_out, damaged.len());
    Ok((before, asked, damaged))
}

/// With nothing pruned, for what does not depend on the cache.
fn dense_run<'a>(data: &'a Path, out: &'a Path, tasks: &'a [&'static Task], max_length: usize) -> Run<'a> {
    Run { data, out, name: "m", tasks, e: false, max_length, policy: Policy::at(0.0) }
}

/// Two items for each task.
fn write_data(folder: &Path, tasks: &[&Task], suffix: &str, answers: impl Fn(&str, usize) -> String) {
    for task in tasks {
        let item = |i: usize| {
            let context = format!("{i}. The quick brown fox jumps over the lazy dog. ").repeat(8);
            line(&format!("{}-{i}", task.name), &context, &[&answers(task.name, i)], 3990 + 10 * i as u64)
        };
        fs::write(folder.join(format!("{}{suffix}.jsonl", task.name)), item(0) + &item(1)).unwrap();
    }
}

fn answer(task: &str, _: usize) -> String {
    match task {
        "passage_retrieval_en" => "Paragraph 1".into(),
        "passage_retrieval_zh" => "段落1".into(),
        _ => "Food".into(),
    }
}

fn predictions(folder: &Path, task: &str) -> Vec<Prediction> {
    read(&folder.join(format!("{task}.jsonl"))).unwrap().into_iter().map(Result::unwrap).collect()
}

#[test]
fn every_task_is_answered_and_scored() {
    let root = directory("all");
    let (model, tokenizer) = (model(), tokenizer(Some(TEMPLATE)));
    let tasks = select(&[], false).unwrap();
    write_data(&root, &tasks, "", answer);
    let mut run = Run {
        data: &root,
        out: &root.join("pred"),
        name: "tiny",
        tasks: &tasks,
        e: false,
        max_length: MAX_LENGTH,
        policy: Policy::at(0.5),
    };
    let folder = root.join("pred/tiny_600_K_0.5_V_0.5");
    assert_eq!(run.folder(), folder);
    let (before, asked, damaged) = predict(&run, &model, &tokenizer).unwrap();
    assert_eq!((before, asked.len(), damaged.len()), (0, 42, 0));
    let result = score_folder(&folder, false).unwrap();
    let mut names: Vec<&str> = TASKS.iter().map(|task| task.name).collect();
    names.sort_unstable();
    assert_eq!(result.keys().map(String::as_str).collect::<Vec<_>>(), names);
    for task in &tasks {
        let found = predictions(&folder, task.name);
        assert_eq!(found.len(), 2, "{}", task.name);
        for (i, p) in found.iter().enumerate() {
            assert_eq!(p.id, Some(format!("{}-{i}", task.name)));
            assert_eq!((&p.answers[..], p.length), (&[answer(task.name, i)][..], Some(3990 + 10 * i as u64)));
            // One byte a token; bytes that are no text become longer.
            assert!(!p.pred.is_empty() && p.pred.chars().count() <= task.max_new, "{}: {p:?}", task.name);
        }
    }
    let (before, asked, _) = predict(&run, &model, &tokenizer).unwrap();
    assert_eq!((before, asked.len()), (42, 0), "nothing is left to do");

    // An item whose answer is what the model says is right; and pruning changes what it says.
    let qmsum = select(&["qmsum".to_string()], false).unwrap();
    let said = predictions(&folder, "qmsum");
    write_data(&root, &qmsum, "", |_, i| said[i].pred.clone());
    let out = root.join("again");
    (run.tasks, run.out) = (&qmsum, &out);
    predict(&run, &model, &tokenizer).unwrap();
    assert_eq!(score_folder(&run.folder(), false).unwrap()["qmsum"], 100.0);
    run.policy = Policy::at(0.0);
    assert!(run.folder().ends_with("tiny_600_K_0.0_V_0.0"));
    predict(&run, &model, &tokenizer).unwrap();
    assert_ne!(predictions(&run.folder(), "qmsum")[0].pred, said[0].pred);
}

#[test]
fn longbench_e_has_its_own_files_and_buckets() {
    let root = directory("e");
    let tasks = select(&["trec".to_string()], true).unwrap();
    write_data(&root, &tasks, "_e", answer);
    let (e, out) = (true, root.join("pred_e"));
    let run = Run { e, ..dense_run(&root, &out, &tasks, 90) };
    predict(&run, &indifferent(), &tokenizer(None)).unwrap();
    let scores = serde_json::json!({ "trec": { "0-4k": 0.0, "4-8k": 0.0, "8k+": null } });
    assert_eq!(serde_json::Value::Object(score_folder(&run.folder(), true).unwrap()), scores);
}

fn one_task(root: &Path, name: &str) -> (Vec<&'static Task>, PathBuf) {
    let tasks = select(&[name.to_string()], false).unwrap();
    write_data(root, &tasks, "", answer);
    (tasks, root.join("pred"))
}

#[test]
fn an_interrupted_run_goes_on_where_it_was() {
    let root = directory("resume");
    let (tasks, out) = one_task(&root, "hotpotqa");
    let (model, tokenizer) = (model(), tokenizer(None));
    let mut run = Run {
        data: &root,
        out: &out,
        name: "m",
        tasks: &tasks,
        e: false,
        max_length: MAX_LENGTH,
        policy: Policy::at(0.5),
    };
    predict(&run, &model, &tokenizer).unwrap();
    let path = run.folder().join("hotpotqa.jsonl");
    let whole = fs::read(&path).unwrap();
    for lost in [1, 20] {
        fs::write(&path, &whole[..whole.len() - lost]).unwrap();
        let (before, asked, _) = predict(&run, &model, &tokenizer).unwrap();
        assert_eq!((before, &asked[..]), (1, &["hotpotqa"][..]));
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
    run.policy.window += 16;
    let other = predict(&run, &model, &tokenizer).unwrap_err();
    assert!(other.contains("has predictions of other settings") && other.contains("window: 48"), "{other}");
}

#[test]
fn damaged_lines_are_named_and_left_out() {
    let root = directory("damaged");
    let (tasks, out) = one_task(&root, "trec");
    let data = root.join("trec.jsonl");
    let good = fs::read_to_string(&data).unwrap();
    let again = good.lines().next().unwrap();
    fs::write(&data, format!("{{\"input\": 3}}\n{good}\n{again}\n\u{7}\n{{\"input\": \"\"}}\n")).unwrap();
    let run = dense_run(&root, &out, &tasks, 50);
    let (_, asked, damaged) = predict(&run, &indifferent(), &tokenizer(None)).unwrap();
    assert_eq!(asked.len(), 2, "the good lines are answered");
    let file = data.display().to_string();
    assert_eq!(damaged.len(), 4);
    assert!(
        damaged[0].starts_with(&format!("{file}, line 1, column 11: invalid type: integer `3`")),
        "{damaged:?}"
    );
    assert_eq!(damaged[1], format!("{file}: _id trec-0 occurs twice"));
    assert!(damaged[2].starts_with(&format!("{file}, line 6, column 1: expected value")), "{damaged:?}");
    assert!(damaged[3].contains("line 7, column 13: missing field `_id`"), "{damaged:?}");
    fs::remove_file(&data).unwrap();
    let missing = predict(&run, &indifferent(), &tokenizer(None)).unwrap_err();
    assert!(missing.contains(&file), "{missing}");
}

#[test]
fn summaries_of_dialogues_end_with_their_line() {
    let root = directory("samsum");
    let names = ["samsum", "hotpotqa"].map(String::from);
    let tasks = select(&names, false).unwrap();
    write_data(&root, &tasks, "", answer);
    let out = root.join("pred");
    let run = dense_run(&root, &out, &tasks, 50);
    predict(&run, &indifferent(), &tokenizer(None)).unwrap();
    // The first token, a line break, may not come first in samsum, and ends it afterwards.
    assert_eq!(predictions(&run.folder(), "samsum")[0].pred, "!\n");
    assert_eq!(predictions(&run.folder(), "hotpotqa")[0].pred, "\n".repeat(32));
}

#[test]
fn prompts_beyond_the_context_are_refused() {
    let root = directory("context");
    let (tasks, out) = one_task(&root, "hotpotqa");
    let mut run = dense_run(&root, &out, &tasks, 2017);
    let refused = |run: &Run<'_>, template| predict(run, &indifferent(), &tokenizer(template)).unwrap_err();
    let message = "--max-length 2017 and answers of 32 tokens exceed the model's context of 2048";
    assert_eq!(refused(&run, None), message);
    run.max_length = 1;
    assert_eq!(refused(&run, None), "--max-length is 1; allowed: 2 or more");
    run.max_length = 2000;
    let message = refused(&run, Some(&"-".repeat(2020)));
    assert!(
        message.starts_with("item hotpotqa-0 of hotpotqa: a prompt of 2021 tokens and 32 new ones"),
        "{message}"
    );
}
