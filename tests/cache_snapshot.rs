//! Snapshots: survive a restart, and are refused when they are foreign, damaged or too large, without any change.
#![allow(clippy::panic, clippy::unwrap_used)]

mod cache_model;
mod common;

use cache_model::{Pair, new_cache, seal, small_config};
use common::{Bytes, Rng};
use mustafar::{Cache, CacheConfig, CenterMode, DType, Error, PageFormat, ValueType};

/// Where the numbers of a snapshot of `small_config` start.
const TOKENS: usize = 24 + 15 * 8 + 2 * 2 * 2 * 8;
const COMPRESSED: usize = TOKENS + 8;
/// Layer 0: its sinks (3 tokens of 2 heads, 64 + 96 channels), then its first K page.
const PAGES: usize = COMPRESSED + 2 * 8 + 3 * 2 * (64 + 96) * 2;

/// A sequence whose last page is partly filled.
fn saved(config: &CacheConfig) -> (Pair, Vec<u8>) {
    let mut pair = Pair::new(config);
    let mut rng = Rng::new(1);
    let id = pair.create();
    pair.step(&mut rng, &[id], 80);
    pair.truncate(id, 45);
    pair.step(&mut rng, &[id], 20);
    let snapshot = pair.cache.save(id).unwrap();
    assert_eq!(pair.cache.len(1, id).unwrap(), (65, 42));
    (pair, snapshot)
}

/// `snapshot` with other bytes at one place and a checksum that fits.
fn forged(snapshot: &[u8], at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut new = snapshot[..snapshot.len() - 4].to_vec();
    new[at..at + bytes.len()].copy_from_slice(bytes);
    seal(&new)
}

/// The message with which a cache refuses a snapshot. The cache stays empty and usable.
fn refused(cache: &mut Cache, snapshot: &[u8]) -> Error {
    let before = cache.bytes();
    let error = cache.restore(snapshot).expect_err("a snapshot that must be refused");
    assert_eq!(cache.bytes(), before);
    error
}

#[test]
fn a_sequence_survives_a_restart() {
    for center in [CenterMode::None, CenterMode::Median] {
        let config = CacheConfig { center, ..small_config() };
        let (mut old, snapshot) = saved(&config);
        let id = *old.model.live.keys().next().unwrap();
        assert!(snapshot == old.model.snapshot(id), "bytes are not those of docs/format.md");

        // Another capacity is no obstacle. Unaligned memory is none either.
        let larger = CacheConfig { max_tokens: 1000, max_sequences: 9, ..config.clone() };
        let mut new = Pair::new(&larger);
        let mut bytes = Bytes::poisoned(snapshot.len() + 1);
        bytes[1..].copy_from_slice(&snapshot);
        let restored = new.cache.restore(&bytes[1..]).unwrap();
        new.model.live.insert(restored, old.model.live[&id].clone());
        assert!(new.cache.save(restored).unwrap() == snapshot);
        new.model.assert_agrees(&new.cache);

        // Both go on alike.
        let (mut a, mut b) = (Rng::new(2), Rng::new(2));
        old.step(&mut a, &[id], 60);
        new.step(&mut b, &[restored], 60);
        assert!(old.cache.save(id).unwrap() == new.cache.save(restored).unwrap());
        new.model.assert_attends(&mut b, &mut new.cache, 1, &[restored], 3);
        old.free(id);
    }
}

#[test]
fn an_empty_sequence_has_a_snapshot() {
    let mut cache = new_cache(&small_config());
    let id = cache.create().unwrap();
    let snapshot = cache.save(id).unwrap();
    assert_eq!(snapshot.len(), COMPRESSED + 2 * 8 + 4);
    let restored = cache.restore(&snapshot).unwrap();
    assert_eq!(cache.len(1, restored).unwrap(), (0, 0));
}

#[test]
fn nothing_of_dropped_tokens_is_saved() {
    let config = small_config();
    let (mut pair, _) = saved(&config);
    let id = *pair.model.live.keys().next().unwrap();
    pair.truncate(id, 3 + 17); // 15 rows of page 1 still hold old tokens
    let snapshot = pair.cache.save(id).unwrap();
    assert!(snapshot == pair.model.snapshot(id));
}

