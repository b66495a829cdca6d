//! Every error of `attend` by its message; nothing is written before one.

use crate::case::{Case, Centre, Pages, Spec};
use crate::common::Bytes;
use mustafar::ops::{self, Attend, Center};
use mustafar::{Context, DType, Mem, MemMut, Stream};

fn case() -> Case {
    Case::new(Spec {
        queries: vec![1, 2],
        sinks: Some(vec![4, 4]),
        compressed: Some((vec![40, 70], Pages::Table)),
        window: Some(vec![9, 3]),
        shuffled_rows: true,
        first: Some(vec![0, 1]),
        centre: Centre::PerSequence,
        ..Spec::plain((4, 2), 64, 20, 0)
    })
}

/// The message that arguments give after a change.
fn refused(change: impl for<'a> FnOnce(&mut Attend<'a>)) -> String {
    let (case, context) = (case(), Context::cpu(1).unwrap());
    let (mut out, mut lse) = case.outputs();
    let mut args = case.args(&mut out, &mut lse);
    change(&mut args);
    let mut workspace = Bytes::poisoned(1 << 20);
    let result = ops::attend(&context, Stream::NONE, args, MemMut::host(&mut workspace[..]));
    let untouched =
        out.indices().iter().all(|&(b, t, h)| out.is_poisoned(b, t, h) && lse.is_poisoned(b, t, h));
    assert!(untouched, "wrote before refusing");
    result.unwrap_err().to_string()
}

static LENS: [i32; 2] = [40, 74];
static ENTRIES: [i32; 8] = [0, 9999, 0, 0, 9999, 1, 1, 1];
static WINDOW_LENS: [i32; 2] = [12, 3];
static ROWS: [i32; 2] = [0, 4];
static FALLING: [i32; 3] = [0, -1, 3];
static OPEN: [i32; 3] = [0, 1, 2];
static NEGATIVE: [i32; 2] = [0, -1];

