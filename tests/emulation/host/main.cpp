// Runs launches read from standard input on the emulated GPU and writes the buffers afterwards to standard
// output.
//
// All numbers are little-endian u64. Input: number of launches, then for each
//   name length, name; grid x, y, z; block x, y, z; dynamic shared bytes; descending (0 or 1);
//   number of buffers, then for each its length and bytes;
//   length of the parameter struct and its bytes;
//   number of pointers in the struct, then for each: offset in the struct, buffer, byte offset into the
//   buffer.
// Output: for each launch the buffers, one after the other.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "registry.h"

namespace emulation {
namespace {

std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

void read(void* to, size_t bytes) {
  if (bytes > 0 && fread(to, 1, bytes, stdin) != bytes) {
    fail("input ends early");
  }
}

uint64_t read_u64() {
  uint64_t value;
  read(&value, sizeof value);
  return value;
}

Index read_index() {
  const unsigned x = static_cast<unsigned>(read_u64());
  const unsigned y = static_cast<unsigned>(read_u64());
  return {x, y, static_cast<unsigned>(read_u64())};
}

// Memory of exactly its size, so that AddressSanitizer sees one byte too far; aligned as device allocations
// are.
struct Buffer {
  uint8_t* bytes;
  size_t size;
};

Buffer read_buffer() {
  const size_t size = read_u64();
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, size) != 0) {
    fail("no memory for %zu bytes", size);
  }
  read(memory, size);
  return {static_cast<uint8_t*>(memory), size};
}

void run_launch() {
  std::string name(read_u64(), '\0');
  read(name.data(), name.size());
  const Index grid = read_index();
  const Index block = read_index();
  set_dynamic_shared(read_u64());
  const bool descending = read_u64() != 0;
  std::vector<Buffer> buffers(read_u64());
  for (Buffer& buffer : buffers) {
    buffer = read_buffer();
  }
  std::vector<uint8_t> params(read_u64());
  read(params.data(), params.size());
  for (uint64_t left = read_u64(); left > 0; --left) {
    const uint64_t at = read_u64();
    const uint64_t buffer = read_u64();
    uint8_t* pointer = buffers.at(buffer).bytes + read_u64();
    memcpy(params.data() + at, &pointer, sizeof pointer);
  }

  const Kernel* kernel = nullptr;
  for (const Kernel& candidate : kernels()) {
    kernel = name == candidate.name ? &candidate : kernel;
  }
  if (kernel == nullptr) {
    fail("no kernel is called %s", name.c_str());
  }
  if (params.size() != kernel->params_bytes) {
    fail("%s takes %zu bytes of parameters, not %zu", kernel->name, kernel->params_bytes, params.size());
  }
  const std::function<void()> body = [&] { kernel->call(params.data()); };
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    const unsigned n = static_cast<unsigned>(descending ? blocks - 1 - i : i);
    run_block(body, {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y}, block, grid, descending);
  }
  for (const Buffer& buffer : buffers) {
    fwrite(buffer.bytes, 1, buffer.size, stdout);
    free(buffer.bytes);
  }
}

}  // namespace

void add(Kernel kernel) { kernels().push_back(kernel); }

}  // namespace emulation

int main() {
  for (uint64_t left = emulation::read_u64(); left > 0; --left) {
    emulation::run_launch();
  }
  return fflush(stdout) == 0 ? 0 : 1;
}
