//! `append` against the reference, byte for byte.
#![allow(unsafe_code, clippy::panic, clippy::unwrap_used)]

mod common;

use common::{
    Bytes, DIMS, Dense, Dist, Layout, PAGE_SIZES, Pool, Rng, VALUE_TYPES, contexts, copy_row, distinct_slots,
    foreign_stream, keeps, run, source_dtype,
};
use mustafar::ops::{Append, AppendSide, Center, append};
use mustafar::{
    Context, DType, Error, Mem, MemMut, PageFormat, PagePoolMut, Place, PoolLayout, ValueType, reference,
};
use proptest::prelude::*;

/// One side of a call, owning everything.
#[derive(Debug, Clone)]
struct Side {
    x: Dense,
    pool: Pool,
    weights: Option<Vec<f32>>,
    center: Option<(Vec<f32>, usize)>,
}

impl Side {
    fn random(rng: &mut Rng, dist: Dist, layout: Layout, tokens: usize, pool: Pool) -> Self {
        let (heads, dim) = (pool.layout.kv_heads, pool.layout.format.head_dim());
        let dtype = source_dtype(rng, pool.layout.format.value_type());
        let x = Dense::random(rng, dist, dtype, layout.shape(1, tokens, heads, dim));
        Self { x, pool, weights: None, center: None }
    }

    fn with_weights(mut self, rng: &mut Rng) -> Self {
        let n = self.pool.layout.kv_heads * self.pool.layout.format.head_dim();
        let weight = |rng: &mut Rng| match rng.below(12) {
            0 => 0.0,
            1 => -0.0,
            2 => f32::INFINITY,
            3 => 1.0,
            _ => rng.normal().abs() as f32,
        };
        self.weights = Some((0..n).map(|_| weight(rng)).collect());
        self
    }

    fn with_center(mut self, rng: &mut Rng, batch: usize) -> Self {
        let n = batch * self.pool.layout.kv_heads * self.pool.layout.format.head_dim();
        self.center = Some((rng.floats(n), batch));
        self
    }

    fn args(&mut self) -> AppendSide<'_> {
        AppendSide {
            x: self.x.view(),
            pool: self.pool.view_mut(),
            weights: self.weights.as_ref().map(|w| Mem::host(w)),
            center: self.center.as_ref().map(|(c, batch)| Center { values: Mem::host(c), batch: *batch }),
        }
    }

    /// The pool as the reference leaves it.
    fn expected(&self, slots: &[i64], sequence: Option<&Vec<i32>>) -> Pool {
        let mut pool = self.pool.clone();
        let format = pool.layout.format;
        let (heads, dim, keep) = (pool.layout.kv_heads, format.head_dim(), format.keep().unwrap());
        let (dtype, values) = (self.x.dtype, format.value_type());
        for (t, slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
            let (page, row) = (*slot as usize / format.page_tokens(), *slot as usize % format.page_tokens());
            for h in 0..heads {
                let mut bits = self.x.row_bits(0, t, h);
                if let Some((c, batch)) = &self.center {
                    let b = if *batch > 1 { sequence.unwrap()[t] as usize } else { 0 };
                    bits = reference::center(dtype, &bits, &c[(b * heads + h) * dim..][..dim]);
                }
                let weights = self.weights.as_ref().map(|w| &w[h * dim..][..dim]);
                let pruned = reference::prune_token(dtype, &bits, keep, weights).stored(dtype, values);
                // A page of the one row gives the bytes of any row.
                let one = reference::page(&format, &[pruned], 0).unwrap();
                copy_row(format, (&one, 0), (pool.page_mut(page, h), row));
            }
        }
        pool
    }
}

fn run(
    context: &Context,
    k: Option<&mut Side>,
    v: Option<&mut Side>,
    slots: &[i64],
    sequence: Option<&Vec<i32>>,
) -> mustafar::Result<()> {
    let (k, v) = (k.map(Side::args), v.map(Side::args));
    let sequence = common::mem(sequence);
    run::append(context, Append { k, v, slots: Mem::host(slots), sequence })
}

