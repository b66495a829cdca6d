//! The C, C++ and Python examples, as a user builds them: against an installed library, found by pkg-config and by
//! CMake, with warnings as errors, plain and under AddressSanitizer and UndefinedBehaviorSanitizer.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr)]

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

/// Whether the programs are installed. Where one is missing the test says so and passes; `MUSTAFAR_REQUIRE_TOOLS=1`
/// makes it fail. CI sets it.
fn has(programs: &[&str]) -> bool {
    let missing = |program: &&&str| Command::new(program).arg("--version").output().is_err();
    let Some(program) = programs.iter().find(missing) else { return true };
    let required = env::var("MUSTAFAR_REQUIRE_TOOLS").is_ok_and(|v| v == "1");
    assert!(!required, "{program} is not installed");
    eprintln!("SKIPPED: {program} is not installed; MUSTAFAR_REQUIRE_TOOLS=1 makes this an error");
    false
}

/// A Python with numpy: the one on the path if it has it, else a virtual environment that pip fills.
fn python() -> PathBuf {
    let system = PathBuf::from("python3");
    let has_numpy = |python: &Path| {
        Command::new(python).args(["-c", "import numpy"]).output().is_ok_and(|o| o.status.success())
    };
    if has_numpy(&system) {
        return system;
    }
    let dir = scratch("python");
    let python = dir.join("bin/python");
    if !has_numpy(&python) {
        run("python3 with venv", Command::new(&system).args(["-m", "venv"]).arg(&dir));
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "numpy"];
        run("pip and a network, or numpy", Command::new(&python).args(pip));
    }
    python
}

/// Refuses that an example says it skips for want of a GPU, where one is required.
fn check_cuda(text: &str) {
    let required = env::var("MUSTAFAR_REQUIRE_GPU").is_ok_and(|v| v == "1");
    if text.contains("SKIPPED on CUDA: ") {
        assert!(!required, "{text}");
        eprintln!("SKIPPED on CUDA; MUSTAFAR_REQUIRE_GPU=1 makes this an error:\n{text}");
    } else {
        assert!(text.contains("largest"), "{text}");
    }
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
    if !has(&["make", "pkg-config"]) {
        return;
    }
    let text = make("examples", false);
    check_output(&text);
    let (_, cuda) = text.split_once("/cuda\n").unwrap();
    check_cuda(cuda.lines().next().unwrap());
}

#[test]
fn c_and_cpp_under_sanitizers() {
    if !has(&["make", "pkg-config"]) {
        return;
    }
    check_output(&make("examples-sanitized", true));
    // A flag that got lost would pass silently.
    for program in ["attend", "engine", "cuda", "cache"] {
        let symbols =
            run("nm (binutils)", Command::new("nm").arg(scratch("examples-sanitized").join(program)));
        for part in ["__asan_init", "__ubsan_handle"] {
            assert!(symbols.contains(part), "{program} was built without {part}");
        }
    }
}

#[test]
fn c_and_cpp_with_cmake() {
    if !has(&["make", "cmake"]) {
        return;
    }
    let build = scratch("examples-cmake");
    let needs = "cmake, make and a C and C++ compiler";
    let mut configure = Command::new("cmake");
    configure.arg("-S").arg(Path::new(ROOT).join("ffi-examples")).arg("-B").arg(&build);
    configure.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix().display())).arg("-DCMAKE_BUILD_TYPE=Release");
    run(needs, &mut configure);
    run(needs, Command::new("cmake").arg("--build").arg(&build));
    let text = run(needs, Command::new("ctest").arg("--output-on-failure").arg("--test-dir").arg(&build));
    assert!(text.contains("5/5 Test") && text.contains("100% tests passed"), "{text}");
}

#[test]
fn python_with_numpy() {
    let mut command = Command::new(python());
    command.arg(Path::new(ROOT).join("ffi-examples/python/attend.py"));
    command.env("MUSTAFAR_LIBRARY", prefix().join("lib/libmustafar.so"));
    let text = run("python3 with numpy", &mut command);
    for part in
        ["46.5 % of dense", "largest difference from numpy", "BUFFER_TOO_SMALL: workspace has 0 bytes"]
    {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
}

#[test]
fn python_with_torch() {
    // torch is large, so it is not fetched; without it Python still compiles the example, which then says why it skips.
    let mut command = Command::new("python3");
    command.arg(Path::new(ROOT).join("ffi-examples/python/cuda.py"));
    command.env("MUSTAFAR_LIBRARY", prefix().join("lib/libmustafar.so"));
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let text = [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned()).concat();
    let skipped = text.starts_with("SKIPPED on CUDA: ");
    assert_eq!(output.status.code(), Some(if skipped { 77 } else { 0 }), "{text}");
    check_cuda(&text);
}

/// The block of this language in README.md. (Its Rust is a doctest of the crate.)
fn readme(language: &str) -> &'static str {
    let (_, rest) = include_str!("../README.md").split_once(&format!("\n```{language}\n")).unwrap();
    rest.split_once("\n```").unwrap().0
}

#[test]
fn c_of_the_readme() {
    let (source, program) = (scratch("readme").join("readme.c"), scratch("readme").join("readme"));
    std::fs::write(&source, readme("c")).unwrap();
    let lib = prefix().join("lib");
    let mut cc = Command::new("cc");
    cc.args(["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsanitize=address,undefined"]);
    cc.arg("-I").arg(prefix().join("include")).arg(&source).arg("-o").arg(&program);
    cc.arg("-L").arg(&lib).arg("-lmustafar").arg(format!("-Wl,-rpath,{}", lib.display()));
    run("a C compiler", &mut cc);
    run("the program", &mut Command::new(&program));
}

#[test]
fn python_of_the_readme() {
    let script = scratch("readme").join("readme.py");
    std::fs::write(&script, readme("python")).unwrap();
    let mut command = Command::new(python());
    command.arg(&script).env("MUSTAFAR_LIBRARY", prefix().join("lib/libmustafar.so"));
    let text = run("python3", &mut command);
    assert!(text.contains("kept per row: 39"), "{text}");
}
