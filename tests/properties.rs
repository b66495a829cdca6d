//! Properties of storing: what `append` and `compress` write, `validate` accepts and `decompress` gives back, whatever
//! the format, the strides, the order of calls and the place of the pages.
#![allow(clippy::panic, clippy::unwrap_used)]

mod common;

use common::{
    Bytes, DIMS, DTYPES, Dense, Dist, Layout, PAGE_SIZES, Pool, Rng, Table, VALUE_TYPES, config, contexts,
    copy_row, is_cuda, run, source_dtype, values_of,
};
use mustafar::ops::{Append, AppendSide, Center, Compress, Decompress, Prune, Selection, Validate};
use mustafar::reference::{self, Row};
use mustafar::{Context, DType, Error, Mem, MemMut, PageFormat, PoolLayout, ValueType};
use proptest::prelude::*;
use proptest::sample::select;

/// A page format with a share of its elements kept.
#[derive(Debug, Clone, Copy)]
struct Kind {
    values: ValueType,
    dim: usize,
    keep: usize,
}

prop_compose! {
    fn kind()(values in select(&VALUE_TYPES[..]), dim in select(&DIMS[..]))
        (values in Just(values), dim in Just(dim), keep in 1..=dim) -> Kind {
        Kind { values, dim, keep }
    }
}

/// What both sides of a test of `append` share.
#[derive(Debug, Clone)]
struct Batch {
    seed: u64,
    page_tokens: usize,
    lens: Vec<usize>,
    heads: usize,
    dist: Dist,
    layout: Layout,
    gaps: bool,
    weighted: bool,
    /// No centre, one for all, or one per sequence.
    centers: usize,
}

prop_compose! {
    fn batch()(
        seed in any::<u64>(),
        page_tokens in select(&PAGE_SIZES[..]),
        lens in prop::collection::vec(0..150usize, 1..4),
        heads in 1..4usize,
        dist in select(&Dist::ALL[..]),
        layout in select(&Layout::ALL[..]),
        gaps in any::<bool>(),
        weighted in any::<bool>(),
        centers in 0..3usize,
    ) -> Batch {
        Batch { seed, page_tokens, lens, heads, dist, layout, gaps, weighted, centers }
    }
}

fn pool(gaps: bool, format: PageFormat, num_pages: usize, heads: usize) -> Pool {
    if gaps { Pool::gaps(format, num_pages, heads) } else { Pool::contiguous(format, num_pages, heads) }
}

/// One side of the cache: input, pages, options, and the rows that the reference would store.
struct Side {
    x: Dense,
    pool: Pool,
    weights: Option<Vec<f32>>,
    center: Option<Vec<f32>>,
    centers: usize,
    /// `rows[token][head]`.
    rows: Vec<Vec<Row>>,
}

impl Side {
    /// `sequence[token]` says whose centre a token uses.
    fn new(rng: &mut Rng, batch: &Batch, kind: Kind, table: &Table, sequence: &[i32]) -> Self {
        let Kind { values, dim, keep } = kind;
        let dtype = source_dtype(rng, values);
        let format = PageFormat::uniform(values, dim, batch.page_tokens, keep).unwrap();
        let heads = batch.heads;
        let x = Dense::random(rng, batch.dist, dtype, batch.layout.shape(1, sequence.len(), heads, dim));
        let weights =
            batch.weighted.then(|| rng.floats(heads * dim).iter().map(|w| w.abs()).collect::<Vec<_>>());
        let centers = if batch.centers == 2 { batch.lens.len() } else { batch.centers };
        let center = (centers > 0).then(|| rng.floats(centers * heads * dim));
        let part =
            |values: &Option<Vec<f32>>, i: usize| values.as_ref().map(|v| v[i * dim..(i + 1) * dim].to_vec());
        let stored = |t: usize, h: usize| {
            let b = if centers > 1 { sequence[t] as usize } else { 0 };
            let row = x.row_bits(0, t, h);
            let row = match part(&center, b * heads + h) {
                Some(c) => reference::center(dtype, &row, &c),
                None => row,
            };
            reference::prune_token(dtype, &row, keep, part(&weights, h).as_deref()).stored(dtype, values)
        };
        let rows = (0..sequence.len()).map(|t| (0..heads).map(|h| stored(t, h)).collect()).collect();
        let pool = pool(batch.gaps, format, table.num_pages, heads);
        Self { x, pool, weights, center, centers, rows }
    }

