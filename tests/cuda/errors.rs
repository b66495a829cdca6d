//! What only the device can find wrong is counted, and the rest of the work done.

use crate::common::device::{DeviceCopy, TestStream};
use crate::common::{Dense, Dist, Layout, Rng};
use crate::gpu;
use crate::step::{MAX_LEN, PACKED, State, Step};
use mustafar::ops::{self, Compress};
use mustafar::{Context, DType, DeviceErrors, PageFormat, PagePoolMut, PoolLayout, Tensor, ValueType};

/// The errors of what `submit` submits. Afterwards there are none.
fn counted(context: &Context, submit: impl FnOnce(&TestStream)) -> DeviceErrors {
    let stream = TestStream::new();
    submit(&stream);
    stream.synchronize();
    let errors = context.take_device_errors().unwrap();
    assert!(context.take_device_errors().unwrap().is_empty(), "counts stay");
    errors
}

fn int32(values: &[i32]) -> DeviceCopy {
    DeviceCopy::new(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>())
}

#[test]
fn append_skips_and_counts_slots_past_the_pool() {
    let Some((context, _lock)) = gpu() else { return };
    let state = State::random(1, [0, 128, 3]);
    let step = Step::new(context, &state, PACKED);
    let past = step.append().k.unwrap().pool.layout.slots() as i64;
    let slots: Vec<u8> = [past, -1, i64::MAX].iter().flat_map(|slot| slot.to_le_bytes()).collect();
    let (slots, before) = (DeviceCopy::new(&slots), step.key_pages());
    let errors = counted(context, |stream| {
        let args = ops::Append { slots: slots.mem(), ..step.append() };
        ops::append(context, stream.stream(), args).unwrap();
    });
    assert_eq!(errors, DeviceErrors { append: 2, ..DeviceErrors::default() });
    assert_eq!(step.key_pages(), before, "written");
}

#[test]
fn compress_counts_pages_that_are_too_full_or_not_there() {
    let Some((context, _lock)) = gpu() else { return };
    let format = PageFormat::ragged(ValueType::F16, 64, 16, 512).unwrap();
    let layout = PoolLayout::contiguous(format, 4, 2).unwrap();
    // Three pages for each of two heads; every value of every token is kept, twice what a page holds.
    let shape = Layout::TokensFirst.shape(1, 48, 2, 64);
    let x = Dense::random(&mut Rng::new(1), Dist::Normal, DType::F16, shape);
    let x = DeviceCopy::new(&x.bytes);
    for pages in [[0, 1, 2], [0, 4, -1]] {
        let (pages, pool) = (int32(&pages), DeviceCopy::poisoned(layout.extent("pool").unwrap()));
        let errors = counted(context, |stream| {
            let args = Compress {
                x: Tensor::new("x", x.mem(), DType::F16, shape).unwrap(),
                mask: None,
                pool: PagePoolMut::new("pool", pool.mem_mut(), layout).unwrap(),
                pages: pages.mem(),
                needed: None,
            };
            ops::compress(context, stream.stream(), args).unwrap();
        });
        assert_eq!(errors, DeviceErrors { compress: 6, ..DeviceErrors::default() });
        assert!(pool.read().iter().all(|byte| *byte == 0xFF), "written");
    }
}

#[test]
fn readers_count_pages_and_lengths_out_of_range() {
    let Some((context, _lock)) = gpu() else { return };
    let step = Step::new(context, &State::random(1, [100, 0, 64]), PACKED);
    let sequences = step.decompress().sequences;
    let table = int32(&vec![9999; sequences.table.unwrap().bytes() / 4]);
    let lens = int32(&[MAX_LEN as i32 + 1, -1, i32::MAX]);
    for sequences in [
        mustafar::Sequences { table: Some(table.mem()), ..sequences },
        mustafar::Sequences { lens: lens.mem(), ..sequences },
    ] {
        let errors = counted(context, |stream| {
            let args = ops::Decompress { sequences, ..step.decompress() };
            ops::decompress(context, stream.stream(), args).unwrap();
        });
        assert!(errors.read > 0 && errors == DeviceErrors { read: errors.read, ..DeviceErrors::default() });
        assert!(step.is_untouched(), "written");
    }
}
