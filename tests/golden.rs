//! The library and the reference against the golden vectors of `tests/vectors/`.
#![allow(clippy::panic, clippy::unwrap_used)]

mod common;

use common::{Dense, Layout, Pool, contexts, copy_row, distinct_slots, run};
use mustafar::ops::{Append, AppendSide, Center, Compress, Decompress, Prune, Selection, Validate};
use mustafar::reference::{self, Row};
use mustafar::{Context, DType, Error, Mem, MemMut, PageFormat, Sequences, ValueType};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;

// ---- reading the files --------------------------------------------------------------------------------------

/// Cargo runs tests in the root of the package.
fn directory() -> &'static Path {
    Path::new("tests/vectors")
}

/// The cases of a file; a file without cases fails.
fn cases(file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(directory().join(file)).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert!(!cases.is_empty(), "{file} is empty");
    cases
}

fn hex(text: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap();
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}

fn size(case: &Value, key: &str) -> usize {
    usize::try_from(case[key].as_u64().unwrap_or_else(|| panic!("{key} of {case}"))).unwrap()
}

fn name(case: &Value) -> &str {
    case["name"].as_str().unwrap()
}

fn dtype(case: &Value) -> DType {
    match case["dtype"].as_str().unwrap() {
        "f16" => DType::F16,
        "bf16" => DType::Bf16,
        other => panic!("dtype {other}"),
    }
}

fn format(case: &Value) -> PageFormat {
    let name = case["value_type"].as_str().unwrap();
    let values = ValueType::all().into_iter().find(|values| values.to_string() == name).unwrap();
    let (dim, tokens) = (size(case, "head_dim"), size(case, "page_tokens"));
    match case.get("keep") {
        Some(_) => PageFormat::uniform(values, dim, tokens, size(case, "keep")),
        None => PageFormat::ragged(values, dim, tokens, size(case, "capacity")),
    }
    .unwrap()
}

/// `[tokens, dim]` 16-bit patterns.
fn rows(case: &Value, key: &str) -> Vec<Vec<u16>> {
    let elements: Vec<u16> = hex(&case[key]).chunks(2).map(|x| u16::from_le_bytes([x[0], x[1]])).collect();
    elements.chunks(size(case, "head_dim")).map(<[u16]>::to_vec).collect()
}

fn floats(value: &Value) -> Option<Vec<f32>> {
    value.as_str()?;
    Some(hex(value).chunks(4).map(|x| f32::from_le_bytes(x.try_into().unwrap())).collect())
}

/// A mask as bools per row.
fn masks(case: &Value) -> Vec<Vec<bool>> {
    let dim = size(case, "head_dim");
    let bit = |row: &[u8], c: usize| row[c / 8] >> (c % 8) & 1 == 1;
    hex(&case["mask"]).chunks(dim / 8).map(|row| (0..dim).map(|c| bit(row, c)).collect()).collect()
}

fn selection(case: &Value) -> Selection {
    let (rule, n) = case["selection"].as_object().unwrap().iter().next().unwrap();
    let n = usize::try_from(n.as_u64().unwrap()).unwrap();
    match rule.as_str() {
        "token" => Selection::Token { keep: n },
        "token_reference_ties" => Selection::TokenReferenceTies { dropped: n },
        "channel" => Selection::Channel { keep: n },
        other => panic!("selection {other}"),
    }
}

// ---- helpers for the ops ------------------------------------------------------------------------------------

/// `[1, tokens, 1, dim]` with gaps between the rows.
fn tensor(dtype: DType, rows: &[Vec<u16>]) -> Dense {
    let mut dense = Dense::poisoned(dtype, Layout::Gaps.shape(1, rows.len(), 1, rows[0].len()));
    for (t, row) in rows.iter().enumerate() {
        dense.set_row_bits(0, t, 0, row);
    }
    dense
}

/// One sequence of `len` tokens in page 0.
fn one_page<'a>(len: &'a [i32; 1], format: PageFormat) -> Sequences<'a> {
    Sequences {
        batch: 1,
        table: None,
        table_stride: 0,
        lens: Mem::host(len),
        lens_per_head: false,
        max_len: format.page_tokens(),
    }
}

