//! How the work of `attend` is cut into blocks. A function of shapes and upper bounds alone, so that a captured graph
//! stays valid whatever lengths it is replayed with.

use crate::error::{Error, Result};

/// Tokens of a tile: a warp's step. Splits are multiples of it.
pub(super) const TILE_TOKENS: usize = 32;

/// Fewest tokens of an item: one tile for each warp of a block.
const MIN_SPLIT: usize = 128;

/// Blocks per multiprocessor that work is cut into, if so many are resident at a time: two, and where items would become
/// longer than [`LONG_SPLIT`] four. More than are resident would make a second wave, which is mostly empty; but with four,
/// the last [`TAIL`]th of the tokens makes a second wave of short items, which fill the places of blocks that end early.
/// Tiles of more than [`TAIL_ROWS`] rows have none where one wave takes all sequences and heads: their blocks take longer
/// to start and to end, as long as [`BLOCK_TOKENS`] tokens, than that saves. There one short item of each sequence and
/// head goes to the places that the long ones leave, and is as long as these can take one after the other in the time of
/// a long one.
/// docs/performance.md has the measurements.
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;
const MOST_BLOCKS_PER_MULTIPROCESSOR: usize = 4;
const LONG_SPLIT: usize = 3072;
const TAIL: usize = 8;
const TAIL_ROWS: u32 = 8;
const BLOCK_TOKENS: usize = 384;

/// What a plan depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) batch: usize,
    pub(super) total_q: usize,
    /// Query tokens of a sequence at most.
    pub(super) max_q_len: usize,
    pub(super) q_heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    /// Query rows of the tiles that there are kernels for, smallest first.
    pub(super) tiles: &'static [u32],
    /// Compressed tokens of a sequence at most.
    pub(super) max_len: usize,
    /// Tokens of the longer of sinks and window at most.
    pub(super) max_dense: usize,
    /// Tokens of an item, if the caller fixes them.
    pub(super) split_tokens: Option<usize>,
    pub(super) multiprocessors: usize,
    /// Blocks of the kernel, see [`tile_rows`], that a multiprocessor runs side by side, at least 1.
    pub(super) resident: usize,
}

/// The cut, and the workspace it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Plan {
    /// Query rows of a tile: which kernel.
    pub(super) rows: u32,
    pub(super) row_tiles: usize,
    /// Items of compressed tokens: `long_items` of `split` tokens, the others of `short_split`.
    pub(super) page_items: usize,
    pub(super) long_items: usize,
    pub(super) split: usize,
    pub(super) short_split: usize,
    /// Tokens of a dense item.
    pub(super) dense_split: usize,
    /// Items of both kinds.
    pub(super) items: usize,
    /// Workspace in bytes. At least what `items` takes, and, unlike that, never falling when a bound rises.
    pub(super) workspace: usize,
}

/// One kind of item: `long` of `split` tokens and then `short` of `short_split`, and for how many results of a query head
/// there must be room.
struct Cut {
    split: usize,
    long: usize,
    short_split: usize,
    short: usize,
    results: usize,
}

/// Of `tiles`, query rows of each, the smallest that takes `rows` at once, or the largest there is.
pub(super) fn tile_rows(tiles: &[u32], rows: usize) -> u32 {
    let fitting = tiles.iter().copied().find(|n| rows <= *n as usize);
    fitting.or(tiles.last().copied()).unwrap_or(1)
}

