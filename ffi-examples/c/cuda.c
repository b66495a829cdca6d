/*
 * The op API on a GPU: stores keys and values of two sequences into a pool in device memory, attends over it
 * through a block table, both on one stream, and compares the answer with a plain loop on the host. Device
 * memory and the stream are the application's, here through the CUDA driver, which is opened at run time: the
 * program builds without a CUDA toolkit, and without a GPU it says so and ends with 77.
 */
#include <dlfcn.h>
#include <string.h>

#include "example.h"

enum { DIM = 128, KV_HEADS = 2, Q_HEADS = 8, PAGE_TOKENS = 64, KEEP_K = 39, KEEP_V = 64 };
enum { BATCH = 2, MAX_LEN = 150, MAX_PAGES = 3, NUM_PAGES = 8, TOKENS = 150 + 64 };
enum { SKIPPED = 77 };

static const int32_t start[BATCH] = {0, 150}; /* of the sequence in the arrays below */
static const int32_t len[BATCH] = {150, 64};
static uint16_t k_data[TOKENS][KV_HEADS][DIM], v_data[TOKENS][KV_HEADS][DIM];
static uint16_t q_data[BATCH][Q_HEADS][DIM];

/* What the program needs of cuda.h. */
typedef unsigned long long CUdeviceptr;
typedef struct CUstream_st* CUstream;
typedef struct CUctx_st* CUcontext;

static int (*cuDevicePrimaryCtxRetain)(CUcontext*, int);
static int (*cuDevicePrimaryCtxRelease)(int);
static int (*cuCtxSetCurrent)(CUcontext);
static int (*cuStreamCreate)(CUstream*, unsigned);
static int (*cuStreamSynchronize)(CUstream);
static int (*cuStreamDestroy)(CUstream);
static int (*cuMemAlloc)(CUdeviceptr*, size_t);
static int (*cuMemFree)(CUdeviceptr);
static int (*cuMemcpyHtoDAsync)(CUdeviceptr, const void*, size_t, CUstream);
static int (*cuMemcpyDtoHAsync)(void*, CUdeviceptr, size_t, CUstream);

/* Sets the function pointer at `function`; ISO C has no cast for it. */
static void find(void* driver, const char* name, void* function) {
  void* address = dlsym(driver, name);
  CHECK(address != NULL);
  memcpy(function, &address, sizeof address);
}

static void open_driver(void) {
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  CHECK(driver != NULL);
  find(driver, "cuDevicePrimaryCtxRetain", &cuDevicePrimaryCtxRetain);
  find(driver, "cuDevicePrimaryCtxRelease_v2", &cuDevicePrimaryCtxRelease);
  find(driver, "cuCtxSetCurrent", &cuCtxSetCurrent);
  find(driver, "cuStreamCreate", &cuStreamCreate);
  find(driver, "cuStreamSynchronize", &cuStreamSynchronize);
  find(driver, "cuStreamDestroy_v2", &cuStreamDestroy);
  find(driver, "cuMemAlloc_v2", &cuMemAlloc);
  find(driver, "cuMemFree_v2", &cuMemFree);
  find(driver, "cuMemcpyHtoDAsync_v2", &cuMemcpyHtoDAsync);
  find(driver, "cuMemcpyDtoHAsync_v2", &cuMemcpyDtoHAsync);
}

static CUstream stream;
static CUdeviceptr blocks[16];
static int num_blocks;

/* Device memory, freed at the end; pages and workspaces are aligned well beyond the 16 bytes they need. */
static void* device(size_t bytes) {
  CHECK(num_blocks < 16 && cuMemAlloc(&blocks[num_blocks], bytes ? bytes : 1) == 0);
  return (void*)(uintptr_t)blocks[num_blocks++];
}

static void* upload(const void* data, size_t bytes) {
  void* copy = device(bytes);
  CHECK(cuMemcpyHtoDAsync((CUdeviceptr)(uintptr_t)copy, data, bytes, stream) == 0);
  return copy;
}

static void download(void* to, const void* from, size_t bytes) {
  CHECK(cuMemcpyDtoHAsync(to, (CUdeviceptr)(uintptr_t)from, bytes, stream) == 0);
}