/// The first `count` tokens of a one-page pool, decompressed to the dtype that they came from.
fn decompress(context: &Context, pool: &Pool, dtype: DType, count: usize) -> Vec<Vec<u16>> {
    let format = pool.layout.format;
    let mut out = Dense::poisoned(dtype, Layout::Gaps.shape(1, format.page_tokens(), 1, format.head_dim()));
    let len = [count as i32];
    let args = Decompress {
        pool: pool.view(),
        sequences: one_page(&len, format),
        center: None,
        out: out.view_mut(),
    };
    run::decompress(context, args).unwrap();
    out.assert_gaps_untouched();
    assert!((count..format.page_tokens()).all(|t| out.is_poisoned(0, t, 0)), "wrote past the last token");
    (0..count).map(|t| out.row_bits(0, t, 0)).collect()
}

fn error_kind(error: &Error) -> String {
    let debug = format!("{error:?}");
    debug.split(|c: char| !c.is_alphanumeric()).next().unwrap().to_owned()
}

// ---- the files themselves -----------------------------------------------------------------------------------

#[test]
fn files_are_what_the_generator_writes() {
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("vectors");
    std::fs::create_dir_all(&target).unwrap();
    let status = Command::new("python3")
        .args([&directory().join("generate.py"), &target])
        .status()
        .expect("python3 is needed to check the golden vectors");
    assert!(status.success(), "generate.py failed: {status}");
    let mut compared = 0;
    for entry in std::fs::read_dir(&target).unwrap() {
        let path = entry.unwrap().path();
        let committed = directory().join(path.file_name().unwrap());
        let same = std::fs::read(&path).unwrap() == std::fs::read(&committed).unwrap();
        assert!(same, "{} differs from the generator's output", committed.display());
        compared += 1;
    }
    let committed = std::fs::read_dir(directory()).unwrap();
    let json = committed.filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|x| x == "json"));
    assert_eq!(compared, json.count(), "a committed file is not written by the generator");
}

#[test]
fn format_document_shows_the_golden_pages() {
    let text = std::fs::read_to_string("docs/format.md").unwrap();
    // Dump lines are "0080  11 22 33 ..": an offset of four digits, then bytes.
    let dumps: Vec<(usize, Vec<u8>)> = text
        .lines()
        .filter_map(|line| {
            let (offset, bytes) = line.split_at_checked(4)?;
            let offset = usize::from_str_radix(offset, 16).ok()?;
            let bytes = bytes.strip_prefix("  ")?.split("  ").next()?.split(' ');
            Some((offset, bytes.map(|b| u8::from_str_radix(b, 16).ok()).collect::<Option<_>>()?))
        })
        .collect();
    let starts: Vec<usize> = (0..dumps.len()).filter(|&i| dumps[i].0 == 0).chain([dumps.len()]).collect();
    let examples = [
        ("append.json", "worked example"),
        ("append.json", "worked example in 8 bits"),
        ("compress.json", "worked example"),
    ];
    assert_eq!(starts.len(), examples.len() + 1, "dumps in the document");
    for (range, (file, example)) in starts.windows(2).zip(examples) {
        let case = cases(file).into_iter().find(|case| name(case) == example).unwrap();
        let page = hex(&case["page"]);
        let mut shown = 0;
        for (offset, bytes) in &dumps[range[0]..range[1]] {
            assert_eq!(bytes, &page[*offset..*offset + bytes.len()], "{example} at {offset:#x}");
            shown += bytes.len();
        }
        assert_eq!(shown, page.len(), "{example}: the document shows the whole page");
    }
}

// ---- the reference ------------------------------------------------------------------------------------------

