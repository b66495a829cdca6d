//! `append` and its kernel leave the same bytes in the pools.

use crate::common::{
    DIMS, DTYPES, Dense, Dist, Layout, PAGE_SIZES, Pool, Rng, VALUE_TYPES, keeps, source_dtype, values_of,
};
use crate::emulator::{Buffer, Launch, le, run};
use mustafar::ops::{Append, AppendSide, Center, append};
use mustafar::{Context, DType, Mem, PageFormat, Stream, ValueType};

struct Side {
    x: Dense,
    pool: Pool,
    weights: Option<Vec<f32>>,
    /// Values, and for how many sequences.
    center: Option<(Vec<f32>, usize)>,
}

impl Side {
    fn random(rng: &mut Rng, dist: Dist, layout: Layout, tokens: usize, pool: Pool) -> Self {
        let (heads, dim) = (pool.layout.kv_heads, pool.layout.format.head_dim());
        let dtype = source_dtype(rng, pool.layout.format.value_type());
        let x = Dense::random(rng, dist, dtype, layout.shape(1, tokens, heads, dim));
        Self { x, pool, weights: None, center: None }
    }

    fn args(&mut self) -> AppendSide<'_> {
        AppendSide {
            x: self.x.view(),
            pool: self.pool.view_mut(),
            weights: self.weights.as_ref().map(|w| Mem::host(w)),
            center: self.center.as_ref().map(|(c, batch)| Center { values: Mem::host(c), batch: *batch }),
        }
    }

    /// Adds an `AppendSide` to the parameters; returns the pool's buffer.
    fn params(&self, launch: &mut Launch) -> Buffer {
        let pool = self.pool.layout;
        let x = launch.buffer(&self.x.bytes);
        let weights = self.weights.as_ref().map(|w| launch.buffer(&le(w, f32::to_le_bytes)));
        let center = self.center.as_ref().map(|(c, _)| launch.buffer(&le(c, f32::to_le_bytes)));
        let pages = launch.buffer(&self.pool.bytes);
        launch.pointer(Some(x)).pointer(weights).pointer(center);
        launch.pointer(Some(pages)).long(pool.page_stride).long(pool.head_stride);
        launch.int(pool.format.keep().unwrap()).int(pool.format.values_offset());
        launch.int(pool.format.value_type() as usize).int(0);
        launch.long(self.x.shape.token_stride).long(self.x.shape.head_stride);
        launch.int(self.center.as_ref().map_or(1, |(_, batch)| *batch)).int(0);
        pages
    }
}

/// A call, and what the kernel must leave: launches are collected and run together.
struct Expected {
    launch: Launch,
    pools: Vec<(Buffer, Vec<u8>)>,
    errors: (Buffer, u32),
}

/// `wrong` tokens of the kernel's `slots` lie outside the pool; the CPU backend, which refuses those, skips them.
fn expect(mut sides: Vec<Side>, slots: &[i64], sequence: Option<&Vec<i32>>, wrong: u32) -> Expected {
    let format = sides[0].pool.layout.format;
    let heads = sides[0].pool.layout.kv_heads;
    let units = slots.len().div_ceil(16) * heads;
    let weighted = if sides.iter().any(|side| side.weights.is_some()) { "weighted_" } else { "" };
    let name = format!("mst_append_{weighted}{}_d{}", sides[0].x.dtype, format.head_dim());
    let mut launch = Launch::new(name, [units.div_ceil(4), sides.len(), 1], 128);
    let mut pages: Vec<Buffer> = sides.iter().map(|side| side.params(&mut launch)).collect();
    if sides.len() == 1 {
        // The second side's place; nothing reads it.
        let again = sides[0].params(&mut launch);
        pages.truncate(1);
        assert_ne!(again, pages[0]);
    }
    let slot_buffer = launch.buffer(&le(slots, i64::to_le_bytes));
    let sequence_buffer = sequence.map(|s| launch.buffer(&le(s, i32::to_le_bytes)));
    let errors = launch.buffer(&[0; 4]);
    let num_slots = sides[0].pool.layout.slots();
    launch.pointer(Some(slot_buffer)).pointer(sequence_buffer).pointer(Some(errors)).long(num_slots);
    launch.int(slots.len()).int(heads).int(format.page_tokens()).int(0);

    let valid: Vec<i64> = slots.iter().map(|&s| if s < num_slots as i64 { s } else { -1 }).collect();
    let valid: Vec<i64> = valid.into_iter().map(|s| s.max(-1)).collect();
    let context = Context::cpu(1).unwrap();
    let (k, v) = sides.split_at_mut(1);
    let args = Append {
        k: Some(k[0].args()),
        v: v.first_mut().map(Side::args),
        slots: Mem::host(&valid),
        sequence: crate::common::mem(sequence),
    };
    append(&context, Stream::NONE, args).unwrap();
    let pools = pages.into_iter().zip(&sides).map(|(buffer, side)| (buffer, side.pool.bytes.to_vec()));
    Expected { launch, pools: pools.collect(), errors: (errors, wrong) }
}