    fn args<'a>(&'a mut self, x: &'a Dense) -> AppendSide<'a> {
        AppendSide {
            x: x.view(),
            pool: self.pool.view_mut(),
            weights: self.weights.as_ref().map(|w| Mem::host(w)),
            center: self.center.as_ref().map(|c| Center { values: Mem::host(c), batch: self.centers }),
        }
    }

    /// The tokens `order`, as a tensor of their own.
    fn gather(&self, order: &[usize]) -> Dense {
        let shape = self.x.shape;
        let mut part =
            Dense::poisoned(self.x.dtype, Layout::Gaps.shape(1, order.len(), shape.heads, shape.dim));
        for (i, &t) in order.iter().enumerate() {
            (0..shape.heads).for_each(|h| part.set_row_bits(0, i, h, &self.x.row_bits(0, t, h)));
        }
        part
    }

    /// What the pool must hold: rows at their slots, poison everywhere else.
    fn expected_pool(&self, slots: &[i64]) -> Pool {
        let mut pool = self.pool.clone();
        pool.bytes.fill(0xFF);
        let format = pool.layout.format;
        let tokens = format.page_tokens();
        for (rows, &slot) in self.rows.iter().zip(slots) {
            for (h, row) in rows.iter().enumerate() {
                let alone = reference::page(&format, std::slice::from_ref(row), 0).unwrap();
                let page = pool.page_mut(slot as usize / tokens, h);
                copy_row(format, (&alone, 0), (page, slot as usize % tokens));
            }
        }
        pool
    }

    /// `validate` and `decompress` of the whole batch.
    fn check_round_trip(&self, context: &Context, table: &Table, out_layout: Layout) {
        let (shape, values) = (self.x.shape, self.pool.layout.format.value_type());
        let args = Validate { pool: self.pool.view(), sequences: table.view(), record: None };
        run::validate(context, args).unwrap();
        // Without the centre, in 16 bits: the stored bits. With it, in float32: one rounded sum.
        for (out_dtype, center) in [(self.x.dtype, &None), (DType::F32, &self.center)] {
            let batch = table.batch();
            let out_shape = out_layout.shape(batch, table.max_len, shape.heads, shape.dim);
            let mut out = Dense::poisoned(out_dtype, out_shape);
            let args = Decompress {
                pool: self.pool.view(),
                sequences: table.view(),
                center: center.as_ref().map(|c| Center { values: Mem::host(c), batch: self.centers }),
                out: out.view_mut(),
            };
            run::decompress(context, args).unwrap();
            out.assert_gaps_untouched();
            let mut token = 0;
            for b in 0..batch {
                for t in 0..table.max_len {
                    for h in 0..shape.heads {
                        if t >= table.len(b, h) {
                            assert!(out.is_poisoned(b, t, h), "token {t} of {b} was written");
                            continue;
                        }
                        let row = &self.rows[token + t][h];
                        if out_dtype == self.x.dtype {
                            assert_eq!(out.row_bits(b, t, h), bits16(row, values, out_dtype));
                            continue;
                        }
                        let b_center = if self.centers > 1 { b } else { 0 };
                        let at = (b_center * shape.heads + h) * shape.dim;
                        let c = center.as_ref().map(|c| &c[at..at + shape.dim]);
                        let want: Vec<f32> = row.dense(values, c).iter().map(|&x| x as f32).collect();
                        let got: Vec<f32> = out.row(b, t, h).iter().map(|&x| x as f32).collect();
                        let same = |(g, w): (&f32, &f32)| g == w || (g.is_nan() && w.is_nan());
                        assert!(got.iter().zip(&want).all(same), "{got:?}\n{want:?}");
                    }
                }
                token += table.len(b, 0);
            }
        }
    }
}

