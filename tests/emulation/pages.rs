//! The kernels that read pages back: `decompress` and `validate`.

use crate::common::{DIMS, Dense, Dist, Layout, PAGE_SIZES, Paged, Pool, Rng, Table, VALUE_TYPES, mem};
use crate::emulator::{Buffer, Launch, dtype_code, le, run};
use mustafar::ops::{Center, Decompress, decompress};
use mustafar::{Context, DType, PageFormat, Rows, Stream, ValueType};

/// Adds `StorePool` and `SequencesParams`, which the structs of all kernels that read pages start with: buffers 0 to 2
/// are the pages, the table and the lengths. A table that numbers all pages in order is not passed.
pub(crate) fn page_params(launch: &mut Launch, pool: &Pool, table: &Table) {
    let layout = pool.layout;
    let in_order = table.entries.iter().enumerate().all(|(i, &page)| page == i as i32);
    let pages = launch.buffer(&pool.bytes);
    let entries = launch.buffer(&le(&table.entries, i32::to_le_bytes));
    let lens = launch.buffer(&le(&table.lens, i32::to_le_bytes));
    launch.pointer(Some(pages)).long(layout.page_stride).long(layout.head_stride);
    launch.int(layout.format.keep().unwrap_or(0)).int(layout.format.values_offset());
    launch.int(layout.format.value_type() as usize).int(0);
    launch.pointer((!in_order).then_some(entries)).pointer(Some(lens)).long(table.stride);
    launch.int(usize::from(table.per_head.is_some())).int(table.page_tokens);
}

/// The type in the name of a kernel that reads these pages.
pub(crate) fn kernel_dtype(format: PageFormat) -> DType {
    format.value_type().dtype().unwrap_or(DType::F16)
}

struct Case {
    launch: Launch,
    out: (Buffer, Dense),
    errors: (Buffer, u32),
}

/// `center`: values and for how many sequences.
fn case(pool: &Pool, table: &Table, out: Dense, center: Option<&(Vec<f32>, usize)>) -> Case {
    let format = pool.layout.format;
    let (batch, heads) = (table.batch(), pool.layout.kv_heads);
    let units = batch * table.max_len.div_ceil(16) * heads;
    let name = format!("mst_decompress_{}_d{}", kernel_dtype(format), format.head_dim());
    let mut launch = Launch::new(name, [units.div_ceil(4), 1, 1], 128);
    page_params(&mut launch, pool, table);
    let center_buffer = center.map(|(c, _)| launch.buffer(&le(c, f32::to_le_bytes)));
    let out_buffer = launch.buffer(&out.bytes);
    let errors = launch.buffer(&[0; 4]);
    launch.pointer(center_buffer).pointer(Some(out_buffer)).pointer(Some(errors));
    launch.long(out.shape.batch_stride).long(out.shape.token_stride).long(out.shape.head_stride);
    launch.int(center.map_or(1, |(_, n)| *n)).int(dtype_code(out.dtype)).int(batch).int(heads);
    launch.int(table.max_len).int(pool.layout.num_pages).int(format.capacity()).int(0);

    let mut expected = out;
    let args = Decompress {
        pool: pool.view(),
        sequences: table.view(),
        center: center
            .map(|(c, batch)| Center { values: mem(Some(c)).expect("a view of some slice"), batch: *batch }),
        out: expected.view_mut(),
    };
    decompress(&Context::cpu(1).unwrap(), Stream::NONE, args).unwrap();
    Case { launch, out: (out_buffer, expected), errors: (errors, 0) }
}

/// Equal but for the bits of a NaN that was widened to float32, which processors choose differently.
fn same(dtype: DType, got: &[u8], expected: &[u8]) -> bool {
    let nan = |x: &[u8]| f32::from_le_bytes([x[0], x[1], x[2], x[3]]).is_nan();
    let both_nan = |(g, e): (&[u8], &[u8])| g == e || (nan(g) && nan(e) && e != [0xFF; 4]);
    match dtype {
        DType::F32 => got.chunks(4).zip(expected.chunks(4)).all(both_nan),
        _ => got == expected,
    }
}

