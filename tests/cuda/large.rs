//! Offsets that 32 bits do not hold: more than 4 GiB from the first page to the last, more than 2^31 elements from the
//! first row of a tensor to the last.

use crate::gpu;
use crate::step::{PACKED, Place, State, alone};
use cudarc::driver::result;

/// Whether the device has `gib` GiB free; says so if not.
fn has_room(gib: usize) -> bool {
    let (free, _) = result::mem_get_info().unwrap();
    let enough = free >= gib << 30;
    if !enough {
        eprintln!("SKIPPED on CUDA: {gib} GiB of device memory are not free");
    }
    enough
}

fn equals_packed(place: Place) {
    let Some((context, _lock)) = gpu() else { return };
    if !has_room(40) {
        return;
    }
    // Nearly all pages are in use, the last ones of the pool among them.
    let state = State::random(1, [700, 650, 699]);
    let far = alone(context, &state, place);
    state.check(&far);
    assert!(far.same_bits(&alone(context, &state, PACKED)));
}

#[test]
fn pools_above_4_gib() {
    equals_packed(Place { page_stride: Some((130 << 20) + 48), stride: None });
}

#[test]
fn tensors_above_2_31_elements() {
    equals_packed(Place { page_stride: None, stride: Some((1 << 30) + 3) });
}
