//! What the shared library offers and needs: the exported symbols are exactly `include/mustafar.symbols`, the SONAME
//! changes with the ABI, and nothing but the C library is required at load time.
//! `MUSTAFAR_BLESS=1 cargo test --test exports` writes the list.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Cargo builds the cdylib beside the test programs.
fn library() -> PathBuf {
    let path = env::current_exe().unwrap().with_file_name("libmustafar.so");
    assert!(path.is_file(), "{} is missing", path.display());
    path
}

fn run(tool: &str, args: &[&str]) -> String {
    let output = Command::new(tool).args(args).arg(library()).output();
    let output = output.unwrap_or_else(|e| panic!("{tool} (binutils) is needed for this test: {e}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Values of one kind of entry of the dynamic section, such as "libc.so.6" of NEEDED.
fn dynamic(kind: &str) -> Vec<String> {
    let text = run("readelf", &["-d", "-W"]);
    let lines = text.lines().filter(|line| line.contains(&format!("({kind})")));
    lines.map(|line| line.rsplit_once('[').unwrap().1.trim_end_matches(']').to_owned()).collect()
}

#[test]
fn exported_symbols_equal_the_list() {
    let text = run("nm", &["-D", "--defined-only"]);
    let mut exported: Vec<&str> = text.lines().map(|line| line.rsplit(' ').next().unwrap()).collect();
    exported.sort_unstable();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/mustafar.symbols");
    if env::var_os("MUSTAFAR_BLESS").is_some() {
        fs::write(&path, exported.join("\n") + "\n").unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap();
    let committed: Vec<&str> = committed.lines().collect();
    assert_eq!(exported, committed, "bless with MUSTAFAR_BLESS=1 if the change of the ABI is meant");
}

#[test]
fn list_and_header_name_the_same_functions() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let header = fs::read_to_string(root.join("include/mustafar.h")).unwrap();
    let list = fs::read_to_string(root.join("include/mustafar.symbols")).unwrap();
    let declarations = header.split_once("extern \"C\" {").unwrap().1;
    let mut declared: Vec<&str> = declarations
        .split("MUSTAFAR_API")
        .filter_map(|text| text.split_once('(')?.0.rsplit([' ', '*']).next())
        .filter(|name| name.starts_with("mustafar_"))
        .collect();
    declared.sort_unstable();
    assert_eq!(declared, list.lines().collect::<Vec<_>>());
}

#[test]
fn needs_no_cuda_and_no_cpp_runtime() {
    let needed = dynamic("NEEDED");
    assert!(!needed.is_empty());
    let base = ["libc.so.6", "libgcc_s.so.1", "libm.so.6", "libdl.so.2", "libpthread.so.0"];
    for library in &needed {
        let allowed = base.contains(&library.as_str()) || library.starts_with("ld-linux");
        assert!(allowed, "{library} would be required at load time; NEEDED is {needed:?}");
    }
}

#[test]
fn soname_follows_the_version() {
    let (major, minor) = (env!("CARGO_PKG_VERSION_MAJOR"), env!("CARGO_PKG_VERSION_MINOR"));
    let abi = if major == "0" { format!("0.{minor}") } else { major.to_owned() };
    assert_eq!(dynamic("SONAME"), [format!("libmustafar.so.{abi}")]);
}
