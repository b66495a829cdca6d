//! Metrics against golden values, hand-worked cases, and scores of folders.

use crate::longbench::data::Prediction;
use crate::longbench::metrics::Metric;
use crate::longbench::score::{round, score, score_folder, write_result};
use crate::longbench::tasks::select;
use crate::longbench::text::segment;
use crate::tiny::directory;
use serde_json::{Value, json};
use std::fs;

#[test]
fn metrics_equal_the_published_ones() {
    let text = fs::read_to_string("tests/vectors/longbench.jsonl").unwrap();
    let mut seen = Vec::new();
    for line in text.lines() {
        let case: Value = serde_json::from_str(line).unwrap();
        let task = select(&[case["task"].as_str().unwrap().to_string()], false).unwrap()[0];
        let prediction = Prediction {
            pred: case["pred"].as_str().unwrap().to_string(),
            answers: serde_json::from_value(case["answers"].clone()).unwrap(),
            all_classes: serde_json::from_value(case["all_classes"].clone()).unwrap(),
            length: None,
            id: None,
        };
        let (found, expected) = (score(task, &prediction).unwrap(), case["score"].as_f64().unwrap());
        assert!((found - expected).abs() < 1e-12, "{found}, not {expected}: {case}");
        seen.push(task.metric);
    }
    seen.dedup();
    assert_eq!(seen.len(), 9, "every metric has its cases");
}

#[test]
fn metrics_by_hand() {
    let of = |metric: Metric, prediction, truth| metric.score(prediction, truth, &[]).unwrap();
    // 2 of 3 words found, 2 of 2 expected.
    assert!((of(Metric::QaF1, "The red, fast car!", "fast a red") - 0.8).abs() < 1e-12);
    // Sets {a b c} and {a c d}; the common subsequence is a c.
    assert!((of(Metric::RougeL, "a b c", "a c d") - 2.0 / 3.0).abs() < 1e-7);
    assert_eq!(of(Metric::Count, "2 or 3 or 3", "3"), 2.0 / 3.0);
    assert_eq!(of(Metric::Retrieval, "Paragraph 3", "The Paragraph or Paragraph 3"), 1.0);
    // 8 of 10 characters are common.
    assert_eq!(of(Metric::CodeSimilarity, "ab_cd", "ab-cd"), 0.8);
    for metric in [Metric::QaF1, Metric::QaF1Zh, Metric::RougeL, Metric::RougeLZh, Metric::Count] {
        assert_eq!(of(metric, "", "7"), 0.0, "{metric:?} of nothing");
        assert!(of(metric, "7", "7") > 0.999, "{metric:?} of the answer");
    }
    let no_number = Metric::RetrievalZh.score("1", "Paragraph 1", &[]).unwrap_err().to_string();
    assert!(no_number.contains("\"段落\" with a number"), "{no_number}");
    assert_eq!([0.125, 0.375, 2.675, 24.41].map(round), [0.12, 0.38, 2.67, 24.41], "as Python rounds");
}

#[test]
fn chinese_is_segmented_as_by_jieba() {
    for expected in [
        "我/来到/北京/清华大学",
        "他/来到/了/网易/杭研/大厦",
        "小明/硕士/毕业/于/中国科学院/计算所/，/后/在/日本京都大学/深造",
        "GPT/-/4/ /v1.2/./3/ /98.5%/ /foo/_/bar/ /C++/./e/./g/.",
        "取/开/㐀/鿖/的/é/ /卡拉/OK/\r\n/x",
    ] {
        let text = expected.replace('/', "");
        assert_eq!(segment(&text).join("/"), expected);
    }
    assert!(segment("").is_empty());
}

fn prediction(pred: &str, answer: &str, length: Option<u64>) -> String {
    format!("{}\n", json!({ "pred": pred, "answers": [answer], "all_classes": ["Food"], "length": length }))
}

#[test]
fn folders_are_scored_by_task_and_by_length() {
    let folder = directory("score");
    let lines: String = [
        prediction("Food", "Food", Some(3999)),
        prediction("\nFood\nno", "Food", Some(4000)),
        prediction("no", "Food", Some(7999)),
        prediction("", "Food", Some(4001)),
    ]
    .concat();
    fs::write(folder.join("trec.jsonl"), lines).unwrap();
    // Files of LongBench itself have neither _id nor, in early versions, length.
    fs::write(
        folder.join("qmsum.jsonl"),
        "{\"pred\": \"é x\", \"answers\": [\"y\", \"é\"], \"all_classes\": null}\n\n",
    )
    .unwrap();
    fs::write(folder.join("notes.txt"), "not a prediction").unwrap();
    let result = score_folder(&folder, false).unwrap();
    assert_eq!(Value::Object(result.clone()), json!({ "qmsum": 66.67, "trec": 50.0 }));
    let (path, text) = write_result(&folder, &result).unwrap();
    assert_eq!(text, "{\n    \"qmsum\": 66.67,\n    \"trec\": 50.0\n}", "as the published scorer writes it");
    assert_eq!(fs::read_to_string(path).unwrap(), text);

    let refused = |e| score_folder(&folder, e).unwrap_err().to_string();
    assert!(refused(true).contains("task is \"qmsum\"; allowed: qasper, "), "{}", refused(true));
    fs::remove_file(folder.join("qmsum.jsonl")).unwrap();
    let buckets = json!({ "trec": { "0-4k": 100.0, "4-8k": 33.33, "8k+": null } });
    assert_eq!(Value::Object(score_folder(&folder, true).unwrap()), buckets);

    fs::write(folder.join("trec.jsonl"), prediction("x", "y", None) + "{\"pred\": \"x\"").unwrap();
    assert!(refused(false).contains("trec.jsonl, line 2, column 12: EOF"), "{}", refused(false));
    fs::write(folder.join("trec.jsonl"), prediction("x", "y", None)).unwrap();
    assert!(refused(true).contains("no length"), "{}", refused(true));
    fs::write(folder.join("trec.jsonl"), "").unwrap();
    assert!(refused(false).contains("trec.jsonl has no predictions"), "{}", refused(false));
    assert!(score_folder(&folder.join("none"), false).unwrap_err().to_string().contains("none"));
    assert!(score_folder(&directory("empty"), false).unwrap_err().to_string().contains("has no predictions"));
}
