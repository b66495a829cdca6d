//! Reader of GGUF files, versions 2 and 3, little-endian.
//!
//! The header is untrusted: every count is checked against the bytes that are left in the file before anything is
//! allocated, so a damaged file costs an error message and no more. Tensor data is read on demand.

use super::error::{Error, Result};
use super::quant::{self, TensorType};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// Elements of a metadata array at most; the largest real ones are vocabularies of some 256 Ki entries.
const MAX_ARRAY: u64 = 1 << 24;
/// Metadata entries, and tensors, at most.
const MAX_ENTRIES: u64 = 1 << 16;
/// Alignment of tensor data when `general.alignment` is absent.
const DEFAULT_ALIGNMENT: u64 = 32;

/// A metadata value. All integer types become `Int`, both float types `Float`.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Int(i64),
    Float(f64),
    Bool(bool),
    Str(String),
    Ints(Vec<i64>),
    Floats(Vec<f64>),
    Bools(Vec<bool>),
    Strs(Vec<String>),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Int(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a bool",
            Self::Str(_) => "a string",
            Self::Ints(_) => "an array of integers",
            Self::Floats(_) => "an array of floats",
            Self::Bools(_) => "an array of bools",
            Self::Strs(_) => "an array of strings",
        }
    }
}

/// Where a tensor lies and how it is coded.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Elements per dimension, innermost first.
    pub dims: Vec<usize>,
    /// Code of the file; [`TensorInfo::tensor_type`] says whether it is one that can be read.
    code: u32,
    /// Bytes from the start of the tensor data.
    offset: u64,
}

impl TensorInfo {
    fn tensor_type(&self, name: &str) -> Result<TensorType> {
        TensorType::from_code(self.code).ok_or_else(|| {
            Error::unsupported(
                format!("type of tensor {name}"),
                quant::code_name(self.code),
                TensorType::names(),
            )
        })
    }

    /// Number of elements. The reader has checked that it fits.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }
}

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf<R> {
    source: R,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
    data_start: u64,
}

impl Gguf<BufReader<File>> {
    pub fn open(path: &Path) -> Result<Self> {
        let named = |e| Error::io(format!("model file {}", path.display()), e);
        let file = File::open(path).map_err(named)?;
        let metadata = file.metadata().map_err(named)?;
        if !metadata.is_file() {
            return Err(Error::Invalid(format!("model file {} is not a regular file", path.display())));
        }
        Self::read(BufReader::with_capacity(1 << 20, file), metadata.len())
    }
}

impl<R: Read + Seek> Gguf<R> {
    /// Reads the header of a file of `len` bytes.
    pub fn read(source: R, len: u64) -> Result<Self> {
        let mut header = Header { source, at: 0, len };
        let magic: [u8; 4] = header.bytes("magic")?;
        if &magic != b"GGUF" {
            return Err(Error::damaged("GGUF file", format!("it starts with {magic:02x?}, not \"GGUF\"")));
        }
        let version = header.u32("version")?;
        if version != 2 && version != 3 {
            return Err(Error::unsupported("GGUF version", version, "2, 3 (little-endian)"));
        }
        // A tensor entry takes at least 24 bytes, a metadata entry at least 13.
        let tensor_count = header.count("tensor count", MAX_ENTRIES, 24)?;
        let entry_count = header.count("metadata count", MAX_ENTRIES, 13)?;

        let mut metadata = BTreeMap::new();
        for i in 0..entry_count {
            let key = header.string(&format!("key of metadata entry {i}"))?;
            let value = header.value(&key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(Error::damaged("GGUF file", format!("metadata key {key} occurs twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Int(n @ 8..=65536)) if n.count_ones() == 1 => *n as u64,
            Some(other) => {
                return Err(Error::damaged(
                    "GGUF file",
                    format!("general.alignment is {other:?}, not a power of two from 8 to 65536"),
                ));
            }
        };
        let mut tensors = BTreeMap::new();
        for i in 0..tensor_count {
            let name = header.string(&format!("name of tensor {i}"))?;
            let info = header.tensor_info(&name, alignment)?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(Error::damaged("GGUF file", format!("tensor {name} occurs twice")));
            }
        }
        let data_start = header.at.next_multiple_of(alignment);
        for (name, info) in &tensors {
            // Tensors of types that cannot be read are refused when someone asks for them.
            let Some(kind) = TensorType::from_code(info.code) else { continue };
            let bytes = kind.bytes_of(&info.dims).ok_or_else(|| {
                Error::damaged(format!("tensor {name}"), format!("its shape is {:?}", info.dims))
            })?;
            let end = data_start.checked_add(info.offset).and_then(|a| a.checked_add(bytes));
            if end.is_none_or(|end| end > len) {
                return Err(Error::damaged(
                    "GGUF file",
                    format!(
                        "tensor {name} needs {bytes} bytes at {data_start} + {}; the file has {len}: truncated?",
                        info.offset
                    ),
                ));
            }
        }
        Ok(Self { source: header.source, metadata, tensors, data_start })
    }

    /// A metadata value, if the key is there.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A string; an error if the key is missing or something else.
    pub fn str(&self, key: &str) -> Result<&str> {
        match self.get(key) {
            Some(Value::Str(s)) => Ok(s),
            other => Err(wrong(key, other, "a string")),
        }
    }

    /// An integer from `low` to `high`; `None` if the key is missing.
    pub fn int(&self, key: &str, low: usize, high: usize) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Int(n)) => match usize::try_from(*n) {
                Ok(n) if (low..=high).contains(&n) => Ok(Some(n)),
                _ => Err(Error::damaged("GGUF file", format!("{key} is {n}; allowed: {low} to {high}"))),
            },
            other => Err(wrong(key, other, "an integer")),
        }
    }

