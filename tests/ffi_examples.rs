//! The C, C++ and Python examples, as a user builds them: against an installed library, found by pkg-config and by
//! CMake, with warnings as errors, plain and under AddressSanitizer and UndefinedBehaviorSanitizer.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Runs a command; its output. `needs` says what to install if the program is missing.
fn run(needs: &str, command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}; this test needs {needs}"));
    let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    assert!(output.status.success(), "{command:?} ended with {}:\n{text}", output.status);
    text
}

fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// The library that cargo built beside this test, installed once.
fn prefix() -> &'static Path {
    static PREFIX: OnceLock<PathBuf> = OnceLock::new();
    PREFIX.get_or_init(|| {
        let prefix = scratch("prefix");
        let build = env::current_exe().unwrap().parent().unwrap().to_owned();
        let script = Path::new(ROOT).join("packaging/install.sh");
        run("sh and install (coreutils)", Command::new(script).arg(&prefix).arg(build));
        prefix
    })
}

fn make(out: &str, sanitize: bool) -> String {
    let mut command = Command::new("make");
    command
        .args(["-C", "ffi-examples", "run"])
        .current_dir(ROOT)
        .arg(format!("OUT={}", scratch(out).display()))
        .arg(format!("PKG_CONFIG_PATH={}", prefix().join("lib/pkgconfig").display()))
        .arg(format!("SANITIZE={}", u8::from(sanitize)));
    run("make, pkg-config and a C and C++ compiler", &mut command)
}

/// Each example has compared its answers and shown one refusal.
fn check_output(text: &str) {
    for part in [
        "46.5 % of dense; largest difference",
        "refused: q.tokens is 2; allowed: a multiple of batch (3)",
        "632 tokens, 512 of them in pages",
        "365568 bytes in pages",
        "refused: INVALID_ARGUMENT: sequence is",
    ] {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
}

#[test]
fn c_and_cpp_with_pkg_config() {
    check_output(&make("examples", false));
}

#[test]
fn c_and_cpp_under_sanitizers() {
    check_output(&make("examples-sanitized", true));
    // A flag that got lost would pass silently.
    for program in ["attend", "engine", "cache"] {
        let symbols =
            run("nm (binutils)", Command::new("nm").arg(scratch("examples-sanitized").join(program)));
        for part in ["__asan_init", "__ubsan_handle"] {
            assert!(symbols.contains(part), "{program} was built without {part}");
        }
    }
}

#[test]
fn c_and_cpp_with_cmake() {
    let build = scratch("examples-cmake");
    let needs = "cmake, make and a C and C++ compiler";
    let mut configure = Command::new("cmake");
    configure.arg("-S").arg(Path::new(ROOT).join("ffi-examples")).arg("-B").arg(&build);
    configure.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix().display())).arg("-DCMAKE_BUILD_TYPE=Release");
    run(needs, &mut configure);
    run(needs, Command::new("cmake").arg("--build").arg(&build));
    let text = run(needs, Command::new("ctest").arg("--output-on-failure").arg("--test-dir").arg(&build));
    assert!(text.contains("4/4 Test") && text.contains("100% tests passed"), "{text}");
}

#[test]
fn python_with_numpy() {
    let python = "python3";
    let numpy = Command::new(python).args(["-c", "import numpy"]).output();
    let found = numpy.is_ok_and(|output| output.status.success());
    assert!(found, "this test needs python3 with numpy: {python} -m pip install numpy");
    let mut command = Command::new(python);
    command.arg(Path::new(ROOT).join("ffi-examples/python/attend.py"));
    command.env("MUSTAFAR_LIBRARY", prefix().join("lib/libmustafar.so"));
    let text = run("python3 with numpy", &mut command);
    for part in
        ["46.5 % of dense", "largest difference from numpy", "BUFFER_TOO_SMALL: workspace has 0 bytes"]
    {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
}
