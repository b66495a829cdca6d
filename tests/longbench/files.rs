//! Files of predictions: resumed after every kind of interruption.

use crate::longbench::data::Prediction;
use crate::longbench::predictions::Predictions;
use crate::tiny::directory;
use std::fs;

fn prediction(id: &str) -> Prediction {
    Prediction {
        pred: "说 \"é\"\n\u{1}".into(),
        answers: vec!["是".into()],
        all_classes: None,
        length: Some(7),
        id: Some(id.into()),
    }
}

#[test]
fn a_kill_at_any_byte_costs_the_last_line_at_most() {
    let path = directory("kill").join("qasper.jsonl");
    let mut file = Predictions::open(&path).unwrap();
    file.push(&prediction("first")).unwrap();
    let start = fs::read(&path).unwrap().len();
    file.push(&prediction("last")).unwrap();
    drop(file);
    let whole = fs::read(&path).unwrap();
    let text = String::from_utf8(whole.clone()).unwrap();
    let line = r#"{"pred":"说 \"é\"\n\u0001","answers":["是"],"all_classes":null,"length":7,"_id":"last"}"#;
    assert_eq!(text[start..], format!("{line}\n"), "readable, one line");
    for len in start..=whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        let mut file = Predictions::open(&path).unwrap();
        assert!(file.contains("first"));
        assert_eq!(file.contains("last"), len == whole.len(), "cut to {len} of {} bytes", whole.len());
        if len < whole.len() {
            file.push(&prediction("last")).unwrap();
        }
        assert!(file.contains("last"));
        assert_eq!(fs::read(&path).unwrap(), whole, "cut to {len} bytes");
    }
}

#[test]
fn bad_files_are_refused_and_left_alone() {
    let path = directory("refused").join("qasper.jsonl");
    let refused = |content: &str| {
        fs::write(&path, content).unwrap();
        let message = Predictions::open(&path).map(|_| ()).unwrap_err().to_string();
        assert_eq!(fs::read_to_string(&path).unwrap(), content);
        message
    };
    let good = serde_json::to_string(&prediction("1")).unwrap();
    let message = refused(&format!("{good}\n{{\"pred\": 1}}\n{good}\n"));
    assert!(message.contains("qasper.jsonl, line 2, column 10: invalid type: integer `1`"), "{message}");
    let message = refused("{\"pred\": \"\", \"answers\": [], \"all_classes\": null, \"length\": 1}\n");
    assert!(message.contains("a file without _id; supported: files that this program wrote"), "{message}");
}

#[test]
fn a_file_has_one_writer() {
    let path = directory("lock").join("qasper.jsonl");
    let file = Predictions::open(&path).unwrap();
    let second = Predictions::open(&path).map(|_| ()).unwrap_err().to_string();
    assert!(second.ends_with("qasper.jsonl is in use by another run"), "{second}");
    drop(file);
    Predictions::open(&path).unwrap();
    let missing = Predictions::open(&path.join("no")).map(|_| ()).unwrap_err().to_string();
    assert!(missing.contains("qasper.jsonl/no"), "{missing}");
}
