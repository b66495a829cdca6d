//! The results as a table and as JSON. The keys are a contract: CHANGELOG.md names changes.

use super::measure::{Figures, Row};
use crate::llama::store::Policy;
use serde_json::{Value, json};
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) model: String,
    pub(crate) device: String,
    pub(crate) output: usize,
    pub(crate) repeats: usize,
    pub(crate) rows: Vec<Row>,
}

fn name(policy: Option<&Policy>) -> String {
    match policy {
        None => "dense".to_string(),
        Some(p) if p.k_sparsity == p.v_sparsity => format!("{} {}", p.k_sparsity, p.values),
        Some(p) => format!("{}/{} {}", p.k_sparsity, p.v_sparsity, p.values),
    }
}

impl Figures {
    fn tokens_per_s(&self, batch: usize) -> f64 {
        batch as f64 / self.step.as_secs_f64()
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Report {
    /// What dense does with the same batch and input.
    fn dense(&self, row: &Row) -> Option<&Row> {
        self.rows.iter().find(|other| {
            other.policy.is_none()
                && other.input == row.input
                && other.largest == row.largest
                && (other.batch == row.batch || row.largest)
        })
    }

    /// Time to the first token over dense's, and tokens per second.
    fn ratios(&self, row: &Row) -> (Option<f64>, Option<f64>) {
        let Some(dense) = self.dense(row) else { return (None, None) };
        let speed = |row: &Row| row.figures.as_ref().ok().map(|f| f.tokens_per_s(row.batch));
        let first = row.ttft.as_secs_f64() / dense.ttft.as_secs_f64();
        (Some(first), speed(row).zip(speed(dense)).map(|(own, dense)| own / dense))
    }

    pub(crate) fn print(&self) {
        println!(
            "{} on {}, {} tokens generated, medians of {}",
            self.model, self.device, self.output, self.repeats
        );
        println!(
            "{:>7} {:>6} {:>14} {:>11} {:>8} {:>10} {:>8} {:>9} {:>9} {:>8} {:>11}",
            "input",
            "batch",
            "store",
            "first, ms",
            "x dense",
            "tokens/s",
            "x dense",
            "step, ms",
            "host, ms",
            "KV, GB",
            "device, GB"
        );
        for row in &self.rows {
            let batch = format!("{}{}", row.batch, if row.largest { "*" } else { "" });
            let (first, speed) = self.ratios(row);
            let ratio = |ratio: Option<f64>| ratio.map_or("-".to_string(), |r| format!("{r:.3}"));
            let name = name(row.policy.as_ref());
            print!("{:>7} {batch:>6} {name:>14} {:>11.1} {:>8} ", row.input, ms(row.ttft), ratio(first));
            match &row.figures {
                Err(why) => println!("{why}"),
                Ok(figures) => println!(
                    "{:>10.1} {:>8} {:>9.3} {:>9} {:>8} {:>11}",
                    figures.tokens_per_s(row.batch),
                    ratio(speed),
                    ms(figures.step),
                    figures.submit.map_or("-".to_string(), |time| format!("{:.3}", ms(time))),
                    gigabytes(figures.kv.held),
                    figures.device_bytes.map_or("-".to_string(), gigabytes)
                ),
            }
        }
        if self.rows.iter().any(|row| row.largest) {
            println!("* the largest batch that fits, against dense's");
        }
    }

    pub(crate) fn json(&self) -> Value {
        let rows: Vec<Value> = self.rows.iter().map(|row| self.row(row)).collect();
        json!({
            "model": self.model,
            "device": self.device,
            "output_tokens": self.output,
            "repeats": self.repeats,
            "runs": rows,
        })
    }

    fn row(&self, row: &Row) -> Value {
        let (first, speed) = self.ratios(row);
        let mut value = json!({
            "store": if row.policy.is_none() { "dense" } else { "pruned" },
            "k_sparsity": row.policy.map_or(0.0, |p| p.k_sparsity),
            "v_sparsity": row.policy.map_or(0.0, |p| p.v_sparsity),
            "values": row.policy.map(|p| p.values.to_string()),
            "input_tokens": row.input,
            "batch": row.batch,
            "largest": row.largest,
            "ttft_ms": ms(row.ttft),
            "ttft_over_dense": first,
        });
        match &row.figures {
            Err(why) => value["does_not_fit"] = why.as_str().into(),
            Ok(figures) => {
                value["tokens_per_s"] = figures.tokens_per_s(row.batch).into();
                value["speed_over_dense"] = speed.into();
                value["step_ms"] = ms(figures.step).into();
                value["submit_ms"] = figures.submit.map(ms).into();
                value["kv_bytes"] = figures.kv.held.into();
                value["kv_bytes_dense"] = figures.kv.dense.into();
                value["device_bytes"] = figures.device_bytes.into();
            }
        }
        value
    }
}

fn gigabytes(bytes: usize) -> String {
    format!("{:.2}", bytes as f64 / 1e9)
}
