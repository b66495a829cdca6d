//! `compress` against the reference, byte for byte.
#![allow(clippy::panic, clippy::unwrap_used)]

mod common;

use common::{
    Bytes, DIMS, Dense, Dist, Layout, PAGE_SIZES, Pool, Rng, VALUE_TYPES, contexts, foreign_stream, is_cuda,
    lengths, run, source_dtype,
};
use mustafar::ops::{Compress, Prune, Selection, compress};
use mustafar::reference::{self, Row};
use mustafar::{Context, DType, Error, Mem, MemMut, PageFormat, ValueType};
use proptest::prelude::*;

/// Arguments of a call. `mask` is `[tokens, heads, dim / 8]`.
#[derive(Debug, Clone)]
struct Call {
    x: Dense,
    mask: Option<Vec<u8>>,
    pool: Pool,
    pages: Vec<i32>,
}

impl Call {
    /// Random rows; each channel is kept with the chance `density`, or as it is non-zero.
    fn random(
        rng: &mut Rng,
        dist: Dist,
        layout: Layout,
        tokens: usize,
        pool: Pool,
        density: Option<f64>,
    ) -> Self {
        let (heads, format) = (pool.layout.kv_heads, pool.layout.format);
        let dtype = source_dtype(rng, format.value_type());
        let x = Dense::random(rng, dist, dtype, layout.shape(1, tokens, heads, format.head_dim()));
        let bytes = tokens * heads * format.bitmap_row_bytes();
        let mut byte = |p: f64| (0..8).fold(0, |byte, _| byte << 1 | u8::from(rng.chance(p)));
        let mask = density.map(|p| (0..bytes).map(|_| byte(p)).collect());
        let mut pages: Vec<i32> = (0..pool.layout.num_pages as i32).collect();
        rng.shuffle(&mut pages);
        pages.truncate(tokens.div_ceil(format.page_tokens()));
        Self { x, mask, pool, pages }
    }

    fn row(&self, t: usize, h: usize) -> Row {
        let bits = self.x.row_bits(0, t, h);
        let row_bytes = bits.len() / 8;
        let first = (t * self.x.shape.heads + h) * row_bytes;
        let kept = |c: usize| match &self.mask {
            Some(mask) => mask[first + c / 8] >> (c % 8) & 1 == 1,
            None => bits[c] & 0x7fff != 0,
        };
        let values = self.pool.layout.format.value_type();
        Row::new((0..bits.len()).map(kept).collect(), &bits).stored(self.x.dtype, values)
    }

    /// Rows of each page and head.
    fn rows(&self) -> Vec<Vec<Vec<Row>>> {
        let page_tokens = self.pool.layout.format.page_tokens();
        let tokens = |i: usize| i * page_tokens..self.x.shape.tokens.min((i + 1) * page_tokens);
        let of_head = |i: usize, h: usize| tokens(i).map(|t| self.row(t, h)).collect();
        (0..self.pages.len()).map(|i| (0..self.x.shape.heads).map(|h| of_head(i, h)).collect()).collect()
    }

    fn run(&mut self, context: &Context, needed: Option<&mut Vec<u32>>) -> mustafar::Result<()> {
        let args = Compress {
            x: self.x.view(),
            mask: self.mask.as_ref().map(|mask| Mem::host(mask)),
            pool: self.pool.view_mut(),
            pages: Mem::host(&self.pages),
            needed: needed.map(|needed| MemMut::host(needed)),
        };
        run::compress(context, args)
    }

    /// Compares pool and needed counts with the reference, or the error where a page overflows.
    fn check(&self) {
        let rows = self.rows();
        let kept = |rows: &Vec<Row>| rows.iter().map(Row::kept).sum::<usize>();
        let counts: Vec<u32> = rows.iter().flatten().map(|rows| kept(rows) as u32).collect();
        let (format, heads) = (self.pool.layout.format, self.pool.layout.kv_heads);
        let overflow = counts.iter().position(|n| *n as usize > format.capacity());
        let mut expected = self.pool.clone();
        if overflow.is_none() {
            for (page, rows) in self.pages.iter().zip(&rows) {
                for (h, rows) in rows.iter().enumerate() {
                    let bytes = reference::page(&format, rows, 0).unwrap();
                    expected.page_mut(*page as usize, h).copy_from_slice(&bytes);
                }
            }
        }
        let expected_result = match overflow {
            None => Ok(()),
            Some(i) => Err(Error::PageOverflow {
                page: i / heads,
                head: i % heads,
                needed: counts[i] as usize,
                capacity: format.capacity(),
            }),
        };
        for context in contexts(&[1, 3]) {
            let mut call = self.clone();
            let mut needed = vec![u32::MAX; counts.len()];
            let result = call.run(&context, Some(&mut needed));
            assert_eq!(needed, counts, "{context}");
            if is_cuda(&context) && overflow.is_some() {
                // Only counted there, and pages that fit are written.
                assert!(result.is_err(), "{context}");
                continue;
            }
            assert_eq!(result, expected_result, "{context}");
            assert!(call.pool.bytes[..] == expected.bytes[..], "{context}: {format:?}");
        }
        // `needed` is optional.
        let mut call = self.clone();
        assert_eq!(call.run(&Context::cpu(1).unwrap(), None), expected_result);
        assert!(call.pool.bytes[..] == expected.bytes[..]);
    }
}

