/*
 * A small engine in the manner of llama.cpp: one stream of tokens, its own KV memory per layer, one scratch
 * buffer reserved before the first token, float32 queries and outputs. Every decode step stores a token into
 * each layer's dense window; when a window is full, its oldest GROUP tokens move to pages. All sizes are
 * known before the first token, and nothing is allocated after it.
 */
#include <string.h>

#include "example.h"

enum { LAYERS = 3, DIM = 64, KV_HEADS = 3, Q_HEADS = 9, ROW = KV_HEADS * DIM };
enum { CONTEXT = 640, KEEP = 32, PAGE_TOKENS = 64, R = 32, GROUP = 256, WINDOW = R + GROUP };

struct layer {
  mustafar_pool_mut k, v;        /* CONTEXT tokens, contiguous: no block table */
  uint16_t *k_window, *v_window; /* [WINDOW, KV_HEADS, DIM] */
};

struct engine {
  mustafar_context* context;
  mustafar_format format;
  struct layer layers[LAYERS];
  int32_t compressed, window; /* tokens of every layer, in pages and in the window */
  void* scratch;
  size_t scratch_bytes;
};

/* Everything that was ever stored, to check the answers: [LAYERS, CONTEXT, KV_HEADS, DIM]. */
static uint16_t all_k[LAYERS][CONTEXT][KV_HEADS][DIM], all_v[LAYERS][CONTEXT][KV_HEADS][DIM];

static mustafar_tensor rows(const void* data, int64_t tokens) {
  mustafar_tensor t = MUSTAFAR_TENSOR_INIT;
  t.data = data;
  t.dtype = MUSTAFAR_DTYPE_F16;
  t.batch = 1;
  t.tokens = tokens;
  t.heads = KV_HEADS;
  t.dim = DIM;
  return t;
}

static mustafar_pool readable(const mustafar_pool_mut* pool) {
  mustafar_pool p = MUSTAFAR_POOL_INIT;
  p.data = pool->data;
  p.format = pool->format;
  p.num_pages = pool->num_pages;
  p.kv_heads = pool->kv_heads;
  return p;
}

/* Attention of one layer, or with scratch == NULL the bytes it may ever need. */
static size_t attend(struct engine* e, int layer, const float* q_data, float* out_data, void* scratch) {
  struct layer* l = &e->layers[layer];
  mustafar_pool k = readable(&l->k), v = readable(&l->v);
  mustafar_sequences stream = MUSTAFAR_SEQUENCES_INIT;
  stream.batch = 1;
  stream.max_len = CONTEXT;
  stream.lens = &e->compressed;
  mustafar_compressed pages = MUSTAFAR_COMPRESSED_INIT;
  pages.k = &k;
  pages.v = &v;
  pages.sequences = &stream;
  mustafar_tensor k_window = rows(l->k_window, WINDOW), v_window = rows(l->v_window, WINDOW);
  mustafar_dense window = MUSTAFAR_DENSE_INIT;
  window.k = &k_window;
  window.v = &v_window;
  window.lens = &e->window;
  mustafar_tensor q = rows(q_data, 1);
  q.dtype = MUSTAFAR_DTYPE_F32;
  q.heads = Q_HEADS;
  mustafar_tensor_mut out = MUSTAFAR_TENSOR_MUT_INIT;
  out.data = out_data;
  out.dtype = MUSTAFAR_DTYPE_F32;
  out.batch = out.tokens = 1;
  out.heads = Q_HEADS;
  out.dim = DIM;
  mustafar_attend_args args = MUSTAFAR_ATTEND_ARGS_INIT;
  args.q = &q;
  args.out = &out;
  args.batch = 1;
  args.compressed = &pages;
  args.window = &window;
  size_t bytes = e->scratch_bytes;
  if (scratch == NULL) {
    MUST(mustafar_attend_workspace_size(e->context, &args, &bytes));
  } else {
    MUST(mustafar_attend(e->context, &args, scratch, bytes, NULL));
  }
  return bytes;
}

static void create(struct engine* e, uint32_t threads) {
  memset(e, 0, sizeof *e);
  mustafar_context_config config = MUSTAFAR_CONTEXT_CONFIG_INIT;
  config.threads = threads;
  MUST(mustafar_context_create(&config, &e->context));
  e->format = (mustafar_format)MUSTAFAR_FORMAT_INIT;
  e->format.value_type = MUSTAFAR_VALUE_TYPE_F16;
  e->format.head_dim = DIM;
  e->format.page_tokens = PAGE_TOKENS;
  e->format.keep = KEEP;
  size_t page_bytes;
  MUST(mustafar_format_page_bytes(&e->format, &page_bytes));
  for (int i = 0; i < LAYERS; i++) {
    struct layer* l = &e->layers[i];
    l->k = (mustafar_pool_mut)MUSTAFAR_POOL_MUT_INIT;
    l->k.format = &e->format;
    l->k.num_pages = CONTEXT / PAGE_TOKENS;
    l->k.kv_heads = KV_HEADS;
    l->v = l->k;
    l->k.data = allocate((size_t)l->k.num_pages * KV_HEADS * page_bytes);
    l->v.data = allocate((size_t)l->v.num_pages * KV_HEADS * page_bytes);
    l->k_window = allocate(sizeof(uint16_t) * WINDOW * ROW);
    l->v_window = allocate(sizeof(uint16_t) * WINDOW * ROW);
  }
  /* Asked with the largest shapes and no data: one buffer serves every layer and step. */
  e->scratch_bytes = attend(e, 0, NULL, NULL, NULL);
  e->scratch = allocate(e->scratch_bytes);
}

