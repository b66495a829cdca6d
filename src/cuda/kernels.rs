//! The kernels: which there are, loading all of them, and the one place that launches.
#![allow(unsafe_code)]

use super::driver::error;
use super::params::KernelParams;
use crate::backend::Stream;
use crate::dtype::{DType, ValueType};
use crate::error::{Error, Result};
use crate::variants::HEAD_DIMS;
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::ffi::CString;
use std::fmt;

/// One file of `csrc/kernels`, compiled.
struct Fatbin {
    name: &'static str,
    bytes: &'static [u8],
}

#[cfg(mustafar_kernels)]
static FATBINS: &[Fatbin] = &include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Built without nvcc.
#[cfg(not(mustafar_kernels))]
static FATBINS: &[Fatbin] = &[];

/// A family of kernels that exists for every value type and head dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Family {
    Append,
    AppendWeighted,
    PruneToken,
    PruneChannel,
    Compress,
    Decompress,
    Validate,
    SpmvKey,
    SpmvValue,
    /// Attention over uniform pages, with tiles of so many query rows.
    Attend(u32),
    /// Attention where K or V has ragged pages.
    AttendRagged(u32),
}

/// A kernel, by what it does and for which types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    Typed(Family, DType, usize),
    /// Attention over uniform pages with values of this 8-bit type and head dimension, with tiles of so many query rows.
    AttendScaled(ValueType, usize, u32),
    /// As [`Kernel::AttendScaled`], where K or V has ragged pages.
    AttendRaggedScaled(ValueType, usize, u32),
    Combine,
    Merge,
    Copy,
    Widen,
    Median,
    QueryWeights,
    ChannelScores,
    ChooseChannels,
    TokenWeights,
}

/// Query rows of the tiles that attention kernels exist for, smallest first.
pub(super) fn attend_rows(dim: usize) -> &'static [u32] {
    if dim == 256 { &[4, 8] } else { &[4, 8, 16] }
}

/// As [`attend_rows`], of [`Kernel::AttendRaggedScaled`].
pub(super) fn ragged_scaled_rows(dim: usize) -> &'static [u32] {
    if dim == 128 { &[4, 8] } else { &[8] }
}

impl Kernel {
    fn all() -> Vec<Self> {
        use Family::*;
        let mut all = vec![Self::Combine, Self::Merge, Self::Copy, Self::Widen, Self::Median];
        all.extend([Self::QueryWeights, Self::ChannelScores, Self::ChooseChannels, Self::TokenWeights]);
        for dtype in [DType::F16, DType::Bf16] {
            for dim in HEAD_DIMS {
                let store =
                    [Append, AppendWeighted, PruneToken, PruneChannel, Compress, Decompress, Validate];
                let attend = attend_rows(dim).iter().copied().map(Attend);
                let ragged = attend_rows(dim).iter().copied().map(AttendRagged);
                let families = store.into_iter().chain([SpmvKey, SpmvValue]).chain(attend).chain(ragged);
                all.extend(families.map(|family| Self::Typed(family, dtype, dim)));
            }
        }
        for values in [ValueType::E4m3, ValueType::Int8] {
            for dim in HEAD_DIMS {
                all.extend(attend_rows(dim).iter().map(|&rows| Self::AttendScaled(values, dim, rows)));
                let ragged = ragged_scaled_rows(dim).iter();
                all.extend(ragged.map(|&rows| Self::AttendRaggedScaled(values, dim, rows)));
            }
        }
        all
    }

    fn needs_shared_memory(self) -> bool {
        self.is_scaled() || matches!(self, Self::Typed(Family::Attend(_) | Family::AttendRagged(_), ..))
    }

    /// Whether it attends over 8-bit values.
    fn is_scaled(self) -> bool {
        matches!(self, Self::AttendScaled(..) | Self::AttendRaggedScaled(..))
    }

