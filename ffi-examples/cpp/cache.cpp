// The cache API from C++17: handles as values that end themselves, statuses as exceptions. Two sequences
// decode over a cache that prunes and compresses by itself; one is forked, truncated, saved and restored.
// Answers are compared with a plain loop over the same data.
#include <mustafar.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace mst {

// What a call that failed was told, with its status.
class Error : public std::runtime_error {
 public:
  explicit Error(mustafar_status status)
      : std::runtime_error(std::string(mustafar_status_name(status)) + ": " + mustafar_last_error_message()),
        status_(status) {}
  mustafar_status status() const { return status_; }

 private:
  mustafar_status status_;
};

inline void check(mustafar_status status) {
  if (status != MUSTAFAR_STATUS_SUCCESS) throw Error(status);
}

// An owned handle: moves, ends once.
template <typename T, mustafar_status (*destroy)(T*)>
struct Destroy {
  void operator()(T* handle) const { destroy(handle); }
};
using Context = std::unique_ptr<mustafar_context, Destroy<mustafar_context, mustafar_context_destroy>>;
using CacheHandle = std::unique_ptr<mustafar_cache, Destroy<mustafar_cache, mustafar_cache_destroy>>;

inline Context make_context(std::uint32_t threads) {
  mustafar_context_config config = MUSTAFAR_CONTEXT_CONFIG_INIT;
  config.threads = threads;
  mustafar_context* context = nullptr;
  check(mustafar_context_create(&config, &context));
  return Context(context);
}

inline mustafar_tensor tensor(const void* data, mustafar_dtype dtype, std::int64_t batch, std::int64_t tokens,
                              std::int64_t heads, std::int64_t dim) {
  mustafar_tensor t = MUSTAFAR_TENSOR_INIT;
  t.data = data;
  t.dtype = dtype;
  t.batch = batch;
  t.tokens = tokens;
  t.heads = heads;
  t.dim = dim;
  return t;
}

class Cache {
 public:
  Cache(const Context& context, const mustafar_cache_config& config) {
    mustafar_cache* cache = nullptr;
    check(mustafar_cache_create(context.get(), &config, &cache));
    handle_.reset(cache);
  }

  std::uint64_t create() {
    std::uint64_t sequence = 0;
    check(mustafar_cache_sequence_create(handle_.get(), &sequence));
    return sequence;
  }
  std::uint64_t fork(std::uint64_t sequence) {
    std::uint64_t copy = 0;
    check(mustafar_cache_sequence_fork(handle_.get(), sequence, &copy));
    return copy;
  }
  void truncate(std::uint64_t sequence, std::int64_t len) {
    check(mustafar_cache_sequence_truncate(handle_.get(), sequence, len));
  }
  void free(std::uint64_t sequence) { check(mustafar_cache_sequence_free(handle_.get(), sequence)); }

  void append(std::uint32_t layer, std::uint64_t sequence, const mustafar_tensor& k,
              const mustafar_tensor& v) {
    check(mustafar_cache_append(handle_.get(), layer, sequence, &k, &v, nullptr));
  }
  void append(std::uint32_t layer, const std::vector<std::uint64_t>& sequences, const mustafar_tensor& k,
              const mustafar_tensor& v) {
    check(mustafar_cache_append_batch(handle_.get(), layer, sequences.data(),
                                      static_cast<std::int64_t>(sequences.size()), &k, &v, nullptr));
  }
  void attend(std::uint32_t layer, const std::vector<std::uint64_t>& sequences, const mustafar_tensor& q,
              const mustafar_tensor_mut& out) {
    mustafar_cache_attend_args args = MUSTAFAR_CACHE_ATTEND_ARGS_INIT;
    args.sequences = sequences.data();
    args.num_sequences = static_cast<std::int64_t>(sequences.size());
    args.layer = layer;
    args.q = &q;
    args.out = &out;
    check(mustafar_cache_attend(handle_.get(), &args, nullptr));
  }

  struct Length {
    std::int64_t tokens, compressed;
  };
  Length length(std::uint32_t layer, std::uint64_t sequence) const {
    Length length{};
    check(mustafar_cache_len(handle_.get(), layer, sequence, &length.tokens, &length.compressed));
    return length;
  }
  mustafar_cache_bytes_info bytes() const {
    mustafar_cache_bytes_info bytes = MUSTAFAR_CACHE_BYTES_INFO_INIT;
    check(mustafar_cache_bytes(handle_.get(), &bytes));
    return bytes;
  }
  std::vector<unsigned char> save(std::uint64_t sequence) const {
    std::size_t size = 0;
    check(mustafar_cache_save_size(handle_.get(), sequence, &size));
    std::vector<unsigned char> snapshot(size);
    check(mustafar_cache_save(handle_.get(), sequence, snapshot.data(), snapshot.size(), nullptr));
    return snapshot;
  }
  std::uint64_t restore(const std::vector<unsigned char>& snapshot) {
    std::uint64_t sequence = 0;
    check(mustafar_cache_restore(handle_.get(), snapshot.data(), snapshot.size(), &sequence));
    return sequence;
  }

