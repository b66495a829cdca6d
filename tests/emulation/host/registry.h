// Kernels by symbol name.
#pragma once

#include <cstring>

#include "cuda.h"

namespace emulation {

// Runs one thread of a kernel with the bytes of its parameter struct.
using Call = void (*)(const uint8_t* params);

struct Kernel {
  const char* name;
  size_t params_bytes;
  Call call;
};

void add(Kernel kernel);

template <typename Params, void (*kKernel)(const Params)>
struct Registration {
  explicit Registration(const char* name) {
    add({name, sizeof(Params), [](const uint8_t* bytes) {
           Params params;
           memcpy(&params, bytes, sizeof params);
           kKernel(params);
         }});
  }
};

}  // namespace emulation

// At namespace scope: makes `kernel`, whose one parameter is a `params`, known.
#define EMULATE(params, kernel) \
  static const emulation::Registration<params, kernel> registration_##kernel(#kernel);