/// Appends on every context and compares every byte of the pools.
fn check(k: Option<Side>, v: Option<Side>, slots: &[i64], sequence: Option<&Vec<i32>>) {
    let expect = |side: &Option<Side>| side.as_ref().map(|side| side.expected(slots, sequence));
    let (expected_k, expected_v) = (expect(&k), expect(&v));
    for context in contexts(&[1, 3]) {
        let (mut k, mut v) = (k.clone(), v.clone());
        let slots = distinct_slots(&context, slots);
        run(&context, k.as_mut(), v.as_mut(), &slots, sequence).unwrap();
        for (side, expected) in [(k, &expected_k), (v, &expected_v)] {
            let (Some(side), Some(expected)) = (side, expected) else { continue };
            assert!(side.pool.bytes[..] == expected.bytes[..], "{context}: {:?}", side.pool.layout.format);
        }
    }
}

/// Slots that touch every page, in any order, some skipped.
fn random_slots(rng: &mut Rng, pool: &Pool, tokens: usize) -> Vec<i64> {
    let mut slots: Vec<i64> = (0..pool.layout.slots() as i64).collect();
    rng.shuffle(&mut slots);
    slots.truncate(tokens);
    slots.iter().map(|slot| if rng.chance(0.1) { -1 } else { *slot }).collect()
}

#[test]
fn every_format() {
    let mut rng = Rng::new(1);
    for values in VALUE_TYPES {
        for dim in DIMS {
            for page_tokens in PAGE_SIZES {
                for keep in keeps(dim) {
                    let format = PageFormat::uniform(values, dim, page_tokens, keep).unwrap();
                    let dist = *rng.pick(&Dist::ALL);
                    let layout = *rng.pick(&Layout::ALL);
                    let side = Side::random(&mut rng, dist, layout, 9, Pool::gaps(format, 2, 2));
                    let slots = random_slots(&mut rng, &side.pool, 9);
                    check(Some(side), None, &slots, None);
                }
            }
        }
    }
}

#[test]
fn ties_and_zeros_keep_exactly_keep() {
    let format = PageFormat::uniform(ValueType::F16, 64, 16, 5).unwrap();
    let mut side =
        Side::random(&mut Rng::new(0), Dist::Normal, Layout::TokensFirst, 4, Pool::contiguous(format, 1, 1));
    let (one, nan, inf) = (0x3c00, 0x7e01, 0x7c00);
    side.x.set_row_bits(0, 0, 0, &[0; 64]);
    side.x.set_row_bits(0, 1, 0, &[one | 0x8000; 64]);
    let mut mixed = [0x8000; 64];
    (mixed[10], mixed[20], mixed[63]) = (one, nan, inf | 0x8000);
    side.x.set_row_bits(0, 2, 0, &mixed);
    let mut late = [one; 64];
    late[60..].fill(one + 1);
    side.x.set_row_bits(0, 3, 0, &late);
    run(&Context::cpu(1).unwrap(), Some(&mut side), None, &[0, 1, 2, 3], None).unwrap();
    let rows = reference::read_page(&format, side.pool.page(0, 0), 4);
    let kept = |row: usize| -> Vec<usize> { (0..64).filter(|c| rows[row].mask[*c]).collect() };
    assert_eq!(kept(0), [0, 1, 2, 3, 4]);
    assert_eq!(kept(1), [0, 1, 2, 3, 4]);
    assert_eq!(kept(2), [0, 1, 10, 20, 63]);
    assert_eq!(kept(3), [0, 60, 61, 62, 63]);
    // Values keep their bits: the sign of zero, the payload of NaN.
    assert_eq!([rows[2].bits[0], rows[2].bits[20], rows[2].bits[63]], [0x8000, nan, inf | 0x8000]);
}

#[test]
fn later_token_wins_a_slot() {
    let format = PageFormat::uniform(ValueType::Bf16, 128, 32, 39).unwrap();
    let mut rng = Rng::new(2);
    let side = Side::random(&mut rng, Dist::Normal, Layout::HeadsFirst, 40, Pool::contiguous(format, 1, 5));
    let slots: Vec<i64> = (0..40).map(|_| rng.below(4) as i64).collect();
    check(Some(side), None, &slots, None);
}

