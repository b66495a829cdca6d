//! A cache compared with its model.

use super::Model;
use super::layer::gather_queries;
use crate::common::{Dense, Dist, Layout, Rng, Tolerance, assert_close, attention, is_cuda, run};
use mustafar::reference::{Scoring, Token};
use mustafar::{Cache, CacheAttend, CacheBytes, DType, SequenceId};

impl Model {
    /// Checks everything `cache` says about its sequences without attention.
    pub fn assert_agrees(&self, cache: &Cache) {
        let mut all = CacheBytes::default();
        for (&id, sequence) in &self.live {
            for (layer, l) in sequence.layers.iter().enumerate() {
                assert_eq!(cache.len(layer, id).unwrap(), (l.k.len(), l.compressed), "{id:?}, layer {layer}");
            }
            let bytes = self.sequence_bytes(id);
            assert_eq!(cache.sequence_bytes(id).unwrap(), bytes, "{id:?}");
            all.dense_equivalent += bytes.dense_equivalent;
            all.window += bytes.window;
            let even = sequence.layers.iter().all(|l| l.k.len() == sequence.layers[0].k.len());
            match cache.save(id) {
                Ok(snapshot) => assert!(even && snapshot == self.snapshot(id), "{id:?}: state differs"),
                Err(e) => assert!(!even && e.to_string().contains("equally many tokens"), "{e}"),
            }
        }
        all.pages = self.pages_in_use() * self.sizes().1;
        let found = cache.bytes();
        assert_eq!(CacheBytes { allocated: 0, ..found }, all);
    }

    /// Compares attention over `ids` with `queries` query tokens each.
    pub fn assert_attends(
        &mut self,
        rng: &mut Rng,
        cache: &mut Cache,
        layer: usize,
        ids: &[SequenceId],
        queries: usize,
    ) {
        let config = &self.config.clone();
        let (dim_k, dim_v) = (config.k.head_dim(), config.v.head_dim());
        let total = ids.len() * queries;
        let shape = |dim| Layout::Gaps.shape(1, total, config.q_heads, dim);
        let dtype = *rng.pick(&[DType::F16, DType::F32]);
        let q = Dense::random(rng, Dist::Normal, dtype, shape(dim_k));
        let on_cuda = is_cuda(&self.context);
        let q = if on_cuda { q.coarse() } else { q };
        let mut out = Dense::poisoned(DType::F32, shape(dim_v));
        let mut lse = Dense::poisoned(DType::F32, shape(1));
        let softcap = rng.chance(0.3).then_some(20.0);
        let sliding_window = rng.chance(0.3).then(|| 1 + rng.below(60));
        let args = CacheAttend {
            layer,
            sequences: ids,
            q: q.view(),
            scale: Some(0.1),
            softcap,
            sliding_window,
            out: out.view_mut(),
            lse: Some(lse.view_mut()),
        };
        run::cache_attend(&self.context, cache, args).unwrap();

        let indptr: Vec<usize> = (0..=ids.len()).map(|b| b * queries).collect();
        let tokens: Vec<Vec<Vec<Token>>> = ids
            .iter()
            .map(|id| {
                let l = &self.live[id].layers[layer];
                (0..config.kv_heads).map(|h| l.tokens(config, h)).collect()
            })
            .collect();
        let scoring = Scoring {
            scale: f64::from(0.1f32),
            softcap: softcap.map(f64::from),
            sliding_window,
            ..Scoring::new(dim_k)
        };
        let expected = attention(&q, &indptr, &tokens, dim_v, &vec![scoring; ids.len()]);
        // Scores reach about 100 (outlier channels); float32 leaves an error of 1e-5 in each exponent.
        let formats = [config.k, config.v];
        let tolerance = match on_cuda {
            true => Tolerance::on_cuda(config.dtype(config.v), DType::F32, 5.0),
            false => {
                Tolerance { rel: 1e-4, cosine: 1e-8, ..Tolerance::new(DType::F32, 5.0) }.over(&formats, 5.0)
            }
        };
        let lse_tolerance = match on_cuda {
            true => Tolerance::on_cuda(config.dtype(config.v), DType::F32, 1.0),
            false => Tolerance::new(DType::F32, 10.0).over(&formats, 1.0),
        };
        for t in 0..total {
            for h in 0..config.q_heads {
                let (want, want_lse) = &expected[t * config.q_heads + h];
                let what = format!("query {t}, head {h}");
                assert_close(&what, &out.row(0, t, h), want, tolerance);
                assert_close(&what, &lse.row(0, t, h), &[*want_lse], lse_tolerance);
            }
        }
        out.assert_gaps_untouched();
        for (b, id) in ids.iter().enumerate() {
            let (from, to) = (b * queries, (b + 1) * queries);
            let (q, lse) = (numbers_of(&q, from, to), numbers_of(&lse, from, to));
            let l = &mut self.live.get_mut(id).unwrap().layers[layer];
            let queries = gather_queries(config, 0, &q, &lse, l.k.len());
            l.observe(config, queries, (Some(0.1), softcap, sliding_window));
        }
    }
}

/// Tokens `from .. to` of the only sequence of a tensor, in float32.
fn numbers_of(x: &Dense, from: usize, to: usize) -> Dense {
    let s = x.shape;
    let mut new = Dense::poisoned(DType::F32, Layout::TokensFirst.shape(1, to - from, s.heads, s.dim));
    for (b, t, h) in new.indices() {
        new.set_row(b, t, h, &x.row(b, from + t, h));
    }
    new
}
