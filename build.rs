//! Compiles `csrc/kernels/*.cu` to one fatbin each when nvcc is found, and sets the SONAME.
//!
//! Environment: `MUSTAFAR_CUDA` = `auto` (default: build without kernels when nvcc is missing), `require`, `off`;
//! `MUSTAFAR_CUDA_ARCHS` = compute capabilities to generate code for, such as `80;90` (default: [`ARCHS`]). nvcc is
//! `$NVCC`, or in `$CUDA_HOME/bin`, `$CUDA_PATH/bin`, `PATH`, `/usr/local/cuda/bin`. Nothing is downloaded and nothing
//! is written outside `OUT_DIR`.

#![allow(clippy::print_stdout, unreachable_pub)]

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Mutex;
use std::thread;

#[allow(dead_code)]
mod variants {
    include!("src/variants.rs");
}

/// Machine code is generated for each of these, and PTX for the first, which the driver compiles for any newer GPU.
const ARCHS: [u32; 6] = [80, 86, 89, 90, 100, 120];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(mustafar_kernels)");
    set_soname();
    match kernels() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

/// `libmustafar.so.X.Y` while the major version is 0, `libmustafar.so.X` from 1.0 on: the part of the version that
/// changes whenever the ABI may.
fn set_soname() {
    if env::var("CARGO_CFG_TARGET_OS").as_deref() != Ok("linux") {
        return;
    }
    let part = |name: &str| env::var(name).unwrap_or_default();
    let (major, minor) = (part("CARGO_PKG_VERSION_MAJOR"), part("CARGO_PKG_VERSION_MINOR"));
    let abi = if major == "0" { format!("0.{minor}") } else { major };
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libmustafar.so.{abi}");
    // The library owns thread-local state; unloading it under a running thread is never safe.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}

/// Decides whether to build kernels, builds them, and writes `fatbins.rs`, a table of them for the code that loads them.
fn kernels() -> Result<(), String> {
    for name in ["MUSTAFAR_CUDA", "MUSTAFAR_CUDA_ARCHS", "NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    println!("cargo::rerun-if-changed=csrc");
    println!("cargo::rerun-if-changed=src/variants.rs");
    let required = match env::var("MUSTAFAR_CUDA").as_deref() {
        Err(_) | Ok("" | "auto") => false,
        Ok("require") => true,
        Ok("off") => return Ok(()),
        Ok(other) => return Err(format!("MUSTAFAR_CUDA is {other:?}; allowed: auto, require, off")),
    };
    let Some(nvcc) = find_nvcc() else {
        let why = "nvcc was not found in $NVCC, $CUDA_HOME/bin, $CUDA_PATH/bin, PATH or /usr/local/cuda/bin";
        if required {
            return Err(format!("MUSTAFAR_CUDA=require, but {why}"));
        }
        println!(
            "cargo::warning=building the CPU backend only: {why}. Install CUDA 13 or point CUDA_HOME at it for GPU \
             kernels; MUSTAFAR_CUDA=off silences this."
        );
        return Ok(());
    };
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| e.to_string())?);
    write_variants(&out)?;
    let names = compile_all(&nvcc, &archs()?, &out)?;
    let mut table = String::from("[\n");
    for name in &names {
        let path = out.join(format!("{name}.fatbin"));
        writeln!(table, "    Fatbin {{ name: {name:?}, bytes: include_bytes!({path:?}) }},")
            .map_err(|e| e.to_string())?;
    }
    table.push_str("]\n");
    fs::write(out.join("fatbins.rs"), table).map_err(|e| format!("fatbins.rs: {e}"))?;
    println!("cargo::rustc-cfg=mustafar_kernels");
    Ok(())
}

fn find_nvcc() -> Option<PathBuf> {
    if let Some(nvcc) = env::var_os("NVCC").filter(|v| !v.is_empty()) {
        return Some(PathBuf::from(nvcc));
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os)
        .map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let fallback = PathBuf::from("/usr/local/cuda/bin");
    homes.chain(env::split_paths(&path)).chain([fallback]).map(|dir| dir.join("nvcc")).find(|p| p.is_file())
}

fn archs() -> Result<Vec<u32>, String> {
    let Some(text) = env::var("MUSTAFAR_CUDA_ARCHS").ok().filter(|t| !t.trim().is_empty()) else {
        return Ok(ARCHS.to_vec());
    };
    text.split([';', ',', ' '])
        .filter(|part| !part.is_empty())
        .map(|part| match part.parse() {
            Ok(arch) if arch >= ARCHS[0] => Ok(arch),
            _ => Err(format!(
                "MUSTAFAR_CUDA_ARCHS has {part:?}; allowed: numbers from {} such as 80;90",
                ARCHS[0]
            )),
        })
        .collect()
}