#[test]
fn reference_writes_the_golden_pages() {
    for case in cases("append.json") {
        let format = format(&case);
        let (weights, center) = (floats(&case["weights"]), floats(&case["center"]));
        let stored: Vec<Row> = rows(&case, "input")
            .iter()
            .map(|row| match &center {
                Some(c) => reference::center(dtype(&case), row, c),
                None => row.clone(),
            })
            .map(|row| {
                reference::prune_token(dtype(&case), &row, format.keep().unwrap(), weights.as_deref())
                    .stored(dtype(&case), format.value_type())
            })
            .collect();
        let mut page = vec![0xFF; format.page_bytes()];
        for (token, slot) in case["slots"].as_array().unwrap().iter().enumerate() {
            let Ok(slot) = usize::try_from(slot.as_i64().unwrap()) else { continue };
            // The reference writes whole pages: take the one row from a page that holds it alone.
            let alone = reference::page(&format, &stored[token..=token], 0).unwrap();
            copy_row(format, (&alone, 0), (&mut page, slot));
        }
        assert_eq!(page, hex(&case["page"]), "{}", name(&case));
    }
    for case in cases("compress.json") {
        let format = format(&case);
        let store =
            |(mask, x): (Vec<bool>, Vec<u16>)| Row::new(mask, &x).stored(dtype(&case), format.value_type());
        let stored: Vec<Row> = masks(&case).into_iter().zip(rows(&case, "input")).map(store).collect();
        let page = reference::page(&format, &stored, 0).unwrap();
        assert_eq!(page, hex(&case["page"]), "{}", name(&case));
        assert_eq!(reference::read_page(&format, &page, stored.len()), stored, "{}", name(&case));
    }
}

#[test]
fn reference_prunes_as_the_golden_masks() {
    for case in cases("prune.json") {
        let input = rows(&case, "input");
        let pruned: Vec<Row> = match selection(&case) {
            Selection::Token { keep } => {
                input.iter().map(|row| reference::prune_token(dtype(&case), row, keep, None)).collect()
            }
            Selection::TokenReferenceTies { dropped } => {
                input.iter().map(|row| reference::prune_reference_ties(row, dropped)).collect()
            }
            Selection::Channel { keep } => input
                .chunks(32)
                .flat_map(|group| reference::prune_channel(dtype(&case), group, keep, None))
                .collect(),
            other => panic!("{other:?}"),
        };
        assert_eq!(
            pruned.iter().map(|r| r.mask.clone()).collect::<Vec<_>>(),
            masks(&case),
            "{}",
            name(&case)
        );
        assert_eq!(pruned.into_iter().map(|r| r.bits).collect::<Vec<_>>(), rows(&case, "output"));
    }
}

// ---- the library --------------------------------------------------------------------------------------------

#[test]
fn append_writes_the_golden_pages() {
    for (case, context) in
        cases("append.json").iter().flat_map(|c| contexts(&[1]).into_iter().map(move |x| (c, x)))
    {
        let format = format(case);
        let x = tensor(dtype(case), &rows(case, "input"));
        let slots: Vec<i64> = case["slots"].as_array().unwrap().iter().map(|s| s.as_i64().unwrap()).collect();
        let (weights, center) = (floats(&case["weights"]), floats(&case["center"]));
        let mut pool = Pool::contiguous(format, 1, 1);
        let side = AppendSide {
            x: x.view(),
            pool: pool.view_mut(),
            weights: weights.as_ref().map(|w| Mem::host(w)),
            center: center.as_ref().map(|c| Center { values: Mem::host(c), batch: 1 }),
        };
        let slots = distinct_slots(&context, &slots);
        let args = Append { k: Some(side), v: None, slots: Mem::host(&slots), sequence: None };
        run::append(&context, args).unwrap();
        assert_eq!(pool.page(0, 0), hex(&case["page"]), "{} at {}", name(case), context);

        for row in case["rows"].as_array().unwrap() {
            // Decompress up to the row in a page whose earlier rows are copies of it, as those may never have
            // been written.
            let at = size(row, "row");
            let mut alone = pool.clone();
            for earlier in 0..at {
                copy_row(format, (pool.page(0, 0), at), (alone.page_mut(0, 0), earlier));
            }
            let expected: Vec<u16> =
                hex(&row["dense"]).chunks(2).map(|x| u16::from_le_bytes([x[0], x[1]])).collect();
            assert_eq!(
                decompress(&context, &alone, dtype(case), at + 1)[at],
                expected,
                "{} row {at}",
                name(case)
            );
        }
    }
}