fn check(cases: &[Expected]) {
    let launches: Vec<Launch> = cases.iter().map(|case| case.launch.clone()).collect();
    let results = run(&launches);
    for (i, case) in cases.iter().enumerate() {
        for (buffer, expected) in &case.pools {
            let got = results.get(i, *buffer);
            let wrong = got.iter().zip(expected).position(|(g, e)| g != e);
            assert_eq!(wrong, None, "case {i}, {}: first wrong byte of the pool", case.launch.kernel);
        }
        let (buffer, expected) = case.errors;
        assert_eq!(results.get(i, buffer), expected.to_le_bytes(), "case {i}: tokens counted as wrong");
    }
}

/// Slots all over the pool in any order, some of them -1.
fn shuffled(rng: &mut Rng, pool: &Pool, tokens: usize) -> Vec<i64> {
    let mut slots: Vec<i64> = (0..pool.layout.slots() as i64).collect();
    rng.shuffle(&mut slots);
    slots.truncate(tokens);
    slots.into_iter().map(|s| if rng.chance(0.1) { -1 } else { s }).collect()
}

#[test]
fn every_format() {
    let mut rng = Rng::new(1);
    let mut cases = Vec::new();
    for values in VALUE_TYPES {
        for dim in DIMS {
            for (i, keep) in keeps(dim).into_iter().enumerate() {
                let format = PageFormat::uniform(values, dim, PAGE_SIZES[i % 4], keep).unwrap();
                let pool = Pool::gaps(format, 2, 2);
                // A full tile and the start of another one; a run that starts anywhere, or no run at all.
                let tokens = 19;
                let first = rng.below(pool.layout.slots() - tokens + 1) as i64;
                let slots = match i % 3 {
                    0 => shuffled(&mut rng, &pool, tokens),
                    1 => (0..tokens as i64).collect(),
                    _ => (first..first + tokens as i64).collect(),
                };
                let dist = Dist::ALL[(i + dim / 32) % Dist::ALL.len()];
                let layout = *rng.pick(&Layout::ALL);
                let side = Side::random(&mut rng, dist, layout, tokens, pool);
                cases.push(expect(vec![side], &slots, None, 0));
            }
        }
    }
    check(&cases);
}

#[test]
fn both_sides_with_weights_and_centres() {
    let (mut rng, mut rng_values) = (Rng::new(2), Rng::new(3));
    let mut cases = Vec::new();
    for dtype in DTYPES {
        for dim in DIMS {
            for center_batch in [1, 3] {
                let (heads, tokens) = (2, 17);
                let side = |rng: &mut Rng, values: ValueType, keep: usize| {
                    let format = PageFormat::uniform(values, dim, 16, keep).unwrap();
                    let (dist, pool) = (*rng.pick(&Dist::ALL), Pool::contiguous(format, 3, heads));
                    let shape = Layout::HeadsFirst.shape(1, tokens, heads, dim);
                    Side { x: Dense::random(rng, dist, dtype, shape), pool, weights: None, center: None }
                };
                let mut k = side(&mut rng, values_of(dtype), dim / 3);
                let mut v = side(&mut rng, *rng_values.pick(&VALUE_TYPES[2..]), dim / 2);
                let weight = |rng: &mut Rng| match rng.below(12) {
                    0 => 0.0,
                    1 => f32::INFINITY, // times 0 is NaN, which ranks first
                    2 => 1e-30,
                    _ => rng.normal().abs() as f32,
                };
                let w: Vec<f32> = (0..heads * dim).map(|_| weight(&mut rng)).collect();
                k.center = Some((rng.floats(center_batch * heads * dim), center_batch));
                if center_batch == 1 {
                    k.weights = Some(w);
                } else {
                    v.weights = Some(w);
                }
                let sequence: Vec<i32> = (0..tokens).map(|_| rng.below(center_batch) as i32).collect();
                let slots = shuffled(&mut rng, &k.pool, tokens);
                let sequence = (center_batch > 1).then_some(&sequence);
                cases.push(expect(vec![k, v], &slots, sequence, 0));
            }
        }
    }
    check(&cases);
}