static void destroy(struct engine* e) {
  for (int i = 0; i < LAYERS; i++) {
    free(e->layers[i].k.data);
    free(e->layers[i].v.data);
    free(e->layers[i].k_window);
    free(e->layers[i].v_window);
  }
  free(e->scratch);
  MUST(mustafar_context_destroy(e->context));
}

/* Moves the oldest GROUP tokens of every window to pages. */
static void compress(struct engine* e) {
  int64_t slots[GROUP];
  for (int t = 0; t < GROUP; t++) slots[t] = e->compressed + t;
  for (int i = 0; i < LAYERS; i++) {
    struct layer* l = &e->layers[i];
    mustafar_tensor k = rows(l->k_window, GROUP), v = rows(l->v_window, GROUP);
    mustafar_append_side k_side = MUSTAFAR_APPEND_SIDE_INIT, v_side = MUSTAFAR_APPEND_SIDE_INIT;
    k_side.x = &k;
    k_side.pool = &l->k;
    v_side.x = &v;
    v_side.pool = &l->v;
    mustafar_append_args args = MUSTAFAR_APPEND_ARGS_INIT;
    args.k = &k_side;
    args.v = &v_side;
    args.slots = slots;
    MUST(mustafar_append(e->context, &args, NULL));
    size_t left = sizeof(uint16_t) * (size_t)(e->window - GROUP) * ROW;
    memmove(l->k_window, l->k_window + GROUP * ROW, left);
    memmove(l->v_window, l->v_window + GROUP * ROW, left);
  }
  e->compressed += GROUP;
  e->window -= GROUP;
}

/* Largest difference of one layer's output from attention by the definition. */
static double difference(const struct engine* e, int layer, const float* q, const float* out) {
  static double score[CONTEXT];
  int total = e->compressed + e->window;
  double worst = 0;
  for (int h = 0; h < Q_HEADS; h++) {
    int kv = h / (Q_HEADS / KV_HEADS);
    double sum = 0, want[DIM] = {0};
    for (int t = 0; t < total; t++) {
      const uint16_t* k = all_k[layer][t][kv];
      score[t] = 0;
      for (int c = 0; c < DIM; c++)
        if (t >= e->compressed || keeps(k, DIM, KEEP, c))
          score[t] += (double)q[h * DIM + c] * half_value(k[c]);
      score[t] = exp(score[t] / sqrt(DIM));
      sum += score[t];
    }
    for (int t = 0; t < total; t++)
      for (int c = 0; c < DIM; c++)
        if (t >= e->compressed || keeps(all_v[layer][t][kv], DIM, KEEP, c))
          want[c] += score[t] / sum * half_value(all_v[layer][t][kv][c]);
    for (int c = 0; c < DIM; c++) worst = fmax(worst, fabs(out[h * DIM + c] - want[c]));
  }
  return worst;
}

int main(void) {
  struct engine engine, *e = &engine;
  create(e, 2);
  static float q[Q_HEADS * DIM], out[Q_HEADS * DIM];
  double worst = 0;
  for (int step = 0; step < CONTEXT - 8; step++) {
    for (int i = 0; i < LAYERS; i++) {
      uint16_t *k = e->layers[i].k_window + e->window * ROW, *v = e->layers[i].v_window + e->window * ROW;
      for (int c = 0; c < ROW; c++) {
        k[c] = random_half();
        v[c] = random_half();
      }
      memcpy(all_k[i][step], k, sizeof all_k[i][step]);
      memcpy(all_v[i][step], v, sizeof all_v[i][step]);
    }
    e->window++;
    for (int i = 0; i < LAYERS; i++) {
      for (int c = 0; c < Q_HEADS * DIM; c++) q[c] = (float)half_value(random_half());
      attend(e, i, q, out, e->scratch);
      /* The loop is slow: check where something changes, and now and then. */
      if (step % 101 == 0 || (e->compressed > 0 && e->window <= R + 1))
        worst = fmax(worst, difference(e, i, q, out));
    }
    if (e->window == WINDOW) compress(e);
  }
  printf("%d tokens, %d of them in pages; scratch %zu bytes; largest difference from the plain loop: %.2g\n",
         e->compressed + e->window, e->compressed, e->scratch_bytes, worst);
  CHECK(e->compressed == 2 * GROUP && worst < 1e-4);
  destroy(e);
  return 0;
}
