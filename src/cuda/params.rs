//! The kernels' parameter structs, as `csrc/mustafar/*params.h` declare them; what the fields mean is said there.
//! A test compiles the headers and compares every offset and size.
#![allow(unsafe_code)]

use std::ffi::c_void;

/// A struct that is the one parameter of some kernels, passed by value.
///
/// # Safety
/// It is laid out as the struct of its name in the headers.
pub(super) unsafe trait KernelParams {}

/// Defines the structs and, for the test, what their layout is.
macro_rules! structs {
    ($($name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            #[derive(Debug, Clone, Copy)]
            #[repr(C)]
            pub(super) struct $name {
                $(pub(super) $field: $type,)*
            }
        )*

        /// Each struct: its name, its size, and each field's name, offset and size.
        #[cfg(test)]
        fn layouts() -> Vec<(&'static str, usize, Vec<(&'static str, usize, usize)>)> {
            fn size_of_field<S, F>(_: impl Fn(&S) -> &F) -> usize {
                size_of::<F>()
            }
            vec![$((
                stringify!($name),
                size_of::<$name>(),
                vec![$((
                    stringify!($field),
                    std::mem::offset_of!($name, $field),
                    size_of_field(|s: &$name| &s.$field),
                )),*],
            )),*]
        }
    };
}

structs! {
    SequencesParams {
        table: *const i32,
        lens: *const i32,
        table_stride: i64,
        lens_per_head: i32,
        page_tokens: i32,
    }
    StorePool {
        pages: *mut u8,
        page_stride_bytes: i64,
        head_stride_bytes: i64,
        keep: i32,
        values_offset_bytes: i32,
        value_type: i32,
        reserved: i32,
    }
    AppendSide {
        x: *const u16,
        weights: *const f32,
        center: *const f32,
        pool: StorePool,
        x_token_stride: i64,
        x_head_stride: i64,
        center_batch: i32,
        reserved: i32,
    }
    AppendParams {
        side: [AppendSide; 2],
        slots: *const i64,
        sequence: *const i32,
        errors: *mut u32,
        num_slots: i64,
        tokens: i32,
        heads: i32,
        page_tokens: i32,
        reserved: i32,
    }
    PruneParams {
        x: *mut u16,
        weights: *const f32,
        mask: *mut u8,
        x_batch_stride: i64,
        x_token_stride: i64,
        x_head_stride: i64,
        batch: i32,
        tokens: i32,
        heads: i32,
        keep: i32,
        all_ties: i32,
        reserved: i32,
    }
    CompressParams {
        x: *const u16,
        mask: *const u8,
        page_numbers: *const i32,
        needed: *mut u32,
        errors: *mut u32,
        pool: StorePool,
        x_token_stride: i64,
        x_head_stride: i64,
        tokens: i32,
        heads: i32,
        pages: i32,
        num_pages: i32,
        page_tokens: i32,
        capacity: i32,
    }
    DecompressParams {
        pool: StorePool,
        sequences: SequencesParams,
        center: *const f32,
        out: *mut c_void,
        errors: *mut u32,
        out_batch_stride: i64,
        out_token_stride: i64,
        out_head_stride: i64,
        center_batch: i32,
        out_dtype: i32,
        batch: i32,
        heads: i32,
        max_len: i32,
        num_pages: i32,
        capacity: i32,
        reserved: i32,
    }
    ValidateParams {
        pool: StorePool,
        sequences: SequencesParams,
        first: *mut u64,
        batch: i32,
        heads: i32,
        max_len: i32,
        num_pages: i32,
        capacity: i32,
        reserved: i32,
    }
    AttendPool {
        pages: *const u8,
        page_stride_bytes: i64,
        head_stride_bytes: i64,
        row_bytes: i32,
        values_offset_bytes: i32,
        shared_row_bytes: i32,
        row_shift: i32,
        capacity: i32,
        run_bytes: i32,
    }
    DenseParams {
        k: *const c_void,
        v: *const c_void,
        lens: *const i32,
        rows: *const i32,
        k_row_stride: i64,
        k_token_stride: i64,
        k_head_stride: i64,
        v_row_stride: i64,
        v_token_stride: i64,
        v_head_stride: i64,
        k_dtype: i32,
        v_dtype: i32,
    }
    AttendParams {
        k: AttendPool,
        v: AttendPool,
        sequences: SequencesParams,
        sinks: DenseParams,
        window: DenseParams,
        q: *const c_void,
        q_indptr: *const i32,
        first: *const i32,
        center: *const f32,
        partial_out: *mut f32,
        partial_lse: *mut f32,
        q_token_stride: i64,
        q_head_stride: i64,
        center_batch_stride: i64,
        q_dtype: i32,
        group: i32,
        kv_heads: i32,
        max_q_len: i32,
        row_tiles: i32,
        page_items: i32,
        long_items: i32,
        dense_split: i32,
        split: i32,
        short_split: i32,
        sliding_window: i32,
        scale: f32,
        softcap: f32,
        max_len: i32,
        items: i32,
        dense_dtype: i32,
    }
    CombineParams {
        partial_out: *const f32,
        partial_lse: *const f32,
        out: *mut c_void,
        lse: *mut f32,
        out_token_stride: i64,
        out_head_stride: i64,
        lse_token_stride: i64,
        lse_head_stride: i64,
        items: i32,
        dim: i32,
        out_dtype: i32,
        rehearse: i32,
    }
    MergeOperand {
        values: *const c_void,
        lse: *const f32,
        token_stride: i64,
        head_stride: i64,
        lse_token_stride: i64,
        lse_head_stride: i64,
        dtype: i32,
        reserved: i32,
    }
    MergeParams {
        a: MergeOperand,
        b: MergeOperand,
        out: *mut c_void,
        lse: *mut f32,
        out_token_stride: i64,
        out_head_stride: i64,
        lse_token_stride: i64,
        lse_head_stride: i64,
        out_dtype: i32,
        dim: i32,
    }
    SpmvKeyParams {
        pool: StorePool,
        sequences: SequencesParams,
        q: *const c_void,
        center: *const f32,
        scores: *mut f32,
        errors: *mut u32,
        q_batch_stride: i64,
        q_token_stride: i64,
        q_head_stride: i64,
        scores_batch_stride: i64,
        scores_token_stride: i64,
        scores_head_stride: i64,
        center_batch: i32,
        q_dtype: i32,
        batch: i32,
        heads: i32,
        group: i32,
        q_len: i32,
        max_len: i32,
        num_pages: i32,
        capacity: i32,
        scale: f32,
    }
    SpmvValueParams {
        pool: StorePool,
        sequences: SequencesParams,
        weights: *const f32,
        out: *mut c_void,
        errors: *mut u32,
        weights_batch_stride: i64,
        weights_token_stride: i64,
        weights_head_stride: i64,
        out_batch_stride: i64,
        out_token_stride: i64,
        out_head_stride: i64,
        out_dtype: i32,
        batch: i32,
        heads: i32,
        group: i32,
        q_len: i32,
        max_len: i32,
        num_pages: i32,
        capacity: i32,
    }
    CopyPlace {
        from_row: i32,
        from_token: i32,
        to_row: i32,
        to_token: i32,
        tokens: i32,
    }
    CopySide {
        from: *const c_void,
        to: *mut c_void,
        from_row_stride: i64,
        from_token_stride: i64,
        from_head_stride: i64,
        to_row_stride: i64,
        to_token_stride: i64,
        to_head_stride: i64,
        dim: i32,
        from_dtype: i32,
    }
    CopyParams {
        side: [CopySide; 2],
        places: *const CopyPlace,
        num_places: i32,
        max_tokens: i32,
        heads: i32,
        reserved: i32,
    }
    MedianPart {
        x: *const u16,
        token_stride: i64,
        head_stride: i64,
        tokens: i32,
        reserved: i32,
    }
    MedianParams {
        part: [MedianPart; 2],
        out: *mut f32,
        dim: i32,
        dtype: i32,
    }
    QueriesParams {
        q: *const c_void,
        token_stride: i64,
        head_stride: i64,
        tokens: i32,
        group: i32,
        dtype: i32,
        reserved: i32,
    }
    QueryWeightsParams {
        queries: QueriesParams,
        out: *mut f32,
        dim: i32,
        reserved: i32,
    }
    ScoredPart {
        x: *const u16,
        token_stride: i64,
        head_stride: i64,
        tokens: i32,
        reserved: i32,
    }
    ChannelScoresParams {
        part: [ScoredPart; 2],
        queries: QueriesParams,
        center: *const f32,
        out: *mut f32,
        dim: i32,
        dtype: i32,
        keep: i32,
        reserved: i32,
    }
    TokenWeightsParams {
        queries: QueriesParams,
        lse: *const f32,
        k: *const c_void,
        out: *mut f32,
        lse_token_stride: i64,
        lse_head_stride: i64,
        k_token_stride: i64,
        k_head_stride: i64,
        q_position: i32,
        k_position: i32,
        tokens: i32,
        kv_heads: i32,
        dim: i32,
        k_dtype: i32,
        sliding_window: i32,
        scale: f32,
        softcap: f32,
        reserved: i32,
    }
}