    /// As [`Gguf::int`], but the key must be there.
    pub fn required_int(&self, key: &str, low: usize, high: usize) -> Result<usize> {
        self.int(key, low, high)?.ok_or_else(|| wrong(key, None, "an integer"))
    }

    /// A float from `low` to `high`; `None` if the key is missing.
    pub fn float(&self, key: &str, low: f64, high: f64) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) if (low..=high).contains(x) => Ok(Some(*x)),
            Some(Value::Float(x)) => {
                Err(Error::damaged("GGUF file", format!("{key} is {x}; allowed: {low} to {high}")))
            }
            other => Err(wrong(key, other, "a float")),
        }
    }

    /// A bool; `None` if the key is missing.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            other => Err(wrong(key, other, "a bool")),
        }
    }

    /// An array of strings.
    pub fn strs(&self, key: &str) -> Result<&[String]> {
        match self.get(key) {
            Some(Value::Strs(s)) => Ok(s),
            other => Err(wrong(key, other, "an array of strings")),
        }
    }

    /// An array of integers.
    pub fn ints(&self, key: &str) -> Result<&[i64]> {
        match self.get(key) {
            Some(Value::Ints(s)) => Ok(s),
            other => Err(wrong(key, other, "an array of integers")),
        }
    }

    /// Names of all tensors.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape and place of a tensor, if it is there.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The coded bytes of a tensor whose dimensions (innermost first) must be `dims`.
    pub fn read_tensor(&mut self, name: &str, dims: &[usize]) -> Result<(TensorType, Vec<u8>)> {
        let info = self
            .tensors
            .get(name)
            .ok_or_else(|| Error::damaged("GGUF file", format!("tensor {name} is missing")))?;
        if info.dims != dims {
            return Err(Error::damaged(
                format!("tensor {name}"),
                format!("its shape is {:?}, the model's metadata ask for {dims:?}", info.dims),
            ));
        }
        let kind = info.tensor_type(name)?;
        let bytes = kind.bytes_of(dims).expect("checked when the header was read") as usize;
        let mut data = vec![0; bytes];
        self.source
            .seek(SeekFrom::Start(self.data_start + info.offset))
            .and_then(|_| self.source.read_exact(&mut data))
            .map_err(|e| Error::io(format!("reading tensor {name}"), e))?;
        Ok((kind, data))
    }
}

fn wrong(key: &str, found: Option<&Value>, wanted: &str) -> Error {
    let reason = match found {
        None => format!("metadata key {key} ({wanted}) is missing"),
        Some(value) => format!("metadata key {key} is {}, not {wanted}", value.kind()),
    };
    Error::damaged("GGUF file", reason)
}

/// Cursor over the header that knows how many bytes the file has.
struct Header<R> {
    source: R,
    at: u64,
    len: u64,
}

impl<R: Read> Header<R> {
    fn truncated(&self, what: &str, needed: u64) -> Error {
        Error::damaged(
            "GGUF file",
            format!("{what} at byte {} needs {needed} bytes; the file has {}: truncated?", self.at, self.len),
        )
    }