/// Calls `append` with the tokens `order` of both sides.
fn append(context: &Context, sides: [&mut Side; 2], order: &[usize], slots: &[i64], sequence: &[i32]) {
    let [k, v] = sides;
    let (x_k, x_v) = (k.gather(order), v.gather(order));
    let slots: Vec<i64> = order.iter().map(|&t| slots[t]).collect();
    let sequence: Vec<i32> = order.iter().map(|&t| sequence[t]).collect();
    let args = Append {
        k: Some(k.args(&x_k)),
        v: Some(v.args(&x_v)),
        slots: Mem::host(&slots),
        sequence: Some(Mem::host(&sequence)),
    };
    run::append(context, args).unwrap();
}

proptest! {
    #![proptest_config(config(48))]

    #[test]
    fn appended_tokens_come_back(batch in batch(), k in kind(), v in kind(), calls in 1..5usize) {
        let mut rng = Rng::new(batch.seed);
        let table = Table::shuffled(&mut rng, batch.page_tokens, &batch.lens, 2);
        let (mut slots, mut sequence) = (Vec::new(), Vec::new());
        for (b, &len) in batch.lens.iter().enumerate() {
            slots.extend((0..len).map(|t| table.slot(b, t)));
            sequence.extend(std::iter::repeat_n(b as i32, len));
        }
        let mut k = Side::new(&mut rng, &batch, k, &table, &sequence);
        let mut v = Side::new(&mut rng, &batch, v, &table, &sequence);
        let (expected_k, expected_v) = (k.expected_pool(&slots), v.expected_pool(&slots));
        for context in contexts(&[1, 3]) {
            k.pool.bytes.fill(0xFF);
            v.pool.bytes.fill(0xFF);
            // Any order, cut into any number of calls.
            let mut order: Vec<usize> = (0..slots.len()).collect();
            rng.shuffle(&mut order);
            for part in order.chunks(order.len().div_ceil(calls).max(1)) {
                append(&context, [&mut k, &mut v], part, &slots, &sequence);
            }
            prop_assert!(k.pool.bytes[..] == expected_k.bytes[..], "K pages at {}", context);
            prop_assert!(v.pool.bytes[..] == expected_v.bytes[..], "V pages at {}", context);
            k.check_round_trip(&context, &table, batch.layout);
            v.check_round_trip(&context, &table, batch.layout);
        }
    }

    #[test]
    fn sparsity_zero_is_lossless(
        seed in any::<u64>(), dtype in select(&DTYPES[..]), dim in select(&DIMS[..]), len in 1..200usize,
    ) {
        let mut rng = Rng::new(seed);
        let keep = mustafar::keep_for_sparsity(dim, 0.0).unwrap();
        let format = PageFormat::uniform(values_of(dtype), dim, 64, keep).unwrap();
        let table = Table::shuffled(&mut rng, 64, &[len], 1);
        let x = Dense::random(&mut rng, Dist::AnyBits, dtype, Layout::TokensFirst.shape(1, len, 2, dim));
        let mut pool = Pool::contiguous(format, table.num_pages, 2);
        let slots: Vec<i64> = (0..len).map(|t| table.slot(0, t)).collect();
        let side = AppendSide { x: x.view(), pool: pool.view_mut(), weights: None, center: None };
        let args = Append { k: None, v: Some(side), slots: Mem::host(&slots), sequence: None };
        let context = Context::cpu(1).unwrap();
        run::append(&context, args).unwrap();
        let mut out = Dense::poisoned(dtype, Layout::HeadsFirst.shape(1, table.max_len, 2, dim));
        let args = Decompress { pool: pool.view(), sequences: table.view(), center: None, out: out.view_mut() };
        run::decompress(&context, args).unwrap();
        for (t, h) in (0..len).flat_map(|t| [(t, 0), (t, 1)]) {
            prop_assert_eq!(out.row_bits(0, t, h), x.row_bits(0, t, h));
        }
    }

    #[test]
    fn any_mask_survives_compressing(
        seed in any::<u64>(), values in select(&VALUE_TYPES[..]), dim in select(&DIMS[..]),
        page_tokens in select(&PAGE_SIZES[..]), tokens in 1..200usize, heads in 1..4usize,
        density in 0.0..1.0f64, gaps in any::<bool>(), from_zeros in any::<bool>(), short in 0..3usize,
    ) {
        let mut rng = Rng::new(seed);
        let dist = if from_zeros { Dist::Zeros } else { Dist::AnyBits };
        let dtype = source_dtype(&mut rng, values);
        let x = Dense::random(&mut rng, dist, dtype, Layout::Gaps.shape(1, tokens, heads, dim));
        let mut mask = |t: usize, h: usize| -> Vec<bool> {
            if from_zeros { // what `compress` finds itself without a mask
                return x.row_bits(0, t, h).iter().map(|x| x & 0x7FFF != 0).collect();
            }
            let density = *rng.pick(&[0.0, density, density, 1.0]);
            (0..dim).map(|_| rng.chance(density)).collect()
        };
        let rows: Vec<Vec<Row>> = (0..tokens)
            .map(|t| (0..heads).map(|h| Row::new(mask(t, h), &x.row_bits(0, t, h)).stored(dtype, values)).collect())
            .collect();
        let bits: Vec<u8> = rows.iter().flatten().flat_map(|row| bitmap(&row.mask)).collect();

        // Room for the fullest page, or a little less.
        let table = Table::shuffled(&mut rng, page_tokens, &[tokens], 1);
        let needed: Vec<u32> = rows
            .chunks(page_tokens)
            .flat_map(|page| (0..heads).map(move |h| page.iter().map(|t| t[h].kept() as u32).sum()))
            .collect();
        let fullest = *needed.iter().max().unwrap() as usize;
        let capacity = fullest.saturating_sub(short);
        let format = PageFormat::ragged(values, dim, page_tokens, capacity).unwrap();
        let pages = &table.entries[..tokens.div_ceil(page_tokens)];
        for context in contexts(&[1, 3]) {
            let mut pool = pool(gaps, format, table.num_pages, heads);
            let untouched = pool.bytes.clone();
            let mut counted = vec![u32::MAX; needed.len()];
            let args = Compress {
                x: x.view(),
                mask: (!from_zeros).then(|| Mem::host(&bits)),
                pool: pool.view_mut(),
                pages: Mem::host(pages),
                needed: Some(MemMut::host(&mut counted)),
            };
            let result = run::compress(&context, args);
            prop_assert_eq!(&counted, &needed);
            if capacity < fullest {
                if is_cuda(&context) {
                    // Only counted there, and pages that fit are written.
                    prop_assert!(result.is_err());
                    continue;
                }
                let first = needed.iter().position(|&n| n as usize > capacity).unwrap();
                prop_assert_eq!(result, Err(Error::PageOverflow {
                    page: first / heads, head: first % heads, needed: needed[first] as usize, capacity,
                }));
                prop_assert!(pool.bytes[..] == untouched[..], "pages were written");
                continue;
            }
            result.unwrap();
            for (i, of_page) in rows.chunks(page_tokens).enumerate() {
                for h in 0..heads {
                    let of_head: Vec<Row> = of_page.iter().map(|t| t[h].clone()).collect();
                    let expected = reference::page(&format, &of_head, 0).unwrap();
                    prop_assert!(pool.page(pages[i] as usize, h) == expected, "page {i} of head {h}");
                }
            }
            pool.assert_gaps_untouched();
            run::validate(&context, Validate { pool: pool.view(), sequences: table.view(), record: None }).unwrap();
            let mut out = Dense::poisoned(dtype, Layout::Gaps.shape(1, table.max_len, heads, dim));
            let args = Decompress { pool: pool.view(), sequences: table.view(), center: None, out: out.view_mut() };
            run::decompress(&context, args).unwrap();
            for (t, row) in rows.iter().enumerate() {
                for (h, row) in row.iter().enumerate() {
                    prop_assert_eq!(out.row_bits(0, t, h), bits16(row, values, dtype));
                }
            }
        }
    }

    #[test]
    fn pages_can_be_moved(seed in any::<u64>(), kind in kind(), page_tokens in select(&PAGE_SIZES[..])) {
        // Pages are position-independent: copied to other pages of a pool with other strides they read the same.
        let mut rng = Rng::new(seed);
        let format = PageFormat::uniform(kind.values, kind.dim, page_tokens, kind.keep).unwrap();
        let len = page_tokens + 3;
        let table = Table::shuffled(&mut rng, page_tokens, &[len], 0);
        let from = common::Paged::random(&mut rng, Dist::AnyBits, Pool::contiguous(format, 2, 2), &table).pool;
        let mut to = Pool::gaps(format, 5, 2);
        let mut moved = table.clone();
        (moved.entries[0], moved.entries[1], moved.num_pages) = (4, 1, 5);
        for (i, h) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let page = from.page(table.entries[i] as usize, h).to_vec();
            to.page_mut(moved.entries[i] as usize, h).copy_from_slice(&page);
        }
        let context = Context::cpu(1).unwrap();
        let dense = |pool: &Pool, table: &Table| {
            let mut out = Dense::poisoned(DType::F32, Layout::TokensFirst.shape(1, table.max_len, 2, kind.dim));
            let args = Decompress { pool: pool.view(), sequences: table.view(), center: None, out: out.view_mut() };
            run::decompress(&context, args).unwrap();
            out.bytes.to_vec()
        };
        prop_assert_eq!(dense(&from, &table), dense(&to, &moved));
    }

    #[test]
    fn pruned_tensors_equal_the_reference(
        seed in any::<u64>(), dtype in select(&DTYPES[..]), dim in select(&DIMS[..]), batch in 1..3usize,
        groups in 1..3usize, heads in 1..4usize, dist in select(&Dist::ALL[..]), layout in select(&Layout::ALL[..]),
        rule in 0..3usize, share in 0.0..1.0f64, weighted in any::<bool>(),
    ) {
        let mut rng = Rng::new(seed);
        let tokens = 32 * groups;
        let pick = |n: usize| 1 + (share * n as f64) as usize;
        let selection = match rule {
            0 => Selection::Token { keep: pick(dim) },
            1 => Selection::TokenReferenceTies { dropped: pick(dim) },
            _ => Selection::Channel { keep: pick(32) },
        };
        let weights = (rule == 0 && weighted)
            .then(|| rng.floats(heads * dim).iter().map(|w| w.abs()).collect::<Vec<f32>>());
        let x = Dense::random(&mut rng, dist, dtype, layout.shape(batch, tokens, heads, dim));
        // rows[batch][head][token]
        let of_head = |b: usize, h: usize| -> Vec<Row> {
            let bits: Vec<Vec<u16>> = (0..tokens).map(|t| x.row_bits(b, t, h)).collect();
            let weights = weights.as_ref().map(|w| &w[h * dim..(h + 1) * dim]);
            match selection {
                Selection::Token { keep } => {
                    bits.iter().map(|row| reference::prune_token(dtype, row, keep, weights)).collect()
                }
                Selection::TokenReferenceTies { dropped } => {
                    bits.iter().map(|row| reference::prune_reference_ties(row, dropped)).collect()
                }
                _ => bits.chunks(32).flat_map(|group| reference::prune_channel(dtype, group, pick(32), None)).collect(),
            }
        };
        let rows: Vec<Vec<Vec<Row>>> =
            (0..batch).map(|b| (0..heads).map(|h| of_head(b, h)).collect()).collect();
        let masks: Vec<u8> = x.indices().iter().flat_map(|&(b, t, h)| bitmap(&rows[b][h][t].mask)).collect();
        for context in contexts(&[1, 3]) {
            let mut pruned = x.clone();
            let mut mask = Bytes::poisoned(masks.len());
            let args = Prune {
                x: pruned.view_mut(),
                selection,
                weights: weights.as_ref().map(|w| Mem::host(w)),
                token_weights: None,
                mask: Some(MemMut::host(&mut mask[..])),
            };
            run::prune(&context, args).unwrap();
            pruned.assert_gaps_untouched();
            for (b, t, h) in x.indices() {
                prop_assert_eq!(&pruned.row_bits(b, t, h), &rows[b][h][t].bits, "{} {} {}", b, t, h);
            }
            prop_assert!(mask[..] == masks[..], "mask at {}", context);
        }
    }
}

