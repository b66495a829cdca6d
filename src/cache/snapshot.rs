//! Saving and restoring a sequence. "Snapshots" in `docs/format.md` is normative for the bytes.

use super::config::{CacheConfig, Geometry};
use super::sequences::{Progress, Sequence};
use super::{Cache, SequenceId};
use crate::error::{Error, Result};
use crate::format::FORMAT_VERSION;

const MAGIC: [u8; 8] = *b"MSTFSNAP";
const VERSION: u32 = 2;
/// Magic, two versions and the length, which every version has.
const PREFIX_BYTES: usize = 24;
const CRC_BYTES: usize = 4;

/// What a snapshot holds of one layer, checked.
struct LayerBytes<'a> {
    progress: Progress,
    center: &'a [u8],
    sinks: &'a [u8],
    pages: &'a [u8],
    window: &'a [u8],
}

/// The configuration that must agree, by name. `max_tokens` and `max_sequences` may differ.
fn fields(config: &CacheConfig) -> [(&'static str, u64); 15] {
    let keep = |format: crate::PageFormat| format.keep().unwrap_or(0);
    [
        ("layers", config.layers as u64),
        ("q_heads", config.q_heads as u64),
        ("kv_heads", config.kv_heads as u64),
        ("k.value_type", config.k.value_type() as u64),
        ("k.head_dim", config.k.head_dim() as u64),
        ("k.keep", keep(config.k) as u64),
        ("v.value_type", config.v.value_type() as u64),
        ("v.head_dim", config.v.head_dim() as u64),
        ("v.keep", keep(config.v) as u64),
        ("scaled_from", config.scaled_from as u64),
        ("page_tokens", config.k.page_tokens() as u64),
        ("window", config.window as u64),
        ("group", config.group as u64),
        ("sinks", config.sinks as u64),
        ("center", config.center.code()),
    ]
}

fn damaged<T>(reason: String) -> Result<T> {
    Err(Error::CorruptData { what: "snapshot", reason })
}

impl Cache {
    /// A sequence that can be saved: its layers have equally many tokens.
    fn saveable(&self, id: SequenceId) -> Result<&Sequence> {
        let sequence = self.sequences.get("sequence", id)?;
        let tokens = sequence.layers[0].tokens;
        match sequence.layers.iter().find(|l| l.tokens != tokens) {
            None => Ok(sequence),
            Some(other) => Err(Error::invalid(
                "sequence",
                format!("{} with layers of {tokens} and {} tokens", id.0, other.tokens),
                "a sequence whose layers have equally many tokens",
            )),
        }
    }

    pub(super) fn snapshot_bytes(&self, id: SequenceId) -> Result<usize> {
        let (config, geometry) = (&self.config, &self.geometry);
        let layers = &self.saveable(id)?.layers;
        let numbers = fields(config).len() + 1 + layers.len();
        let of_layer = |progress: &Progress| {
            let pages = progress.compressed.div_ceil(config.k.page_tokens());
            let center = if progress.compressed > 0 { geometry.center } else { 0 };
            let dense = progress.sinks(config) + progress.window(config);
            center + dense * geometry.token + pages * geometry.page
        };
        Ok(PREFIX_BYTES + numbers * size_of::<u64>() + layers.iter().map(of_layer).sum::<usize>() + CRC_BYTES)
    }

    pub(super) fn save_sequence(&self, id: SequenceId) -> Result<Vec<u8>> {
        let sequence = self.saveable(id)?;
        let (config, geometry) = (&self.config, &self.geometry);
        let tokens = sequence.layers[0].tokens;
        let bytes = self.snapshot_bytes(id)?;
        let mut out = Vec::with_capacity(bytes);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&(bytes as u64).to_le_bytes());
        for (_, value) in fields(config) {
            out.extend_from_slice(&value.to_le_bytes());
        }
        out.extend_from_slice(&(tokens as u64).to_le_bytes());
        for layer in &sequence.layers {
            out.extend_from_slice(&(layer.compressed as u64).to_le_bytes());
        }
        for (layer, &progress) in sequence.layers.iter().enumerate() {
            if progress.compressed > 0 {
                self.centers.read(
                    geometry.center_at(config, layer, sequence.row),
                    geometry.center,
                    &mut out,
                )?;
            }
            self.sinks.read(layer, sequence.row, progress.sinks(config), &mut out)?;
            self.save_pages(layer, progress.compressed, &sequence.pages, &mut out)?;
            self.windows.read(layer, sequence.row, progress.window(config), &mut out)?;
        }
        debug_assert_eq!(out.len() + CRC_BYTES, bytes);
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        Ok(out)
    }

    /// Appends the pages of one layer; rows past the compressed tokens become zero, so that equal sequences have
    /// equal snapshots and nothing of dropped tokens leaves the process.
    fn save_pages(&self, layer: usize, compressed: usize, pages: &[u32], out: &mut Vec<u8>) -> Result<()> {
        let page_tokens = self.config.k.page_tokens();
        for (i, &page) in pages[..compressed.div_ceil(page_tokens)].iter().enumerate() {
            let start = out.len();
            let at = layer * self.geometry.layer_pages + page as usize * self.geometry.page;
            self.pool.read(at, self.geometry.page, out)?;
            let rows = page_tokens.min(compressed - i * page_tokens);
            for head in out[start..].chunks_exact_mut(self.geometry.layouts.0.head_stride) {
                let (k, v) = head.split_at_mut(self.config.k.page_bytes());
                self.config.k.clear_rows(k, rows);
                self.config.v.clear_rows(v, rows);
            }
        }
        Ok(())
    }

    pub(super) fn restore_sequence(&mut self, snapshot: &[u8]) -> Result<SequenceId> {
        let layers = parse(&self.config, &self.geometry, snapshot)?;
        let compressed = layers.iter().map(|l| l.progress.compressed).max().unwrap_or(0);
        let needed = compressed.div_ceil(self.config.k.page_tokens());
        if needed > self.pages.free() {
            return Err(Error::CacheFull { what: "pages", needed, free: self.pages.free() });
        }
        self.sequences.check_room()?;
        let pages: Vec<u32> = (0..needed).map(|_| self.pages.take()).collect();
        let id = self.sequences.insert(pages, layers.iter().map(|l| l.progress).collect())?;
        let sequence = self.sequences.get("sequence", id)?;
        let row = sequence.row;
        for (layer, bytes) in layers.iter().enumerate() {
            self.centers.write(self.geometry.center_at(&self.config, layer, row), bytes.center)?;
            self.sinks.write(layer, row, bytes.progress.sinks(&self.config), bytes.sinks)?;
            self.windows.write(layer, row, bytes.progress.window(&self.config), bytes.window)?;
            for (&page, bytes) in sequence.pages.iter().zip(bytes.pages.chunks_exact(self.geometry.page)) {
                let at = layer * self.geometry.layer_pages + page as usize * self.geometry.page;
                self.pool.write(at, bytes)?;
            }
        }
        Ok(id)
    }
}

