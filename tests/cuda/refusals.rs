//! Calls that are refused before anything is launched.

use crate::common::device::TestStream;
use crate::gpu;
use crate::step::{BATCH, PACKED, State, Step, mem_at};
use mustafar::ops::{self, Attend};
use mustafar::{Context, Error, Mem, MemMut, PageFormat, PagePool, Place, Tensor, ValueType};

/// The error of a call after a change of its arguments; outputs must stay as they were.
fn refused(context: &Context, step: &Step, change: impl FnOnce(&mut Attend<'_>)) -> Error {
    let stream = TestStream::new();
    let mut args = step.attend();
    change(&mut args);
    let error = ops::attend(context, stream.stream(), args, step.workspace.mem_mut()).unwrap_err();
    stream.synchronize();
    assert!(step.is_untouched(), "wrote before refusing");
    error
}

fn step(context: &Context) -> Step {
    Step::new(context, &State::random(1, [100, 64, 3]), PACKED)
}

#[test]
fn memory_that_is_not_the_devices() {
    let Some((context, _lock)) = gpu() else { return };
    let step = step(context);
    let host = vec![0u8; 1 << 16];
    let q = step.attend().q;
    let with_q = |mem| {
        let q = Tensor::new("q", mem, q.dtype, q.shape).unwrap();
        refused(context, &step, |args| args.q = q).to_string()
    };
    let ordinary = "q is host memory; allowed: memory of CUDA device 0";
    assert_eq!(with_q(mem_at(host.as_ptr() as u64, host.len())), ordinary);
    // Nothing that the driver knows of.
    assert_eq!(with_q(mem_at(1 << 40, host.len())), ordinary);
    let marked = "q is host memory; allowed: device memory on the CUDA backend";
    // SAFETY: the call refuses it; nothing is read.
    let host = unsafe { Mem::from_raw(host.as_ptr() as u64, host.len(), Place::Host) };
    assert_eq!(with_q(host), marked);
}

#[test]
fn null_and_misaligned_pointers() {
    let Some((context, _lock)) = gpu() else { return };
    let step = step(context);
    let lens = step.decompress().sequences.lens;
    let with_lens =
        |mem| refused(context, &step, |args| args.compressed.as_mut().unwrap().sequences.lens = mem);
    assert_eq!(with_lens(mem_at(0, 4 * BATCH)), Error::NullPointer { argument: "sequences.lens" });
    let value = lens.address() + 2;
    let misaligned = Error::Misaligned { argument: "sequences.lens", value, required: 4 };
    assert_eq!(with_lens(mem_at(value, 4 * BATCH)), misaligned);
    let (bytes, needed) = (4 * BATCH - 1, 4 * BATCH);
    let short = Error::BufferTooSmall { argument: "sequences.lens", bytes, needed };
    assert_eq!(with_lens(mem_at(lens.address(), bytes)), short);
}

#[test]
fn workspace_too_small_says_what_is_needed() {
    let Some((context, _lock)) = gpu() else { return };
    let (step, stream) = (step(context), TestStream::new());
    let needed = ops::attend_workspace(context, &step.attend()).unwrap();
    let run = |address, bytes| {
        // SAFETY: for calls that refuse it; nothing is written.
        let workspace = unsafe { MemMut::from_raw(address, bytes, Place::Device) };
        ops::attend(context, stream.stream(), step.attend(), workspace).unwrap_err()
    };
    let at = step.workspace.mem().address();
    let short = Error::BufferTooSmall { argument: "workspace", bytes: needed - 1, needed };
    assert_eq!(run(at, needed - 1), short);
    assert_eq!(run(0, needed), Error::NullPointer { argument: "workspace" });
    let misaligned = Error::Misaligned { argument: "workspace", value: at + 4, required: 16 };
    assert_eq!(run(at + 4, needed), misaligned);
    stream.synchronize();
    assert!(step.is_untouched(), "wrote before refusing");
}

#[test]
fn what_no_kernel_serves_names_what_is_supported() {
    let Some((context, _lock)) = gpu() else { return };
    let step = step(context);
    let with_v = |values, dim| {
        let message = refused(context, &step, |args| {
            let v = &mut args.compressed.as_mut().unwrap().v;
            let mut layout = v.layout;
            layout.format = PageFormat::uniform(values, dim, 64, 39).unwrap();
            *v = PagePool::new("v", v.mem(), layout).unwrap();
            args.out.shape.dim = dim;
            args.window = None;
        });
        message.to_string()
    };
    assert_eq!(
        with_v(ValueType::Bf16, 128),
        "compressed.v.value_type is bf16; supported: f16, the value type of K, on the CUDA backend"
    );
    assert_eq!(
        with_v(ValueType::Int8, 128),
        "compressed.v.value_type is int8; supported: f16, the value type of K, on the CUDA backend"
    );
    assert_eq!(
        with_v(ValueType::F16, 64),
        "out.dim is 64; supported: 128, the dim of q, on the CUDA backend"
    );
}

#[test]
fn devices_that_do_not_exist() {
    let Some((_context, _lock)) = gpu() else { return };
    let message = Context::cuda(999).unwrap_err().to_string();
    assert!(message.starts_with("device is 999; allowed: 0 to "), "{message}");
}
