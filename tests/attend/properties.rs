//! Random batches: every feature at once, shrunk by proptest when one fails.

use crate::case::{Centre, Pages, Spec, ragged, uniform};
use crate::common::{DIMS, Dist, HEADS, Layout, PAGE_SIZES, Rng, VALUE_TYPES, keeps, lengths};
use mustafar::DType;
use proptest::prelude::*;

/// A batch from one number. Lengths are small but for the choice of sizes around pages, so that a case is quick.
fn spec(seed: u64) -> Spec {
    let rng = &mut Rng::new(seed);
    let floats = [DType::F16, DType::Bf16, DType::F32];
    let page_tokens = *rng.pick(&PAGE_SIZES);
    let batch = 1 + rng.below(3);
    let format = |rng: &mut Rng| {
        let (values, dim) = (*rng.pick(&VALUE_TYPES), *rng.pick(&DIMS));
        match rng.chance(0.3) {
            true => ragged(values, dim, page_tokens),
            false => uniform(values, dim, page_tokens, *rng.pick(&keeps(dim))),
        }
    };
    let (k, v) = (format(rng), format(rng));
    let lens = |rng: &mut Rng, most: usize| (0..batch).map(|_| rng.below(most + 1)).collect::<Vec<_>>();
    let compressed = (0..batch).map(|_| *rng.pick(&lengths(page_tokens))).collect();
    let pages = *rng.pick(&[Pages::Table, Pages::Contiguous, Pages::PerHead]);
    Spec {
        seed,
        heads: *rng.pick(&HEADS),
        k,
        v,
        q: *rng.pick(&floats),
        out: *rng.pick(&floats),
        dense: (*rng.pick(&floats), *rng.pick(&floats)),
        layout: *rng.pick(&Layout::ALL),
        dist: *rng.pick(&[Dist::Normal, Dist::Ties, Dist::Zeros, Dist::Subnormal]),
        queries: lens(rng, 4),
        sinks: rng.chance(0.5).then(|| lens(rng, 5)),
        compressed: rng.chance(0.9).then_some((compressed, pages)),
        window: rng.chance(0.7).then(|| lens(rng, 90)),
        shuffled_rows: rng.chance(0.5),
        first: rng.chance(0.3).then(|| lens(rng, 120)),
        centre: *rng.pick(&[Centre::Off, Centre::Shared, Centre::PerSequence]),
        scale: rng.chance(0.3).then(|| rng.normal() as f32 * 0.2),
        softcap: rng.chance(0.3).then_some(20.0),
        sliding_window: rng.chance(0.3).then(|| 1 + rng.below(200)),
        split_tokens: rng.chance(0.7).then(|| 1 + rng.below(300)),
        coarse: false,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_batch_matches_the_reference(seed in any::<u64>()) {
        crate::check(spec(seed));
    }
}