/// Checks everything a snapshot says. Allocates only what the configuration, not the snapshot, asks for.
fn parse<'a>(config: &CacheConfig, geometry: &Geometry, snapshot: &'a [u8]) -> Result<Vec<LayerBytes<'a>>> {
    let mut prefix = Reader { bytes: snapshot };
    if prefix.take(MAGIC.len())? != MAGIC {
        return damaged(format!("it does not start with {:?}", String::from_utf8_lossy(&MAGIC)));
    }
    let versions = [("version", VERSION), ("page format version", FORMAT_VERSION)];
    for (name, supported) in versions {
        let found = prefix.u32()?;
        if found != supported {
            return mismatch(format!("of {name} {found}"), format!("{name} {supported}"));
        }
    }
    let bytes = prefix.u64()?;
    if bytes != snapshot.len() as u64 {
        return damaged(format!("it has {} bytes and should have {bytes}", snapshot.len()));
    }
    let Some((body, crc)) = snapshot.split_last_chunk::<CRC_BYTES>().filter(|(b, _)| b.len() >= PREFIX_BYTES)
    else {
        return damaged(format!("it has {} bytes, too few for a checksum", snapshot.len()));
    };
    let (stored, found) = (u32::from_le_bytes(*crc), crc32fast::hash(body));
    if stored != found {
        return damaged(format!("its checksum is {stored:#010x}, that of its bytes {found:#010x}"));
    }

    let mut reader = Reader { bytes: &body[PREFIX_BYTES..] };
    for (name, expected) in fields(config) {
        let found = reader.u64()?;
        if found != expected {
            return mismatch(
                format!("of a cache with {name} {found}"),
                format!("{name} {expected}, as in this cache"),
            );
        }
    }
    let tokens = reader.size()?;
    let progress = (0..config.layers)
        .map(|layer| check_progress(config, layer, Progress { tokens, compressed: reader.size()? }))
        .collect::<Result<Vec<_>>>()?;
    let layers = progress
        .into_iter()
        .enumerate()
        .map(|(layer, progress)| {
            let pages = progress.compressed.div_ceil(config.k.page_tokens());
            let bytes = LayerBytes {
                progress,
                center: reader.take(if pages > 0 { geometry.center } else { 0 })?,
                sinks: reader.items(progress.sinks(config), geometry.token)?,
                pages: reader.items(pages, geometry.page)?,
                window: reader.items(progress.window(config), geometry.token)?,
            };
            check_pages(config, geometry, layer, &bytes)?;
            Ok(bytes)
        })
        .collect::<Result<Vec<_>>>()?;
    match reader.bytes.len() {
        0 => Ok(layers),
        n => damaged(format!("{n} bytes follow the last layer")),
    }
}

