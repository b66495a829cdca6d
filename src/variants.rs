// THE list of what kernels exist for. Plain constants: `build.rs` includes this file to instantiate the CUDA
// kernels, the ops check their arguments against it, and the support table of the README is tested against it.

/// Head dimensions every op supports on every backend.
pub const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];

/// Page sizes in tokens.
pub const PAGE_TOKENS: [usize; 4] = [16, 32, 64, 128];

/// Names of the types of what is pruned, as `DType` prints them.
pub const VALUE_DTYPES: [&str; 2] = ["f16", "bf16"];

/// Tokens that channel-direction pruning ranks against each other.
pub const CHANNEL_GROUP: usize = 32;
