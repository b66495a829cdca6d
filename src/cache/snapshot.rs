//! Saving and restoring a sequence. "Snapshots" in `docs/format.md` is normative for the bytes.

use super::config::CacheConfig;
use super::geometry::Geometry;
use super::sequences::{Progress, Recent, Scoring, Sequence};
use super::{Cache, SequenceId};
use crate::error::{Error, Result};
use crate::format::{FORMAT_VERSION, PageFormat};
use crate::ops::{RECENT_QUERIES, check};
use crate::strategy::Strategy;

const MAGIC: [u8; 8] = *b"MSTFSNAP";
const VERSION: u32 = 3;
/// Magic, two versions and the length, which every version has.
const PREFIX_BYTES: usize = 24;
const CRC_BYTES: usize = 4;

/// What a snapshot holds of one layer, checked.
struct LayerBytes<'a> {
    progress: Progress,
    center: &'a [u8],
    /// Weights of K and of V that are fixed.
    fixed: [&'a [u8]; 2],
    queries: &'a [u8],
    lse: &'a [u8],
    sinks: &'a [u8],
    pages: &'a [u8],
    window: &'a [u8],
}

/// The configuration that must agree, by name. `max_tokens` and `max_sequences` may differ.
fn fields(config: &CacheConfig) -> Vec<(&'static str, u64)> {
    let mut fields = vec![
        ("layers", config.layers as u64),
        ("q_heads", config.q_heads as u64),
        ("kv_heads", config.kv_heads as u64),
        ("k.value_type", config.k.value_type() as u64),
        ("k.head_dim", config.k.head_dim() as u64),
        ("k.strategy", config.k_strategy as u64),
        ("v.value_type", config.v.value_type() as u64),
        ("v.head_dim", config.v.head_dim() as u64),
        ("v.strategy", config.v_strategy as u64),
        ("scaled_from", config.scaled_from as u64),
        ("page_tokens", config.k.page_tokens() as u64),
        ("window", config.window as u64),
        ("group", config.group as u64),
        ("sinks", config.sinks as u64),
        ("center", config.center.code()),
    ];
    for (layer, head) in (0..config.layers).flat_map(|l| (0..config.kv_heads).map(move |h| (l, h))) {
        let (k, v) = config.formats(layer, head);
        fields.extend([("k.keep", keep(config.k_strategy, &k)), ("v.keep", keep(config.v_strategy, &v))]);
    }
    fields
}

/// Values of a row, or tokens of a channel in 32; 0 for what no cache has.
fn keep(strategy: Strategy, format: &PageFormat) -> u64 {
    strategy.keep("format", format).unwrap_or(0) as u64
}

/// Of the queries of a layer: end and count, scale, softcap, sliding window.
const QUERY_NUMBERS: usize = 5;

