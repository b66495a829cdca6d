//! Untrusted bytes: damaged pages, lengths and block tables give errors or meaningless numbers, never a panic, a write
//! outside the output or an accepted page that breaks a rule.
#![allow(clippy::panic, clippy::unwrap_used)]

mod common;

use common::{
    DIMS, Dense, Dist, Layout, PAGE_SIZES, Paged, Pool, Rng, Table, VALUE_TYPES, config, contexts, is_cuda,
    run,
};
use mustafar::ops::{Attend, Compressed, Decompress, SpmvKey, SpmvValue, Validate};
use mustafar::{Context, DType, Error, Mem, PageFormat, Result, Rows, Sequences};
use proptest::prelude::*;
use proptest::sample::select;

prop_compose! {
    fn format()(
        values in select(&VALUE_TYPES[..]), dim in select(&DIMS[..]), page_tokens in select(&PAGE_SIZES[..]),
        share in 0.0..=1.0f64, ragged in any::<bool>(),
    ) -> PageFormat {
        let keep = 1 + (share * (dim - 1) as f64) as usize;
        if ragged {
            PageFormat::ragged(values, dim, page_tokens, keep * page_tokens).unwrap()
        } else {
            PageFormat::uniform(values, dim, page_tokens, keep).unwrap()
        }
    }
}

/// The rules of docs/format.md, one after the other.
fn obeys_the_rules(format: &PageFormat, page: &[u8], rows: usize) -> bool {
    let (dim, tokens) = (format.head_dim(), format.page_tokens());
    if page.len() < format.page_bytes() || rows > tokens {
        return false;
    }
    let set = |row: usize| (0..dim).filter(|c| page[row * dim / 8 + c / 8] >> (c % 8) & 1 == 1).count();
    let offset = |i: usize| {
        let at = tokens * dim / 8 + 2 * i;
        usize::from(page[at]) + 256 * usize::from(page[at + 1])
    };
    match format.rows() {
        Rows::Uniform { keep } => (0..rows).all(|row| set(row) == keep),
        Rows::Ragged { capacity } => {
            (rows == 0 || offset(0) == 0)
                && (0..rows)
                    .all(|row| offset(row + 1) == offset(row) + set(row) && offset(row + 1) <= capacity)
        }
    }
}

/// Bytes that are more or less like a valid page: some flipped, some replaced, some of everything.
fn damage(rng: &mut Rng, page: &mut [u8]) {
    match rng.below(4) {
        0 => (0..1 + rng.below(3)).for_each(|_| {
            let at = rng.below(page.len());
            page[at] ^= 1 << rng.below(8);
        }),
        1 => {
            let at = rng.below(page.len());
            page[at] = rng.next() as u8;
        }
        2 => {
            let (from, to) = (rng.below(page.len()), rng.below(page.len()));
            let value = *rng.pick(&[0x00, 0xFF, 0x80, 0x01]);
            page[from.min(to)..from.max(to)].fill(value);
        }
        _ => page.iter_mut().for_each(|b| *b = rng.next() as u8),
    }
}

/// Every op that reads pages, over the same pool as K and V.
fn read_with_every_op(context: &Context, pool: &Pool, sequences: Sequences<'_>) -> [Result<()>; 5] {
    let (batch, max_len) = (sequences.batch, sequences.max_len);
    let (heads, dim) = (pool.layout.kv_heads, pool.layout.format.head_dim());
    let mut out = Dense::poisoned(DType::F32, Layout::Gaps.shape(batch, max_len, heads, dim));
    let args = Decompress { pool: pool.view(), sequences, center: None, out: out.view_mut() };
    let decompress = run::decompress(context, args);
    out.assert_gaps_untouched();
    if decompress.is_err() && !is_cuda(context) {
        assert!(out.bytes.iter().all(|&b| b == 0xFF), "a refused call wrote to its output");
    }

    let mut rng = Rng::new(1);
    let q_heads = 3 * heads;
    let q =
        Dense::random(&mut rng, Dist::Normal, DType::F32, Layout::TokensFirst.shape(1, batch, q_heads, dim));
    let mut out = Dense::poisoned(DType::F32, Layout::Gaps.shape(1, batch, q_heads, dim));
    let args = Attend {
        q: q.view(),
        batch,
        q_indptr: None,
        max_q_len: 1,
        sinks: None,
        compressed: Some(Compressed { k: pool.view(), v: pool.view(), sequences, k_center: None }),
        window: None,
        first: None,
        scale: None,
        softcap: None,
        sliding_window: None,
        split_tokens: None,
        out: out.view_mut(),
        lse: None,
    };
    let attend = run::attend(context, args);
    out.assert_gaps_untouched();
    if attend.is_err() {
        assert!(out.bytes.iter().all(|&b| b == 0xFF), "a refused call wrote to its output");
    }

    let q =
        Dense::random(&mut rng, Dist::Normal, DType::F32, Layout::TokensFirst.shape(batch, 1, q_heads, dim));
    let long = Layout::Gaps.shape(batch, 1, q_heads, max_len);
    let mut scores = Dense::poisoned(DType::F32, long);
    let args = SpmvKey {
        q: q.view(),
        pool: pool.view(),
        sequences,
        center: None,
        scale: None,
        scores: scores.view_mut(),
    };
    let spmv_key = run::spmv_key(context, args);
    scores.assert_gaps_untouched();
    let weights = Dense::random(&mut rng, Dist::Normal, DType::F32, long);
    let mut out = Dense::poisoned(DType::F32, Layout::Gaps.shape(batch, 1, q_heads, dim));
    let args = SpmvValue { weights: weights.view(), pool: pool.view(), sequences, out: out.view_mut() };
    let spmv_value = run::spmv_value(context, args);
    out.assert_gaps_untouched();

    let validate = run::validate(context, Validate { pool: pool.view(), sequences, record: None });
    [validate, decompress, attend, spmv_key, spmv_value]
}