/// `variants.inc`: one line per (value type, head dimension), which every kernel file includes to instantiate itself.
fn write_variants(out: &Path) -> Result<(), String> {
    let mut lines = String::new();
    for dtype in variants::VALUE_DTYPES {
        for dim in variants::HEAD_DIMS {
            writeln!(lines, "MST_VARIANT({dtype}, {dim})").map_err(|e| e.to_string())?;
        }
    }
    fs::write(out.join("variants.inc"), lines).map_err(|e| format!("variants.inc: {e}"))
}

/// Compiles every kernel file, as many at once as cargo allows. Returns their names, sorted.
fn compile_all(nvcc: &Path, archs: &[u32], out: &Path) -> Result<Vec<String>, String> {
    let mut sources = files("csrc/kernels")?;
    sources.retain(|path| path.extension().is_some_and(|e| e == "cu"));
    sources.sort();
    let ptx = ptx_steps()?;
    // In the order of their names: attention, which takes longest, comes early and does not end up as the last to run.
    let queue = Mutex::new(sources.iter());
    let failures = Mutex::new(Vec::new());
    let jobs = env::var("NUM_JOBS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1usize)
        .clamp(1, sources.len().max(1));
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(source) = queue.lock().ok().and_then(|mut q| q.next()) {
                    if let (Err(e), Ok(mut all)) = (compile(nvcc, archs, &ptx, source, out), failures.lock())
                    {
                        all.push(e);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().map_err(|e| e.to_string())?;
    if !failures.is_empty() {
        return Err(failures.join("\n").replace('\n', "\\n"));
    }
    Ok(sources.iter().filter_map(|s| Some(s.file_stem()?.to_str()?.to_owned())).collect())
}

/// The architectures from which on PTX differs: the first of [`ARCHS`], and what `csrc` compares `__CUDA_ARCH__` with. PTX
/// takes nvcc about half of its time, so the architectures between two steps share that of the lower one.
fn ptx_steps() -> Result<Vec<u32>, String> {
    let mut steps = vec![ARCHS[0]];
    for path in [files("csrc/kernels")?, files("csrc/mustafar")?].concat() {
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        for condition in text.replace("defined(__CUDA_ARCH__)", "").split("__CUDA_ARCH__").skip(1) {
            let bound = condition.strip_prefix(" >= ").or(condition.strip_prefix(" < "));
            let digits = bound.and_then(|text| text.split(|c: char| !c.is_ascii_digit()).next());
            match digits.and_then(|digits| digits.parse::<u32>().ok()) {
                Some(number) => steps.push(number / 10),
                None => {
                    return Err(format!(
                        "{}: compare __CUDA_ARCH__ with a number, by >= or <",
                        path.display()
                    ));
                }
            }
        }
    }
    Ok(steps)
}

fn files(dir: &str) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(dir).map_err(|e| format!("{dir}: {e}"))?;
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
}

/// One `.cu` to one fatbin. Warnings and register spills are errors; what ptxas says of registers and memory is kept
/// beside the fatbin as `NAME.ptxas`.
fn compile(nvcc: &Path, archs: &[u32], ptx: &[u32], source: &Path, out: &Path) -> Result<(), String> {
    let name = source.file_stem().and_then(|s| s.to_str()).ok_or("kernel file name is not UTF-8")?;
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "-O3", "-Werror", "all-warnings", "--compress-mode=balance"]);
    command.args(["-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]);
    command.arg("-Icsrc").arg("-I").arg(out);
    let ptx_of = |arch: u32| ptx.iter().copied().filter(|step| *step <= arch).max().unwrap_or(ARCHS[0]);
    for arch in archs {
        command.arg(format!("-gencode=arch=compute_{},code=sm_{arch}", ptx_of(*arch)));
    }
    let first = ptx_of(archs.first().copied().unwrap_or(ARCHS[0]));
    command.arg(format!("-gencode=arch=compute_{first},code=compute_{first}"));
    command.arg("-o").arg(out.join(format!("{name}.fatbin"))).arg(source);
    let result = command.output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&result.stderr);
    fs::write(out.join(format!("{name}.ptxas")), text.as_bytes())
        .map_err(|e| format!("{name}.ptxas: {e}"))?;
    if !result.status.success() {
        return Err(format!("nvcc failed on {}:\n{text}", source.display()));
    }
    let spills =
        |line: &&str| line.contains("spill stores") && !line.contains(" 0 bytes spill stores, 0 bytes spill");
    match text.lines().find(spills) {
        Some(line) => Err(format!("{} spills registers: {}", source.display(), line.trim())),
        None => Ok(()),
    }
}
