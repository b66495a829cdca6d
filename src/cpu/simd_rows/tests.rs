use super::*;
use crate::variants::HEAD_DIMS;
use half::{bf16, f16};

fn levels() -> Vec<Level> {
    Level::ALL.into_iter().filter(|level| level.available()).collect()
}

/// A small generator of 64-bit numbers (SplitMix64), so that failures repeat.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Bits of any value, or of one of few, so that ties occur.
    fn row(&mut self, dim: usize) -> Vec<u16> {
        let few = [1, 2, 5, 0][(self.next() % 4) as usize];
        let magnitude =
            |bits: u64| if few == 0 { bits as u16 & 0x7fff } else { (bits % few) as u16 * 0x1fff };
        (0..dim).map(|_| magnitude(self.next()) | (self.next() as u16 & 0x8000)).collect()
    }
}

/// Channels sorted by falling key, then rising channel.
fn ranking(keys: &[u32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..keys.len()).collect();
    order.sort_by_key(|&c| (std::cmp::Reverse(keys[c]), c));
    order
}

fn mask_of(channels: &[usize]) -> Mask {
    let mut mask = Mask::default();
    channels.iter().for_each(|c| mask.0[c / 32] |= 1 << (c % 32));
    mask
}

#[test]
fn select_equals_a_sort() {
    let mut numbers = Numbers(1);
    for _ in 0..200 {
        for dim in HEAD_DIMS {
            let row = numbers.row(dim);
            let keys: Vec<u32> = row.iter().map(|x| u32::from(x & 0x7fff)).collect();
            let order = ranking(&keys);
            for keep in [1, 2, 39 * dim / 128, dim / 2, dim - 1, dim, (numbers.next() as usize % dim) + 1] {
                let expected = mask_of(&order[..keep]);
                let ties = (keep..dim).take_while(|&i| keys[order[i]] == keys[order[keep - 1]]).count();
                let expected_ties = mask_of(&order[..keep + ties]);
                for level in levels() {
                    assert_eq!(select(level, &row, keep, false), expected, "{level} {dim} {keep}");
                    assert_eq!(select(level, &row, keep, true), expected_ties, "{level} {dim} {keep}");
                }
            }
        }
    }
}

#[test]
fn select_keys_equals_a_sort() {
    let mut numbers = Numbers(2);
    for round in 0..200 {
        for dim in HEAD_DIMS {
            let keys: Vec<u32> = (0..dim)
                .map(|_| match round % 3 {
                    0 => numbers.next() as u32 >> 1,
                    1 => (numbers.next() % 3) as u32,
                    _ => [0, 1, 0x7fff_fffe, 0x7fff_ffff][(numbers.next() % 4) as usize],
                })
                .collect();
            let order = ranking(&keys);
            for keep in [1, dim / 2, dim - 1, dim] {
                for level in levels() {
                    assert_eq!(
                        select_keys(level, &keys, keep),
                        mask_of(&order[..keep]),
                        "{level} {dim} {keep}"
                    );
                }
            }
        }
    }
}

#[test]
fn select_channels_equals_a_sort() {
    let mut numbers = Numbers(5);
    for round in 0..40 {
        let mut group = [[0u16; MAX_DIM]; GROUP];
        for row in &mut group {
            row.copy_from_slice(&numbers.row(MAX_DIM));
        }
        let keep = [1, 10, 31, 32][round % 4];
        for dim in HEAD_DIMS {
            let mut expected = [Mask::default(); GROUP];
            for c in 0..dim {
                let keys: Vec<u32> = group.iter().map(|row| u32::from(row[c] & 0x7fff)).collect();
                ranking(&keys)[..keep].iter().for_each(|&t| expected[t].0[c / 32] |= 1 << (c % 32));
            }
            for level in levels() {
                assert_eq!(select_channels(level, &group, dim, keep), expected, "{level} {dim} {keep}");
            }
        }
    }
}

