//! `include/mustafar.h` is what `src/capi` says: it is generated here and compared with the committed file, and it
//! compiles under every C and C++ standard from C99 and C++11 on. `MUSTAFAR_BLESS=1 cargo test --test headers` writes
//! it.
#![allow(clippy::unwrap_used, clippy::panic)]

use cbindgen::{Builder, Config, DocumentationStyle, Language, RenameRule, Style};
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

/// In the order in which a reader wants them. `cache/mod.rs` brings its submodules.
const SOURCES: [&str; 22] = [
    "src/dtype.rs",
    "src/format.rs",
    "src/capi/version.rs",
    "src/capi/status.rs",
    "src/capi/error.rs",
    "src/capi/format.rs",
    "src/capi/strategy.rs",
    "src/capi/context.rs",
    "src/capi/tensor.rs",
    "src/capi/pool.rs",
    "src/capi/ops/prune.rs",
    "src/capi/ops/score.rs",
    "src/capi/ops/append.rs",
    "src/capi/ops/compress.rs",
    "src/capi/ops/decompress.rs",
    "src/capi/ops/validate.rs",
    "src/capi/ops/attend.rs",
    "src/ops/attend/advice.rs",
    "src/capi/ops/advice.rs",
    "src/capi/ops/spmv.rs",
    "src/capi/ops/merge.rs",
    "src/capi/cache/mod.rs",
];

const INTRODUCTION: &str = "\
/*
 * mustafar: decode attention on a pruned, bitmap-compressed KV cache.
 * SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * Generated from src/capi by `MUSTAFAR_BLESS=1 cargo test --test headers`; do not edit. docs/c-api.md is the manual.
 *
 * - Start a structure from its _INIT macro: it sets struct_size and zeroes the rest, and zero means \"default\" or
 *   \"not given\". Structures only grow at the end; programs compiled with an older header keep working.
 * - Data pointers (tensors, pages, arrays in structures, workspace) point into the memory of the context: host memory
 *   on the CPU backend. Structures themselves, sequence numbers, sizes and snapshots are host memory always.
 * - Every call but a few that cannot fail returns a mustafar_status; mustafar_last_error_message() says in words what
 *   was wrong. Unless a call says otherwise, a failing one has written to none of its outputs.
 * - Counts, sizes of dimensions and strides are int64_t so that a negative one is refused, not taken for a huge one.
 */
";

fn config() -> Config {
    let mut config = Config {
        language: Language::C,
        header: Some(INTRODUCTION.to_owned()),
        include_guard: Some("MUSTAFAR_H".to_owned()),
        no_includes: true,
        sys_includes: vec!["stddef.h".to_owned(), "stdint.h".to_owned()],
        after_includes: Some(macros()),
        cpp_compat: true,
        usize_is_size_t: true,
        style: Style::Both,
        documentation_style: DocumentationStyle::Doxy,
        line_length: 120,
        tab_width: 4,
        ..Config::default()
    };
    config.function.prefix = Some("MUSTAFAR_API".to_owned());
    config.enumeration.prefix_with_name = true;
    config.enumeration.rename_variants = RenameRule::ScreamingSnakeCase;
    for (rust, c) in [
        ("DType", "mustafar_dtype"),
        ("ValueType", "mustafar_value_type"),
        ("Speed", "mustafar_speed"),
        ("FORMAT_VERSION", "MUSTAFAR_FORMAT_VERSION"),
        ("PAGE_ALIGN", "MUSTAFAR_PAGE_ALIGN"),
    ] {
        config.export.rename.insert(rust.to_owned(), c.to_owned());
    }
    // Enums travel as uint32_t, so no function refers to their types.
    for name in [
        "DType",
        "ValueType",
        "Speed",
        "mustafar_rows",
        "mustafar_backend",
        "mustafar_selection",
        "mustafar_strategy",
        "mustafar_center_mode",
    ] {
        config.export.include.push(name.to_owned());
    }
    config
}

/// Linkage and version macros; the version is the crate's.
fn macros() -> String {
    let (version, major, minor, patch) = (
        env!("CARGO_PKG_VERSION"),
        env!("CARGO_PKG_VERSION_MAJOR"),
        env!("CARGO_PKG_VERSION_MINOR"),
        env!("CARGO_PKG_VERSION_PATCH"),
    );
    format!(
        "
/* Define before including to decorate the declarations. */
#ifndef MUSTAFAR_API
#define MUSTAFAR_API
#endif

/* Version of this header; mustafar_version() and mustafar_version_number() give the library's. */
#define MUSTAFAR_VERSION \"{version}\"
#define MUSTAFAR_VERSION_MAJOR {major}
#define MUSTAFAR_VERSION_MINOR {minor}
#define MUSTAFAR_VERSION_PATCH {patch}
#define MUSTAFAR_VERSION_NUMBER \\
    (MUSTAFAR_VERSION_MAJOR * 1000000 + MUSTAFAR_VERSION_MINOR * 1000 + MUSTAFAR_VERSION_PATCH)"
    )
}

