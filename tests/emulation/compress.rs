//! `compress` as a kernel, against the reference pages.

use crate::common::{Bytes, DIMS, Dense, Dist, Layout, PAGE_SIZES, Pool, Rng, VALUE_TYPES, source_dtype};
use crate::emulator::{Buffer, Launch, le, run};
use mustafar::reference::{self, Row};
use mustafar::{DType, PageFormat, ValueType};

struct Case {
    launch: Launch,
    pool: (Buffer, Pool),
    needed: (Buffer, Vec<u32>),
    errors: (Buffer, u32),
}

/// Compresses `x` into `pages` of `pool`. With `masks`, rows keep what a random mask says; otherwise what is not 0.
fn case(rng: &mut Rng, x: &Dense, mut pool: Pool, pages: &[i32], masks: bool) -> Case {
    let format = pool.layout.format;
    let (dim, heads, tokens) = (format.head_dim(), pool.layout.kv_heads, x.shape.tokens);
    let name = format!("mst_compress_{}_d{dim}", x.dtype);
    let mut launch = Launch::new(name, [pages.len() * heads, 1, 1], 128);
    let x_buffer = launch.buffer(&x.bytes);
    let mask: Vec<u8> = (0..tokens * heads * dim / 8).map(|_| rng.next() as u8 & rng.next() as u8).collect();
    let mask_buffer = masks.then(|| launch.buffer(&mask));
    let numbers = launch.buffer(&le(pages, i32::to_le_bytes));
    let needed_buffer = launch.buffer(&vec![0xFF; 4 * pages.len() * heads]);
    let errors = launch.buffer(&[0; 4]);
    let pool_buffer = launch.buffer(&pool.bytes);
    launch.pointer(Some(x_buffer)).pointer(mask_buffer).pointer(Some(numbers));
    launch.pointer(Some(needed_buffer)).pointer(Some(errors));
    launch.pointer(Some(pool_buffer)).long(pool.layout.page_stride).long(pool.layout.head_stride);
    launch.int(0).int(format.values_offset()).int(format.value_type() as usize).int(0);
    launch.long(x.shape.token_stride).long(x.shape.head_stride);
    launch.int(tokens).int(heads).int(pages.len()).int(pool.layout.num_pages);
    launch.int(format.page_tokens()).int(format.capacity());

    let row = |t: usize, h: usize| {
        let bits = x.row_bits(0, t, h);
        let of_mask = &mask[(t * heads + h) * dim / 8..][..dim / 8];
        let kept = |c: usize| if masks { of_mask[c / 8] >> (c % 8) & 1 == 1 } else { bits[c] & 0x7FFF != 0 };
        Row::new((0..dim).map(kept).collect(), &bits).stored(x.dtype, format.value_type())
    };
    let mut needed = Vec::new();
    let mut wrong = 0;
    for (i, &page) in pages.iter().enumerate() {
        let of_page = i * format.page_tokens()..tokens.min((i + 1) * format.page_tokens());
        for h in 0..heads {
            let rows: Vec<Row> = of_page.clone().map(|t| row(t, h)).collect();
            let total: usize = rows.iter().map(Row::kept).sum();
            needed.push(total as u32);
            match reference::page(&format, &rows, 0) {
                Some(bytes) if (page as usize) < pool.layout.num_pages => {
                    pool.page_mut(page as usize, h).copy_from_slice(&bytes);
                }
                _ => wrong += 1,
            }
        }
    }
    Case { launch, pool: (pool_buffer, pool), needed: (needed_buffer, needed), errors: (errors, wrong) }
}

fn check(cases: &[Case]) {
    let launches: Vec<Launch> = cases.iter().map(|case| case.launch.clone()).collect();
    let results = run(&launches);
    for (i, case) in cases.iter().enumerate() {
        let what = format!("case {i}, {}", case.launch.kernel);
        let (buffer, pool) = &case.pool;
        let expected: &Bytes = &pool.bytes;
        let wrong = results.get(i, *buffer).iter().zip(expected.iter()).position(|(g, e)| g != e);
        assert_eq!(wrong, None, "{what}: first wrong byte of the pool");
        assert_eq!(results.get(i, case.needed.0), le(&case.needed.1, u32::to_le_bytes), "{what}: needed");
        assert_eq!(
            results.get(i, case.errors.0),
            case.errors.1.to_le_bytes(),
            "{what}: pages counted as wrong"
        );
    }
}

#[test]
fn every_pattern() {
    let mut rng = Rng::new(21);
    let mut cases = Vec::new();
    for values in VALUE_TYPES {
        for (i, dim) in DIMS.into_iter().enumerate() {
            for masks in [false, true] {
                let page_tokens = PAGE_SIZES[(i + usize::from(masks)) % 4];
                // Two pages, the second one not full.
                let tokens = page_tokens + page_tokens / 2 + 1;
                let format = PageFormat::ragged(values, dim, page_tokens, page_tokens * dim).unwrap();
                let dtype = source_dtype(&mut rng, values);
                let layout = Layout::ALL[(i + usize::from(masks)) % 3];
                let shape = layout.shape(1, tokens, 2, dim);
                let x = Dense::random(&mut rng, Dist::Zeros, dtype, shape);
                cases.push(case(&mut rng, &x, Pool::gaps(format, 3, 2), &[2, 0], masks));
            }
        }
    }
    check(&cases);
}

#[test]
fn full_pages_and_pages_out_of_range_stay_unwritten_and_are_counted() {
    let mut rng = Rng::new(22);
    let x = Dense::random(&mut rng, Dist::Zeros, DType::F16, Layout::TokensFirst.shape(1, 48, 2, 64));
    // About 256 of 1024 elements of a page are not 0: with this capacity some pages fit and some do not.
    let format = PageFormat::ragged(ValueType::F16, 64, 16, 256).unwrap();
    let one = case(&mut rng, &x, Pool::contiguous(format, 3, 2), &[1, 3, -1], false);
    assert!(one.errors.1 >= 4);
    let exact = *one.needed.1.iter().max().unwrap() as usize;
    let fits = PageFormat::ragged(ValueType::F16, 64, 16, exact).unwrap();
    let short = PageFormat::ragged(ValueType::F16, 64, 16, exact - 1).unwrap();
    let fits = case(&mut rng, &x, Pool::contiguous(fits, 3, 2), &[1, 2, 0], false);
    let short = case(&mut rng, &x, Pool::contiguous(short, 3, 2), &[1, 2, 0], false);
    assert_eq!(fits.errors.1, 0);
    assert!(short.errors.1 >= 1);
    check(&[one, fits, short]);
}