/// What decompressing a row to 16 bits gives.
fn bits16(row: &Row, values: ValueType, dtype: DType) -> Vec<u16> {
    let round = |x: f64| reference::round(dtype, if x.is_nan() { f32::NAN } else { x as f32 });
    match values.dtype() {
        Some(_) => row.bits.clone(),
        None => row.dense(values, None).into_iter().map(round).collect(),
    }
}

/// A mask as bitmap bytes.
fn bitmap(mask: &[bool]) -> Vec<u8> {
    mask.chunks(8).map(|byte| byte.iter().enumerate().map(|(i, &kept)| u8::from(kept) << i).sum()).collect()
}

/// K and V pages side by side in engine slots read as two pools over one allocation.
#[test]
fn interleaved_slots_read_like_separate_pools() {
    let mut rng = Rng::new(21);
    let format_k = PageFormat::uniform(ValueType::F16, 128, 16, 39).unwrap();
    let format_v = PageFormat::uniform(ValueType::Int8, 64, 16, 20).unwrap();
    let table = Table::shuffled(&mut rng, 16, &[40, 7], 1);
    let (heads, pages) = (2, table.num_pages);
    let k = common::Paged::random(&mut rng, Dist::Normal, Pool::contiguous(format_k, pages, heads), &table);
    let v = common::Paged::random(&mut rng, Dist::Normal, Pool::contiguous(format_v, pages, heads), &table);
    let head_stride = format_k.page_bytes() + format_v.page_bytes();
    let mut slots = Bytes::poisoned(pages * heads * head_stride);
    for (page, h) in (0..pages).flat_map(|page| [(page, 0), (page, 1)]) {
        let at = (page * heads + h) * head_stride;
        slots[at..][..format_k.page_bytes()].copy_from_slice(k.pool.page(page, h));
        slots[at + format_k.page_bytes()..][..format_v.page_bytes()].copy_from_slice(v.pool.page(page, h));
    }
    let context = Context::cpu(1).unwrap();
    for (offset, side) in [(0, &k), (format_k.page_bytes(), &v)] {
        let format = side.pool.layout.format;
        let layout = PoolLayout {
            format,
            num_pages: pages,
            kv_heads: heads,
            page_stride: heads * head_stride,
            head_stride,
        };
        let mem = Mem::host(&slots[..]).skip("slots", offset).unwrap();
        let pool = mustafar::PagePool::new("slots", mem, layout).unwrap();
        let shape = Layout::TokensFirst.shape(2, table.max_len, heads, format.head_dim());
        let mut out = Dense::poisoned(DType::F16, shape);
        let args = Decompress { pool, sequences: table.view(), center: None, out: out.view_mut() };
        run::decompress(&context, args).unwrap();
        for (b, heads) in side.rows.iter().enumerate() {
            for (h, tokens) in heads.iter().enumerate() {
                for (t, row) in tokens.iter().enumerate() {
                    assert_eq!(out.row_bits(b, t, h), bits16(row, format.value_type(), DType::F16));
                }
            }
        }
    }
}
