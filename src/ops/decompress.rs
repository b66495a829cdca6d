//! `decompress`: pages back to a dense tensor.

use crate::backend::{Context, Run, Stream};
use crate::cpu::decompress::{self as on_cpu, Source};
use crate::cuda;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::attend::Center;
use crate::ops::check::{self, HostCenter, HostSequences};
use crate::pool::{PagePool, Sequences};
use crate::tensor::TensorMut;

/// Arguments of [`decompress`].
#[derive(Debug)]
pub struct Decompress<'a> {
    /// Pages, uniform or ragged.
    pub pool: PagePool<'a>,
    /// Which pages, and how many tokens.
    pub sequences: Sequences<'a>,
    /// Centre to add back: every element becomes `round(x + c)`, dropped ones `round(c)`. `None`: dropped
    /// elements become +0.
    pub center: Option<Center<'a>>,
    /// Receives `[batch, >= max_len, kv_heads, head_dim]` in f16, bf16 or f32. Tokens past a sequence's length
    /// are not written.
    pub out: TensorMut<'a>,
}

/// Writes the dense form of the compressed tokens: bit for bit where `out` has the type of the pages' values and there
/// is no centre, otherwise rounded once to nearest even (a NaN as the type's canonical one). An 8-bit value is
/// `scale * code`; where the scale is NaN, which says that the row held a NaN or an infinity, so is every element.
///
/// Uniform pages are not checked (that is [`super::validate()`]'s work): a damaged row gives meaningless numbers, +0
/// on CUDA.
///
/// # Errors
/// Shapes by name; on the CPU lengths above `max_len`, page numbers out of range, and rows of ragged pages that leave
/// their page. CUDA counts these and damaged rows of any kind ([`Context::take_device_errors`]): tokens without a page
/// are not written, rows whose bitmap does not fit their values become +0.
pub fn decompress(context: &Context, stream: Stream, mut args: Decompress<'_>) -> Result<()> {
    stream.check(context)?;
    check_shapes(&args)?;
    match context.run() {
        Run::Cpu(cpu) => {
            let layout = args.pool.layout;
            let pages = args.pool.pages("pool")?;
            let sequences = HostSequences::new(&args.sequences, &layout)?;
            let center = args
                .center
                .map(|c| HostCenter::new("center", &c, layout.kv_heads, layout.format.head_dim()))
                .transpose()?;
            let source = Source { pages, sequences, center };
            match args.out.dtype {
                DType::F32 => {
                    let out = args.out.rows_mut("out")?;
                    check::ragged_pages(&pages, &sequences)?;
                    on_cpu::decompress32(cpu, source, out);
                }
                dtype => {
                    let out = args.out.rows_mut("out")?;
                    check::ragged_pages(&pages, &sequences)?;
                    on_cpu::decompress16(cpu, source, dtype, out);
                }
            }
            Ok(())
        }
        Run::Cuda(device) => cuda::decompress(device, stream, &mut args),
    }
}

fn check_shapes(args: &Decompress<'_>) -> Result<()> {
    let (out, layout, batch) = (args.out.shape, args.pool.layout, args.sequences.batch);
    check::dtype("out.dtype", args.out.dtype, &[DType::F16, DType::Bf16, DType::F32])?;
    check::same("out.batch", out.batch, batch, "sequences.batch")?;
    check::same("out.heads", out.heads, layout.kv_heads, "kv_heads of the pool")?;
    check::same("out.dim", out.dim, layout.format.head_dim(), "head_dim of the pages")?;
    if out.tokens < args.sequences.max_len {
        let allowed = format!("at least {} (sequences.max_len)", args.sequences.max_len);
        return Err(Error::invalid("out.tokens", out.tokens, allowed));
    }
    if let Some(center) = &args.center {
        check::center_batch("center.batch", center, batch)?;
    }
    check::sequences(&args.sequences, &layout)
}
