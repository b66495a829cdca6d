//! A decode step. With a dense store the whole step is one CUDA graph. A [`mustafar::Cache`] decides on the host where
//! tokens go, so what lies between two of its calls is a graph each, on the same stream: the host submits far ahead of
//! the device and waits for nothing.

use super::gpu::Buffer;
use super::graph::Graph;
use super::model::{Activations, GpuModel};
use super::store::{GpuStore, Kind};
use crate::llama::error::{Error, Result};
use crate::llama::model::Meter;
use std::time::Instant;

/// Activations of one token of each sequence, and the graphs that read and write them.
#[derive(Debug)]
pub(super) struct Step {
    /// i32 `[sequences]`, likewise the next two: the token to come, its position, and how many tokens there are then.
    pub tokens: Buffer,
    pub positions: Buffer,
    pub lens: Buffer,
    x: Buffer,
    normed: Buffer,
    pub qkv: Buffer,
    pub attended: Buffer,
    gate_up: Buffer,
    /// f32 `[sequences, vocab]`.
    pub logits: Buffer,
    graphs: Vec<Graph>,
}

impl Step {
    pub(super) fn new(model: &GpuModel, batch: usize) -> Result<Self> {
        let (gpu, c) = (&model.gpu, &model.config);
        Ok(Self {
            tokens: Buffer::elements::<i32>(gpu, batch)?,
            positions: Buffer::elements::<i32>(gpu, batch)?,
            lens: Buffer::elements::<i32>(gpu, batch)?,
            x: Buffer::elements::<f32>(gpu, batch * c.hidden)?,
            normed: Buffer::elements::<u16>(gpu, batch * c.hidden)?,
            qkv: Buffer::elements::<u16>(gpu, batch * model.qkv_width())?,
            attended: Buffer::elements::<u16>(gpu, batch * c.q_width())?,
            gate_up: Buffer::elements::<u16>(gpu, batch * 2 * c.ffn)?,
            logits: Buffer::elements::<f32>(gpu, batch * c.vocab)?,
            graphs: Vec::new(),
        })
    }
}

impl GpuModel {
    /// Makes the graphs of a new store. Everything in them runs once before, which loads it.
    pub(super) fn record(&self, store: &mut GpuStore) -> Result<()> {
        let layers = self.config.layers;
        // Positions and lengths of an empty store.
        store.clear()?;
        (0..=layers).try_for_each(|layer| self.segment(store, layer))?;
        let mut graphs = Vec::new();
        if matches!(store.kind, Kind::Dense(_)) {
            store.append_and_attend(self, 0)?;
            graphs.push(Graph::capture(&self.gpu, || {
                for layer in 0..layers {
                    self.segment(store, layer)?;
                    store.append_and_attend(self, layer)?;
                }
                self.segment(store, layers)
            })?);
        } else {
            for layer in 0..=layers {
                graphs.push(Graph::capture(&self.gpu, || self.segment(store, layer))?);
            }
        }
        store.step.graphs = graphs;
        Ok(())
    }

    /// What a step does between the attentions of two layers.
    fn segment(&self, store: &GpuStore, layer: usize) -> Result<()> {
        let (step, batch) = (&store.step, store.batch);
        let activations = Activations {
            x: step.x.address(),
            normed: step.normed.address(),
            qkv: step.qkv.address(),
            attended: step.attended.address(),
            gate_up: step.gate_up.address(),
        };
        if layer == 0 {
            self.embed(step.tokens.address(), activations.x, batch)?;
        }
        self.between(layer, activations, batch)?;
        if layer < self.config.layers {
            return self.turn(activations.qkv, batch, step.positions.address(), store.target(layer, 1));
        }
        self.logits(activations.x, activations.normed, step.logits.address(), batch)?;
        let [tokens, positions, lens] = [&step.tokens, &step.positions, &step.lens].map(Buffer::address);
        self.kernels.pick(tokens, positions, lens, step.logits.address(), batch, self.config.vocab)
    }

    /// Submits one step of all sequences, which go on with the tokens that [`GpuStore::feed`] gave or, after another
    /// step, with the likeliest. Does not wait. In the meter is the time it took to submit.
    pub fn step(&self, store: &mut GpuStore, meter: &mut Meter) -> Result<()> {
        store.check_room(1)?;
        let start = Instant::now();
        if matches!(store.kind, Kind::Dense(_)) {
            store.step.graphs[0].launch()?;
        } else {
            for layer in 0..=self.config.layers {
                store.step.graphs[layer].launch()?;
                if layer < self.config.layers {
                    let start = Instant::now();
                    store.append_and_attend(self, layer)?;
                    meter.attention += start.elapsed();
                }
            }
        }
        store.advance();
        meter.total += start.elapsed();
        Ok(())
    }

    /// One step with these tokens, one for each sequence; logits `[sequences, vocab]`. Waits for the device.
    pub fn decode(&self, tokens: &[u32], store: &mut GpuStore, meter: &mut Meter) -> Result<Vec<f32>> {
        let start = Instant::now();
        self.feed(tokens, store)?;
        self.step(store, &mut Meter::default())?;
        let logits = store.step.logits.read(store.batch * self.config.vocab)?;
        meter.total += start.elapsed();
        Ok(logits)
    }

    /// Sets the tokens of the next step, one for each sequence.
    pub fn feed(&self, tokens: &[u32], store: &GpuStore) -> Result<()> {
        if tokens.len() != store.batch {
            return Err(Error::Invalid(format!("{} tokens for {} sequences", tokens.len(), store.batch)));
        }
        self.config.check_input(tokens, store.len() + 1)?;
        let tokens: Vec<i32> = tokens.iter().map(|&t| t as i32).collect();
        store.step.tokens.write(&tokens)
    }

    /// The likeliest tokens after the last step. Waits for the device.
    pub fn picked(&self, store: &GpuStore) -> Result<Vec<u32>> {
        Ok(store.step.tokens.read::<i32>(store.batch)?.into_iter().map(|t| t as u32).collect())
    }
}
