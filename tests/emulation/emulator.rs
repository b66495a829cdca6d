//! Builds the emulated kernels and runs launches on them. `host/main.cpp` is the other end.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::SystemTime;

use mustafar::DType;
use mustafar::variants::{HEAD_DIMS, VALUE_DTYPES};

/// Memory that a launch may touch. `buffer` numbers are indices into [`Launch::buffers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Buffer(pub(crate) usize);

/// One kernel launch.
#[derive(Debug, Clone, Default)]
pub(crate) struct Launch {
    pub(crate) kernel: String,
    pub(crate) grid: [usize; 3],
    pub(crate) block: usize,
    pub(crate) shared_bytes: usize,
    buffers: Vec<Vec<u8>>,
    params: Vec<u8>,
    /// Offset in the parameters, buffer, byte offset in the buffer.
    pointers: Vec<(usize, usize, usize)>,
}

impl Launch {
    pub(crate) fn new(kernel: String, grid: [usize; 3], block: usize) -> Self {
        Self { kernel, grid, block, ..Self::default() }
    }

    /// Adds memory with these contents.
    pub(crate) fn buffer(&mut self, bytes: &[u8]) -> Buffer {
        self.buffers.push(bytes.to_vec());
        Buffer(self.buffers.len() - 1)
    }

    /// What is in the `index`-th buffer.
    pub(crate) fn contents(&self, index: usize) -> &[u8] {
        &self.buffers[index]
    }

    /// The same launch with other contents in its `index`-th buffer.
    pub(crate) fn with_buffer(&self, index: usize, bytes: &[u8]) -> Self {
        let mut other = self.clone();
        other.set_buffer(Buffer(index), bytes);
        other
    }

    /// Other contents for one of its buffers.
    pub(crate) fn set_buffer(&mut self, buffer: Buffer, bytes: &[u8]) {
        assert_eq!(self.buffers[buffer.0].len(), bytes.len());
        self.buffers[buffer.0] = bytes.to_vec();
    }

    /// The next field of the parameter struct: a pointer, null for `None`.
    pub(crate) fn pointer(&mut self, to: Option<Buffer>) -> &mut Self {
        self.pointer_at(to, 0)
    }

    /// As [`Launch::pointer`], `offset` bytes into the buffer.
    pub(crate) fn pointer_at(&mut self, to: Option<Buffer>, offset: usize) -> &mut Self {
        if let Some(Buffer(buffer)) = to {
            self.pointers.push((self.params.len(), buffer, offset));
        }
        self.long(0)
    }

    /// The next field: an i64.
    pub(crate) fn long(&mut self, value: usize) -> &mut Self {
        self.params.extend((value as i64).to_le_bytes());
        self
    }

    /// The next field: an i32.
    pub(crate) fn int(&mut self, value: usize) -> &mut Self {
        self.params.extend(i32::try_from(value).unwrap().to_le_bytes());
        self
    }

    /// The next field: a float.
    pub(crate) fn float(&mut self, value: f32) -> &mut Self {
        self.params.extend(value.to_le_bytes());
        self
    }

    fn encode(&self, descending: bool, out: &mut Vec<u8>) {
        let number = |n: usize| (n as u64).to_le_bytes().to_vec();
        let bytes = |b: &[u8]| [&(b.len() as u64).to_le_bytes()[..], b].concat();
        out.extend(bytes(self.kernel.as_bytes()));
        for n in [self.grid[0], self.grid[1], self.grid[2], self.block, 1, 1, self.shared_bytes] {
            out.extend(number(n));
        }
        out.extend(number(usize::from(descending)));
        out.extend(number(self.buffers.len()));
        for buffer in &self.buffers {
            out.extend(bytes(buffer));
        }
        out.extend(bytes(&self.params));
        out.extend(number(self.pointers.len()));
        for (at, buffer, offset) in &self.pointers {
            out.extend([*at, *buffer, *offset].into_iter().flat_map(number));
        }
    }
}

/// What each launch left in its buffers.
pub(crate) struct Results(Vec<Vec<Vec<u8>>>);

impl Results {
    pub(crate) fn get(&self, launch: usize, buffer: Buffer) -> &[u8] {
        &self.0[launch][buffer.0]
    }
}

/// Runs the launches, once from the first thread and once from the last; the results must not differ.
pub(crate) fn run(launches: &[Launch]) -> Results {
    let [ascending, descending] = in_both_orders(launches);
    for ((a, d), launch) in ascending.iter().zip(&descending).zip(launches) {
        assert!(a == d, "{}: the result depends on the order of threads", launch.kernel);
    }
    Results(ascending)
}

