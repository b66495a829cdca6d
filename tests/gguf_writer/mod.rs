//! Writes GGUF files, good ones and such as no sane writer would write.
#![allow(dead_code, unreachable_pub, reason = "each test uses its own part of this module")]
#![allow(clippy::unwrap_used)]

/// Codes of metadata types.
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;

/// A metadata entry or tensor as bytes, so that tests can write what no sane writer would.
#[derive(Clone)]
pub struct Entry {
    pub name: String,
    /// Type code and value, or number of dimensions to type code.
    pub body: Vec<u8>,
    /// Tensor data; offsets follow from it.
    pub data: Option<Vec<u8>>,
}

pub fn text(s: &str) -> Vec<u8> {
    [&(s.len() as u64).to_le_bytes(), s.as_bytes()].concat()
}

pub fn entry(name: &str, kind: u32, value: &[u8]) -> Entry {
    Entry { name: name.into(), body: [&kind.to_le_bytes(), value].concat(), data: None }
}

pub fn string(name: &str, value: &str) -> Entry {
    entry(name, STRING, &text(value))
}

pub fn int(name: &str, value: u32) -> Entry {
    entry(name, 4, &value.to_le_bytes())
}

pub fn float(name: &str, value: f32) -> Entry {
    entry(name, 6, &value.to_le_bytes())
}

pub fn array(name: &str, kind: u32, len: usize, values: &[u8]) -> Entry {
    entry(name, ARRAY, &[&kind.to_le_bytes(), &(len as u64).to_le_bytes()[..], values].concat())
}

pub fn tensor(name: &str, dims: &[usize], code: u32, data: Vec<u8>) -> Entry {
    let mut body = (dims.len() as u32).to_le_bytes().to_vec();
    dims.iter().for_each(|d| body.extend((*d as u64).to_le_bytes()));
    body.extend(code.to_le_bytes());
    Entry { name: name.into(), body, data: Some(data) }
}

/// Puts a file together; tensor data on 32 bytes.
pub fn file(metadata: &[Entry], tensors: &[Entry]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for e in metadata {
        out.extend(text(&e.name));
        out.extend(&e.body);
    }
    let mut data = Vec::new();
    for t in tensors {
        out.extend(text(&t.name));
        out.extend(&t.body);
        out.extend((data.len() as u64).to_le_bytes());
        data.extend(t.data.as_ref().unwrap());
        data.resize(data.len().next_multiple_of(32), 0);
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend(data);
    out
}