#[test]
fn enough_work_for_threads() {
    let mut rng = Rng::new(3);
    let k = PageFormat::uniform(ValueType::F16, 128, 64, 39).unwrap();
    let v = PageFormat::uniform(ValueType::Bf16, 64, 64, 32).unwrap();
    let k = Side::random(&mut rng, Dist::Outliers, Layout::TokensFirst, 700, Pool::contiguous(k, 11, 5));
    let v = Side::random(&mut rng, Dist::Ties, Layout::HeadsFirst, 700, Pool::gaps(v, 11, 5));
    let k = k.with_center(&mut rng, 3);
    let sequence: Vec<i32> = (0..700).map(|_| rng.below(3) as i32).collect();
    let slots = random_slots(&mut rng, &k.pool, 700);
    check(Some(k), Some(v), &slots, Some(&sequence));
}

#[test]
fn k_and_v_interleaved_in_one_buffer() {
    // An engine's slot: [K page | V page] for each page and head. Two views of one allocation need `from_raw`.
    let k_format = PageFormat::uniform(ValueType::F16, 64, 16, 19).unwrap();
    let v_format = PageFormat::uniform(ValueType::F16, 64, 16, 32).unwrap();
    let mut rng = Rng::new(4);
    let [k, v] = [k_format, v_format].map(|format| {
        Side::random(&mut rng, Dist::Normal, Layout::TokensFirst, 20, Pool::contiguous(format, 2, 3))
    });
    let slots: Vec<i64> = (5..25).collect();
    let (k_bytes, slot_bytes) = (k_format.page_bytes(), k_format.page_bytes() + v_format.page_bytes());
    let mut shared = Bytes::poisoned(6 * slot_bytes);
    let address = shared.as_mut_ptr() as u64;
    let pool = |offset: usize, format: PageFormat| {
        let layout = PoolLayout {
            page_stride: 3 * slot_bytes,
            head_stride: slot_bytes,
            ..PoolLayout::contiguous(format, 2, 3).unwrap()
        };
        let bytes = layout.extent("test").unwrap();
        // SAFETY: `shared` outlives the call, and K and V pages are disjoint.
        let mem = unsafe { MemMut::from_raw(address + offset as u64, bytes, Place::Host) };
        PagePoolMut::new("test", mem, layout).unwrap()
    };
    let side = |x, pool| Some(AppendSide { x, pool, weights: None, center: None });
    let args = Append {
        k: side(k.x.view(), pool(0, k_format)),
        v: side(v.x.view(), pool(k_bytes, v_format)),
        slots: Mem::host(&slots),
        sequence: None,
    };
    run::append(&Context::cpu(2).unwrap(), args).unwrap();
    let (expected_k, expected_v) = (k.expected(&slots, None), v.expected(&slots, None));
    for (i, slot) in shared.chunks(slot_bytes).enumerate() {
        assert!(slot[..k_bytes] == *expected_k.page(i / 3, i % 3), "K of slot {i}");
        assert!(slot[k_bytes..] == *expected_v.page(i / 3, i % 3), "V of slot {i}");
    }
}

/// Runs a call that must fail with `expected` and leave both pools as they were.
#[track_caller]
fn refused(
    mut k: Option<Side>,
    mut v: Option<Side>,
    slots: &[i64],
    sequence: Option<&Vec<i32>>,
    expected: &str,
) {
    let before = (k.clone(), v.clone());
    let error = run(&Context::cpu(1).unwrap(), k.as_mut(), v.as_mut(), slots, sequence).unwrap_err();
    assert_eq!(error.to_string(), expected);
    for (after, before) in [(k, before.0), (v, before.1)] {
        assert!(after.map(|s| s.pool.bytes.to_vec()) == before.map(|s| s.pool.bytes.to_vec()), "written");
    }
}