/* The tensor [1, tokens, heads, DIM] at `data`. */
static mustafar_tensor tensor(const void* data, int64_t tokens, int64_t heads) {
  mustafar_tensor t = MUSTAFAR_TENSOR_INIT;
  t.data = data;
  t.dtype = MUSTAFAR_DTYPE_F16;
  t.batch = 1;
  t.tokens = tokens;
  t.heads = heads;
  t.dim = DIM;
  return t;
}

/* Attention of query head `h` of sequence `b` by the definition, over pruned keys and values. */
static void expected(int b, int h, double out[DIM], double* lse) {
  int kv = h / (Q_HEADS / KV_HEADS);
  double score[MAX_LEN], sum = 0;
  for (int t = 0; t < len[b]; t++) {
    const uint16_t* k = k_data[start[b] + t][kv];
    score[t] = 0;
    for (int c = 0; c < DIM; c++)
      if (keeps(k, DIM, KEEP_K, c)) score[t] += half_value(q_data[b][h][c]) * half_value(k[c]);
    score[t] = exp(score[t] / sqrt(DIM));
    sum += score[t];
  }
  for (int c = 0; c < DIM; c++) out[c] = 0;
  for (int t = 0; t < len[b]; t++) {
    const uint16_t* v = v_data[start[b] + t][kv];
    for (int c = 0; c < DIM; c++)
      if (keeps(v, DIM, KEEP_V, c)) out[c] += score[t] / sum * half_value(v[c]);
  }
  *lse = log(sum);
}