 private:
  CacheHandle handle_;
};

}  // namespace mst

namespace {

constexpr std::uint32_t kLayers = 2, kHeads = 2, kQueryHeads = 8, kDim = 128, kKeepK = 39, kKeepV = 64;
constexpr std::uint32_t kSinks = 4;
constexpr std::size_t kRow = kHeads * kDim;

using Half = std::uint16_t;

double value(Half half) {
  const int exponent = half >> 10 & 31;
  const double magnitude = exponent == 0 ? 0.0 : std::ldexp(1.0 + (half & 1023) / 1024.0, exponent - 15);
  return half >> 15 ? -magnitude : magnitude;
}

// What was appended to each layer of a sequence, unpruned.
struct Plain {
  std::vector<Half> k[kLayers], v[kLayers];
};

std::vector<Half> random_halves(std::mt19937& random, std::size_t count) {
  std::vector<Half> halves(count);
  for (Half& half : halves) {
    const auto bits = random();
    half = static_cast<Half>((bits & 0x83ff) | (9 + bits / 65536 % 7) << 10);
  }
  return halves;
}

// Whether channel c is among the `keep` largest of the row; the lower channel wins ties.
bool keeps(const Half* row, std::size_t keep, std::size_t c) {
  std::size_t larger = 0;
  for (std::size_t i = 0; i < kDim; i++) {
    const int a = row[i] & 0x7fff, b = row[c] & 0x7fff;
    larger += a > b || (a == b && i < c);
  }
  return larger < keep;
}

// Largest difference of `out` from attention by the definition.
double difference(const Plain& plain, std::uint32_t layer, mst::Cache::Length length, const Half* q,
                  const float* out) {
  const auto tokens = static_cast<std::size_t>(length.tokens);
  const auto pruned_end = kSinks + static_cast<std::size_t>(length.compressed);
  double worst = 0;
  for (std::size_t h = 0; h < kQueryHeads; h++) {
    const std::size_t head = h / (kQueryHeads / kHeads);
    std::vector<double> score(tokens), want(kDim);
    double sum = 0;
    const auto kept = [&](const Half* row, std::size_t t, std::size_t keep, std::size_t c) {
      return t < kSinks || t >= pruned_end || keeps(row, keep, c);
    };
    for (std::size_t t = 0; t < tokens; t++) {
      const Half* k = &plain.k[layer][t * kRow + head * kDim];
      for (std::size_t c = 0; c < kDim; c++)
        if (kept(k, t, kKeepK, c)) score[t] += value(q[h * kDim + c]) * value(k[c]);
      score[t] = std::exp(score[t] / std::sqrt(kDim));
      sum += score[t];
    }
    for (std::size_t t = 0; t < tokens; t++) {
      const Half* v = &plain.v[layer][t * kRow + head * kDim];
      for (std::size_t c = 0; c < kDim; c++)
        if (kept(v, t, kKeepV, c)) want[c] += score[t] / sum * value(v[c]);
    }
    for (std::size_t c = 0; c < kDim; c++) worst = std::fmax(worst, std::fabs(out[h * kDim + c] - want[c]));
  }
  return worst;
}

void extend(std::vector<Half>& all, const Half* more, std::size_t count) {
  all.insert(all.end(), more, more + count);
}

void must(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("failed: ") + what);
}