/// Comments of one line take one line.
fn shorten_comments(header: &str) -> String {
    let mut lines: Vec<&str> = header.lines().collect();
    let mut short = String::new();
    while let [first, rest @ ..] = lines.as_slice() {
        let indent = &first[..first.len() - first.trim_start().len()];
        match rest {
            [text, end, ..] if first.trim() == "/**" && end.trim() == "*/" => {
                writeln!(short, "{indent}/** {} */", text.trim().trim_start_matches("* ")).unwrap();
                lines.drain(..3);
            }
            _ => {
                writeln!(short, "{first}").unwrap();
                lines.drain(..1);
            }
        }
    }
    short
}

/// One macro per structure that initialises every field, so that no compiler warns of missing ones.
fn init_macros(header: &str) -> String {
    let mut text = "\n/* Initialisers: struct_size, and zero for every other field. */\n".to_owned();
    for (name, fields) in structs(header) {
        let zeros = ", 0".repeat(fields - 1);
        let line = format!("#define {}_INIT {{sizeof({name}){zeros}}}", name.to_uppercase());
        writeln!(text, "{line}").unwrap();
    }
    text
}

/// Names of the structures of the header and how many fields each has.
fn structs(header: &str) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for body in header.split("typedef struct ").skip(1) {
        let Some((name, rest)) = body.split_once(" {\n") else { continue };
        if name.contains(';') {
            continue;
        }
        let fields = rest.split_once("\n}").unwrap().0;
        found.push((name.to_owned(), fields.lines().filter(|line| line.ends_with(';')).count()));
    }
    found
}

fn generate() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let empty = Builder::new().with_config(config());
    let builder = SOURCES.iter().fold(empty, |b, source| b.with_src(root.join(source)));
    let mut bytes = Vec::new();
    builder.generate().expect("src/capi parses").write(&mut bytes);
    let header = shorten_comments(&String::from_utf8(bytes).unwrap());
    let end = "#endif  /* MUSTAFAR_H */";
    let (body, tail) = header.split_once(end).expect("cbindgen closes its guard so");
    format!("{body}{}\n{end}{tail}", init_macros(&header).trim_start_matches('\n'))
}

#[test]
fn header_is_what_the_source_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/mustafar.h");
    let generated = generate();
    if env::var_os("MUSTAFAR_BLESS").is_some() {
        // Renamed into place: the tests beside this one are compiling the header.
        let new = path.with_extension("new");
        fs::write(&new, &generated).unwrap();
        fs::rename(&new, &path).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap();
    let difference = committed.lines().zip(generated.lines()).enumerate().find(|(_, (a, b))| a != b);
    assert!(
        committed == generated,
        "include/mustafar.h differs from src/capi (first at {difference:?}); write it anew with MUSTAFAR_BLESS=1 \
         cargo test --test headers"
    );
}

/// Compiles a use of the header that touches every initialiser.
fn compile(compiler: &str, standard: &str, extension: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let header = fs::read_to_string(root.join("include/mustafar.h")).unwrap();
    let mut source = "#include <mustafar.h>\n#include <mustafar.h>\n".to_owned();
    for (name, _) in structs(&header) {
        let init = name.to_uppercase();
        writeln!(source, "extern const {name} x_{name};\nconst {name} x_{name} = {init}_INIT;").unwrap();
    }
    source.push_str(
        "int use(uint32_t *code);\nint use(uint32_t *code) {\n    code[0] = MUSTAFAR_DTYPE_BF16;\n    code[1] = MUSTAFAR_SINKS_NONE;\n\
         #if MUSTAFAR_VERSION_NUMBER < 1000\n#error version\n#endif\n    \
         return mustafar_context_create(NULL, NULL) == MUSTAFAR_STATUS_NULL_POINTER;\n}\n",
    );
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(dir).unwrap();
    let file = dir.join(format!("header_{}.{extension}", standard.replace('+', "p")));
    fs::write(&file, source).unwrap();
    let output = Command::new(compiler)
        .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-Wconversion", "-Wundef", "-Wredundant-decls"])
        .arg(format!("-std={standard}"))
        .arg("-I")
        .arg(root.join("include"))
        .args(["-c", "-o", "/dev/null"])
        .arg(&file)
        .output()
        .unwrap_or_else(|e| panic!("{compiler} is needed for this test: {e}"));
    assert!(output.status.success(), "{standard}:\n{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn header_compiles_as_c() {
    for standard in ["c99", "c11", "c17"] {
        compile("cc", standard, "c");
    }
}

#[test]
fn header_compiles_as_cpp() {
    for standard in ["c++11", "c++14", "c++17", "c++20"] {
        compile("c++", standard, "cpp");
    }
}
