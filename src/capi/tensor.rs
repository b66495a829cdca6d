//! Dense strided tensors.

use crate::capi::structs::{extensible, read};
use crate::capi::views::{Pointers, product, reserved, size};
use crate::dtype::DType;
use crate::error::Result;
use crate::tensor::{Shape, Tensor, TensorMut};
use std::ffi::c_void;

/// A dense tensor [batch, tokens, heads, dim] that is written. Elements of a row of `dim` are adjacent; the other
/// dimensions have strides in elements. Three strides of 0 mean contiguous in this order; otherwise each stride counts
/// as it is. Dimensions of 0 are legal, and `data` may then be NULL. Rows must not overlap each other or an input of
/// the same call.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_tensor_mut {
    /// sizeof(mustafar_tensor_mut).
    pub struct_size: usize,
    /// Element [0, 0, 0, 0], aligned to the element type, in the memory of the context (host or device).
    pub data: *mut c_void,
    /// A mustafar_dtype. Required.
    pub dtype: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Sequences.
    pub batch: i64,
    /// Tokens per sequence.
    pub tokens: i64,
    /// Heads.
    pub heads: i64,
    /// Elements per row.
    pub dim: i64,
    /// Elements from one sequence to the next; not negative.
    pub batch_stride: i64,
    /// Elements from one token to the next; not negative.
    pub token_stride: i64,
    /// Elements from one head to the next; not negative.
    pub head_stride: i64,
}

/// As mustafar_tensor_mut, for a tensor that is read. A stride of 0 repeats the same data.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct mustafar_tensor {
    /// sizeof(mustafar_tensor).
    pub struct_size: usize,
    /// As in mustafar_tensor_mut; never written.
    pub data: *const c_void,
    /// A mustafar_dtype. Required.
    pub dtype: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Sequences.
    pub batch: i64,
    /// Tokens per sequence.
    pub tokens: i64,
    /// Heads.
    pub heads: i64,
    /// Elements per row.
    pub dim: i64,
    /// Elements from one sequence to the next; not negative.
    pub batch_stride: i64,
    /// Elements from one token to the next; not negative.
    pub token_stride: i64,
    /// Elements from one head to the next; not negative.
    pub head_stride: i64,
}

extensible!(mustafar_tensor, first_release_ends_with head_stride, {
    struct_size, data, dtype, reserved, batch, tokens, heads, dim, batch_stride, token_stride, head_stride,
});
extensible!(mustafar_tensor_mut, first_release_ends_with head_stride, {
    struct_size, data, dtype, reserved, batch, tokens, heads, dim, batch_stride, token_stride, head_stride,
});

/// What messages call a tensor and its fields. Made by [`tensor_names`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Names {
    pub(super) tensor: &'static str,
    pub(super) data: &'static str,
    pub(super) dtype: &'static str,
    pub(super) reserved: &'static str,
    /// batch, tokens, heads, dim, batch_stride, token_stride, head_stride.
    pub(super) sizes: [&'static str; 7],
}

/// [`Names`] of the tensor argument with this name.
macro_rules! tensor_names {
    ($name:expr) => {
        $crate::capi::tensor::Names {
            tensor: $name,
            data: concat!($name, ".data"),
            dtype: concat!($name, ".dtype"),
            reserved: concat!($name, ".reserved"),
            sizes: [
                concat!($name, ".batch"),
                concat!($name, ".tokens"),
                concat!($name, ".heads"),
                concat!($name, ".dim"),
                concat!($name, ".batch_stride"),
                concat!($name, ".token_stride"),
                concat!($name, ".head_stride"),
            ],
        }
    };
}
pub(super) use tensor_names;

fn shape(names: &Names, [batch, tokens, heads, dim, strides @ ..]: [i64; 7]) -> Result<Shape> {
    let sizes = &names.sizes;
    let (batch, tokens) = (size(sizes[0], batch)?, size(sizes[1], tokens)?);
    let (heads, dim) = (size(sizes[2], heads)?, size(sizes[3], dim)?);
    if strides == [0; 3] {
        return Shape::contiguous(batch, tokens, heads, dim);
    }
    Ok(Shape {
        batch,
        tokens,
        heads,
        dim,
        batch_stride: size(sizes[4], strides[0])?,
        token_stride: size(sizes[5], strides[1])?,
        head_stride: size(sizes[6], strides[2])?,
    })
}

/// The tensor a C structure describes.
///
/// # Safety
/// `tensor` is as [`read`] wants it, and its data as [`Pointers::mem`] does.
pub(super) unsafe fn tensor<'a>(
    pointers: Pointers,
    names: &Names,
    tensor: *const mustafar_tensor,
) -> Result<Tensor<'a>> {
    // SAFETY: the caller's promise.
    let t = unsafe { read(names.tensor, tensor)? };
    let dtype = DType::from_code(names.dtype, t.dtype)?;
    reserved(names.reserved, t.reserved)?;
    let shape =
        shape(names, [t.batch, t.tokens, t.heads, t.dim, t.batch_stride, t.token_stride, t.head_stride])?;
    let bytes = product(names.tensor, &[shape.extent(names.tensor)?, dtype.bytes()])?;
    // SAFETY: the caller's promise; `bytes` is what the structure describes.
    Tensor::new(names.tensor, unsafe { pointers.mem(names.data, t.data, bytes)? }, dtype, shape)
}

/// As [`tensor`]; null is "not given".
///
/// # Safety
/// As [`tensor`].
pub(super) unsafe fn tensor_optional<'a>(
    pointers: Pointers,
    names: &Names,
    tensor: *const mustafar_tensor,
) -> Result<Option<Tensor<'a>>> {
    if tensor.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    unsafe { self::tensor(pointers, names, tensor) }.map(Some)
}

/// As [`tensor`], for a tensor that is written.
///
/// # Safety
/// As [`tensor`], with [`Pointers::mem_mut`].
pub(super) unsafe fn tensor_mut<'a>(
    pointers: Pointers,
    names: &Names,
    tensor: *const mustafar_tensor_mut,
) -> Result<TensorMut<'a>> {
    // SAFETY: the caller's promise.
    let t = unsafe { read(names.tensor, tensor)? };
    let dtype = DType::from_code(names.dtype, t.dtype)?;
    reserved(names.reserved, t.reserved)?;
    let shape =
        shape(names, [t.batch, t.tokens, t.heads, t.dim, t.batch_stride, t.token_stride, t.head_stride])?;
    let bytes = product(names.tensor, &[shape.extent(names.tensor)?, dtype.bytes()])?;
    // SAFETY: the caller's promise; `bytes` is what the structure describes.
    TensorMut::new(names.tensor, unsafe { pointers.mem_mut(names.data, t.data, bytes)? }, dtype, shape)
}

/// As [`tensor_mut`]; null is "not wanted".
///
/// # Safety
/// As [`tensor_mut`].
pub(super) unsafe fn tensor_mut_optional<'a>(
    pointers: Pointers,
    names: &Names,
    tensor: *const mustafar_tensor_mut,
) -> Result<Option<TensorMut<'a>>> {
    if tensor.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    unsafe { tensor_mut(pointers, names, tensor) }.map(Some)
}
