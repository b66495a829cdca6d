//! The shape of a model, from the config.json of a Hugging Face checkpoint.

use super::config::Config;
use super::error::{Error, Result};
use serde_json::Value;

/// What a config.json says.
#[derive(Debug, Clone, PartialEq)]
pub struct HfConfig {
    pub config: Config,
    /// Divisors of the RoPE frequencies, one per pair, where they are scaled as in Llama 3.1.
    pub rope_factors: Option<Vec<f32>>,
}

/// Reads and checks the fields. Whatever would change the computation and is not implemented is refused.
pub fn parse(json: &Value) -> Result<HfConfig> {
    let fields = Fields { json, prefix: "" };
    fields.only("model_type", &["llama", "mistral"], None)?;
    fields.only("hidden_act", &["silu"], Some("silu"))?;
    for (key, allowed) in [("attention_bias", "false"), ("mlp_bias", "false")] {
        if fields.get(key).is_some_and(|v| v != &Value::Bool(false)) {
            return Err(fields.unsupported(key, allowed));
        }
    }
    if fields.get("quantization_config").is_some() {
        return Err(fields.unsupported("quantization_config", "none (f16, bf16 or f32 tensors)"));
    }
    if fields.float("partial_rotary_factor", 0.0, 1.0)?.is_some_and(|share| share != 1.0) {
        return Err(fields.unsupported("partial_rotary_factor", "1"));
    }
    let context = fields.int("max_position_embeddings", 1, 1 << 30)?;
    if let Some(window) = fields.get("sliding_window").and_then(Value::as_u64)
        && (window as usize) < context
    {
        return Err(fields.unsupported("sliding_window", "null (full attention)"));
    }
    let (heads, hidden) =
        (fields.int("num_attention_heads", 1, 1024)?, fields.int("hidden_size", 1, 1 << 16)?);
    let head_dim = match fields.get("head_dim") {
        Some(_) => fields.int("head_dim", 1, 1024)?,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let reason = format!("hidden_size {hidden} is no multiple of num_attention_heads {heads}");
            return Err(Error::damaged("config.json", reason));
        }
    };
    // Newer files put the base beside the scaling.
    let object = |key, prefix| fields.get(key).map(|json| Fields { json, prefix });
    let newer = object("rope_parameters", "rope_parameters.");
    let rope_base = newer.as_ref().unwrap_or(&fields).float("rope_theta", 1.0, 1e12)?.unwrap_or(10_000.0);
    let scaling = newer.or_else(|| object("rope_scaling", "rope_scaling."));
    let config = Config {
        layers: fields.int("num_hidden_layers", 1, 1024)?,
        hidden,
        ffn: fields.int("intermediate_size", 1, 1 << 20)?,
        heads,
        kv_heads: fields.int("num_key_value_heads", 1, heads)?,
        head_dim,
        vocab: fields.int("vocab_size", 1, 1 << 24)?,
        context,
        rms_eps: fields.float("rms_norm_eps", 0.0, 1.0)?.ok_or_else(|| fields.missing("rms_norm_eps"))?
            as f32,
        rope_base,
        rope_dim: head_dim,
        tied: fields.get("tie_word_embeddings") == Some(&Value::Bool(true)),
    };
    config.check()?;
    let rope_factors = scaling.map(|scaling| factors(&scaling, &config)).transpose()?.flatten();
    Ok(HfConfig { config, rope_factors })
}

/// Llama 3.1: frequencies that turn less than `low_freq_factor` times over the original context are divided by
/// `factor`, those that turn more than `high_freq_factor` times stay, and between the two it is interpolated.
fn factors(scaling: &Fields<'_>, config: &Config) -> Result<Option<Vec<f32>>> {
    let kind = if scaling.get("rope_type").is_some() { "rope_type" } else { "type" };
    scaling.only(kind, &["llama3", "default"], Some("default"))?;
    if scaling.get(kind).is_none_or(|kind| kind == "default") {
        return Ok(None);
    }
    let number = |key| scaling.float(key, 1e-3, 1e9)?.ok_or_else(|| scaling.missing(key));
    let (factor, low, high) = (number("factor")?, number("low_freq_factor")?, number("high_freq_factor")?);
    let original = number("original_max_position_embeddings")?;
    if low >= high {
        let allowed = format!("less than high_freq_factor, {high}");
        return Err(scaling.unsupported("low_freq_factor", &allowed));
    }
    let pairs = 0..config.rope_dim / 2;
    let divisor = |i: usize| {
        let frequency = config.rope_base.powf(-2.0 * i as f64 / config.rope_dim as f64);
        let turns = original * frequency / std::f64::consts::TAU;
        let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        (1.0 / (kept + (1.0 - kept) / factor)) as f32
    };
    Ok(Some(pairs.map(divisor).collect()))
}

/// An object of the file; null counts as missing.
struct Fields<'a> {
    json: &'a Value,
    prefix: &'static str,
}

impl<'a> Fields<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn missing(&self, key: &str) -> Error {
        Error::damaged("config.json", format!("{}{key} is missing", self.prefix))
    }

    fn unsupported(&self, key: &str, supported: &str) -> Error {
        let found = self.get(key).unwrap_or(&Value::Null);
        Error::unsupported(format!("{}{key} of config.json", self.prefix), found, supported)
    }

    /// Refuses other strings than these.
    fn only(&self, key: &str, allowed: &[&str], default: Option<&str>) -> Result<()> {
        let found = match self.get(key) {
            None => default.ok_or_else(|| self.missing(key))?,
            Some(value) => value.as_str().unwrap_or_default(),
        };
        if allowed.contains(&found) { Ok(()) } else { Err(self.unsupported(key, &allowed.join(", "))) }
    }

    fn int(&self, key: &str, low: usize, high: usize) -> Result<usize> {
        let value = self.get(key).ok_or_else(|| self.missing(key))?;
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        let range = format!("{low} to {high}");
        number.filter(|n| (low..=high).contains(n)).ok_or_else(|| self.unsupported(key, &range))
    }

    fn float(&self, key: &str, low: f64, high: f64) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|x| (low..=high).contains(x));
        number.map(Some).ok_or_else(|| self.unsupported(key, &format!("{low} to {high}")))
    }
}
