//! The shared helpers must notice what they are there to notice.
#![allow(unsafe_code, clippy::panic, clippy::unwrap_used)]

mod common;

use common::{Bytes, Dense, Dist, Layout, Paged, Pool, Rng, Table, Tolerance, assert_close};
use mustafar::{DType, PageFormat, ValueType, reference};

fn close(got: &[f64], want: &[f64]) {
    assert_close("test", got, want, Tolerance::new(DType::F32, 1.0));
}

#[test]
fn comparator_accepts_equal_and_nearly_equal() {
    let want = [1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -3.5];
    close(&want, &want);
    close(&[1.0 + 1e-6, 2.0], &[1.0, 2.0]);
}

#[test]
#[should_panic(expected = "element 1 is 0, expected NaN")]
fn comparator_rejects_a_lost_nan() {
    close(&[1.0, 0.0], &[1.0, f64::NAN]);
}

#[test]
#[should_panic(expected = "element 0 is -inf, expected inf")]
fn comparator_rejects_the_other_infinity() {
    close(&[f64::NEG_INFINITY], &[f64::INFINITY]);
}

#[test]
#[should_panic(expected = "off by")]
fn comparator_rejects_a_wrong_element() {
    close(&[1.0, 2.001], &[1.0, 2.0]);
}

#[test]
#[should_panic(expected = "cosine distance")]
fn comparator_rejects_a_wrong_direction() {
    let tolerance = Tolerance { abs: 0.0, rel: 1.0, smallest: 0.0, cosine: 1e-6 };
    assert_close("test", &[1.0, 0.0], &[1.0, 1.0], tolerance);
}

#[test]
#[should_panic(expected = "bytes outside the buffer")]
fn canaries_notice_a_write_before_the_buffer() {
    let mut bytes = Bytes::poisoned(100);
    bytes.corrupt_canary();
}

#[test]
fn buffers_are_aligned_and_poisoned() {
    for len in [0, 1, 100, 4096, 4112] {
        let bytes = Bytes::poisoned(len);
        assert_eq!(bytes.as_ptr() as usize % 16, 0);
        assert!(bytes.len() == len && bytes.iter().all(|&b| b == 0xFF));
    }
    let nan = reference::value(DType::F16, 0xFFFF);
    assert!(nan.is_nan() && reference::value(DType::Bf16, 0xFFFF).is_nan());
}

/// Runs itself again as a child that reads one byte past a buffer, and expects the child to die of it.
#[test]
fn reading_past_a_buffer_is_fatal() {
    const CHILD: &str = "MUSTAFAR_TEST_READ_PAST";
    let bytes = Bytes::poisoned(160);
    if std::env::var_os(CHILD).is_some() {
        // SAFETY: none. The page after the buffer is inaccessible, so this must kill the process.
        let byte = unsafe { bytes.as_ptr().add(bytes.len()).read_volatile() };
        panic!("read {byte} past the end");
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "reading_past_a_buffer_is_fatal"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&child.status);
    assert!(signal == Some(libc::SIGSEGV) || signal == Some(libc::SIGBUS), "{child:?}");
}

#[test]
fn tensors_keep_rows_apart_in_every_layout() {
    for layout in Layout::ALL {
        let mut rng = Rng::new(1);
        let shape = layout.shape(2, 5, 3, 64);
        assert!(shape.rows_are_disjoint());
        let mut dense = Dense::random(&mut rng, Dist::Normal, DType::Bf16, shape);
        let before = dense.row_bits(1, 4, 2);
        dense.set_row(0, 0, 0, &[0.5; 64]);
        assert_eq!((dense.row(0, 0, 0), dense.row_bits(1, 4, 2)), (vec![0.5; 64], before));
        dense.assert_gaps_untouched();
    }
}

#[test]
#[should_panic(expected = "between the rows")]
fn gaps_notice_a_write() {
    let mut dense = Dense::poisoned(DType::F32, Layout::Gaps.shape(1, 2, 1, 64));
    let gap = 64 * 4;
    dense.bytes[gap] = 0;
    dense.assert_gaps_untouched();
}

#[test]
fn distributions_contain_what_they_promise() {
    let mut rng = Rng::new(7);
    for dtype in common::DTYPES {
        let count = |rng: &mut Rng, dist: Dist, f: &dyn Fn(f64) -> bool| {
            let row = rng.row(dist, dtype, 4096);
            row.iter().filter(|&&x| f(reference::value(dtype, x))).count()
        };
        assert!(count(&mut rng, Dist::Zeros, &|x| x == 0.0) > 2800);
        assert!(count(&mut rng, Dist::Outliers, &|x| x > 20.0) == 256);
        assert!(count(&mut rng, Dist::AnyBits, &f64::is_nan) > 10);
        let smallest_normal = if dtype == DType::F16 { 2f64.powi(-14) } else { 2f64.powi(-126) };
        assert!(count(&mut rng, Dist::Subnormal, &|x| x != 0.0 && x.abs() < smallest_normal) > 3500);
        for dist in Dist::FINITE {
            assert_eq!(count(&mut rng, dist, &|x| !x.is_finite()), 0, "{dist:?}");
        }
    }
}

#[test]
fn paged_rows_read_back_from_shuffled_pages() {
    let mut rng = Rng::new(3);
    let table = Table::shuffled(&mut rng, 16, &[0, 33, 16, 5], 3);
    assert_eq!((table.num_pages, table.batch()), (3 + 1 + 1 + 3, 4));
    for format in [
        PageFormat::uniform(ValueType::F16, 64, 16, 21).unwrap(),
        PageFormat::ragged(ValueType::Bf16, 128, 16, 500).unwrap(),
    ] {
        let paged = Paged::random(&mut rng, Dist::AnyBits, Pool::gaps(format, table.num_pages, 2), &table);
        paged.pool.assert_gaps_untouched();
        let page = paged.pool.page(table.page(1, 32), 1);
        format.validate(page, 1).unwrap();
        assert!(format.validate(page, 2).is_err(), "row 1 of the last page is poison");
        assert_eq!(reference::read_page(&format, page, 1)[0], paged.rows[1][1][32]);
    }
}

#[test]
fn head_lengths_stay_within_the_sequence() {
    let mut rng = Rng::new(5);
    let table = Table::shuffled(&mut rng, 32, &[70, 1, 0], 0).with_head_lengths(&mut rng, 4);
    assert_eq!((table.batch(), table.lens.len()), (3, 12));
    assert_eq!((0..4).map(|h| table.len(0, h)).max(), Some(70));
    assert_eq!((0..4).map(|h| table.len(2, h)).max(), Some(0));
}