/// Runs launches on damaged pages, whose results may be anything, for the accesses alone.
pub(crate) fn run_damaged(launches: &[Launch]) {
    in_both_orders(launches);
}

fn in_both_orders(launches: &[Launch]) -> [Vec<Vec<Vec<u8>>>; 2] {
    thread::scope(|scope| {
        let runs = [false, true].map(|descending| scope.spawn(move || run_in_order(launches, descending)));
        runs.map(|run| run.join().unwrap())
    })
}

fn run_in_order(launches: &[Launch], descending: bool) -> Vec<Vec<Vec<u8>>> {
    let mut input = (launches.len() as u64).to_le_bytes().to_vec();
    launches.iter().for_each(|launch| launch.encode(descending, &mut input));
    let mut child = Command::new(program())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A second thread, because the program writes results while input is left. If it fails it stops reading, and its
    // own message says why.
    let writer = thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the emulated kernels failed ({}):\n{messages}", output.status);
    let mut rest = &output.stdout[..];
    let mut take = |n: usize| {
        let (buffer, after) = rest.split_at(n);
        rest = after;
        buffer.to_vec()
    };
    let buffers = |launch: &Launch| launch.buffers.iter().map(|b| take(b.len())).collect();
    launches.iter().map(buffers).collect()
}

/// The program, built when it is older than a source.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(build)
}

fn build() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let host = root.join("tests/emulation/host");
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulation");
    let program = out.join("emulate");
    let headers =
        [host.clone(), host.join("mustafar"), root.join("csrc/mustafar"), root.join("csrc/kernels")];
    let newest = headers.iter().flat_map(|dir| files(dir)).map(|path| modified(&path)).max();
    let own = [modified(&host.join("kernels")), modified(&root.join("src/variants.rs"))].into_iter().max();
    if program.is_file() && Some(modified(&program)) > newest.max(own) {
        return program;
    }

    fs::create_dir_all(&out).unwrap();
    let variant = |dtype, dim| format!("MST_VARIANT({dtype}, {dim})\n");
    let variants = VALUE_DTYPES.iter().flat_map(|t| HEAD_DIMS.iter().map(move |dim| variant(t, dim)));
    fs::write(out.join("variants.inc"), variants.collect::<String>()).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    let mut sources =
        [host.clone(), host.join("kernels")].iter().flat_map(|dir| files(dir)).collect::<Vec<_>>();
    sources.retain(|path| path.extension().is_some_and(|e| e == "cpp"));
    let objects: Vec<PathBuf> =
        sources.iter().map(|s| out.join(s.file_stem().unwrap()).with_extension("o")).collect();
    let compile = |source: &Path, object: &Path| {
        let mut command = Command::new(&compiler);
        command.args(FLAGS).arg("-I").arg(&host).arg("-I").arg(root.join("csrc")).arg("-I").arg(&out);
        command.args(["-include", "cuda.h", "-c", "-o"]).arg(object).arg(source);
        command
    };
    let queue: Mutex<Vec<_>> = Mutex::new(sources.iter().zip(&objects).collect());
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..threads.min(sources.len()) {
            scope.spawn(|| {
                loop {
                    let Some((source, object)) = queue.lock().unwrap().pop() else { break };
                    check(compile(source, object));
                }
            });
        }
    });
    let mut link = Command::new(&compiler);
    link.args(FLAGS).args(["-no-pie", "-o"]).arg(&program).args(&objects);
    check(link);
    program
}

/// Unaligned and out-of-bounds accesses end the program; so does every warning.
const FLAGS: [&str; 11] = [
    "-std=c++17",
    "-ffp-contract=off",
    "-O1",
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
];

fn check(mut command: Command) {
    let output = command.output().unwrap_or_else(|e| {
        panic!(
            "{}: {e}; the emulation tests need a C++ compiler, g++ or $CXX",
            command.get_program().display()
        )
    });
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect()
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).and_then(|m| m.modified()).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Little-endian bytes of a slice of numbers.
pub(crate) fn le<T: Copy, const N: usize>(values: &[T], encode: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&v| encode(v)).collect()
}

/// Floats from little-endian bytes.
pub(crate) fn floats(bytes: &[u8]) -> Vec<f64> {
    let one = |b: &[u8]| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    bytes.chunks_exact(4).map(one).collect()
}

/// The code of a tensor's dtype in parameter structs.
pub(crate) fn dtype_code(dtype: DType) -> usize {
    match dtype {
        DType::F16 => 1,
        DType::Bf16 => 2,
        _ => 3,
    }
}