#[test]
fn bad_arguments() {
    let mut rng = Rng::new(5);
    let format = PageFormat::uniform(ValueType::F16, 64, 16, 32).unwrap();
    let pool = Pool::contiguous(format, 2, 2);
    let side = Side::random(&mut rng, Dist::Normal, Layout::TokensFirst, 3, pool.clone());
    let some = || Some(side.clone());
    let slots = [0, 1, 2];

    refused(None, None, &slots, None, "k and v is absent; allowed: at least one of them");
    refused(some(), None, &[0, 32, 1], None, "slots[1] is 32; allowed: -1 to 31");
    refused(some(), None, &[0, 1, -2], None, "slots[2] is -2; allowed: -1 to 31");
    refused(
        some(),
        None,
        &[0, i64::MAX, i64::MIN],
        None,
        &format!("slots[1] is {}; allowed: -1 to 31", i64::MAX),
    );
    refused(some(), None, &[0, 1], None, "slots has 16 bytes; needed: 24");

    let with_x = |dtype, shape| Some(Side { x: Dense::poisoned(dtype, shape), ..side.clone() });
    let shape = Layout::TokensFirst.shape(1, 3, 2, 64);
    refused(
        with_x(DType::Bf16, shape),
        None,
        &slots,
        None,
        "k.x.dtype is bf16; allowed: f16 (type of the pages' values)",
    );
    refused(
        with_x(DType::F32, shape),
        None,
        &slots,
        None,
        "k.x.dtype is f32; allowed: f16 (type of the pages' values)",
    );
    let shape = Layout::TokensFirst.shape(1, 3, 2, 96);
    refused(
        None,
        with_x(DType::F16, shape),
        &slots,
        None,
        "v.x.dim is 96; allowed: 64 (head_dim of the pages)",
    );
    let shape = Layout::TokensFirst.shape(1, 3, 3, 64);
    refused(
        None,
        with_x(DType::F16, shape),
        &slots,
        None,
        "v.x.heads is 3; allowed: 2 (kv_heads of the pool)",
    );
    let shape = Layout::TokensFirst.shape(2, 3, 2, 64);
    let message = "k.x.batch is 2; allowed: 1 (tokens of all sequences follow each other)";
    refused(with_x(DType::F16, shape), None, &slots, None, message);
    let shape = Layout::TokensFirst.shape(1, 4, 2, 64);
    let message = "v.x.tokens is 4; allowed: 3 (tokens of k.x)";
    refused(some(), with_x(DType::F16, shape), &slots, None, message);

    let with_pool = |pool: Pool| Some(Side { pool, ..side.clone() });
    let ragged = PageFormat::ragged(ValueType::F16, 64, 16, 512).unwrap();
    let message = "k.pool is ragged; allowed: uniform pages";
    refused(with_pool(Pool::contiguous(ragged, 2, 2)), None, &slots, None, message);
    let message = "v.pool.num_pages is 3; allowed: 2 (num_pages of k.pool)";
    refused(some(), with_pool(Pool::contiguous(format, 3, 2)), &slots, None, message);
    let larger = PageFormat::uniform(ValueType::F16, 64, 32, 32).unwrap();
    let message = "v.pool.page_tokens is 32; allowed: 16 (page_tokens of k.pool)";
    refused(some(), with_pool(Pool::contiguous(larger, 2, 2)), &slots, None, message);
}

#[test]
fn bad_weights_and_centers() {
    let mut rng = Rng::new(6);
    let format = PageFormat::uniform(ValueType::F16, 64, 16, 32).unwrap();
    let side = Side::random(&mut rng, Dist::Normal, Layout::TokensFirst, 3, Pool::contiguous(format, 2, 2));
    let slots = [0, -1, 2];
    for (value, text) in [(-1.0, "-1"), (f32::NAN, "NaN"), (-f32::INFINITY, "-inf")] {
        let mut weights = vec![1.0; 128];
        weights[70] = value;
        let bad = Side { weights: Some(weights), ..side.clone() };
        let message = format!("v.weights is {text} at head 1, channel 6; allowed: values of at least 0");
        // The V side is checked before K is written.
        refused(Some(side.clone()), Some(bad), &slots, None, &message);
    }
    let short = Side { weights: Some(vec![1.0; 127]), ..side.clone() };
    refused(Some(short), None, &slots, None, "k.weights has 508 bytes; needed: 512");

    let centered = |batch| Some(side.clone().with_center(&mut Rng::new(7), batch));
    let message = "sequence is absent; allowed: given when a centre has batch > 1";
    refused(centered(2), None, &slots, None, message);
    refused(centered(0), None, &slots, None, "k.center.batch is 0; allowed: at least 1");
    refused(centered(2), None, &slots, Some(&vec![0, 9, 2]), "sequence[2] is 2; allowed: 0 to 1");
    refused(centered(2), None, &slots, Some(&vec![-1, 9, 0]), "sequence[0] is -1; allowed: 0 to 1");
    refused(centered(2), None, &slots, Some(&vec![0, 0]), "sequence has 8 bytes; needed: 12");
    let short = Side { center: Some((vec![0.0; 127], 1)), ..side.clone() };
    refused(None, Some(short), &slots, None, "v.center has 508 bytes; needed: 512");
    // A skipped token may belong to any sequence.
    check(centered(2), None, &slots, Some(&vec![0, 9, 1]));
}