fn mismatch<T>(found: String, supported: String) -> Result<T> {
    Err(Error::VersionMismatch { what: "snapshot", found, supported })
}

/// Lengths that a cache of this configuration can reach.
fn check_progress(config: &CacheConfig, layer: usize, progress: Progress) -> Result<Progress> {
    let Progress { tokens, compressed } = progress;
    let dense_at_most = config.window + config.group - 1;
    if compressed > tokens - progress.sinks(config) || progress.window(config) > dense_at_most {
        return damaged(format!(
            "layer {layer} has {tokens} tokens of which {compressed} are compressed; sinks are {}, the window holds \
             at most {dense_at_most}",
            config.sinks
        ));
    }
    Ok(progress)
}

fn check_pages(
    config: &CacheConfig,
    geometry: &Geometry,
    layer: usize,
    bytes: &LayerBytes<'_>,
) -> Result<()> {
    let page_tokens = config.k.page_tokens();
    for (i, page) in bytes.pages.chunks_exact(geometry.page).enumerate() {
        let rows = page_tokens.min(bytes.progress.compressed - i * page_tokens);
        for (head, page) in page.chunks_exact(geometry.layouts.0.head_stride).enumerate() {
            let (k, v) = page.split_at(config.k.page_bytes());
            for (side, format, page) in [("K", config.k, k), ("V", config.v, v)] {
                if let Err(Error::CorruptData { reason, .. }) = format.validate(page, rows) {
                    return damaged(format!("layer {layer}, {side} page {i} of head {head}: {reason}"));
                }
            }
        }
    }
    Ok(())
}

/// Little-endian values from the front of a slice.
struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        match self.bytes.split_at_checked(n) {
            Some((taken, rest)) => {
                self.bytes = rest;
                Ok(taken)
            }
            None => damaged(format!("it ends {} bytes early", n - self.bytes.len())),
        }
    }

    fn items(&mut self, n: usize, bytes: usize) -> Result<&'a [u8]> {
        match n.checked_mul(bytes) {
            Some(n) => self.take(n),
            None => damaged(format!("it claims {n} items of {bytes} bytes")),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn size(&mut self) -> Result<usize> {
        let value = self.u64()?;
        match usize::try_from(value) {
            Ok(size) => Ok(size),
            Err(_) => damaged(format!("it has a length of {value}")),
        }
    }
}