fn check(cases: &[Case]) {
    let launches: Vec<Launch> = cases.iter().map(|case| case.launch.clone()).collect();
    let results = run(&launches);
    for (i, case) in cases.iter().enumerate() {
        let what = format!("case {i}, {}", case.launch.kernel);
        let (buffer, expected) = &case.out;
        assert!(same(expected.dtype, results.get(i, *buffer), &expected.bytes), "{what}: elements");
        assert_eq!(results.get(i, case.errors.0), case.errors.1.to_le_bytes(), "{what}: errors counted");
    }
}

fn format(values: ValueType, dim: usize, page_tokens: usize, keep: Option<usize>) -> PageFormat {
    match keep {
        Some(keep) => PageFormat::uniform(values, dim, page_tokens, keep).unwrap(),
        None => PageFormat::ragged(values, dim, page_tokens, page_tokens * dim / 2).unwrap(),
    }
}

#[test]
fn decompress_every_format() {
    let mut rng = Rng::new(31);
    let mut cases = Vec::new();
    for values in VALUE_TYPES {
        for (i, dim) in DIMS.into_iter().enumerate() {
            let keeps = [Some(1), Some(dim / 3), Some(dim), None, None];
            for (j, keep) in keeps.into_iter().enumerate() {
                let page_tokens = PAGE_SIZES[(i + j) % 4];
                let format = format(values, dim, page_tokens, keep);
                let mut table = Table::shuffled(&mut rng, page_tokens, &[page_tokens + 3, 0, 15], 1);
                if j % 2 == 1 {
                    table = table.with_head_lengths(&mut rng, 2);
                }
                let pool = Pool::gaps(format, table.num_pages, 2);
                let pool = Paged::random(&mut rng, Dist::ALL[j], pool, &table).pool;
                let out_dtype =
                    [kernel_dtype(format), DType::F16, DType::Bf16, DType::F32, kernel_dtype(format)][j];
                let shape = Layout::ALL[(i + j) % 3].shape(3, table.max_len, 2, dim);
                let center_batch = if j == 1 { 3 } else { 1 };
                let center = (rng.floats(center_batch * 2 * dim), center_batch);
                let center = (j == 1 || j == 4).then_some(&center);
                cases.push(case(&pool, &table, Dense::poisoned(out_dtype, shape), center));
            }
        }
    }
    check(&cases);
}

#[test]
fn decompress_survives_damage() {
    survives_damage(ValueType::F16);
    survives_damage(ValueType::Int8);
}

fn survives_damage(values: ValueType) {
    let mut rng = Rng::new(32);
    let format = format(values, 64, 16, None);
    let table = Table::shuffled(&mut rng, 16, &[32, 20], 1);
    let pool = Pool::contiguous(format, table.num_pages, 2);
    let good = Paged::random(&mut rng, Dist::Normal, pool, &table).pool;
    let shape = Layout::TokensFirst.shape(2, table.max_len, 2, 64);
    let base = case(&good, &table, Dense::poisoned(DType::F16, shape), None);
    let mut cases = Vec::new();

    // Offsets and bitmaps of one page say anything; the elements that come out do not matter.
    let mut pool = good.clone();
    let end = format.values_offset();
    pool.page_mut(table.page(0, 16), 1)[..end].iter_mut().for_each(|b| *b = rng.next() as u8);
    cases.push(base.launch.with_buffer(0, &pool.bytes));

    // Page numbers, then lengths, out of range.
    let entries: Vec<i32> = table.entries.iter().map(|_| table.num_pages as i32).collect();
    cases.push(base.launch.with_buffer(1, &le(&entries, i32::to_le_bytes)));
    cases.push(base.launch.with_buffer(2, &le(&[i32::MIN, 1000], i32::to_le_bytes)));

    let results = run(&cases);
    let count = |i: usize| u32::from_le_bytes(results.get(i, base.errors.0).try_into().unwrap());
    assert!(count(0) >= 1);
    // Two pages of each sequence, two heads.
    assert_eq!(count(1), 8);
    // Both lengths, for each of the two heads.
    assert_eq!(count(2), 4);
    for i in [1, 2] {
        let untouched = results.get(i, base.out.0).iter().all(|&b| b == 0xFF);
        assert!(untouched, "tokens without a page or a length were written");
    }
}