#[test]
fn every_format_and_length() {
    let mut rng = Rng::new(1);
    for values in VALUE_TYPES {
        for dim in DIMS {
            for page_tokens in PAGE_SIZES {
                let format = PageFormat::ragged(values, dim, page_tokens, page_tokens * dim).unwrap();
                for tokens in lengths(page_tokens) {
                    let (dist, layout) = (*rng.pick(&Dist::ALL), *rng.pick(&Layout::ALL));
                    let density = *rng.pick(&[None, Some(0.0), Some(0.3), Some(1.0)]);
                    let pool = Pool::gaps(format, tokens.div_ceil(page_tokens) + 1, 2);
                    Call::random(&mut rng, dist, layout, tokens, pool, density).check();
                }
            }
        }
    }
}

#[test]
fn zeros_are_dropped_without_a_mask_and_kept_with_one() {
    let format = PageFormat::ragged(ValueType::F16, 64, 16, 8).unwrap();
    let mut rng = Rng::new(2);
    let mut call =
        Call::random(&mut rng, Dist::Normal, Layout::TokensFirst, 1, Pool::contiguous(format, 1, 1), None);
    let mut row = [0; 64];
    (row[1], row[2], row[3], row[63]) = (0x8000, 0x0001, 0xfe00, 0xfc00);
    call.x.set_row_bits(0, 0, 0, &row);
    call.check();
    call.run(&Context::cpu(1).unwrap(), None).unwrap();
    let stored = |call: &Call| reference::read_page(&format, call.pool.page(0, 0), 16);
    assert_eq!(stored(&call)[0].kept(), 3);
    assert_eq!(stored(&call)[1..].iter().map(Row::kept).sum::<usize>(), 0);
    call.mask = Some(vec![0x0f, 0, 0, 0, 0, 0, 0, 0]);
    call.check();
    call.run(&Context::cpu(1).unwrap(), None).unwrap();
    assert_eq!(stored(&call)[0].kept(), 4);
}

#[test]
fn capacity_is_exact() {
    let mut rng = Rng::new(3);
    for (capacity, fits) in [(16 * 7, true), (16 * 7 - 1, false)] {
        let format = PageFormat::ragged(ValueType::Bf16, 96, 16, capacity).unwrap();
        let mut call = Call::random(
            &mut rng,
            Dist::Normal,
            Layout::HeadsFirst,
            40,
            Pool::contiguous(format, 4, 3),
            Some(0.0),
        );
        // Seven values in every row of the second page of head 1, five elsewhere; the third page has 8 rows of 96.
        let row_bytes = 12;
        let mask = call.mask.as_mut().unwrap();
        for (i, row) in mask.chunks_mut(row_bytes).enumerate() {
            let (token, head) = (i / 3, i % 3);
            row[4] = if (16..32).contains(&token) && head == 1 { 0x7f } else { 0x1f };
        }
        call.check();
        let result = call.run(&Context::cpu(1).unwrap(), None);
        match fits {
            true => result.unwrap(),
            false => assert_eq!(
                result.unwrap_err().to_string(),
                "page 1 of head 1 keeps 112 values; its capacity is 111, 1 too few"
            ),
        }
    }
}

#[test]
fn channel_direction_fills_pages_exactly() {
    // Each channel keeps 10 of every 32 tokens, so a page of 64 tokens holds 2 * 10 * dim values.
    let format = PageFormat::ragged(ValueType::F16, 128, 64, 2 * 10 * 128).unwrap();
    let mut rng = Rng::new(4);
    let mut call = Call::random(
        &mut rng,
        Dist::Outliers,
        Layout::TokensFirst,
        256,
        Pool::contiguous(format, 4, 2),
        Some(0.0),
    );
    let selection = Selection::Channel { keep: 10 };
    let mask = call.mask.as_mut().unwrap();
    let args = Prune {
        x: call.x.view_mut(),
        selection,
        weights: None,
        token_weights: None,
        mask: Some(MemMut::host(mask)),
    };
    run::prune(&Context::cpu(2).unwrap(), args).unwrap();
    call.check();
    let mut needed = vec![0; 8];
    call.run(&Context::cpu(1).unwrap(), Some(&mut needed)).unwrap();
    assert_eq!(needed, [2560; 8]);
}

