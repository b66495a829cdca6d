//! The CUDA kernels, run on the CPU: every one of them, on small cases.
//!
//! The kernel sources are compiled by the host's C++ compiler against the headers in `host/`: threads are fibers, warp
//! collectives make the lanes of a warp meet, and `host/mustafar/ptx.cuh` stands in for the instructions that C++ cannot
//! express. Under AddressSanitizer and UndefinedBehaviorSanitizer this finds wrong indices, layouts and tie rules, reads
//! and writes outside every buffer, misaligned wide accesses, lanes that do not meet, and results that depend on whether
//! the first or the last thread runs first.
//!
//! What it cannot find: races between threads that no order of whole fibers shows, missing memory fences, writes from
//! one part of a shared array into another, reads of shared memory left over from an earlier CTA, the rounding order
//! inside tensor cores, and anything about speed.

#![allow(clippy::panic, clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod append;
mod attend;
mod cache;
mod compress;
mod emulator;
mod merge;
mod pages;
mod prune;
mod score;
mod spmv;
