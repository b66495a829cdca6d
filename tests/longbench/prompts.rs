//! Prompts: templates, truncation, chat templates and their exceptions.

use crate::longbench::data::Item;
use crate::longbench::predict::{default_max_length, prompt};
use crate::longbench::tasks::{TASKS, Task, select};
use crate::tiny::{TEMPLATE, tokenizer};

fn task(name: &str) -> &'static Task {
    select(&[name.to_string()], false).unwrap()[0]
}

fn item(context: &str) -> Item {
    Item {
        id: "1".into(),
        input: "WHAT{context}".into(),
        context: context.into(),
        answers: vec!["x".into()],
        all_classes: None,
        length: 1,
    }
}

#[test]
fn unknown_tasks_list_the_known_ones() {
    let message = |names: &[&str], e| {
        let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
        select(&names, e).unwrap_err().to_string()
    };
    let unknown = message(&["qasper", "quasper"], false);
    assert!(unknown.starts_with("task is \"quasper\"; allowed: narrativeqa, qasper, "), "{unknown}");
    assert!(unknown.ends_with("lcc, repobench-p"), "{unknown}");
    assert!(
        message(&["musique"], true).starts_with("task is \"musique\"; allowed: qasper, multifieldqa_en, ")
    );
    assert_eq!((select(&[], false).unwrap().len(), select(&[], true).unwrap().len()), (21, 13));
}

#[test]
fn templates_take_context_and_input() {
    assert_eq!(
        task("lsht").prompt(&item("新闻{input}")),
        "请判断给定新闻的类别，下面是一些例子。\n\n新闻{input}\nWHAT{context}",
        "what an item holds is not looked at"
    );
    assert_eq!(
        task("lcc").prompt(&item("x =\n")),
        "Please complete the code given below. \nx =\nNext line of code:\n"
    );
    for task in &TASKS {
        let asks = !["gov_report", "multi_news", "vcsum", "passage_count", "lcc"].contains(&task.name);
        let text = task.prompt(&item("CONTEXT"));
        assert_eq!(text.matches("CONTEXT").count(), 1, "{}", task.name);
        assert_eq!(text.contains("WHAT{context}"), asks, "{}", task.name);
        assert!(!text.contains("{input}"), "{}", task.name);
    }
    let plain: Vec<&str> = TASKS.iter().filter(|t| !t.uses_chat_template()).map(|t| t.name).collect();
    assert_eq!(plain, ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"]);
}

#[test]
fn long_prompts_lose_their_middle() {
    let plain = tokenizer(None);
    let (trec, context) = (task("trec"), "0123456789".repeat(50));
    let whole = trec.prompt(&item(&context));
    // One token per byte, and one before the first.
    let tokens = whole.len() + 1;
    let text = |max| plain.decode(&prompt(&plain, trec, &item(&context), max).unwrap()).unwrap();
    assert_eq!(text(tokens), whole);
    for max in [2, 99, 100, tokens - 1] {
        let half = max / 2;
        let expected = whole[..half - 1].to_string() + &whole[whole.len() - half..];
        assert_eq!(text(max), expected, "{max} tokens");
    }
    // Where a cut falls into a character, its bytes turn into a replacement character, as published.
    let cut = prompt(&plain, task("vcsum"), &item("会议"), 24).unwrap();
    assert!(plain.decode(&cut).unwrap().contains('\u{fffd}'));
}

#[test]
fn chat_templates_are_used_except_for_examples_and_code() {
    let (chat, plain) = (tokenizer(Some(TEMPLATE)), tokenizer(None));
    let whole = |task: &'static Task| task.prompt(&item("c"));
    let text = |t, name| {
        let ids = prompt(t, task(name), &item("c"), 4000).unwrap();
        assert_eq!((ids[0], ids.iter().filter(|id| **id == 256).count()), (256, 1), "{name} begins once");
        t.decode(&ids).unwrap()
    };
    let qasper = whole(task("qasper"));
    assert_eq!(text(&chat, "qasper"), format!("[user] {qasper} [answer] "));
    assert_eq!(text(&plain, "qasper"), qasper, "no template, no chat");
    for name in ["samsum", "lcc"] {
        assert_eq!(text(&chat, name), whole(task(name)));
    }
    // The template comes after the cut and is whole.
    let cut = prompt(&chat, task("qasper"), &item("c"), 20).unwrap();
    assert_eq!(chat.decode(&cut).unwrap(), "[user] You are g}\n\nAnswer: [answer] ");
}

#[test]
fn default_lengths_are_longbenchs() {
    let lengths = [4096, 8192, 16384, 32768].map(|context| default_max_length(context).unwrap());
    assert_eq!(lengths, [3500, 7500, 15500, 31500]);
    assert!(default_max_length(1000).unwrap_err().to_string().contains("1000 tokens; give"));
}