#[test]
fn every_flipped_bit_is_noticed() {
    let config = small_config();
    let (_, snapshot) = saved(&config);
    let mut cache = new_cache(&config);
    let mut rng = Rng::new(3);
    // All of the header, samples of the rest.
    for bit in (0..COMPRESSED * 8).chain((0..300).map(|_| rng.below(snapshot.len() * 8))) {
        let mut damaged = snapshot.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let error = refused(&mut cache, &damaged);
        let version = (64..128).contains(&bit);
        let expected = match error {
            Error::VersionMismatch { .. } => version,
            Error::CorruptData { what: "snapshot", .. } => !version,
            _ => false,
        };
        assert!(expected, "bit {bit}: {error}");
    }
    cache.restore(&snapshot).unwrap();
}

#[test]
fn every_truncation_and_anything_behind_is_noticed() {
    let config = small_config();
    let (_, snapshot) = saved(&config);
    let mut cache = new_cache(&config);
    let all = snapshot.len();
    for len in (0..200).chain((200..all).step_by(97)).chain([all - 4, all - 1]) {
        let error = refused(&mut cache, &snapshot[..len]);
        assert!(matches!(error, Error::CorruptData { .. }), "{len} bytes: {error}");
    }
    let error = refused(&mut cache, &snapshot[..all - 1]).to_string();
    assert_eq!(error, format!("snapshot is damaged: it has {} bytes and should have {all}", all - 1));
    let longer = [&snapshot[..], &[0]].concat();
    let error = refused(&mut cache, &longer).to_string();
    assert_eq!(error, format!("snapshot is damaged: it has {} bytes and should have {all}", all + 1));
    // A length and a checksum that fit do not help.
    let mut longer = snapshot[..all - 4].to_vec();
    longer.extend([0; 5]);
    longer[16..24].copy_from_slice(&(all as u64 + 5).to_le_bytes());
    let error = refused(&mut cache, &seal(&longer)).to_string();
    assert_eq!(error, "snapshot is damaged: 5 bytes follow the last layer");
    for len in 24..28u64 {
        let mut short = snapshot[..len as usize].to_vec();
        short[16..24].copy_from_slice(&len.to_le_bytes());
        assert!(matches!(refused(&mut cache, &short), Error::CorruptData { .. }));
    }
}

#[test]
fn other_formats_and_versions_are_refused_by_name() {
    let config = small_config();
    let (_, snapshot) = saved(&config);
    let mut cache = new_cache(&config);
    let error =
        |cache: &mut Cache, at, bytes: &[u8]| refused(cache, &forged(&snapshot, at, bytes)).to_string();
    assert_eq!(error(&mut cache, 3, b"X"), "snapshot is damaged: it does not start with \"MSTFSNAP\"");
    assert_eq!(error(&mut cache, 8, &[2]), "snapshot is of version 2; supported: version 3");
    assert_eq!(
        error(&mut cache, 12, &[0, 1]),
        "snapshot is of page format version 256; supported: page format version 2"
    );
}

#[test]
fn other_configurations_are_refused_by_field() {
    let config = small_config();
    let (_, snapshot) = saved(&config);
    let k = |values, keep| PageFormat::uniform(values, 64, 16, keep).unwrap();
    let v = |values, dim, keep| PageFormat::uniform(values, dim, 16, keep).unwrap();
    let larger_pages = CacheConfig {
        k: PageFormat::uniform(ValueType::F16, 64, 32, 19).unwrap(),
        v: PageFormat::uniform(ValueType::Int8, 96, 32, 33).unwrap(),
        ..config.clone()
    };
    let cases = [
        (CacheConfig { layers: 3, ..config.clone() }, "layers 2", "layers 3"),
        (CacheConfig { q_heads: 2, ..config.clone() }, "q_heads 4", "q_heads 2"),
        (CacheConfig { kv_heads: 4, ..config.clone() }, "kv_heads 2", "kv_heads 4"),
        (CacheConfig { k: k(ValueType::Bf16, 19), ..config.clone() }, "k.value_type 1", "k.value_type 2"),
        (CacheConfig { k: k(ValueType::F16, 20), ..config.clone() }, "k.keep 19", "k.keep 20"),
        (CacheConfig { k: v(ValueType::F16, 128, 19), ..config.clone() }, "k.head_dim 64", "k.head_dim 128"),
        (
            CacheConfig { v: v(ValueType::E4m3, 96, 33), ..config.clone() },
            "v.value_type 17",
            "v.value_type 16",
        ),
        (CacheConfig { v: v(ValueType::Int8, 64, 33), ..config.clone() }, "v.head_dim 96", "v.head_dim 64"),
        (CacheConfig { v: v(ValueType::Int8, 96, 34), ..config.clone() }, "v.keep 33", "v.keep 34"),
        (CacheConfig { scaled_from: DType::F16, ..config.clone() }, "scaled_from 2", "scaled_from 1"),
        (larger_pages, "page_tokens 16", "page_tokens 32"),
        (CacheConfig { window: 6, ..config.clone() }, "window 5", "window 6"),
        (CacheConfig { group: 64, ..config.clone() }, "group 32", "group 64"),
        (CacheConfig { sinks: 0, ..config.clone() }, "sinks 3", "sinks 0"),
        (CacheConfig { center: CenterMode::Median, ..config.clone() }, "center 0", "center 1"),
    ];
    for (other, found, own) in cases {
        let error = refused(&mut new_cache(&other), &snapshot).to_string();
        assert_eq!(error, format!("snapshot is of a cache with {found}; supported: {own}, as in this cache"));
    }
}