#[test]
fn shapes() {
    let compressed =
        |change: fn(&mut ops::Compressed<'_>)| refused(|args| change(args.compressed.as_mut().unwrap()));
    let window = |change: fn(&mut ops::Dense<'_>)| refused(|args| change(args.window.as_mut().unwrap()));
    for (message, expected) in [
        (
            refused(|a| a.q.shape.batch = 2),
            "q.batch is 2; allowed: 1 (queries of all sequences are packed in one)",
        ),
        (refused(|a| a.out.shape.tokens = 2), "out.tokens is 2; allowed: 3 (tokens of q)"),
        (refused(|a| a.out.shape.heads = 2), "out.heads is 2; allowed: 4 (heads of q)"),
        (refused(|a| a.out.shape.dim = 32), "out.dim is 32; supported: 64, 96, 128, 256"),
        (refused(|a| a.q.shape.dim = 60), "q.dim is 60; supported: 64, 96, 128, 256"),
        (refused(|a| a.lse.as_mut().unwrap().dtype = DType::F16), "lse.dtype is f16; supported: f32"),
        (
            refused(|a| a.lse.as_mut().unwrap().shape.dim = 2),
            "lse.dim is 2; allowed: 1 (one value per query and head)",
        ),
        (
            compressed(|c| c.v.layout.num_pages -= 1),
            "compressed.v.num_pages is 4; allowed: 5 (num_pages of k)",
        ),
        (compressed(|c| c.sequences.batch = 3), "compressed.sequences.batch is 3; allowed: 2 (batch)"),
        (
            compressed(|c| c.k_center.as_mut().unwrap().batch = 3),
            "compressed.k_center.batch is 3; allowed: 1, or 2 (one per sequence)",
        ),
        (window(|w| w.k.shape.heads = 1), "window.k.heads is 1; allowed: 2 (KV heads)"),
        (window(|w| w.v.shape.tokens = 1), "window.v.tokens is 1; allowed: 11 (tokens of k)"),
    ] {
        assert_eq!(message, expected);
    }
}

#[test]
fn contents() {
    let compressed =
        |change: fn(&mut ops::Compressed<'_>)| refused(|args| change(args.compressed.as_mut().unwrap()));
    let window = |change: fn(&mut ops::Dense<'_>)| refused(|args| change(args.window.as_mut().unwrap()));
    for (message, expected) in [
        (compressed(|c| c.sequences.lens = Mem::host(&LENS)), "sequences.lens[1] is 74; allowed: 0 to 73"),
        (
            compressed(|c| c.sequences.table = Some(Mem::host(&ENTRIES))),
            "sequences.table[4] is 9999; allowed: 0 to 4",
        ),
        (window(|w| w.lens = Mem::host(&WINDOW_LENS)), "window.lens[0] is 12; allowed: 0 to 11"),
        (window(|w| w.rows = Some(Mem::host(&ROWS))), "window.rows[1] is 4; allowed: 0 to 3"),
        (refused(|a| a.first = Some(Mem::host(&NEGATIVE))), "first[1] is -1; allowed: 0 to 2147483647"),
        (refused(|a| a.q_indptr = Some(Mem::host(&FALLING))), "q_indptr[1] is -1; allowed: 0 to 2"),
        (refused(|a| a.q_indptr = Some(Mem::host(&OPEN))), "q_indptr[2] is 2; allowed: 3 to 3"),
        (refused(|a| a.q_indptr = None), "q.tokens is 3; allowed: a multiple of batch (2) without q_indptr"),
        (refused(|a| a.max_q_len = 1), "q_indptr[2] is 3; allowed: 1 to 2"),
    ] {
        assert_eq!(message, expected);
    }
}

#[test]
fn scalars() {
    for (message, expected) in [
        (refused(|a| a.scale = Some(f32::INFINITY)), "scale is inf; allowed: a finite number"),
        (refused(|a| a.softcap = Some(0.0)), "softcap is 0; allowed: a finite number above 0"),
        (refused(|a| a.softcap = Some(f32::NAN)), "softcap is NaN; allowed: a finite number above 0"),
        (refused(|a| a.sliding_window = Some(0)), "sliding_window is 0; allowed: at least 1"),
        (refused(|a| a.split_tokens = Some(0)), "split_tokens is 0; allowed: at least 1"),
    ] {
        assert_eq!(message, expected);
    }
}

#[test]
fn centre_too_short() {
    static VALUES: [f32; 255] = [0.0; 255];
    let center = Center { values: Mem::host(&VALUES), batch: 2 };
    let message = refused(|a| a.compressed.as_mut().unwrap().k_center = Some(center));
    assert_eq!(message, "compressed.k_center.values has 1020 bytes; needed: 1024");
}

#[test]
fn workspace() {
    let (case, context) = (case(), Context::cpu(3).unwrap());
    let (mut out, mut lse) = case.outputs();
    let needed = ops::attend_workspace(&context, &case.args(&mut out, &mut lse)).unwrap();
    let mut memory = Bytes::poisoned(needed + 16);
    let mut run = |range: std::ops::Range<usize>| {
        let args = case.args(&mut out, &mut lse);
        ops::attend(&context, Stream::NONE, args, MemMut::host(&mut memory[range]))
    };
    let short = run(0..needed - 1).unwrap_err().to_string();
    assert_eq!(short, format!("workspace has {} bytes; needed: {needed}", needed - 1));
    let crooked = run(4..needed + 4).unwrap_err().to_string();
    assert!(
        crooked.starts_with("workspace is 0x") && crooked.ends_with("must be a multiple of 16 bytes"),
        "{crooked}"
    );
    run(0..needed).unwrap();
}

#[test]
fn workspace_grows_with_every_bound() {
    let bytes = |threads, change: fn(&mut Attend<'_>)| {
        let case = case();
        let (mut out, mut lse) = case.outputs();
        let mut args = case.args(&mut out, &mut lse);
        change(&mut args);
        ops::attend_workspace(&Context::cpu(threads).unwrap(), &args)
    };
    let base = bytes(2, |_| ()).unwrap();
    for larger in [
        bytes(2, |a| a.max_q_len = 3),
        bytes(2, |a| a.max_q_len = 40),
        bytes(2, |a| a.compressed.as_mut().unwrap().sequences.max_len = 128),
        bytes(3, |_| ()),
    ] {
        assert!(larger.unwrap() >= base);
    }
    let overflow = bytes(2, |a| a.max_q_len = usize::MAX).unwrap_err().to_string();
    assert_eq!(overflow, "workspace does not fit in 64 bits");
}