    /// The file of `csrc/kernels` that defines it.
    fn file(self) -> &'static str {
        match self {
            Self::Combine | Self::Merge => "merge",
            Self::Copy | Self::Widen => "copy",
            Self::Median => "median",
            Self::QueryWeights | Self::ChannelScores | Self::ChooseChannels | Self::TokenWeights => "score",
            Self::AttendScaled(ValueType::E4m3, ..) => "attend_e4m3",
            Self::AttendScaled(..) => "attend_int8",
            Self::AttendRaggedScaled(ValueType::E4m3, ..) => "attend_ragged_e4m3",
            Self::AttendRaggedScaled(..) => "attend_ragged_int8",
            Self::Typed(family, dtype, _) => match (family, dtype) {
                (Family::Append | Family::AppendWeighted, _) => "append",
                (Family::PruneToken | Family::PruneChannel, _) => "prune",
                (Family::Compress, _) => "compress",
                (Family::Decompress, _) => "decompress",
                (Family::Validate, _) => "validate",
                (Family::SpmvKey | Family::SpmvValue, _) => "spmv",
                (Family::Attend(_), DType::Bf16) => "attend_bf16",
                (Family::Attend(_), _) => "attend_f16",
                (Family::AttendRagged(_), DType::Bf16) => "attend_ragged_bf16",
                (Family::AttendRagged(_), _) => "attend_ragged_f16",
            },
        }
    }
}

/// The name of the symbol.
impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (family, dtype, dim) = match self {
            Self::Combine => return f.write_str("mst_combine"),
            Self::Merge => return f.write_str("mst_merge"),
            Self::Copy => return f.write_str("mst_copy"),
            Self::Widen => return f.write_str("mst_widen"),
            Self::Median => return f.write_str("mst_median"),
            Self::QueryWeights => return f.write_str("mst_query_weights"),
            Self::ChannelScores => return f.write_str("mst_channel_scores"),
            Self::ChooseChannels => return f.write_str("mst_choose_channels"),
            Self::TokenWeights => return f.write_str("mst_token_weights"),
            Self::AttendScaled(values, dim, rows) => {
                return write!(f, "mst_attend_{values}_d{dim}_r{rows}");
            }
            Self::AttendRaggedScaled(values, dim, rows) => {
                return write!(f, "mst_attend_ragged_{values}_d{dim}_r{rows}");
            }
            Self::Typed(family, dtype, dim) => (family, dtype, dim),
        };
        let name = match family {
            Family::Append => "append",
            Family::AppendWeighted => "append_weighted",
            Family::PruneToken => "prune_token",
            Family::PruneChannel => "prune_channel",
            Family::Compress => "compress",
            Family::Decompress => "decompress",
            Family::Validate => "validate",
            Family::SpmvKey => "spmv_key",
            Family::SpmvValue => "spmv_value",
            Family::Attend(rows) => return write!(f, "mst_attend_{dtype}_d{dim}_r{rows}"),
            Family::AttendRagged(rows) => return write!(f, "mst_attend_ragged_{dtype}_d{dim}_r{rows}"),
        };
        write!(f, "mst_{name}_{dtype}_d{dim}")
    }
}

/// Every kernel, loaded into one CUDA context.
#[derive(Debug)]
pub(super) struct Kernels {
    modules: Vec<sys::CUmodule>,
    functions: HashMap<Kernel, sys::CUfunction>,
}