#[test]
fn enough_work_for_threads() {
    let mut rng = Rng::new(5);
    let format = PageFormat::ragged(ValueType::F16, 128, 64, 64 * 50).unwrap();
    Call::random(&mut rng, Dist::Normal, Layout::TokensFirst, 1000, Pool::gaps(format, 20, 5), Some(0.3))
        .check();
}

/// Runs a call that must fail with `expected` and write nothing.
#[track_caller]
fn refused(call: &Call, needed: usize, expected: &str) {
    let (mut after, mut needed) = (call.clone(), vec![7u32; needed]);
    let error = after.run(&Context::cpu(1).unwrap(), Some(&mut needed)).unwrap_err();
    assert_eq!(error.to_string(), expected);
    assert!(after.pool.bytes[..] == call.pool.bytes[..] && needed.iter().all(|n| *n == 7), "written");
}

#[test]
fn bad_arguments() {
    let mut rng = Rng::new(6);
    let format = PageFormat::ragged(ValueType::F16, 64, 16, 1024).unwrap();
    let pool = Pool::contiguous(format, 4, 2);
    let good = Call::random(&mut rng, Dist::Normal, Layout::TokensFirst, 40, pool, Some(0.5));
    let pages = |pages: &[i32]| Call { pages: pages.to_vec(), ..good.clone() };
    refused(&pages(&[0, 1, 4]), 6, "pages[2] is 4; allowed: 0 to 3");
    refused(&pages(&[0, -1, 2]), 6, "pages[1] is -1; allowed: 0 to 3");
    refused(&pages(&[3, 1, 3]), 6, "pages is page 3 at 0 and 2; allowed: no page twice");
    refused(&pages(&[0, 1]), 6, "pages has 8 bytes; needed: 12");
    refused(&good, 5, "needed has 20 bytes; needed: 24");
    let short = Call { mask: Some(vec![0; 639]), ..good.clone() };
    refused(&short, 6, "mask has 639 bytes; needed: 640");
    let x = |dtype, batch, heads, dim| {
        let shape = Layout::TokensFirst.shape(batch, 40, heads, dim);
        Call { x: Dense::poisoned(dtype, shape), mask: None, ..good.clone() }
    };
    refused(&x(DType::Bf16, 1, 2, 64), 6, "x.dtype is bf16; allowed: f16 (type of the pages' values)");
    refused(&x(DType::F16, 2, 2, 64), 6, "x.batch is 2; allowed: 1 (pages hold the tokens of one sequence)");
    refused(&x(DType::F16, 1, 3, 64), 6, "x.heads is 3; allowed: 2 (kv_heads of the pool)");
    refused(&x(DType::F16, 1, 2, 96), 6, "x.dim is 96; allowed: 64 (head_dim of the pages)");
    let uniform = PageFormat::uniform(ValueType::F16, 64, 16, 32).unwrap();
    let uniform = Call { pool: Pool::contiguous(uniform, 4, 2), ..good.clone() };
    refused(&uniform, 6, "pool is uniform; allowed: ragged pages");
}

#[test]
fn streams_are_refused_on_the_cpu() {
    let format = PageFormat::ragged(ValueType::F16, 64, 16, 1024).unwrap();
    let (mut pool, x) =
        (Pool::contiguous(format, 1, 1), Dense::poisoned(DType::F16, Layout::TokensFirst.shape(1, 1, 1, 64)));
    let empty = Bytes::poisoned(0);
    let args = Compress {
        x: x.view(),
        mask: None,
        pool: pool.view_mut(),
        pages: Mem::host(&empty[..]),
        needed: None,
    };
    let error = compress(&Context::cpu(1).unwrap(), foreign_stream(), args).unwrap_err();
    assert_eq!(error.to_string(), "stream is 0x1; allowed: null on the CPU backend");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_call_equals_the_reference(
        seed: u64,
        dim in 0..4usize,
        page_tokens in 0..4usize,
        tokens in 0..150usize,
        heads in 1..4usize,
        dist in 0..6usize,
        layout in 0..3usize,
        density in proptest::option::of(0.0..1.0f64),
        spare in 0..3usize,
        gaps: bool,
    ) {
        let mut rng = Rng::new(seed);
        let (values, dim, page_tokens) = (*rng.pick(&VALUE_TYPES), DIMS[dim], PAGE_SIZES[page_tokens]);
        // Sometimes too small for the pattern.
        let capacity = page_tokens * dim / (1 + rng.below(3));
        let format = PageFormat::ragged(values, dim, page_tokens, capacity).unwrap();
        let new = if gaps { Pool::gaps } else { Pool::contiguous };
        let pool = new(format, tokens.div_ceil(page_tokens) + spare, heads);
        Call::random(&mut rng, Dist::ALL[dist], Layout::ALL[layout], tokens, pool, density).check();
    }
}
