//! The structures of the header, as a C and a C++ compiler lay them out, have the sizes and offsets of the Rust ones.

use mustafar::capi::cache::attend::mustafar_cache_attend_args;
use mustafar::capi::cache::config::{
    MUSTAFAR_SINKS_NONE, mustafar_cache_config, mustafar_cache_head_formats, mustafar_center_mode,
};
use mustafar::capi::cache::mustafar_cache_bytes_info;
use mustafar::capi::cache::sequence::mustafar_cache_queries;
use mustafar::capi::context::{mustafar_backend, mustafar_context_config, mustafar_device_errors};
use mustafar::capi::format::{mustafar_format, mustafar_page_layout, mustafar_rows};
use mustafar::capi::ops::advice::mustafar_advice;
use mustafar::capi::ops::append::{mustafar_append_args, mustafar_append_side};
use mustafar::capi::ops::attend::{mustafar_attend_args, mustafar_compressed, mustafar_dense};
use mustafar::capi::ops::compress::mustafar_compress_args;
use mustafar::capi::ops::decompress::mustafar_decompress_args;
use mustafar::capi::ops::merge::mustafar_merge_args;
use mustafar::capi::ops::prune::{mustafar_prune_args, mustafar_selection};
use mustafar::capi::ops::score::{
    mustafar_query_weights_args, mustafar_structured_weights_args, mustafar_token_weights_args,
};
use mustafar::capi::ops::spmv::{mustafar_spmv_key_args, mustafar_spmv_value_args};
use mustafar::capi::ops::validate::mustafar_validate_args;
use mustafar::capi::pool::{mustafar_center, mustafar_pool, mustafar_pool_mut, mustafar_sequences};
use mustafar::capi::status::{mustafar_status, mustafar_status_name};
use mustafar::capi::strategy::mustafar_strategy;
use mustafar::capi::structs::Extensible;
use mustafar::capi::tensor::{mustafar_tensor, mustafar_tensor_mut};
use mustafar::ops::Speed;
use mustafar::{DType, Strategy, ValueType, format};
use std::ffi::CStr;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