// SAFETY: the handles are names that the driver accepts on every thread.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Loads all of them into the current context. Attention kernels may use up to `shared_bytes` of shared memory.
    pub(super) fn load(shared_bytes: u32) -> Result<Self> {
        if FATBINS.is_empty() {
            let reason =
                "this library was built without CUDA kernels (nvcc was not found, or MUSTAFAR_CUDA=off)";
            return Err(Error::Unavailable { reason: reason.to_owned() });
        }
        let mut loaded = Self { modules: Vec::new(), functions: HashMap::new() };
        match loaded.load_all(shared_bytes) {
            Ok(()) => Ok(loaded),
            Err(e) => {
                loaded.unload();
                Err(e)
            }
        }
    }

    fn load_all(&mut self, shared_bytes: u32) -> Result<()> {
        let mut files = HashMap::new();
        for fatbin in FATBINS {
            // SAFETY: the bytes are a fatbin made by nvcc, which carries its own length.
            let module = unsafe { result::module::load_data(fatbin.bytes.as_ptr().cast()) };
            let module = module.map_err(error("cuModuleLoadData"))?;
            self.modules.push(module);
            files.insert(fatbin.name, module);
        }
        for kernel in Kernel::all() {
            let missing =
                || Error::Internal { reason: format!("no kernel {kernel} in {}.cu", kernel.file()) };
            let module = *files.get(kernel.file()).ok_or_else(missing)?;
            let name = CString::new(kernel.to_string()).map_err(|_| missing())?;
            // SAFETY: the module is loaded. An error tells that the symbol is not there.
            let function = unsafe { result::module::get_function(module, name) }.map_err(|_| missing())?;
            // SAFETY: the function was just found. Without this the driver would load it when it is first launched,
            // which a stream capture does not survive.
            unsafe { sys::cuFuncLoad(function) }.result().map_err(error("cuFuncLoad"))?;
            if kernel.needs_shared_memory() {
                allow_shared_memory(function, shared_bytes, kernel.is_scaled())?;
            }
            self.functions.insert(kernel, function);
        }
        Ok(())
    }

    /// Unloads them; nothing may be running or be launched afterwards. Their context must be current.
    pub(super) fn unload(&mut self) {
        self.functions.clear();
        for module in self.modules.drain(..) {
            // SAFETY: loaded by `load_all`, and drained so that it is unloaded once. An error cannot be dealt with.
            let _ = unsafe { result::module::unload(module) };
        }
    }

    fn function(&self, kernel: Kernel) -> Result<sys::CUfunction> {
        let missing = || Error::Internal { reason: format!("no kernel {kernel}") };
        self.functions.get(&kernel).copied().ok_or_else(missing)
    }

    /// Blocks of a kernel that a multiprocessor runs side by side, at least 1. The kernels' context must be current.
    pub(super) fn resident_blocks(&self, kernel: Kernel, threads: u32, shared_bytes: usize) -> Result<usize> {
        let function = self.function(kernel)?;
        // SAFETY: the function stays loaded as long as `self` lives.
        let blocks = unsafe {
            result::occupancy::max_active_block_per_multiprocessor(function, threads as i32, shared_bytes)
        };
        let blocks = blocks.map_err(error("cuOccupancyMaxActiveBlocksPerMultiprocessor"))?;
        Ok(usize::try_from(blocks).unwrap_or(0).max(1))
    }

    /// Dynamic shared memory that a block of a kernel may ask for.
    pub(super) fn most_shared_bytes(&self, kernel: Kernel) -> Result<usize> {
        let limit = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function stays loaded as long as `self` lives.
        let bytes = unsafe { result::function::get_function_attribute(self.function(kernel)?, limit) };
        Ok(usize::try_from(bytes.map_err(error("cuFuncGetAttribute"))?).unwrap_or(0))
    }

    /// Submits one launch. An empty grid is nothing to do.
    ///
    /// # Safety
    /// The context that the kernels were loaded into is current and `stream` belongs to it; what `params` point at
    /// is as the kernel's parameter struct demands, until the launch has run.
    pub(super) unsafe fn launch<P: KernelParams>(
        &self,
        kernel: Kernel,
        shape: LaunchShape,
        stream: Stream,
        params: &P,
    ) -> Result<()> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        let function = self.function(kernel)?;
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: shape.grid[0],
            gridDimY: shape.grid[1],
            gridDimZ: shape.grid[2],
            blockDimX: shape.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared_bytes,
            hStream: stream.as_raw().cast(),
            attrs: &raw mut overlap,
            numAttrs: u32::from(shape.overlaps_previous),
        };
        let mut arguments = [std::ptr::from_ref(params).cast_mut().cast()];
        // SAFETY: `params` is the kernel's one parameter (`KernelParams`), and the driver copies it before it returns;
        // the rest is the caller's promise.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
        }
        .result()
        .map_err(error("cuLaunchKernelEx"))
    }
}