#[test]
fn slots_out_of_range_are_skipped_and_counted() {
    let mut rng = Rng::new(3);
    let format = PageFormat::uniform(ValueType::F16, 64, 16, 20).unwrap();
    let side = Side::random(&mut rng, Dist::Normal, Layout::TokensFirst, 20, Pool::gaps(format, 2, 3));
    let mut slots: Vec<i64> = (0..20).collect();
    (slots[3], slots[7], slots[11], slots[18]) = (32, i64::MAX, i64::MIN, -1);
    check(&[expect(vec![side], &slots, None, 2)]);
}

/// Runs of codes are copied 16 bytes at a time where they are that long.
#[test]
fn short_runs_of_codes_start_anywhere_in_a_page() {
    let mut rng = Rng::new(4);
    let mut cases = Vec::new();
    for keep in [1, 2, 3, 5] {
        for first in [1, 7, 13, 15] {
            let format = PageFormat::uniform(ValueType::Int8, 64, 64, keep).unwrap();
            let pool = Pool::contiguous(format, 1, 1);
            let side = Side::random(&mut rng, Dist::Normal, Layout::TokensFirst, 16, pool);
            let slots: Vec<i64> = (first..first + 16).collect();
            cases.push(expect(vec![side], &slots, None, 0));
        }
    }
    check(&cases);
}

/// Kernels multiply with a reciprocal where the format divides. Here is every quotient of two mantissas at every distance
/// that matters, and numbers so small that reciprocals overflow.
#[test]
fn every_quotient_gets_the_code_of_the_division() {
    let dim = 128;
    let mut cases = Vec::new();
    for (dtype, fraction_bits, exponents) in [(DType::F16, 10, [30, 1]), (DType::Bf16, 7, [128, 5])] {
        let octave: usize = 1 << fraction_bits;
        // Elements further below the largest of their row than this have the code 0.
        for (values, octaves) in [(ValueType::E4m3, 21), (ValueType::Int8, 9)] {
            for exponent in exponents {
                let top = exponent * octave;
                let mut rows = Vec::new();
                // 256 of an octave have scales of all mantissas.
                for largest in (top..top + octave).step_by(octave.div_ceil(256)) {
                    let others: Vec<u16> = (largest.saturating_sub(octaves * octave)..largest)
                        .map(|x| (x | (x & 1 ^ largest >> 2 & 1) << 15) as u16)
                        .collect();
                    for part in others.chunks(dim - 1) {
                        let mut row = part.to_vec();
                        row.resize(dim, largest as u16);
                        rows.push(row);
                    }
                }
                let format = PageFormat::uniform(values, dim, 128, dim).unwrap();
                let mut x = Dense::poisoned(dtype, Layout::TokensFirst.shape(1, rows.len(), 1, dim));
                rows.iter().enumerate().for_each(|(token, row)| x.set_row_bits(0, token, 0, row));
                let pool = Pool::contiguous(format, rows.len().div_ceil(128), 1);
                let slots: Vec<i64> = (0..rows.len() as i64).collect();
                cases.push(expect(vec![Side { x, pool, weights: None, center: None }], &slots, None, 0));
            }
        }
    }
    check(&cases);
}