fn query_numbers(recent: Recent) -> [u64; QUERY_NUMBERS] {
    let Scoring { scale, softcap, sliding_window } = recent.scoring();
    // A scale of None is one that no finite number has the bits of.
    let float = |x: Option<f32>| u64::from(x.unwrap_or(f32::NAN).to_bits());
    [
        recent.end() as u64,
        recent.count() as u64,
        float(scale),
        float(softcap),
        sliding_window.unwrap_or(0) as u64,
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
        let of_queries = if config.needs_queries() { QUERY_NUMBERS } else { 0 };
        let numbers = fields(config).len() + 1 + (1 + of_queries) * layers.len();
        let of_layer = |(layer, progress): (usize, &Progress)| {
            let pages = progress.compressed.div_ceil(config.k.page_tokens());
            let weights = geometry.center + geometry.fixed[0] + geometry.fixed[1];
            let weights = if progress.compressed > 0 { weights } else { 0 };
            let queries = progress.recent.count() * (geometry.query + geometry.lse);
            let dense = progress.sinks(config) + progress.window(config);
            weights + queries + dense * geometry.token + pages * page_of_layer(geometry, layer)
        };
        let layers: usize = layers.iter().enumerate().map(of_layer).sum();
        Ok(PREFIX_BYTES + numbers * size_of::<u64>() + layers + CRC_BYTES)
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
        let remembering = sequence.layers.iter().filter(|_| config.needs_queries());
        for value in remembering.flat_map(|layer| query_numbers(layer.recent)) {
            out.extend_from_slice(&value.to_le_bytes());
        }
        for (layer, &progress) in sequence.layers.iter().enumerate() {
            let [queries, lse, k_weights, v_weights] = self.scores.rows();
            if progress.compressed > 0 {
                for rows in [&self.centers, k_weights, v_weights] {
                    rows.read(layer, sequence.row, 0, rows.bytes(), &mut out)?;
                }
            }
            for (rows, bytes) in [(queries, geometry.query), (lse, geometry.lse)] {
                for position in progress.recent.positions() {
                    rows.read(layer, sequence.row, position % RECENT_QUERIES * bytes, bytes, &mut out)?;
                }
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
        for segment in self.geometry.segments(layer) {
            let (k_layout, v_layout) = segment.layouts;
            for (i, &page) in pages[..compressed.div_ceil(page_tokens)].iter().enumerate() {
                let start = out.len();
                self.pool.read(segment.at(page as usize), segment.page(), out)?;
                let rows = page_tokens.min(compressed - i * page_tokens);
                if rows == page_tokens {
                    continue;
                }
                for head in out[start..].chunks_exact_mut(k_layout.head_stride) {
                    let (k, v) = head.split_at_mut(k_layout.format.page_bytes());
                    k_layout.format.clear_rows(k, rows);
                    v_layout.format.clear_rows(v, rows);
                }
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
            let [queries, lse, k_weights, v_weights] = self.scores.rows_mut();
            let [k_bytes, v_bytes] = bytes.fixed;
            for (rows, bytes) in
                [(&mut self.centers, bytes.center), (k_weights, k_bytes), (v_weights, v_bytes)]
            {
                rows.write(layer, row, 0, bytes)?;
            }
            let recent = bytes.progress.recent;
            for (rows, bytes, all) in
                [(queries, self.geometry.query, bytes.queries), (lse, self.geometry.lse, bytes.lse)]
            {
                for (i, position) in recent.positions().enumerate() {
                    let slot = position % RECENT_QUERIES * bytes;
                    rows.write(layer, row, slot, &all[i * bytes..][..bytes])?;
                }
            }
            self.sinks.write(layer, row, bytes.progress.sinks(&self.config), bytes.sinks)?;
            self.windows.write(layer, row, bytes.progress.window(&self.config), bytes.window)?;
            let mut rest = bytes.pages;
            for segment in self.geometry.segments(layer) {
                let held = bytes.progress.compressed.div_ceil(self.config.k.page_tokens());
                let (of_segment, after) = rest.split_at(held * segment.page());
                rest = after;
                for (&page, bytes) in sequence.pages.iter().zip(of_segment.chunks_exact(segment.page())) {
                    self.pool.write(segment.at(page as usize), bytes)?;
                }
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
    let mut progress = (0..config.layers)
        .map(|layer| {
            let progress = Progress { tokens, compressed: reader.size()?, ..Progress::default() };
            check_progress(config, layer, progress)
        })
        .collect::<Result<Vec<_>>>()?;
    if config.needs_queries() {
        for (layer, progress) in progress.iter_mut().enumerate() {
            progress.recent = read_queries(&mut reader, layer, tokens)?;
        }
    }
    let layers = progress
        .into_iter()
        .enumerate()
        .map(|(layer, progress)| {
            let pages = progress.compressed.div_ceil(config.k.page_tokens());
            let weights = |bytes| if pages > 0 { bytes } else { 0 };
            let queries = progress.recent.count();
            let bytes = LayerBytes {
                progress,
                center: reader.take(weights(geometry.center))?,
                fixed: [reader.take(weights(geometry.fixed[0]))?, reader.take(weights(geometry.fixed[1]))?],
                queries: reader.items(queries, geometry.query)?,
                lse: reader.items(queries, geometry.lse)?,
                sinks: reader.items(progress.sinks(config), geometry.token)?,
                pages: reader.items(pages, page_of_layer(geometry, layer))?,
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

/// One page number in one layer.
fn page_of_layer(geometry: &Geometry, layer: usize) -> usize {
    geometry.segments(layer).map(|segment| segment.page()).sum()
}

/// What [`query_numbers`] gives.
fn read_queries(reader: &mut Reader<'_>, layer: usize, tokens: usize) -> Result<Recent> {
    let (end, count) = (reader.size()?, reader.size()?);
    let float = |bits: u64| u32::try_from(bits).map(f32::from_bits).ok();
    let scalars = (float(reader.u64()?), float(reader.u64()?), reader.size()?);
    let (Some(scale), Some(softcap), window) = scalars else {
        return damaged(format!("layer {layer} has a scale or softcap of more than 32 bits"));
    };
    let given = |x: f32| (!x.is_nan()).then_some(x);
    let scoring = Scoring {
        scale: given(scale),
        softcap: given(softcap),
        sliding_window: (window > 0).then_some(window),
    };
    check::scalars(scoring.scale, scoring.softcap, scoring.sliding_window)
        .or_else(|error| damaged(format!("layer {layer}: {error}")))?;
    match Recent::new(end, count, scoring).filter(|recent| recent.end() <= tokens) {
        Some(recent) => Ok(recent),
        None => damaged(format!("layer {layer} has {count} queries before position {end} of {tokens}")),
    }
}

/// Lengths that a cache of this configuration can reach.
fn check_progress(config: &CacheConfig, layer: usize, progress: Progress) -> Result<Progress> {
    let Progress { tokens, compressed, .. } = progress;
    let dense_at_most = config.window + config.group - 1;
    let torn = config.is_channel() && !compressed.is_multiple_of(config.k.page_tokens());
    let too_many = compressed > tokens - progress.sinks(config);
    if torn || too_many || progress.window(config) > dense_at_most {
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
    let (mut rest, held) = (bytes.pages, bytes.progress.compressed.div_ceil(page_tokens));
    for segment in geometry.segments(layer) {
        let (of_segment, after) = rest.split_at(held * segment.page());
        rest = after;
        let (k_layout, v_layout) = segment.layouts;
        for (i, page) in of_segment.chunks_exact(segment.page()).enumerate() {
            let rows = page_tokens.min(bytes.progress.compressed - i * page_tokens);
            for (head, page) in (segment.heads.start..).zip(page.chunks_exact(k_layout.head_stride)) {
                let (k, v) = page.split_at(k_layout.format.page_bytes());
                for (side, format, page) in [("K", k_layout.format, k), ("V", v_layout.format, v)] {
                    if let Err(Error::CorruptData { reason, .. }) = format.validate(page, rows) {
                        return damaged(format!("layer {layer}, {side} page {i} of head {head}: {reason}"));
                    }
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
