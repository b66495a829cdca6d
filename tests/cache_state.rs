//! Random histories of a cache next to the model that keeps everything dense.
#![allow(clippy::panic, clippy::unwrap_used)]

mod cache_model;
mod common;

use cache_model::{Pair, pairs, random_tokens, small_config};
use common::Rng;
use mustafar::{CacheConfig, CenterMode, Error, SequenceId};
use proptest::prelude::*;

/// One call. Indices count live sequences, modulo their number.
#[derive(Debug, Clone)]
enum Step {
    Create,
    /// The same number of tokens to some sequences, in every layer.
    Append {
        first: usize,
        count: usize,
        tokens: usize,
    },
    /// To one layer of one sequence only.
    AppendLayer {
        index: usize,
        layer: usize,
        tokens: usize,
    },
    Fork(usize),
    /// Keeps this part of the shortest layer, in 1/64.
    Truncate(usize, usize),
    Free(usize),
    SaveRestore(usize),
    Attend {
        first: usize,
        count: usize,
        layer: usize,
        queries: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    // Mostly single tokens and short chunks, now and then a prompt.
    let tokens = prop_oneof![3 => 0usize..4, 3 => 4usize..40, 1 => 40usize..120];
    let index = 0usize..4;
    prop_oneof![
        2 => Just(Step::Create),
        8 => (index.clone(), 1usize..4, tokens.clone())
            .prop_map(|(first, count, tokens)| Step::Append { first, count, tokens }),
        2 => (index.clone(), 0usize..2, tokens)
            .prop_map(|(index, layer, tokens)| Step::AppendLayer { index, layer, tokens }),
        2 => index.clone().prop_map(Step::Fork),
        3 => (index.clone(), 0usize..=64).prop_map(|(index, part)| Step::Truncate(index, part)),
        1 => index.clone().prop_map(Step::Free),
        1 => index.clone().prop_map(Step::SaveRestore),
        3 => (index, 1usize..4, 0usize..2, 1usize..4)
            .prop_map(|(first, count, layer, queries)| Step::Attend { first, count, layer, queries }),
    ]
}

fn some(live: &[SequenceId], first: usize, count: usize) -> Vec<SequenceId> {
    (0..count.min(live.len())).map(|i| live[(first + i) % live.len()]).collect()
}

fn apply(pair: &mut Pair, rng: &mut Rng, step: &Step) {
    let live: Vec<SequenceId> = pair.model.live.keys().copied().collect();
    let config = pair.model.config.clone();
    let full = Error::CacheFull { what: "sequences", needed: 1, free: 0 };
    if let Step::Create = step {
        match pair.cache.create() {
            Ok(id) => pair.model.create(id),
            Err(e) => assert!(live.len() == config.max_sequences && e == full),
        }
        return;
    }
    if live.is_empty() {
        return;
    }
    let at = |index: usize| live[index % live.len()];
    match *step {
        Step::Create => {}
        Step::Append { first, count, tokens } => {
            let ids = some(&live, first, count);
            for layer in 0..config.layers {
                let (k, v) = random_tokens(rng, &config, ids.len(), tokens);
                pair.append(layer, &ids, &k, &v);
            }
        }
        Step::AppendLayer { index, layer, tokens } => {
            let (k, v) = random_tokens(rng, &config, 1, tokens);
            pair.append(layer, &[at(index)], &k, &v);
        }
        Step::Fork(index) => match pair.cache.fork(at(index)) {
            Ok(new) => pair.model.fork(at(index), new),
            Err(e) => assert!(live.len() == config.max_sequences && e == full),
        },
        Step::Truncate(index, part) => {
            let shortest = pair.model.live[&at(index)].layers.iter().map(|l| l.k.len()).min().unwrap();
            assert!(pair.cache.truncate(at(index), shortest + 1).is_err());
            pair.truncate(at(index), shortest * part / 64);
        }
        Step::Free(index) => pair.free(at(index)),
        Step::SaveRestore(index) => {
            let Ok(snapshot) = pair.cache.save(at(index)) else { return };
            let needed = pair.model.live[&at(index)].pages.len();
            let free = pair.model.pages_free();
            match pair.cache.restore(&snapshot) {
                Ok(new) => pair.model.restore(at(index), new),
                Err(e) if needed > free => assert_eq!(e, Error::CacheFull { what: "pages", needed, free }),
                Err(e) => assert!(live.len() == config.max_sequences && e == full),
            }
        }
        Step::Attend { first, count, layer, queries } => {
            let ids = some(&live, first, count);
            pair.model.assert_attends(rng, &mut pair.cache, layer, &ids, queries);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn random_histories(
        seed in any::<u64>(),
        steps in prop::collection::vec(step(), 1..30),
        sinks in prop::sample::select(vec![0usize, 1, 3]),
        (window, group) in prop::sample::select(vec![(1usize, 16usize), (5, 32), (40, 16)]),
        pages in 4usize..20,
        centred in any::<bool>(),
    ) {
        let center = if centred { CenterMode::Median } else { CenterMode::None };
        let config = CacheConfig { sinks, window, group, center, max_tokens: pages * 16, ..small_config() };
        for mut pair in pairs(&config) {
            let mut rng = Rng::new(seed);
            for step in &steps {
                apply(&mut pair, &mut rng, step);
                pair.model.assert_agrees(&pair.cache);
            }
        }
    }
}