proptest! {
    #![proptest_config(config(256))]

    #[test]
    fn validate_is_exactly_the_rules(format in format(), seed in any::<u64>(), rows in 0..130usize) {
        let mut rng = Rng::new(seed);
        let table = Table::shuffled(&mut rng, format.page_tokens(), &[format.page_tokens()], 0);
        let mut page = Paged::random(&mut rng, Dist::AnyBits, Pool::contiguous(format, 1, 1), &table).pool.bytes;
        for _ in 0..4 {
            let valid = format.validate(&page, rows).is_ok();
            prop_assert_eq!(valid, obeys_the_rules(&format, &page, rows));
            let short = rng.below(page.len());
            prop_assert!(format.validate(&page[..short], rows).is_err());
            damage(&mut rng, &mut page);
        }
    }
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn damaged_pages_are_harmless(
        format in format(), seed in any::<u64>(), lens in prop::collection::vec(0..200usize, 1..3), heads in 1..3usize,
    ) {
        let mut rng = Rng::new(seed);
        let table = Table::shuffled(&mut rng, format.page_tokens(), &lens, 1);
        let pool = Pool::gaps(format, table.num_pages, heads);
        let mut pool = Paged::random(&mut rng, Dist::AnyBits, pool, &table).pool;
        for _ in 0..3 {
            damage(&mut rng, &mut pool.bytes);
        }
        let valid = (0..table.batch()).all(|b| (0..heads).all(|h| {
            (0..table.len(b, h)).step_by(format.page_tokens()).all(|t| {
                let rows = (table.len(b, h) - t).min(format.page_tokens());
                obeys_the_rules(&format, pool.page(table.page(b, t), h), rows)
            })
        }));
        for context in contexts(&[1, 2]) {
            let results = read_with_every_op(&context, &pool, table.view());
            prop_assert_eq!(results[0].is_ok(), valid, "validate: {:?}", results[0]);
            for result in results {
                let acceptable = matches!(result, Ok(()) | Err(Error::CorruptData { .. }));
                prop_assert!(acceptable, "{result:?}");
                prop_assert!(result.is_ok() || !valid, "a valid page was refused: {result:?}");
            }
        }
    }

    #[test]
    fn wild_lengths_and_tables_are_refused(
        format in format(), seed in any::<u64>(), batch in 1..4usize, per_head in any::<bool>(),
        contiguous in any::<bool>(), max_len in 0..300usize,
    ) {
        let mut rng = Rng::new(seed);
        let (heads, tokens) = (2, format.page_tokens());
        let wild = |rng: &mut Rng, good: usize| match rng.below(12) {
            0 => -1,
            1 => i32::MIN,
            2 => i32::MAX,
            3 => good as i32,
            _ => rng.below(good.max(1)) as i32,
        };
        let stride = max_len.div_ceil(tokens);
        let num_pages = batch * stride.max(1);
        let count = if per_head { batch * heads } else { batch };
        let lens: Vec<i32> = (0..count).map(|_| wild(&mut rng, max_len)).collect();
        let table: Vec<i32> = (0..batch * stride).map(|_| wild(&mut rng, num_pages)).collect();
        let mut pool = Pool::contiguous(format, num_pages, heads);
        // Pages without rows: any length within bounds finds something valid or damaged, both fine.
        pool.bytes.fill(0);
        let sequences = Sequences {
            batch,
            table: (!contiguous).then(|| Mem::host(&table)),
            table_stride: stride,
            lens: Mem::host(&lens),
            lens_per_head: per_head,
            max_len,
        };
        let len = |b: usize| {
            let of_b = if per_head { &lens[b * heads..][..heads] } else { &lens[b..=b] };
            of_b.iter().copied().max().unwrap()
        };
        let lens_good = lens.iter().all(|&n| n >= 0 && n as usize <= max_len);
        let table_good = |b: usize| {
            let used = (len(b) as usize).div_ceil(tokens);
            table[b * stride..][..used].iter().all(|&p| p >= 0 && (p as usize) < num_pages)
        };
        let good = lens_good && (contiguous || (0..batch).all(table_good));
        let context = Context::cpu(1).unwrap();
        for result in read_with_every_op(&context, &pool, sequences) {
            match result {
                Err(Error::OutOfRange { argument, .. }) => {
                    prop_assert!(!good && argument.contains("sequences."), "{argument}");
                }
                Ok(()) | Err(Error::CorruptData { .. }) => prop_assert!(good, "{result:?}"),
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