/// How many threads a launch has.
#[derive(Debug, Clone, Copy)]
pub(super) struct LaunchShape {
    /// Blocks.
    pub(super) grid: [u32; 3],
    /// Threads of a block.
    pub(super) block: u32,
    /// Dynamic shared memory.
    pub(super) shared_bytes: u32,
    /// Start while the kernel before it still runs; the kernel itself waits where it needs that one's results.
    /// For compute capability 9.0 and higher.
    pub(super) overlaps_previous: bool,
}

impl LaunchShape {
    pub(super) fn new(grid: [u32; 3], block: u32) -> Self {
        Self { grid, block, shared_bytes: 0, overlaps_previous: false }
    }
}

/// `kStoreWarps` of the kernels, and `kCopyWarps`.
pub(super) const STORE_WARPS: u32 = 4;
/// Blocks in the second and third dimension of a grid.
const MAX_GRID_ROWS: usize = 65535;

/// A dimension of the grid other than the first.
pub(super) fn grid_rows(argument: &'static str, n: usize) -> Result<u32> {
    if n > MAX_GRID_ROWS {
        return Err(Error::unsupported(argument, n, format!("at most {MAX_GRID_ROWS} in one call")));
    }
    Ok(n as u32)
}

/// Product of what a launch goes over, which kernels count in 32 bits.
pub(super) fn units(argument: &'static str, factors: &[usize]) -> Result<u32> {
    let product = factors.iter().try_fold(1usize, |n, f| n.checked_mul(*f));
    match product {
        Some(n) if n < 1 << 31 => Ok(n as u32),
        _ => Err(Error::unsupported(argument, format!("{factors:?} pieces of work"), "fewer than 2^31")),
    }
}

/// Warps of `STORE_WARPS` to a block, one unit of work each.
pub(super) fn warps(units: u32, rows: u32) -> LaunchShape {
    LaunchShape::new([units.div_ceil(STORE_WARPS), rows, 1], 32 * STORE_WARPS)
}

/// Lets a block have `bytes`. With `all` the blocks of a multiprocessor get everything that can be shared memory instead of
/// what the driver thinks they need, which may be less than the blocks that registers have room for; what is left of the
/// L1 cache is then too little for kernels that read dense tokens.
fn allow_shared_memory(function: sys::CUfunction, bytes: u32, all: bool) -> Result<()> {
    use sys::CUfunction_attribute_enum as Attribute;
    // SAFETY: the function is loaded.
    let fixed = unsafe {
        result::function::get_function_attribute(function, Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
    }
    .map_err(error("cuFuncGetAttribute"))?;
    let dynamic = i32::try_from(bytes).unwrap_or(i32::MAX) - fixed;
    let limit = (Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic);
    let percent = all.then_some((Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100));
    for (attribute, value) in [Some(limit), percent].into_iter().flatten() {
        // SAFETY: as above.
        unsafe { result::function::set_function_attribute(function, attribute, value) }
            .map_err(error("cuFuncSetAttribute"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_has_its_own_symbol() {
        let mut names: Vec<String> = Kernel::all().iter().map(ToString::to_string).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(names.contains(&"mst_attend_bf16_d128_r4".to_owned()));
    }

    #[test]
    fn every_file_of_kernels_is_known() {
        let known: std::collections::HashSet<&str> = Kernel::all().iter().map(|k| k.file()).collect();
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/csrc/kernels");
        let found = std::fs::read_dir(dir).expect("csrc/kernels").map(|e| e.expect("an entry").path());
        let found: std::collections::HashSet<String> =
            found.filter_map(|p| Some(p.file_stem()?.to_str()?.to_owned())).collect();
        assert_eq!(known, found.iter().map(String::as_str).collect());
    }
}
