//! What a result must not depend on, bit for bit, and what damage must not do.

use crate::case::{Case, Centre, Pages, Results, Spec, ragged, uniform};
use crate::common::{Rng, Table};
use mustafar::{Context, Level, ValueType};

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|level| level.available())
}

/// Bits of all results.
fn bits(results: &Results) -> Vec<u64> {
    results.iter().flat_map(|(out, lse)| out.iter().chain([lse])).map(|x| x.to_bits()).collect()
}

fn batch() -> Spec {
    Spec {
        queries: vec![1, 3, 2],
        sinks: Some(vec![4, 4, 0]),
        compressed: Some((vec![1300, 0, 700], Pages::Table)),
        window: Some(vec![40, 9, 90]),
        centre: Centre::PerSequence,
        ..Spec::plain((8, 2), 128, 39, 0)
    }
}

#[test]
fn threads_do_not_matter() {
    let case = Case::new(batch());
    for level in levels() {
        let run = |threads| bits(&case.run(&Context::cpu_with_level(threads, level).unwrap()).unwrap());
        let one = run(1);
        for threads in [2, 3, 8] {
            assert_eq!(run(threads), one, "{level}, {threads} threads");
        }
    }
}

#[test]
fn the_rest_of_the_batch_does_not_matter() {
    let full = Case::new(batch());
    for level in levels() {
        let context = Context::cpu_with_level(2, level).unwrap();
        let together = full.run(&context).unwrap();
        for b in 0..3 {
            // The same data, every other sequence empty.
            let mut alone = Case::new(batch());
            let empty =
                |lens: &mut Vec<i32>| lens.iter_mut().enumerate().for_each(|(i, n)| *n *= i32::from(i == b));
            empty(&mut alone.table.lens);
            empty(&mut alone.sinks.as_mut().unwrap().lens);
            empty(&mut alone.window.as_mut().unwrap().lens);
            let rows = alone.indptr[b] as usize * 8..alone.indptr[b + 1] as usize * 8;
            let alone = alone.run(&context).unwrap();
            assert_eq!(
                bits(&together[rows.clone()].to_vec()),
                bits(&alone[rows].to_vec()),
                "{level}, sequence {b}"
            );
        }
    }
}

#[test]
fn where_pages_lie_does_not_matter() {
    let context = Context::cpu(1).unwrap();
    let case = Case::new(batch());
    let before = case.run(&context).unwrap();
    let mut moved = Case::new(batch());
    // Every page to the place of another, and the table with them.
    let num_pages = moved.table.num_pages;
    for h in 0..2 {
        for p in 0..num_pages {
            let to = (p + 1) % num_pages;
            moved.k.pool.page_mut(to, h).copy_from_slice(case.k.pool.page(p, h));
            moved.v.pool.page_mut(to, h).copy_from_slice(case.v.pool.page(p, h));
        }
    }
    let Table { entries, .. } = &mut moved.table;
    entries.iter_mut().filter(|p| **p >= 0).for_each(|p| *p = (*p + 1) % num_pages as i32);
    assert_eq!(bits(&moved.run(&context).unwrap()), bits(&before));
}

#[test]
fn damaged_pages_are_harmless() {
    // Test buffers end at an inaccessible page: reading past a pool ends the process.
    for (page_tokens, keep) in [(16, 1), (16, 64), (64, 20), (128, 63)] {
        for format in [
            uniform(ValueType::F16, 64, page_tokens, keep),
            uniform(ValueType::Int8, 96, page_tokens, keep),
            ragged(ValueType::Bf16, 64, page_tokens),
            ragged(ValueType::Int8, 256, page_tokens),
        ] {
            for seed in 0..8 {
                let spec =
                    Spec { k: format, v: format, seed, ..Spec::plain((5, 1), 64, 20, 3 * page_tokens - 1) };
                let mut case = Case::new(spec);
                let mut rng = Rng::new(seed);
                for pool in [&mut case.k.pool, &mut case.v.pool] {
                    let all_ones = rng.chance(0.5);
                    pool.bytes.iter_mut().for_each(|x| *x = if all_ones { 0xFF } else { rng.next() as u8 });
                }
                for level in levels() {
                    let results = case.run(&Context::cpu_with_level(1, level).unwrap()).unwrap();
                    assert_eq!(results.len(), 5);
                }
            }
        }
    }
}
