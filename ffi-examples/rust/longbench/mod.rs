//! LongBench: prompts, predictions that can be resumed, and scores equal to the published scorer's.
//!
//! Reading order: [`tasks`] (the benchmark), [`data`] (its files), [`predict`] and [`predictions`] (running a model),
//! [`score`] with [`metrics`], which rest on [`rouge`], [`similarity`] and [`text`].
#![allow(dead_code, unreachable_pub, reason = "tests and the example each use their own part of this module")]

pub mod data;
pub mod metrics;
pub mod predict;
pub mod predictions;
pub mod rouge;
pub mod score;
pub mod similarity;
pub mod tasks;
pub mod text;
