//! The results as a table and as JSON. The keys are a contract: CHANGELOG.md names changes.

use super::measure::{Figures, Row};
use crate::llama::store::Policy;
use serde_json::{Value, json};

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

    fn ttft_ms(&self) -> f64 {
        self.ttft.as_secs_f64() * 1e3
    }
}

impl Report {
    /// What dense does with the same batch and input.
    fn dense(&self, row: &Row) -> Option<&Figures> {
        let same = |other: &&Row| {
            other.policy.is_none()
                && (other.input, other.batch, other.largest) == (row.input, row.batch, row.largest)
        };
        self.rows.iter().find(same)?.figures.as_ref().ok()
    }

    pub(crate) fn print(&self) {
        println!(
            "{} on {}, {} tokens generated, medians of {}",
            self.model, self.device, self.output, self.repeats
        );
        println!(
            "{:>7} {:>6} {:>14} {:>11} {:>8} {:>10} {:>8} {:>9} {:>10} {:>10} {:>10}",
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
            print!("{:>7} {batch:>6} {:>14} ", row.input, name(row.policy.as_ref()));
            match &row.figures {
                Err(why) => println!("{why}"),
                Ok(figures) => self.print_figures(row, figures),
            }
        }
        if self.rows.iter().any(|row| row.largest) {
            println!("* the largest batch that fits");
        }
    }

    fn print_figures(&self, row: &Row, figures: &Figures) {
        let ratio = |of: &dyn Fn(&Figures) -> f64| {
            self.dense(row).map_or("-".to_string(), |dense| format!("{:.3}", of(figures) / of(dense)))
        };
        let gigabytes = |bytes: usize| format!("{:.2}", bytes as f64 / 1e9);
        let ms = |time: std::time::Duration| format!("{:.2}", time.as_secs_f64() * 1e3);
        println!(
            "{:>11.1} {:>8} {:>10.1} {:>8} {:>9} {:>10} {:>10} {:>10}",
            figures.ttft_ms(),
            ratio(&Figures::ttft_ms),
            figures.tokens_per_s(row.batch),
            ratio(&|f: &Figures| f.tokens_per_s(row.batch)),
            ms(figures.step),
            figures.submit.map_or("-".to_string(), ms),
            gigabytes(figures.kv.held),
            figures.device_bytes.map_or("-".to_string(), gigabytes)
        );
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
        let mut value = json!({
            "store": if row.policy.is_none() { "dense" } else { "pruned" },
            "k_sparsity": row.policy.map_or(0.0, |p| p.k_sparsity),
            "v_sparsity": row.policy.map_or(0.0, |p| p.v_sparsity),
            "values": row.policy.map(|p| p.values.to_string()),
            "input_tokens": row.input,
            "batch": row.batch,
            "largest": row.largest,
        });
        match &row.figures {
            Err(why) => value["does_not_fit"] = why.as_str().into(),
            Ok(figures) => {
                value["ttft_ms"] = figures.ttft_ms().into();
                value["tokens_per_s"] = figures.tokens_per_s(row.batch).into();
                value["step_ms"] = (figures.step.as_secs_f64() * 1e3).into();
                value["submit_ms"] = figures.submit.map(|t| t.as_secs_f64() * 1e3).into();
                value["kv_bytes"] = figures.kv.held.into();
                value["kv_bytes_dense"] = figures.kv.dense.into();
                value["device_bytes"] = figures.device_bytes.into();
                let dense = self.dense(row);
                value["ttft_over_dense"] = dense.map(|d| figures.ttft_ms() / d.ttft_ms()).into();
                value["speed_over_dense"] =
                    dense.map(|d| figures.tokens_per_s(row.batch) / d.tokens_per_s(row.batch)).into();
            }
        }
        value
    }
}