macro_rules! kernel_params {
    ($($name:ident),*) => {$(
        // SAFETY: the test below compares the two definitions.
        unsafe impl KernelParams for $name {}
    )*};
}
kernel_params!(AppendParams, PruneParams, CompressParams, DecompressParams, ValidateParams);
kernel_params!(AttendParams, CombineParams, MergeParams, SpmvKeyParams, SpmvValueParams);
kernel_params!(CopyParams, MedianParams);
kernel_params!(QueryWeightsParams, ChannelScoresParams, TokenWeightsParams);

#[cfg(test)]
#[allow(clippy::expect_used, clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::fmt::Write as _;
    use std::process::Command;

    #[test]
    fn the_headers_agree() {
        let mut source = String::from("#include <cstddef>\n");
        for header in
            ["store_params.h", "attend_params.h", "spmv_params.h", "cache_params.h", "score_params.h"]
        {
            writeln!(source, "#include \"mustafar/{header}\"").unwrap();
        }
        source.push_str("using namespace mustafar;\n");
        for (name, size, fields) in layouts() {
            writeln!(source, "static_assert(sizeof({name}) == {size}, \"{name}\");").unwrap();
            for (field, offset, size) in fields {
                let place = format!("{name}.{field}");
                writeln!(source, "static_assert(offsetof({name}, {field}) == {offset}, \"{place}\");")
                    .unwrap();
                writeln!(source, "static_assert(sizeof({name}::{field}) == {size}, \"{place}\");").unwrap();
            }
        }
        let dir = std::env::temp_dir().join(format!("mustafar-params-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a folder");
        let file = dir.join("layout.cpp");
        std::fs::write(&file, source).expect("a source file");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let include = concat!("-I", env!("CARGO_MANIFEST_DIR"), "/csrc");
        let output =
            Command::new(compiler).args(["-std=c++17", "-fsyntax-only", include]).arg(&file).output();
        let output = output.expect("a C++ compiler");
        std::fs::remove_dir_all(&dir).expect("the folder goes");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