void run() {
  const mst::Context context = mst::make_context(1);
  mustafar_format k = MUSTAFAR_FORMAT_INIT;
  k.value_type = MUSTAFAR_VALUE_TYPE_F16;
  k.head_dim = kDim;
  k.keep = kKeepK;
  mustafar_format v = k;
  v.keep = kKeepV;
  mustafar_cache_config config = MUSTAFAR_CACHE_CONFIG_INIT;
  config.k = &k;
  config.v = &v;
  config.layers = kLayers;
  config.q_heads = kQueryHeads;
  config.kv_heads = kHeads;
  config.max_sequences = 4;
  config.max_tokens = 4096;
  config.group = 128;
  mst::Cache cache(context, config);

  // A prompt each, appended at once.
  std::mt19937 random(1);
  std::vector<std::uint64_t> sequences{cache.create(), cache.create()};
  std::vector<Plain> plain(2);
  const std::size_t prompt[2] = {300, 170};
  for (std::size_t s = 0; s < 2; s++)
    for (std::uint32_t layer = 0; layer < kLayers; layer++) {
      plain[s].k[layer] = random_halves(random, prompt[s] * kRow);
      plain[s].v[layer] = random_halves(random, prompt[s] * kRow);
      const auto tokens = static_cast<std::int64_t>(prompt[s]);
      cache.append(layer, sequences[s],
                   mst::tensor(plain[s].k[layer].data(), MUSTAFAR_DTYPE_F16, 1, tokens, kHeads, kDim),
                   mst::tensor(plain[s].v[layer].data(), MUSTAFAR_DTYPE_F16, 1, tokens, kHeads, kDim));
    }

  // Decoding: both sequences, every layer.
  std::vector<float> out(2 * kQueryHeads * kDim);
  mustafar_tensor_mut out_tensor = MUSTAFAR_TENSOR_MUT_INIT;
  out_tensor.data = out.data();
  out_tensor.dtype = MUSTAFAR_DTYPE_F32;
  out_tensor.batch = 1;
  out_tensor.tokens = 2;
  out_tensor.heads = kQueryHeads;
  out_tensor.dim = kDim;
  double worst = 0;
  std::vector<Half> q;
  for (int step = 0; step < 40; step++)
    for (std::uint32_t layer = 0; layer < kLayers; layer++) {
      const std::vector<Half> new_k = random_halves(random, 2 * kRow),
                              new_v = random_halves(random, 2 * kRow);
      cache.append(layer, sequences, mst::tensor(new_k.data(), MUSTAFAR_DTYPE_F16, 2, 1, kHeads, kDim),
                   mst::tensor(new_v.data(), MUSTAFAR_DTYPE_F16, 2, 1, kHeads, kDim));
      q = random_halves(random, 2 * kQueryHeads * kDim);
      cache.attend(layer, sequences, mst::tensor(q.data(), MUSTAFAR_DTYPE_F16, 1, 2, kQueryHeads, kDim),
                   out_tensor);
      for (std::size_t s = 0; s < 2; s++) {
        extend(plain[s].k[layer], &new_k[s * kRow], kRow);
        extend(plain[s].v[layer], &new_v[s * kRow], kRow);
        if (step % 13 == 0) {
          const std::size_t at = s * kQueryHeads * kDim;
          const auto length = cache.length(layer, sequences[s]);
          worst = std::fmax(worst, difference(plain[s], layer, length, &q[at], &out[at]));
        }
      }
    }
  const auto length = cache.length(0, sequences[0]);
  must(length.tokens == 340 && length.compressed == 256, "340 tokens, two groups compressed");
  const mustafar_cache_bytes_info bytes = cache.bytes();
  std::printf(
      "%zu bytes in pages and %zu dense, %zu if all were dense; largest difference from the plain loop: "
      "%.2g\n",
      bytes.pages, bytes.window, bytes.dense_equivalent, worst);
  must(worst < 1e-4, "answers agree with the plain loop");

  // A fork sees the same tokens, and so does what a snapshot brings back; both survive their origin.
  const std::vector<unsigned char> snapshot = cache.save(sequences[0]);
  const std::vector<std::uint64_t> copies{cache.fork(sequences[0]), cache.restore(snapshot)};
  cache.free(sequences[0]);
  std::vector<float> first(out.begin(), out.begin() + kQueryHeads * kDim);
  std::vector<Half> twice(q.begin(), q.begin() + kQueryHeads * kDim);
  extend(twice, q.data(), kQueryHeads * kDim);
  cache.attend(kLayers - 1, copies, mst::tensor(twice.data(), MUSTAFAR_DTYPE_F16, 1, 2, kQueryHeads, kDim),
               out_tensor);
  for (std::size_t i = 0; i < out.size(); i++)
    must(std::fabs(out[i] - first[i % first.size()]) < 1e-5F, "copies answer as their origin did");
  cache.truncate(copies[0], 310);
  must(cache.length(0, copies[0]).tokens == 310, "truncated");

  // Mistakes are exceptions that say what was wrong.
  try {
    cache.free(sequences[0]);
    must(false, "a freed sequence is refused");
  } catch (const mst::Error& error) {
    std::printf("as it should be refused: %s\n", error.what());
  }
}

}  // namespace

int main() {
  try {
    run();
    return EXIT_SUCCESS;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return EXIT_FAILURE;
  }
}