#[test]
fn absurd_lengths_and_damaged_pages_are_refused() {
    let config = small_config();
    let (_, snapshot) = saved(&config);
    let mut cache = new_cache(&config);
    let u64s = |n: u64| n.to_le_bytes();
    for (at, value) in [
        (TOKENS, 0),
        (TOKENS, 44), // fewer than are compressed
        (TOKENS, 66), // one more than there are bytes for
        (TOKENS, 64),
        (TOKENS, 3 + 42 + 37), // more than the window ever holds
        (TOKENS, u64::MAX),
        (TOKENS, 1 << 62),
        (COMPRESSED, 0),
        (COMPRESSED, 43),
        (COMPRESSED, 62),
        (COMPRESSED, 63),
        (COMPRESSED + 8, u64::MAX),
        (COMPRESSED + 8, 1 << 60),
        (16, 0),
        (16, u64::MAX),
    ] {
        let error = refused(&mut cache, &forged(&snapshot, at, &u64s(value)));
        assert!(matches!(error, Error::CorruptData { what: "snapshot", .. }), "{value} at {at}: {error}");
    }
    // Both lengths raised together agree with each other and with no snapshot.
    let mut both = snapshot.clone();
    both[TOKENS..TOKENS + 8].copy_from_slice(&u64s((1 << 60) + 23));
    both[COMPRESSED..COMPRESSED + 8].copy_from_slice(&u64s(1 << 60));
    let error = refused(&mut cache, &forged(&both, COMPRESSED + 8, &u64s(1 << 60))).to_string();
    assert!(error.contains("early") || error.contains("items"), "{error}");

    // Row 2 of the first K page with one bit more.
    let at = PAGES + 2 * 8;
    let zero = (0..64).find(|c| snapshot[at + c / 8] >> (c % 8) & 1 == 0).unwrap();
    let byte = snapshot[at + zero / 8] | 1 << (zero % 8);
    let error = refused(&mut cache, &forged(&snapshot, at + zero / 8, &[byte])).to_string();
    assert_eq!(error, "snapshot is damaged: layer 0, K page 0 of head 0: row 2 has 20 bits set, keep is 19");
    // The V page of head 1 follows K and V of head 0 and K of head 1.
    let (k, v) = (config.k.page_bytes(), config.v.page_bytes());
    let error = refused(&mut cache, &forged(&snapshot, PAGES + 2 * k + v, &[0; 12])).to_string();
    assert_eq!(error, "snapshot is damaged: layer 0, V page 0 of head 1: row 0 has 0 bits set, keep is 33");
}

#[test]
fn a_full_cache_refuses_a_snapshot() {
    let (_, snapshot) = saved(&small_config()); // 3 pages
    let mut cache = new_cache(&CacheConfig { max_tokens: 32, ..small_config() });
    let full = Error::CacheFull { what: "pages", needed: 3, free: 2 };
    assert_eq!(refused(&mut cache, &snapshot), full);
    let mut cache = new_cache(&CacheConfig { max_sequences: 1, ..small_config() });
    cache.create().unwrap();
    let full = Error::CacheFull { what: "sequences", needed: 1, free: 0 };
    assert_eq!(refused(&mut cache, &snapshot), full);
}