    fn fill(&mut self, what: &str, buffer: &mut [u8]) -> Result<()> {
        if buffer.len() as u64 > self.len - self.at {
            return Err(self.truncated(what, buffer.len() as u64));
        }
        self.source.read_exact(buffer).map_err(|e| Error::io(format!("reading {what}"), e))?;
        self.at += buffer.len() as u64;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut buffer = [0; N];
        self.fill(what, &mut buffer)?;
        Ok(buffer)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes(what)?))
    }

    /// A number of things of at least `unit` bytes each that follow in the file.
    fn count(&mut self, what: &str, max: u64, unit: u64) -> Result<u64> {
        let n = self.u64(what)?;
        if n > max {
            return Err(Error::damaged("GGUF file", format!("{what} is {n}; allowed: 0 to {max}")));
        }
        if n * unit > self.len - self.at {
            return Err(self.truncated(&format!("{what} of {n}"), n * unit));
        }
        Ok(n)
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let n = self.count(&format!("length of {what}"), MAX_ARRAY, 1)?;
        let mut buffer = vec![0; n as usize];
        self.fill(what, &mut buffer)?;
        String::from_utf8(buffer).map_err(|_| Error::damaged("GGUF file", format!("{what} is not UTF-8")))
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        const STRING: u32 = 8;
        const ARRAY: u32 = 9;
        match self.u32(key)? {
            STRING => Ok(Value::Str(self.string(key)?)),
            ARRAY => {
                let kind = self.u32(key)?;
                if kind == STRING {
                    let n = self.count(&format!("length of {key}"), MAX_ARRAY, 8)?;
                    return Ok(Value::Strs((0..n).map(|_| self.string(key)).collect::<Result<_>>()?));
                }
                let unit = scalar_bytes(kind, key)?;
                let n = self.count(&format!("length of {key}"), MAX_ARRAY, unit)?;
                self.array(kind, n, key)
            }
            kind => self.scalar(kind, key),
        }
    }

    fn array(&mut self, kind: u32, n: u64, key: &str) -> Result<Value> {
        let (mut ints, mut floats, mut bools) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..n {
            match self.scalar(kind, key)? {
                Value::Float(x) => floats.push(x),
                Value::Bool(b) => bools.push(b),
                Value::Int(i) => ints.push(i),
                _ => unreachable!("scalar() returns scalars"),
            }
        }
        Ok(match kind {
            6 | 12 => Value::Floats(floats),
            7 => Value::Bools(bools),
            _ => Value::Ints(ints),
        })
    }

    fn scalar(&mut self, kind: u32, key: &str) -> Result<Value> {
        let mut raw = [0; 8];
        let bytes = scalar_bytes(kind, key)? as usize;
        self.fill(key, &mut raw[..bytes])?;
        let bits = u64::from_le_bytes(raw);
        Ok(match kind {
            0 | 2 | 4 => Value::Int(bits as i64),
            1 => Value::Int(i64::from(bits as i8)),
            3 => Value::Int(i64::from(bits as i16)),
            5 => Value::Int(i64::from(bits as i32)),
            11 => Value::Int(bits as i64),
            10 => Value::Int(i64::try_from(bits).map_err(|_| {
                Error::damaged("GGUF file", format!("{key} is {bits}; allowed: 0 to {}", i64::MAX))
            })?),
            6 => Value::Float(f64::from(f32::from_bits(bits as u32))),
            12 => Value::Float(f64::from_bits(bits)),
            7 if bits <= 1 => Value::Bool(bits == 1),
            _ => return Err(Error::damaged("GGUF file", format!("bool {key} has byte {bits:#04x}"))),
        })
    }

    fn tensor_info(&mut self, name: &str, alignment: u64) -> Result<TensorInfo> {
        let what = format!("tensor {name}");
        let n = self.u32(&what)?;
        if !(1..=4).contains(&n) {
            return Err(Error::damaged(what, format!("it has {n} dimensions; allowed: 1 to 4")));
        }
        let mut dims = Vec::with_capacity(n as usize);
        for _ in 0..n {
            let d = self.u64(&what)?;
            dims.push(
                usize::try_from(d)
                    .ok()
                    .filter(|&d| d > 0)
                    .ok_or_else(|| Error::damaged(&what, format!("it has a dimension of {d}")))?,
            );
        }
        if dims.iter().try_fold(1usize, |a, &d| a.checked_mul(d)).is_none() {
            return Err(Error::damaged(what, format!("its shape {dims:?} overflows 64 bits")));
        }
        let code = self.u32(&what)?;
        let offset = self.u64(&what)?;
        if !offset.is_multiple_of(alignment) {
            return Err(Error::damaged(what, format!("its offset {offset} is no multiple of {alignment}")));
        }
        Ok(TensorInfo { dims, code, offset })
    }
}

/// Bytes of a scalar metadata type.
fn scalar_bytes(kind: u32, key: &str) -> Result<u64> {
    match kind {
        0 | 1 | 7 => Ok(1),
        2 | 3 => Ok(2),
        4..=6 => Ok(4),
        10..=12 => Ok(8),
        9 => Err(Error::unsupported(format!("metadata {key}"), "an array of arrays", "arrays of scalars")),
        _ => Err(Error::damaged("GGUF file", format!("metadata {key} has type code {kind}; known: 0 to 12"))),
    }
}
