/*
 * The op API: an engine that owns all memory stores keys and values into pages of its own pool and attends
 * over them. Two sequences of different length share the pool through a block table; the newest tokens are
 * dense. The answer is compared with a plain loop over the same data.
 */
#include "example.h"

enum { DIM = 128, KV_HEADS = 2, Q_HEADS = 8, PAGE_TOKENS = 64, KEEP_K = 39, KEEP_V = 64 };
enum { BATCH = 2, COMPRESSED = 150, WINDOW = 20, MAX_PAGES = 3, NUM_PAGES = 8 };

static const int32_t compressed_len[BATCH] = {150, 64};
static const int32_t window_len[BATCH] = {20, 7};

/* Dense data of both sequences, [BATCH, COMPRESSED + WINDOW, KV_HEADS, DIM]. The engine would not keep it. */
enum { TOKENS = COMPRESSED + WINDOW };
static uint16_t k_data[BATCH][TOKENS][KV_HEADS][DIM];
static uint16_t v_data[BATCH][TOKENS][KV_HEADS][DIM];
static uint16_t q_data[BATCH][Q_HEADS][DIM];

/* The tensor [1, tokens, KV_HEADS, DIM] that starts at `data`. */
static mustafar_tensor tokens_at(const void* data, int64_t tokens) {
  mustafar_tensor t = MUSTAFAR_TENSOR_INIT;
  t.data = data;
  t.dtype = MUSTAFAR_DTYPE_F16;
  t.batch = 1;
  t.tokens = tokens;
  t.heads = KV_HEADS;
  t.dim = DIM;
  return t;
}

/* Attention of one query head by the definition: pruned tokens first, then dense ones. */
static void expected(int b, int h, double out[DIM], double* lse) {
  int kv = h / (Q_HEADS / KV_HEADS), total = compressed_len[b] + window_len[b];
  double score[TOKENS], largest = -INFINITY, sum = 0;
  for (int t = 0; t < total; t++) {
    int pruned = t < compressed_len[b];
    const uint16_t* k = k_data[b][t < compressed_len[b] ? t : COMPRESSED + t - compressed_len[b]][kv];
    score[t] = 0;
    for (int c = 0; c < DIM; c++)
      if (!pruned || keeps(k, DIM, KEEP_K, c)) score[t] += half_value(q_data[b][h][c]) * half_value(k[c]);
    score[t] /= sqrt(DIM);
    if (score[t] > largest) largest = score[t];
  }
  for (int t = 0; t < total; t++) sum += exp(score[t] - largest);
  for (int c = 0; c < DIM; c++) out[c] = 0;
  for (int t = 0; t < total; t++) {
    int pruned = t < compressed_len[b];
    const uint16_t* v = v_data[b][pruned ? t : COMPRESSED + t - compressed_len[b]][kv];
    for (int c = 0; c < DIM; c++)
      if (!pruned || keeps(v, DIM, KEEP_V, c)) out[c] += exp(score[t] - largest) / sum * half_value(v[c]);
  }
  *lse = largest + log(sum);
}