impl Plan {
    pub(super) fn new(b: &Bounds) -> Result<Self> {
        let overflow = || Error::Overflow { argument: "workspace" };
        let rows = b.max_q_len.checked_mul(b.q_heads / b.kv_heads).ok_or_else(overflow)?;
        let tile_rows = tile_rows(b.tiles, rows);
        let row_tiles = rows.div_ceil(tile_rows as usize);
        let blocks = b.batch.checked_mul(b.kv_heads).and_then(|n| n.checked_mul(row_tiles));
        let blocks = blocks.ok_or_else(overflow)?.max(1);
        let query_heads = b.total_q.checked_mul(b.q_heads).ok_or_else(overflow)?;
        let most_blocks = MOST_BLOCKS_PER_MULTIPROCESSOR * b.multiprocessors;

        let cut = |tokens: usize, fixed: Option<usize>, long_split: usize, with_tail: bool| -> Result<Cut> {
            let most = tokens.div_ceil(fixed.unwrap_or(MIN_SPLIT));
            let all = query_heads.checked_mul(most).ok_or_else(overflow)?;
            if let Some(split) = fixed {
                return Ok(Cut { split, long: most, short_split: split, short: 0, results: all });
            }
            let wave = |per_multiprocessor: usize| per_multiprocessor.min(b.resident) * b.multiprocessors;
            let items_for = |per_multiprocessor: usize| most.min(wave(per_multiprocessor) / blocks).max(1);
            let split_for = |tokens: usize, items: usize, multiple: usize| {
                tokens.div_ceil(items).next_multiple_of(multiple).max(MIN_SPLIT)
            };
            // Two waves of blocks stay below the most there may be or one item each, and a block has `tile_rows` results.
            let filled = blocks.max(most_blocks).checked_mul(2 * tile_rows as usize).ok_or_else(overflow)?;
            let results = all.min(filled);
            let even = |split: usize| Cut {
                split,
                long: tokens.div_ceil(split),
                short_split: split,
                short: 0,
                results,
            };
            let split = split_for(tokens, items_for(BLOCKS_PER_MULTIPROCESSOR), TILE_TOKENS);
            if split <= long_split {
                return Ok(even(split));
            }
            let long = items_for(MOST_BLOCKS_PER_MULTIPROCESSOR);
            if !with_tail {
                return Ok(even(split_for(tokens, long, TILE_TOKENS)));
            }
            let all_places = wave(MOST_BLOCKS_PER_MULTIPROCESSOR);
            if tile_rows > TAIL_ROWS && blocks <= all_places {
                let places = all_places - long * blocks;
                let rest = if places == 0 {
                    0
                } else {
                    let turns = blocks.div_ceil(places);
                    (tokens / long).saturating_sub(turns * BLOCK_TOKENS) / (turns + 1)
                };
                let split = split_for(tokens - rest, long, MIN_SPLIT);
                let rest = tokens.saturating_sub(long * split);
                let short_split = split_for(rest, 1, MIN_SPLIT);
                let long = long.min(tokens.div_ceil(split));
                return Ok(Cut { split, long, short_split, short: usize::from(rest > 0), results });
            }
            let split = (tokens / long - tokens / long / TAIL) / MIN_SPLIT * MIN_SPLIT;
            let rest = tokens - long * split;
            let short_split = split_for(rest, long, MIN_SPLIT);
            Ok(Cut { split, long, short_split, short: rest.div_ceil(short_split), results })
        };
        let fixed = b.split_tokens.map(|n| n.next_multiple_of(TILE_TOKENS));
        let pages = cut(b.max_len, fixed, LONG_SPLIT, true)?;
        let dense = cut(b.max_dense, fixed.map(|_| MIN_SPLIT), MIN_SPLIT, false)?;
        let results = pages.results.checked_add(dense.results).ok_or_else(overflow)?;
        let workspace = results.checked_mul((b.dim + 1) * size_of::<f32>()).ok_or_else(overflow)?;
        let page_items = pages.long + pages.short;
        Ok(Self {
            rows: tile_rows,
            row_tiles,
            page_items,
            long_items: pages.long,
            split: pages.split,
            short_split: pages.short_split,
            dense_split: dense.split,
            items: page_items + dense.long,
            workspace,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::kernels::{attend_rows, ragged_scaled_rows};
    use super::*;
    use proptest::prelude::*;

    /// Llama-3-8B on a GPU of 132 multiprocessors.
    fn bounds(batch: usize, max_len: usize) -> Bounds {
        Bounds {
            batch,
            total_q: batch,
            max_q_len: 1,
            q_heads: 32,
            kv_heads: 8,
            dim: 128,
            tiles: attend_rows(128),
            max_len,
            max_dense: 0,
            split_tokens: None,
            multiprocessors: 132,
            resident: 4,
        }
    }

    #[test]
    fn large_work_has_a_tail_and_small_work_has_short_items() {
        let plan = Plan::new(&bounds(8, 32768)).unwrap();
        assert_eq!((plan.rows, plan.row_tiles, plan.page_items), (4, 1, 16));
        assert_eq!((plan.long_items, plan.split, plan.short_split), (8, 3584, 512));
        let plan = Plan::new(&Bounds { resident: 3, ..bounds(8, 32768) }).unwrap();
        assert_eq!((plan.long_items, plan.split, plan.short_split), (6, 4736, 768));
        let plan = Plan::new(&Bounds { resident: 2, q_heads: 128, ..bounds(8, 32768) }).unwrap();
        assert_eq!((plan.rows, plan.page_items), (16, 5));
        assert_eq!((plan.long_items, plan.split, plan.short_split), (4, 8064, 512));
        let plan = Plan::new(&Bounds { resident: 2, q_heads: 128, ..bounds(40, 32768) }).unwrap();
        assert_eq!((plan.long_items, plan.split, plan.short_split), (1, 28672, 4096));
        let plan = Plan::new(&bounds(1, 32768)).unwrap();
        assert_eq!((plan.split, plan.items), (1024, 32));
        let plan = Plan::new(&bounds(1, 4096)).unwrap();
        assert_eq!((plan.split, plan.items), (128, 32));
        let plan = Plan::new(&bounds(1000, 100)).unwrap();
        assert_eq!((plan.split, plan.items), (128, 1));
    }

    #[test]
    fn the_smallest_kernel_that_fits_is_taken() {
        let [most, wide, few] = [attend_rows(128), attend_rows(256), ragged_scaled_rows(64)];
        for (q_len, tiles, rows, row_tiles) in [
            (1, most, 4, 1),
            (2, most, 8, 1),
            (3, most, 16, 1),
            (5, most, 16, 2),
            (3, wide, 8, 2),
            (1, few, 8, 1),
            (3, few, 8, 2),
        ] {
            let plan = Plan::new(&Bounds { max_q_len: q_len, tiles, ..bounds(1, 64) }).unwrap();
            assert_eq!((plan.rows, plan.row_tiles), (rows, row_tiles), "{q_len} {tiles:?}");
        }
    }

    #[test]
    fn a_fixed_split_does_not_depend_on_the_batch() {
        let cut = |batch, split| {
            let b = Bounds { split_tokens: Some(split), max_dense: 300, ..bounds(batch, 32768) };
            let plan = Plan::new(&b).unwrap();
            (plan.split, plan.dense_split, plan.items)
        };
        assert_eq!(cut(1, 1000), (1024, 128, 35));
        assert_eq!(cut(64, 1000), cut(1, 1000));
    }

    #[test]
    fn without_tokens_there_is_nothing_to_do() {
        let plan = Plan::new(&bounds(1, 0)).unwrap();
        assert_eq!((plan.items, plan.workspace), (0, 0));
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        for b in [
            Bounds { max_q_len: usize::MAX / 2, ..bounds(1, 64) },
            Bounds { total_q: usize::MAX / 2, ..bounds(1, 64) },
            Bounds { total_q: 1 << 40, ..bounds(1 << 40, 1 << 40) },
        ] {
            assert_eq!(Plan::new(&b), Err(Error::Overflow { argument: "workspace" }));
        }
    }

    fn any_bounds() -> impl Strategy<Value = Bounds> {
        let sizes = (1usize..40, 1usize..40, 1usize..9, 1usize..20, 0usize..70_000, 0usize..2000);
        (sizes, 0usize..4, any::<bool>(), proptest::option::of(1usize..5000), 1usize..7).prop_map(
            |((batch, max_q_len, kv_heads, group, max_len, max_dense), dim, few, split_tokens, resident)| {
                let dim = [64, 96, 128, 256][dim];
                Bounds {
                    batch,
                    total_q: batch * max_q_len,
                    max_q_len,
                    q_heads: kv_heads * group,
                    kv_heads,
                    dim,
                    tiles: if few { ragged_scaled_rows(dim) } else { attend_rows(dim) },
                    max_len,
                    max_dense,
                    split_tokens,
                    multiprocessors: 132,
                    resident,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn the_cut_covers_every_token_and_fits_the_workspace(b in any_bounds()) {
            let plan = Plan::new(&b).unwrap();
            prop_assert!(plan.row_tiles * plan.rows as usize >= b.max_q_len * (b.q_heads / b.kv_heads));
            let short_items = plan.page_items - plan.long_items;
            prop_assert!(plan.long_items * plan.split + short_items * plan.short_split >= b.max_len);
            prop_assert!((plan.items - plan.page_items) * plan.dense_split >= b.max_dense);
            for split in [plan.split, plan.short_split, plan.dense_split] {
                prop_assert!(split.is_multiple_of(32) && split >= 32);
            }
            prop_assert!(b.total_q * b.q_heads * plan.items * (b.dim + 1) * 4 <= plan.workspace);
        }

        #[test]
        fn workspace_never_falls_when_a_bound_rises(b in any_bounds(), by in 0usize..3000) {
            let grown = [
                Bounds { max_len: b.max_len + by, ..b },
                Bounds { max_dense: b.max_dense + by, ..b },
                Bounds { batch: b.batch + by, total_q: b.total_q + by * b.max_q_len, ..b },
                Bounds { total_q: b.total_q + by, batch: b.batch + by, ..b },
                Bounds { max_q_len: b.max_q_len + by, ..b },
            ];
            let before = Plan::new(&b).unwrap().workspace;
            for b in grown {
                prop_assert!(Plan::new(&b).unwrap().workspace >= before, "{b:?}");
            }
        }
    }
}
