//! The C functions as C calls them: structure layouts, structures of older and newer callers, bad input, and results.
#![allow(clippy::unwrap_used, clippy::panic, unsafe_code)]

mod allocations;
mod attend;
mod bad_input;
mod cache;
mod calls;
mod cuda;
mod layout;
mod queries;
mod strategies;
mod support;
mod versions;
