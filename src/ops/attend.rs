//! `attend`: decode attention over sinks, compressed pages and dense window in one pass; how fast it is expected to be.

pub(crate) mod advice;
pub(crate) mod checks;

use crate::backend::{Context, Run, Stream};
use crate::cpu;
use crate::cuda;
use crate::error::{Error, Result};
use crate::mem::{Mem, MemMut};
use crate::pool::{PagePool, Sequences};
use crate::tensor::{Tensor, TensorMut};

pub use advice::{Advice, Speed, attend_advice};

/// Key centre: compressed keys are stored as `round16(k - c)`, so `scale * (q . c)` is added to the score of every
/// compressed token.
#[derive(Debug, Clone, Copy)]
pub struct Center<'a> {
    /// f32 `[batch, kv_heads, head_dim]`, contiguous.
    pub values: Mem<'a>,
    /// Number of centres: 1 (one for all sequences) or one per sequence.
    pub batch: usize,
}

impl Center<'_> {
    /// How many numbers the centres are.
    pub(crate) fn count(&self, argument: &'static str, heads: usize, dim: usize) -> Result<usize> {
        let count = self.batch.checked_mul(heads).and_then(|n| n.checked_mul(dim));
        count.ok_or(Error::Overflow { argument })
    }
}

/// The compressed tokens of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Compressed<'a> {
    /// Key pages.
    pub k: PagePool<'a>,
    /// Value pages: same page_tokens, num_pages and kv_heads as `k`; rows and keep may differ, on the CPU value type
    /// and head_dim too.
    pub v: PagePool<'a>,
    /// Which pages, and how many tokens.
    pub sequences: Sequences<'a>,
    /// The centre that the pages were written with.
    pub k_center: Option<Center<'a>>,
}

/// Dense tokens of a batch: the window after the compressed tokens, or the sinks before them.
#[derive(Debug, Clone, Copy)]
pub struct Dense<'a> {
    /// Keys `[rows, max_len, kv_heads, k head_dim]`, f16, bf16 or f32; never centred.
    pub k: Tensor<'a>,
    /// Values `[rows, max_len, kv_heads, v head_dim]`.
    pub v: Tensor<'a>,
    /// Valid tokens of each sequence, i32 `[batch]`, 0 to max_len (the tensors' `tokens`).
    pub lens: Mem<'a>,
    /// Row of the tensors that holds each sequence, i32 `[batch]`. `None`: row b for sequence b.
    pub rows: Option<Mem<'a>>,
}

/// Arguments of [`attend`].
///
/// The tokens of sequence b are, in order, its sinks, its compressed tokens and its window; their positions count
/// from 0. The last query token of the sequence stands at the last position, the one before it one earlier, and a
/// query sees the positions up to its own (causal, aligned to the bottom right).
#[derive(Debug)]
pub struct Attend<'a> {
    /// Queries `[1, total_q, q_heads, k head_dim]`, f16, bf16 or f32. q_heads is a multiple of kv_heads; query head
    /// h reads KV head `h / (q_heads / kv_heads)`.
    pub q: Tensor<'a>,
    /// Sequences in the batch.
    pub batch: usize,
    /// First query token of each sequence, i32 `[batch + 1]`, rising from 0 to total_q. `None`: every sequence has
    /// `total_q / batch` query tokens.
    pub q_indptr: Option<Mem<'a>>,
    /// Upper bound of the query tokens of a sequence.
    pub max_q_len: usize,
    /// First tokens, kept dense.
    pub sinks: Option<Dense<'a>>,
    /// Compressed tokens.
    pub compressed: Option<Compressed<'a>>,
    /// Most recent tokens, dense.
    pub window: Option<Dense<'a>>,
    /// First position of each sequence that may be seen (left padding), i32 `[batch]`; `None`: 0.
    pub first: Option<Mem<'a>>,
    /// Factor of q.k; `None`: `1 / sqrt(k head_dim)`.
    pub scale: Option<f32>,
    /// `Some(c)` turns a score s into `c * tanh(s / c)`; c > 0.
    pub softcap: Option<f32>,
    /// `Some(n)`: a query sees only the n last positions up to and including its own; n >= 1.
    pub sliding_window: Option<usize>,
    /// Tokens that one work item covers; CUDA rounds it up to a multiple of 32. A number fixed here makes a sequence's
    /// result independent of the rest of the batch, bit for bit. `None`: on the CPU a fixed number, on CUDA what is
    /// fastest for the batch and the upper bounds, so that results may differ in the last bits between batch sizes.
    pub split_tokens: Option<usize>,
    /// Receives `[1, total_q, q_heads, v head_dim]`, f16, bf16 or f32; 0 where a query sees nothing.
    pub out: TensorMut<'a>,
    /// Receives the natural-log log-sum-exp of the scaled (and softcapped) scores, f32 `[1, total_q, q_heads, 1]`;
    /// -inf where a query sees nothing.
    pub lse: Option<TensorMut<'a>>,
}

/// Bytes of workspace that [`attend`] needs for these arguments; depends on shapes and upper bounds only, and never
/// shrinks when one of them grows.
///
/// # Errors
/// As [`attend`] for shapes and bounds.
pub fn attend_workspace(context: &Context, args: &Attend<'_>) -> Result<usize> {
    let shapes = checks::Shapes::new(args)?;
    match context.run() {
        Run::Cpu(cpu) => Ok(cpu::attend::Layout::new(&shapes, cpu.threads)?.bytes()),
        Run::Cuda(device) => cuda::attend_workspace(device, args, &shapes),
    }
}

/// Attention with float32 accumulation: `softmax(scores) . v` over all tokens a query sees.
///
/// A value that is not finite makes its channel of the output so, for every query that sees it, and nothing else. On
/// CUDA such values cost time: what the tensor cores make of them is computed again without. In pages of 8-bit values a
/// value that is not finite makes its whole row NaN.
///
/// `workspace` is scratch of at least [`attend_workspace`] bytes, 16-byte aligned; its contents do not matter.
///
/// CUDA multiplies in one type: queries and dense tokens are rounded to the dtype of the pages (without pages, and dense
/// ones beside 8-bit values, to that of the window, the sinks or q, the first that is f16 or bf16), and so are the weights
/// before they multiply values. 8-bit values are multiplied by weights in f16, and by queries in f16 (e4m3) or in
/// integers of 16 bits with a factor for each query head (int8).
///
/// # Errors
/// Each names the argument: shapes or dtypes that contradict each other, q_heads no multiple of kv_heads, scale or
/// softcap not finite, workspace too small or misaligned; on the CPU `q_indptr`, lengths, rows, `first` or page numbers
/// out of range, which CUDA trusts: it reads or writes wherever wrong ones lead. What pages hold is not checked:
/// damaged ones give meaningless results but are never read outside their bytes ([`super::validate()`] checks them).
/// On CUDA [`Error::Unsupported`] where K and V differ in value type or head_dim.
pub fn attend(context: &Context, stream: Stream, mut args: Attend<'_>, workspace: MemMut<'_>) -> Result<()> {
    stream.check(context)?;
    let shapes = checks::Shapes::new(&args)?;
    match context.run() {
        Run::Cpu(cpu) => cpu::attend::run(cpu, &checks::Host::new(&args, shapes)?, args, workspace),
        Run::Cuda(device) => cuda::attend(device, stream, &mut args, &shapes, workspace),
    }
}
