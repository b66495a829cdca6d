//! What a comparison compares: strategies at one sparsity.

use crate::common::sparsity;
use crate::llama::store::Policy;
use mustafar::{CenterMode, Side, Strategy};
use std::fmt;
use std::str::FromStr;

/// Strategies of K, of V or of both, as `Kt_Opa+Vt_Mag`; a side that is not named stays dense. `+median` centres keys,
/// `+nosink` prunes the first tokens too.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Recipe {
    k: Option<Strategy>,
    v: Option<Strategy>,
    median: bool,
    nosink: bool,
}

/// Recipes that are compared unless others are named.
pub(crate) const RECIPES: [&str; 15] = [
    "Kt_Mag",
    "Kt_Mag+median",
    "Kt_Opa",
    "Kt_Opa+median",
    "Kc_Mag",
    "think",
    "Vt_Mag",
    "Vc_Mag",
    "Vc_Mag+nosink",
    "Vc_Opa",
    "Vc_Opa+nosink",
    "thinv",
    "Kt_Mag+Vt_Mag",
    "Kt_Opa+Vt_Mag",
    "Kt_Opa+Vt_Mag+median",
];

impl Recipe {
    /// `base` with these strategies at this sparsity.
    pub(crate) fn policy(&self, base: &Policy, sparsity: f64) -> Policy {
        let of = |strategy: Option<Strategy>| if strategy.is_some() { sparsity } else { 0.0 };
        Policy {
            k_strategy: self.k.unwrap_or(Strategy::KtMag),
            v_strategy: self.v.unwrap_or(Strategy::VtMag),
            k_sparsity: of(self.k),
            v_sparsity: of(self.v),
            center: if self.median { CenterMode::Median } else { base.center },
            sinks: if self.nosink { 0 } else { base.sinks },
            ..*base
        }
    }

    /// Which sides are pruned.
    pub(crate) fn sides(&self) -> &'static str {
        match (self.k, self.v) {
            (Some(_), Some(_)) => "K and V",
            (Some(_), None) => "K",
            _ => "V",
        }
    }
}

impl FromStr for Recipe {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut recipe = Self { k: None, v: None, median: false, nosink: false };
        for part in text.split('+') {
            match part {
                "median" => recipe.median = true,
                "nosink" => recipe.nosink = true,
                name => {
                    let strategy: Strategy = name.parse().map_err(|e: mustafar::Error| e.to_string())?;
                    let side = if strategy.side() == Side::K { &mut recipe.k } else { &mut recipe.v };
                    if let Some(first) = side.replace(strategy) {
                        return Err(format!("{text} names {first} and {strategy} for one side"));
                    }
                }
            }
        }
        match (recipe.k, recipe.v) {
            (None, None) => Err(format!("{text} names no strategy")),
            _ => Ok(recipe),
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<&str> = [self.k, self.v].into_iter().flatten().map(Strategy::name).collect();
        parts.extend(self.median.then_some("median"));
        parts.extend(self.nosink.then_some("nosink"));
        f.write_str(&parts.join("+"))
    }
}

/// What is compared.
#[derive(Debug, clap::Args)]
pub(crate) struct Comparison {
    /// Strategies joined with +: at most one of K and one of V, a side not named stays dense; +median centres keys,
    /// +nosink prunes the first tokens too
    #[arg(long = "recipe", value_name = "RECIPES", value_delimiter = ',', default_values_t = RECIPES.map(default))]
    pub(crate) recipes: Vec<Recipe>,
    /// Share of what the strategies prune that is dropped
    #[arg(long = "sparsity", value_name = "LIST", value_delimiter = ',', value_parser = sparsity, default_values_t = [0.3, 0.5, 0.7, 0.9])]
    pub(crate) sparsities: Vec<f64>,
}

fn default(recipe: &str) -> Recipe {
    recipe.parse().expect("the recipes of the list are valid")
}

impl Comparison {
    /// Every recipe at every sparsity.
    pub(crate) fn cases(&self) -> Vec<(Recipe, f64)> {
        self.recipes.iter().flat_map(|r| self.sparsities.iter().map(|s| (*r, *s))).collect()
    }
}

/// Mean, and standard error of the mean (0 for one value).
pub(crate) fn mean(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (n - 1.0) / n).sqrt() } else { 0.0 })
}