#[test]
fn compress_writes_the_golden_pages() {
    for (case, context) in
        cases("compress.json").iter().flat_map(|c| contexts(&[1]).into_iter().map(move |x| (c, x)))
    {
        let format = format(case);
        let x = tensor(dtype(case), &rows(case, "input"));
        let tokens = x.shape.tokens;
        let mask = hex(&case["mask"]);
        let (mut pool, pages, mut needed) = (Pool::contiguous(format, 1, 1), [0i32], [u32::MAX]);
        let args = Compress {
            x: x.view(),
            mask: Some(Mem::host(&mask)),
            pool: pool.view_mut(),
            pages: Mem::host(&pages),
            needed: Some(MemMut::host(&mut needed)),
        };
        run::compress(&context, args).unwrap();
        assert_eq!(pool.page(0, 0), hex(&case["page"]), "{} at {}", name(case), context);
        let kept: usize = masks(case).iter().flatten().filter(|kept| **kept).count();
        assert_eq!(needed[0] as usize, kept, "{}", name(case));
        assert_eq!(decompress(&context, &pool, dtype(case), tokens), rows(case, "dense"), "{}", name(case));
    }
}

#[test]
fn prune_writes_the_golden_masks() {
    for (case, context) in
        cases("prune.json").iter().flat_map(|c| contexts(&[1]).into_iter().map(move |x| (c, x)))
    {
        let mut x = tensor(dtype(case), &rows(case, "input"));
        let expected = hex(&case["mask"]);
        let mut mask = vec![0xFFu8; expected.len()];
        let args = Prune {
            x: x.view_mut(),
            selection: selection(case),
            weights: None,
            token_weights: None,
            mask: Some(MemMut::host(&mut mask)),
        };
        run::prune(&context, args).unwrap();
        assert_eq!(mask, expected, "{} at {}", name(case), context);
        let output: Vec<Vec<u16>> = (0..x.shape.tokens).map(|t| x.row_bits(0, t, 0)).collect();
        assert_eq!(output, rows(case, "output"), "{} at {}", name(case), context);
        x.assert_gaps_untouched();
    }
}

// ---- rejects ------------------------------------------------------------------------------------------------

#[test]
fn damaged_pages_are_refused() {
    for case in cases("page_rejects.json") {
        let result = format(&case).validate(&hex(&case["page"]), size(&case, "rows"));
        match (result, case["error"].as_str()) {
            (Ok(()), None) => {}
            (Err(error), Some(kind)) => {
                assert_eq!(error_kind(&error), kind, "{}", name(&case));
                assert_eq!(error.to_string(), case["message"].as_str().unwrap(), "{}", name(&case));
            }
            (result, expected) => panic!("{}: {result:?}, expected {expected:?}", name(&case)),
        }
    }
}

#[test]
fn validate_op_agrees_about_damaged_pages() {
    let context = Context::cpu(1).unwrap();
    for case in cases("page_rejects.json") {
        let (format, page, count) = (format(&case), hex(&case["page"]), size(&case, "rows"));
        if page.len() != format.page_bytes() || count > format.page_tokens() {
            continue; // a pool or a sequence like this cannot be described
        }
        let mut pool = Pool::contiguous(format, 1, 1);
        pool.page_mut(0, 0).copy_from_slice(&page);
        let len = [count as i32];
        let args = Validate { pool: pool.view(), sequences: one_page(&len, format), record: None };
        match (run::validate(&context, args), case["error"].as_str()) {
            (Ok(()), None) => {}
            (Err(error @ Error::CorruptData { .. }), Some("CorruptData")) => {
                // The op says where the page is; the rule and the row are the page's own words.
                let rule = case["message"].as_str().unwrap().trim_start_matches("page is damaged: ");
                assert!(error.to_string().contains(rule), "{}: {error}", name(&case));
            }
            (result, expected) => panic!("{}: {result:?}, expected {expected:?}", name(&case)),
        }
    }
}

#[test]
fn unknown_formats_are_refused() {
    for case in cases("format_rejects.json") {
        let code = u32::try_from(case["value_type_code"].as_u64().unwrap()).unwrap();
        let result = ValueType::from_code("value_type", code).and_then(|values| {
            let (dim, tokens) = (size(&case, "head_dim"), size(&case, "page_tokens"));
            match case.get("keep") {
                Some(_) => PageFormat::uniform(values, dim, tokens, size(&case, "keep")),
                None => PageFormat::ragged(values, dim, tokens, size(&case, "capacity")),
            }
        });
        let error = result.expect_err(&case.to_string());
        assert_eq!(error_kind(&error), case["error"].as_str().unwrap(), "{case}");
        assert_eq!(error.to_string(), case["message"].as_str().unwrap(), "{case}");
    }
}