int main(void) {
  mustafar_context_config config = MUSTAFAR_CONTEXT_CONFIG_INIT;
  config.backend = MUSTAFAR_BACKEND_CUDA;
  config.device = 0;
  mustafar_context* context = NULL;
  mustafar_status status = mustafar_context_create(&config, &context);
  if (status == MUSTAFAR_STATUS_UNAVAILABLE) {
    printf("SKIPPED on CUDA: %s\n", mustafar_last_error_message());
    return SKIPPED;
  }
  MUST(status);
  /* The context works in the device's primary CUDA context, as this program does. */
  open_driver();
  CUcontext primary;
  CHECK(cuDevicePrimaryCtxRetain(&primary, 0) == 0 && cuCtxSetCurrent(primary) == 0);
  CHECK(cuStreamCreate(&stream, 1 /* does not wait for the default stream */) == 0);

  for (int t = 0; t < TOKENS; t++)
    for (int h = 0; h < KV_HEADS; h++)
      for (int c = 0; c < DIM; c++) {
        k_data[t][h][c] = random_half();
        v_data[t][h][c] = random_half();
      }
  for (int b = 0; b < BATCH; b++)
    for (int h = 0; h < Q_HEADS; h++)
      for (int c = 0; c < DIM; c++) q_data[b][h][c] = random_half();
  /* Any pages will do; entries past a sequence's last page are never read. */
  static const int32_t table[BATCH][MAX_PAGES] = {{6, 1, 3}, {4, -1, -1}};
  int64_t slots[TOKENS];
  for (int b = 0; b < BATCH; b++)
    for (int t = 0; t < len[b]; t++)
      slots[start[b] + t] = (int64_t)table[b][t / PAGE_TOKENS] * PAGE_TOKENS + t % PAGE_TOKENS;

  /* Slots of [K page | V page] per page and head: one block of device memory, two pools. */
  mustafar_format k_format = MUSTAFAR_FORMAT_INIT;
  k_format.value_type = MUSTAFAR_VALUE_TYPE_F16;
  k_format.head_dim = DIM;
  k_format.page_tokens = PAGE_TOKENS;
  k_format.keep = KEEP_K;
  mustafar_format v_format = k_format;
  v_format.keep = KEEP_V;
  size_t k_bytes, v_bytes;
  MUST(mustafar_format_page_bytes(&k_format, &k_bytes));
  MUST(mustafar_format_page_bytes(&v_format, &v_bytes));
  char* memory = device(NUM_PAGES * KV_HEADS * (k_bytes + v_bytes));
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

  /* Structures are host memory, everything that they point to as data is device memory. */
  mustafar_tensor k_new = tensor(upload(k_data, sizeof k_data), TOKENS, KV_HEADS);
  mustafar_tensor v_new = tensor(upload(v_data, sizeof v_data), TOKENS, KV_HEADS);
  mustafar_append_side k_side = MUSTAFAR_APPEND_SIDE_INIT, v_side = MUSTAFAR_APPEND_SIDE_INIT;
  k_side.x = &k_new;
  k_side.pool = &k_pool;
  v_side.x = &v_new;
  v_side.pool = &v_pool;
  mustafar_append_args append = MUSTAFAR_APPEND_ARGS_INIT;
  append.k = &k_side;
  append.v = &v_side;
  append.slots = upload(slots, sizeof slots);
  MUST(mustafar_append(context, &append, stream));

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
  sequences.max_len = MAX_LEN;
  sequences.table = upload(table, sizeof table);
  sequences.lens = upload(len, sizeof len);
  mustafar_compressed compressed = MUSTAFAR_COMPRESSED_INIT;
  compressed.k = &k_read;
  compressed.v = &v_read;
  compressed.sequences = &sequences;

  static float out_data[BATCH][Q_HEADS][DIM], lse_data[BATCH][Q_HEADS];
  mustafar_tensor q = tensor(upload(q_data, sizeof q_data), BATCH, Q_HEADS);
  mustafar_tensor_mut out = MUSTAFAR_TENSOR_MUT_INIT;
  out.data = device(sizeof out_data);
  out.dtype = MUSTAFAR_DTYPE_F32;
  out.batch = 1;
  out.tokens = BATCH;
  out.heads = Q_HEADS;
  out.dim = DIM;
  mustafar_tensor_mut lse = out;
  lse.data = device(sizeof lse_data);
  lse.dim = 1;
  mustafar_attend_args attend = MUSTAFAR_ATTEND_ARGS_INIT;
  attend.q = &q;
  attend.out = &out;
  attend.lse = &lse;
  attend.batch = BATCH;
  attend.compressed = &compressed;
  size_t workspace_bytes;
  MUST(mustafar_attend_workspace_size(context, &attend, &workspace_bytes));
  void* workspace = device(workspace_bytes);
  MUST(mustafar_attend(context, &attend, workspace, workspace_bytes, stream));
  download(out_data, out.data, sizeof out_data);
  download(lse_data, lse.data, sizeof lse_data);
  CHECK(cuStreamSynchronize(stream) == 0);

  /* What a GPU cannot return from the calls above, it counts. */
  mustafar_device_errors errors = MUSTAFAR_DEVICE_ERRORS_INIT;
  MUST(mustafar_context_take_device_errors(context, &errors));
  CHECK(errors.append == 0 && errors.compress == 0 && errors.read == 0);

  double worst = 0, worst_lse = 0;
  for (int b = 0; b < BATCH; b++)
    for (int h = 0; h < Q_HEADS; h++) {
      double want[DIM], want_lse;
      expected(b, h, want, &want_lse);
      worst_lse = fmax(worst_lse, fabs(lse_data[b][h] - want_lse));
      for (int c = 0; c < DIM; c++) worst = fmax(worst, fabs(out_data[b][h][c] - want[c]));
    }
  printf("CUDA: largest difference from the plain loop: %.2g, of log-sum-exp: %.2g\n", worst, worst_lse);
  /* Weights are rounded to f16 before they multiply values, which are below 2. */
  CHECK(worst < 2 * ldexp(1, -11) && worst_lse < 1e-4);

  /* A host pointer where device memory is needed is refused, not read. */
  q.data = q_data;
  CHECK(mustafar_attend(context, &attend, workspace, workspace_bytes, stream) ==
        MUSTAFAR_STATUS_INVALID_ARGUMENT);

  while (num_blocks > 0) CHECK(cuMemFree(blocks[--num_blocks]) == 0);
  CHECK(cuStreamDestroy(stream) == 0);
  MUST(mustafar_context_destroy(context));
  CHECK(cuDevicePrimaryCtxRelease(0) == 0);
  return 0;
}