int main(void) {
  CHECK(mustafar_version_number() / 1000 == MUSTAFAR_VERSION_NUMBER / 1000);
  printf("mustafar %s\n", mustafar_version());
  mustafar_context* context = NULL;
  MUST(mustafar_context_create(NULL, &context));

  /* Slots of [K page | V page] per page and head: one block of memory, two pools. */
  mustafar_format k_format = MUSTAFAR_FORMAT_INIT;
  k_format.value_type = MUSTAFAR_VALUE_TYPE_F16;
  k_format.head_dim = DIM;
  k_format.page_tokens = PAGE_TOKENS;
  MUST(mustafar_keep_for_sparsity(DIM, 0.7, &k_format.keep));
  CHECK(k_format.keep == KEEP_K);
  mustafar_format v_format = k_format;
  v_format.keep = KEEP_V;
  size_t k_bytes, v_bytes;
  MUST(mustafar_format_page_bytes(&k_format, &k_bytes));
  MUST(mustafar_format_page_bytes(&v_format, &v_bytes));
  char* memory = allocate(NUM_PAGES * KV_HEADS * (k_bytes + v_bytes));

  mustafar_pool_mut k_pool = MUSTAFAR_POOL_MUT_INIT;
  k_pool.data = memory;
  k_pool.format = &k_format;
  k_pool.num_pages = NUM_PAGES;
  k_pool.kv_heads = KV_HEADS;
  k_pool.head_stride = (int64_t)(k_bytes + v_bytes);
  k_pool.page_stride = KV_HEADS * k_pool.head_stride;
  mustafar_pool_mut v_pool = k_pool;
  v_pool.data = memory + k_bytes;
  v_pool.format = &v_format;

  for (int b = 0; b < BATCH; b++) {
    for (int t = 0; t < TOKENS; t++)
      for (int h = 0; h < KV_HEADS; h++)
        for (int c = 0; c < DIM; c++) {
          k_data[b][t][h][c] = random_half();
          v_data[b][t][h][c] = random_half();
        }
    for (int h = 0; h < Q_HEADS; h++)
      for (int c = 0; c < DIM; c++) q_data[b][h][c] = random_half();
  }

  /* Any pages will do; the last entry of the second row is never read. */
  static const int32_t table[BATCH][MAX_PAGES] = {{6, 1, 3}, {4, -1, -1}};
  for (int b = 0; b < BATCH; b++) {
    int64_t slots[COMPRESSED];
    for (int t = 0; t < compressed_len[b]; t++)
      slots[t] = (int64_t)table[b][t / PAGE_TOKENS] * PAGE_TOKENS + t % PAGE_TOKENS;
    mustafar_tensor k_new = tokens_at(k_data[b], compressed_len[b]);
    mustafar_tensor v_new = tokens_at(v_data[b], compressed_len[b]);
    mustafar_append_side k_side = MUSTAFAR_APPEND_SIDE_INIT, v_side = MUSTAFAR_APPEND_SIDE_INIT;
    k_side.x = &k_new;
    k_side.pool = &k_pool;
    v_side.x = &v_new;
    v_side.pool = &v_pool;
    mustafar_append_args append = MUSTAFAR_APPEND_ARGS_INIT;
    append.k = &k_side;
    append.v = &v_side;
    append.slots = slots;
    MUST(mustafar_append(context, &append, NULL));
  }

  mustafar_pool k_read = MUSTAFAR_POOL_INIT;
  k_read.data = k_pool.data;
  k_read.format = &k_format;
  k_read.num_pages = NUM_PAGES;
  k_read.kv_heads = KV_HEADS;
  k_read.head_stride = k_pool.head_stride;
  k_read.page_stride = k_pool.page_stride;
  mustafar_pool v_read = k_read;
  v_read.data = v_pool.data;
  v_read.format = &v_format;
  mustafar_sequences sequences = MUSTAFAR_SEQUENCES_INIT;
  sequences.batch = BATCH;
  sequences.max_len = COMPRESSED;
  sequences.table = table[0];
  sequences.lens = compressed_len;
  mustafar_compressed compressed = MUSTAFAR_COMPRESSED_INIT;
  compressed.k = &k_read;
  compressed.v = &v_read;
  compressed.sequences = &sequences;

  mustafar_tensor k_window = tokens_at(k_data[0][COMPRESSED], WINDOW);
  k_window.batch = BATCH;
  k_window.batch_stride = TOKENS * KV_HEADS * DIM;
  k_window.token_stride = KV_HEADS * DIM;
  k_window.head_stride = DIM;
  mustafar_tensor v_window = k_window;
  v_window.data = v_data[0][COMPRESSED];
  mustafar_dense window = MUSTAFAR_DENSE_INIT;
  window.k = &k_window;
  window.v = &v_window;
  window.lens = window_len;

  static float out_data[BATCH][Q_HEADS][DIM], lse_data[BATCH][Q_HEADS];
  mustafar_tensor q = tokens_at(q_data, BATCH);
  q.heads = Q_HEADS;
  mustafar_tensor_mut out = MUSTAFAR_TENSOR_MUT_INIT;
  out.data = out_data;
  out.dtype = MUSTAFAR_DTYPE_F32;
  out.batch = 1;
  out.tokens = BATCH;
  out.heads = Q_HEADS;
  out.dim = DIM;
  mustafar_tensor_mut lse = out;
  lse.data = lse_data;
  lse.dim = 1;
  mustafar_attend_args attend = MUSTAFAR_ATTEND_ARGS_INIT;
  attend.q = &q;
  attend.out = &out;
  attend.lse = &lse;
  attend.batch = BATCH;
  attend.compressed = &compressed;
  attend.window = &window;
  size_t workspace_bytes;
  MUST(mustafar_attend_workspace_size(context, &attend, &workspace_bytes));
  void* workspace = allocate(workspace_bytes);
  MUST(mustafar_attend(context, &attend, workspace, workspace_bytes, NULL));

  double worst = 0;
  for (int b = 0; b < BATCH; b++)
    for (int h = 0; h < Q_HEADS; h++) {
      double want[DIM], want_lse;
      expected(b, h, want, &want_lse);
      worst = fmax(worst, fabs(lse_data[b][h] - want_lse));
      for (int c = 0; c < DIM; c++) worst = fmax(worst, fabs(out_data[b][h][c] - want[c]));
    }
  double dense = 2.0 * PAGE_TOKENS * DIM * sizeof(uint16_t);
  printf("pages: %.1f %% of dense; largest difference from the plain loop: %.2g\n",
         100.0 * (double)(k_bytes + v_bytes) / dense, worst);
  CHECK(worst < 1e-4);

  /* A mistake is a status and a message, never a crash. */
  attend.batch = 3;
  CHECK(mustafar_attend(context, &attend, workspace, workspace_bytes, NULL) != MUSTAFAR_STATUS_SUCCESS);
  printf("as it should be refused: %s\n", mustafar_last_error_message());

  free(workspace);
  free(memory);
  MUST(mustafar_context_destroy(context));
  return 0;
}