type Described = (&'static str, usize, &'static [(&'static str, usize, usize)]);

fn described<T: Extensible>() -> Described {
    (T::NAME, size_of::<T>(), T::FIELDS)
}

fn structures() -> Vec<Described> {
    vec![
        described::<mustafar_context_config>(),
        described::<mustafar_device_errors>(),
        described::<mustafar_format>(),
        described::<mustafar_page_layout>(),
        described::<mustafar_tensor>(),
        described::<mustafar_tensor_mut>(),
        described::<mustafar_pool>(),
        described::<mustafar_pool_mut>(),
        described::<mustafar_sequences>(),
        described::<mustafar_center>(),
        described::<mustafar_prune_args>(),
        described::<mustafar_append_side>(),
        described::<mustafar_append_args>(),
        described::<mustafar_compress_args>(),
        described::<mustafar_decompress_args>(),
        described::<mustafar_validate_args>(),
        described::<mustafar_compressed>(),
        described::<mustafar_dense>(),
        described::<mustafar_attend_args>(),
        described::<mustafar_advice>(),
        described::<mustafar_spmv_key_args>(),
        described::<mustafar_spmv_value_args>(),
        described::<mustafar_merge_args>(),
        described::<mustafar_query_weights_args>(),
        described::<mustafar_structured_weights_args>(),
        described::<mustafar_token_weights_args>(),
        described::<mustafar_cache_head_formats>(),
        described::<mustafar_cache_queries>(),
        described::<mustafar_cache_config>(),
        described::<mustafar_cache_bytes_info>(),
        described::<mustafar_cache_attend_args>(),
    ]
}

fn header() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("include/mustafar.h")).unwrap()
}

#[test]
fn every_structure_of_the_header_is_checked() {
    let header = header();
    let in_header =
        header.matches("typedef struct ").count() - header.matches("typedef struct mustafar_c").count();
    let opaque_aside: Vec<_> = structures().into_iter().filter(|s| !s.0.starts_with("mustafar_c")).collect();
    assert_eq!(opaque_aside.len(), in_header);
    for (name, _, _) in structures() {
        assert!(header.contains(&format!("typedef struct {name} {{")), "{name}");
    }
}

/// C source that fails to compile where the header disagrees with the Rust side. `check` is the static assertion.
fn assertions(check: &str) -> String {
    let mut source = "#include <mustafar.h>\n".to_owned();
    let mut assert = |condition: String| writeln!(source, "{check}({condition}, \"{condition}\");").unwrap();
    for (name, bytes, fields) in structures() {
        assert(format!("sizeof({name}) == {bytes}"));
        for (field, offset, size) in fields {
            assert(format!("offsetof({name}, {field}) == {offset}"));
            assert(format!("sizeof((({name} *)0)->{field}) == {size}"));
        }
    }
    for (status, name) in mustafar_status::ALL {
        assert(format!("MUSTAFAR_STATUS_{} == {}", name.to_str().unwrap(), status as i32));
    }
    for (name, code) in [
        ("MUSTAFAR_DTYPE_F16", DType::F16 as u32),
        ("MUSTAFAR_DTYPE_BF16", DType::Bf16 as u32),
        ("MUSTAFAR_DTYPE_F32", DType::F32 as u32),
        ("MUSTAFAR_VALUE_TYPE_F16", ValueType::F16 as u32),
        ("MUSTAFAR_VALUE_TYPE_BF16", ValueType::Bf16 as u32),
        ("MUSTAFAR_VALUE_TYPE_E4M3", ValueType::E4m3 as u32),
        ("MUSTAFAR_VALUE_TYPE_INT8", ValueType::Int8 as u32),
        ("MUSTAFAR_SPEED_FASTER", Speed::Faster as u32),
        ("MUSTAFAR_SPEED_EVEN", Speed::Even as u32),
        ("MUSTAFAR_SPEED_SLOWER", Speed::Slower as u32),
        ("MUSTAFAR_ROWS_UNIFORM", mustafar_rows::Uniform as u32),
        ("MUSTAFAR_ROWS_RAGGED", mustafar_rows::Ragged as u32),
        ("MUSTAFAR_BACKEND_CPU", mustafar_backend::Cpu as u32),
        ("MUSTAFAR_BACKEND_CUDA", mustafar_backend::Cuda as u32),
        ("MUSTAFAR_SELECTION_TOKEN", mustafar_selection::Token as u32),
        ("MUSTAFAR_SELECTION_TOKEN_REFERENCE_TIES", mustafar_selection::TokenReferenceTies as u32),
        ("MUSTAFAR_SELECTION_CHANNEL", mustafar_selection::Channel as u32),
        ("MUSTAFAR_STRATEGY_DEFAULT", mustafar_strategy::Default as u32),
        ("MUSTAFAR_STRATEGY_KT_MAG", Strategy::KtMag as u32),
        ("MUSTAFAR_STRATEGY_KT_OPA", Strategy::KtOpa as u32),
        ("MUSTAFAR_STRATEGY_KC_MAG", Strategy::KcMag as u32),
        ("MUSTAFAR_STRATEGY_THINK", Strategy::Think as u32),
        ("MUSTAFAR_STRATEGY_VT_MAG", Strategy::VtMag as u32),
        ("MUSTAFAR_STRATEGY_VT_OPA", Strategy::VtOpa as u32),
        ("MUSTAFAR_STRATEGY_VC_MAG", Strategy::VcMag as u32),
        ("MUSTAFAR_STRATEGY_VC_OPA", Strategy::VcOpa as u32),
        ("MUSTAFAR_STRATEGY_THINV", Strategy::Thinv as u32),
        ("MUSTAFAR_CENTER_MODE_NONE", mustafar_center_mode::None as u32),
        ("MUSTAFAR_CENTER_MODE_MEDIAN", mustafar_center_mode::Median as u32),
        ("MUSTAFAR_SINKS_NONE", MUSTAFAR_SINKS_NONE),
        ("MUSTAFAR_FORMAT_VERSION", format::FORMAT_VERSION),
        ("MUSTAFAR_PAGE_ALIGN", format::PAGE_ALIGN as u32),
    ] {
        assert(format!("{name} == {code}"));
    }
    source
}

fn compile(compiler: &str, standard: &str, file: &str, source: &str) {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(dir).unwrap();
    let path = dir.join(file);
    std::fs::write(&path, source).unwrap();
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    let mut command = Command::new(compiler);
    command.arg(standard).arg("-I").arg(include).args(["-fsyntax-only"]).arg(&path);
    let output = command.output().unwrap_or_else(|e| panic!("{compiler} is needed for this test: {e}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn c_agrees_on_sizes_offsets_and_codes() {
    compile("cc", "-std=c11", "layout.c", &assertions("_Static_assert"));
}

#[test]
fn cpp_agrees_on_sizes_offsets_and_codes() {
    compile("c++", "-std=c++11", "layout.cpp", &assertions("static_assert"));
}

#[test]
fn status_names_are_those_of_the_header() {
    let name = |code| {
        // SAFETY: a static string.
        unsafe { CStr::from_ptr(mustafar_status_name(code)) }
    };
    for (i, (status, expected)) in mustafar_status::ALL.into_iter().enumerate() {
        assert_eq!(status as usize, i, "codes count up from 0");
        assert_eq!(name(status as i32), expected);
    }
    for code in [-1, mustafar_status::ALL.len() as i32, i32::MIN, i32::MAX] {
        assert_eq!(name(code), c"UNKNOWN");
    }
}