#[test]
fn pack_and_expand_are_inverse() {
    let mut numbers = Numbers(3);
    for round in 0..100 {
        for dim in HEAD_DIMS {
            let row: Vec<u16> = (0..dim).map(|_| numbers.next() as u16 | 1).collect();
            let mut mask = Mask::default();
            for word in &mut mask.0[..dim / 32] {
                *word = match round {
                    0 => 0,
                    1 => u32::MAX,
                    _ => (numbers.next() & numbers.next()) as u32,
                };
            }
            let mut bitmap = vec![0u8; dim / 8];
            mask.write(&mut bitmap);
            assert_eq!(Mask::from_bytes(&bitmap), mask);
            let kept: Vec<u16> = mask.channels().map(|c| row[c]).collect();
            let mut dense = row.clone();
            portable::zero_dropped(&mut dense, &mask);
            for level in levels() {
                let mut packed = vec![0u8; 2 * kept.len()];
                pack(level, &row, &mask, &mut packed);
                let expected: Vec<u8> = kept.iter().flat_map(|v| v.to_le_bytes()).collect();
                assert_eq!(packed, expected, "{level}");
                // The values followed by nothing, by something, and cut short.
                let mut longer = packed.clone();
                longer.extend([0xab; 64]);
                for values in [&packed[..], &longer] {
                    let mut out = vec![0xffff; dim];
                    expand(level, &bitmap, values, &mut out);
                    assert_eq!(out, dense, "{level}");
                }
                let (mut out, mut expected) = (vec![0xffff; dim], vec![0; dim]);
                let cut = packed.len() / 4 * 2;
                expand(level, &bitmap, &packed[..cut], &mut out);
                portable::expand(&bitmap, &packed[..cut], &mut expected);
                assert_eq!(out, expected, "{level}");
                let mut zeroed = row.clone();
                zero_dropped(level, &mut zeroed, &mask);
                assert_eq!(zeroed, dense, "{level}");
                assert_eq!(nonzero(level, &dense), mask, "{level}");
            }
        }
    }
}

#[test]
fn conversions_are_exact_and_round_to_even() {
    for level in levels() {
        for dtype in [DType::F16, DType::Bf16] {
            let all: Vec<u16> = (0..=u16::MAX).collect();
            let (mut wide, mut expected) = (vec![0f32; 256], vec![0f32; 256]);
            let mut back = vec![0u16; 256];
            for bits in all.chunks_exact(256) {
                widen(level, dtype, bits, &mut wide);
                portable::widen(dtype, bits, &mut expected);
                let to_bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(to_bits(&wide), to_bits(&expected), "{level} {dtype}");
                narrow(level, dtype, &wide, &mut back);
                for ((&bits, &wide), &back) in bits.iter().zip(&wide).zip(&back) {
                    assert_eq!(
                        back,
                        if wide.is_nan() { canonical_nan(dtype) } else { bits },
                        "{level} {dtype}"
                    );
                }
            }
        }
    }
    let mut numbers = Numbers(4);
    for round in 0..2000 {
        // Any bits; and values near the f16 range, half of them exactly between two f16 or bf16 neighbours.
        let x: Vec<f32> = (0..64)
            .map(|_| {
                let bits = numbers.next() as u32;
                f32::from_bits(match round % 3 {
                    0 => bits,
                    1 => (bits & 0x8fff_e000) | 0x3000_1000,
                    _ => (bits & 0xffff_0000) | 0x8000,
                })
            })
            .collect();
        for level in levels() {
            let mut y = vec![0u16; 64];
            narrow(level, DType::F16, &x, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let expected = if x.is_nan() { 0x7e00 } else { f16::from_f32(*x).to_bits() };
                assert_eq!(*y, expected, "{level} f16 {x:e}");
            }
            narrow(level, DType::Bf16, &x, &mut y);
            for (x, y) in x.iter().zip(&y) {
                let expected = if x.is_nan() { 0x7fc0 } else { bf16::from_f32(*x).to_bits() };
                assert_eq!(*y, expected, "{level} bf16 {x:e}");
            }
        }
    }
}