/// The record that `validate` must leave, from the CPU's own check of each row.
fn first_violation(pool: &Pool, table: &Table) -> u64 {
    let format = pool.layout.format;
    let heads = pool.layout.kv_heads;
    let max_pages = table.max_len.div_ceil(table.page_tokens);
    for b in 0..table.batch() {
        for h in 0..heads {
            for t in 0..table.len(b, h) {
                let (i, row) = (t / table.page_tokens, t % table.page_tokens);
                let place = (((b * heads + h) * max_pages + i) * table.page_tokens + row) as u64;
                let Err(error) = format.validate(pool.page(table.page(b, t), h), row + 1) else { continue };
                let text = error.to_string();
                let kind = match format.rows() {
                    Rows::Ragged { .. } if text.contains("must be 0") => 4,
                    Rows::Ragged { .. } if text.contains("capacity") => 5,
                    _ => 3,
                };
                return place * 8 + kind;
            }
        }
    }
    u64::MAX
}

#[test]
fn validate_finds_the_first_violation() {
    let mut rng = Rng::new(33);
    let mut launches = Vec::new();
    let mut expected = Vec::new();
    let mut push = |pool: &Pool, table: &Table, record: Option<u64>| {
        let format = pool.layout.format;
        let (batch, heads) = (table.batch(), pool.layout.kv_heads);
        let rows = batch * heads * table.max_len.div_ceil(table.page_tokens) * table.page_tokens;
        let name = format!("mst_validate_{}_d{}", kernel_dtype(format), format.head_dim());
        let mut launch = Launch::new(name, [rows.div_ceil(256), 1, 1], 256);
        page_params(&mut launch, pool, table);
        let first = launch.buffer(&u64::MAX.to_le_bytes());
        launch.pointer(Some(first)).int(batch).int(heads);
        launch.int(table.max_len).int(pool.layout.num_pages).int(format.capacity()).int(0);
        launches.push(launch);
        expected.push((first, record.unwrap_or_else(|| first_violation(pool, table))));
    };
    for (i, dim) in DIMS.into_iter().enumerate() {
        for keep in [Some(dim / 4), None] {
            let page_tokens = PAGE_SIZES[i];
            let format = format(VALUE_TYPES[i], dim, page_tokens, keep);
            let table = Table::shuffled(&mut rng, page_tokens, &[page_tokens + 9, 5], 1);
            let pool = Pool::gaps(format, table.num_pages, 2);
            let good = Paged::random(&mut rng, Dist::AnyBits, pool, &table).pool;
            push(&good, &table, None);
            // One byte of a used bitmap row, twice; then of the row offsets.
            let mut bad = good.clone();
            bad.page_mut(table.page(1, 0), 1)[3] ^= 0x10;
            push(&bad, &table, None);
            bad.page_mut(table.page(0, page_tokens), 0)[8 * dim / 8] ^= 0x01;
            push(&bad, &table, None);
            if let Some(offsets) = format.offsets_offset() {
                for (at, value) in [(0, 1), (1, 0xFF), (7, 0xFF)] {
                    let mut bad = good.clone();
                    bad.page_mut(table.page(0, 0), 1)[offsets + at] = value;
                    push(&bad, &table, None);
                }
                // A page whose rows hold more than another capacity allows.
                let short = PageFormat::ragged(format.value_type(), dim, page_tokens, 1).unwrap();
                let mut layout = good.layout;
                layout.format = short;
                push(&Pool { bytes: good.bytes.clone(), layout }, &table, None);
            }
            let mut no_page = table.clone();
            no_page.entries[1] = table.num_pages as i32;
            push(&good, &no_page, Some((page_tokens * 8 + 2) as u64));
            let mut too_long = table.clone();
            too_long.lens[1] = table.max_len as i32 + 1;
            let max_pages = table.max_len.div_ceil(page_tokens);
            push(&good, &too_long, Some((2 * max_pages * page_tokens * 8 + 1) as u64));
        }
    }
    let results = run(&launches);
    for (i, (buffer, record)) in expected.into_iter().enumerate() {
        let got = u64::from_le_bytes(results.get(i, buffer).try_into().unwrap());
        assert_eq!(got, record, "case {i}, {}", launches[i].kernel);
    }
}