#[test]
fn pages_that_overlap_are_refused() {
    // Not when the pool is made, but through its public layout afterwards.
    let format = PageFormat::uniform(ValueType::F16, 64, 16, 32).unwrap();
    let pool = Pool::contiguous(format, 2, 2);
    let mut side = Side::random(&mut Rng::new(10), Dist::Normal, Layout::TokensFirst, 1, pool);
    let mut k = side.args();
    k.pool.layout.head_stride = 16;
    let args = Append { k: Some(k), v: None, slots: Mem::host(&[0i64]), sequence: None };
    let error = run::append(&Context::cpu(1).unwrap(), args).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { argument: "k.pool", .. }), "{error}");
    assert!(side.pool.bytes.iter().all(|b| *b == 0xff), "written");
}

#[test]
fn nothing_to_do() {
    let format = PageFormat::uniform(ValueType::F16, 64, 16, 32).unwrap();
    let none = |tokens| {
        let pool = Pool::contiguous(format, 1, 1);
        Some(Side::random(&mut Rng::new(8), Dist::Normal, Layout::TokensFirst, tokens, pool))
    };
    check(none(0), None, &[], None);
    check(none(2), None, &[-1, -1], None);
    let empty = Side { pool: Pool::contiguous(format, 0, 1), ..none(1).unwrap() };
    check(Some(empty.clone()), None, &[-1], None);
    refused(Some(empty), None, &[0], None, "slots[0] is 0; allowed: -1 to -1");
}

#[test]
fn streams_and_device_memory_are_refused_on_the_cpu() {
    let format = PageFormat::uniform(ValueType::F16, 64, 16, 32).unwrap();
    let mut side =
        Side::random(&mut Rng::new(9), Dist::Normal, Layout::TokensFirst, 1, Pool::contiguous(format, 1, 1));
    let context = Context::cpu(1).unwrap();
    let args = Append { k: Some(side.args()), v: None, slots: Mem::host(&[0i64]), sequence: None };
    let error = append(&context, foreign_stream(), args).unwrap_err();
    assert_eq!(error.to_string(), "stream is 0x1; allowed: null on the CPU backend");
    // SAFETY: device memory is never dereferenced.
    let slots = unsafe { Mem::from_raw(64, 8, Place::Device) };
    let error = run::append(&context, Append { k: Some(side.args()), v: None, slots, sequence: None });
    let error = error.unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { argument: "slots", .. }), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_call_equals_the_reference(
        seed: u64,
        dims in (0..4usize, 0..4usize),
        page_tokens in 0..4usize,
        heads in 1..4usize,
        pages in 1..4usize,
        tokens in 0..70usize,
        sides in 1..4u8,
        options: (bool, bool, bool),
        dists in (0..6usize, 0..6usize),
        layouts in (0..3usize, 0..3usize),
    ) {
        let mut rng = Rng::new(seed);
        let (weighted, centered, per_sequence) = options;
        let mut side = |dim: usize, dist: usize, layout: usize| {
            let (dtype, dim) = (*rng.pick(&VALUE_TYPES), DIMS[dim]);
            let format = PageFormat::uniform(dtype, dim, PAGE_SIZES[page_tokens], rng.below(dim) + 1).unwrap();
            let pool = if rng.chance(0.5) { Pool::gaps(format, pages, heads) } else { Pool::contiguous(format, pages, heads) };
            let mut side = Side::random(&mut rng, Dist::ALL[dist], Layout::ALL[layout], tokens, pool);
            if weighted {
                side = side.with_weights(&mut rng);
            }
            if centered {
                side = side.with_center(&mut rng, if per_sequence { 3 } else { 1 });
            }
            side
        };
        let k = (sides & 1 != 0).then(|| side(dims.0, dists.0, layouts.0));
        let v = (sides & 2 != 0).then(|| side(dims.1, dists.1, layouts.1));
        let limit = pages * PAGE_SIZES[page_tokens];
        let slots: Vec<i64> = (0..tokens).map(|_| rng.below(limit + 1) as i64 - 1).collect();
        let sequence: Vec<i32> = (0..tokens).map(|_| rng.below(3) as i32).collect();
        check(k, v, &slots, Some(&sequence));
    }
}
