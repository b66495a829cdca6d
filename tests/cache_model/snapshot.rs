//! Snapshots as `docs/format.md` prescribes them.

use super::Model;
use super::layer::{formats, keep};
use mustafar::reference::{self, Row};
use mustafar::{CacheConfig, CenterMode, SequenceId, Strategy};

impl Model {
    /// The bytes that "Snapshots" in `docs/format.md` prescribes.
    pub fn snapshot(&self, id: SequenceId) -> Vec<u8> {
        let c = &self.config;
        let layers = &self.live[&id].layers;
        let mut out = b"MSTFSNAP".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(2u32.to_le_bytes());
        out.extend([0; 8]);
        let mut numbers = vec![
            c.layers,
            c.q_heads,
            c.kv_heads,
            c.k.value_type() as usize,
            c.k.head_dim(),
            strategy_code(c.k_strategy),
            c.v.value_type() as usize,
            c.v.head_dim(),
            strategy_code(c.v_strategy),
            c.scaled_from as usize,
            c.k.page_tokens(),
            c.window,
            c.group,
            c.sinks,
            usize::from(c.center == CenterMode::Median),
        ];
        for (layer, head) in (0..c.layers).flat_map(|l| (0..c.kv_heads).map(move |h| (l, h))) {
            let (k, v) = formats(c, layer, head);
            numbers.extend([keep(k), keep(v)]);
        }
        numbers.push(layers[0].k.len());
        out.extend(numbers.iter().flat_map(|&n| (n as u64).to_le_bytes()));
        out.extend(layers.iter().flat_map(|l| (l.compressed as u64).to_le_bytes()));
        if c.k_strategy.needs_queries() || c.v_strategy.needs_queries() {
            for l in layers {
                let end = l.end;
                let (scale, softcap, window) = l.scoring;
                let float = |x: Option<f32>| u64::from(x.unwrap_or(f32::NAN).to_bits());
                let (end, window) = (end as u64, window.unwrap_or(0) as u64);
                let numbers = [end, l.queries.len() as u64, float(scale), float(softcap), window];
                out.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
            }
        }
        for (layer, l) in layers.iter().enumerate() {
            let floats =
                |x: &Vec<Vec<f32>>| x.iter().flatten().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>();
            for weights in [&l.center, &l.fixed[0], &l.fixed[1]].into_iter().flatten() {
                out.extend(floats(weights));
            }
            for query in l.queries.iter().flatten() {
                out.extend(query.q.iter().flat_map(|&x| (x as f32).to_le_bytes()));
            }
            if c.v_strategy == Strategy::VcOpa {
                out.extend(l.queries.iter().flatten().flat_map(|query| (query.lse as f32).to_le_bytes()));
            }
            let first = l.k.len().min(c.sinks);
            let dense = |out: &mut Vec<u8>, tokens: std::ops::Range<usize>| {
                for side in [&l.k, &l.v] {
                    out.extend(side[tokens.clone()].iter().flatten().flatten().flat_map(|x| x.to_le_bytes()));
                }
            };
            dense(&mut out, 0..first);
            for segment in segments(c, layer) {
                for start in (0..l.compressed).step_by(c.k.page_tokens()) {
                    let end = l.compressed.min(start + c.k.page_tokens());
                    for head in segment.clone() {
                        let (k_format, v_format) = formats(c, layer, head);
                        let (k, v): (Vec<Row>, Vec<Row>) =
                            l.rows[start..end].iter().map(|rows| rows[head].clone()).unzip();
                        out.extend(reference::page(&k_format, &k, 0).unwrap());
                        out.extend(reference::page(&v_format, &v, 0).unwrap());
                    }
                }
            }
            dense(&mut out, first + l.compressed..l.k.len());
        }
        let bytes = out.len() as u64 + 4;
        out[16..24].copy_from_slice(&bytes.to_le_bytes());
        seal(&out)
    }
}

/// Runs of heads of a layer with the same formats.
fn segments(config: &CacheConfig, layer: usize) -> Vec<std::ops::Range<usize>> {
    let mut segments: Vec<std::ops::Range<usize>> = Vec::new();
    for head in 0..config.kv_heads {
        match segments.last_mut() {
            Some(s) if formats(config, layer, s.start) == formats(config, layer, head) => s.end += 1,
            _ => segments.push(head..head + 1),
        }
    }
    segments
}

/// The number that a snapshot has for a strategy.
fn strategy_code(strategy: Strategy) -> usize {
    1 + Strategy::ALL.iter().position(|s| *s == strategy).unwrap()
}

/// `bytes` followed by their CRC-32 (the one of zlib and PNG), bit by bit.
pub fn seal(bytes: &[u8]) -> Vec<u8> {
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
        }
    }
    [bytes, &(!crc).to_le_bytes()].concat()
}
