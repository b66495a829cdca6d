/* What the C examples share: checked calls, and random f16 data without a f16 type. */
#ifndef EXAMPLE_H
#define EXAMPLE_H

#include <math.h>
#include <mustafar.h>
#include <stdio.h>
#include <stdlib.h>

/* Ends the program when a call of the library, or any other condition, failed. */
#define MUST(call)                                                                              \
  do {                                                                                          \
    mustafar_status must_status = (call);                                                       \
    if (must_status != MUSTAFAR_STATUS_SUCCESS) {                                               \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, mustafar_status_name(must_status), \
              mustafar_last_error_message());                                                   \
      exit(EXIT_FAILURE);                                                                       \
    }                                                                                           \
  } while (0)

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      exit(EXIT_FAILURE);                                                     \
    }                                                                         \
  } while (0)

/* Zeroed memory aligned to 16 bytes, as pages and workspaces need it: malloc gives that on 64-bit systems. */
static inline void* allocate(size_t bytes) {
  void* memory = calloc(bytes ? bytes : 1, 1);
  CHECK(memory != NULL && (uintptr_t)memory % MUSTAFAR_PAGE_ALIGN == 0);
  return memory;
}

static uint32_t random_state = 1;

static inline uint32_t next_random(void) {
  random_state = random_state * 1664525u + 1013904223u;
  return random_state >> 8;
}

/* A normal f16 between 2^-6 and 2 in magnitude, either sign. */
static inline uint16_t random_half(void) {
  uint32_t exponent = 9 + next_random() % 7;
  return (uint16_t)((next_random() & 1) << 15 | exponent << 10 | (next_random() & 1023));
}

/* Value of a normal f16, or of zero. */
static inline double half_value(uint16_t half) {
  int exponent = half >> 10 & 31;
  double magnitude = exponent == 0 ? 0.0 : ldexp(1.0 + (half & 1023) / 1024.0, exponent - 15);
  return half >> 15 ? -magnitude : magnitude;
}

/* Whether a row of `dim` values keeps channel `c`: it is among the `keep` largest, the lower channel winning
 * ties. */
static inline int keeps(const uint16_t* row, int dim, int keep, int c) {
  int larger = 0;
  for (int i = 0; i < dim; i++) {
    int a = row[i] & 0x7fff, b = row[c] & 0x7fff;
    larger += a > b || (a == b && i < c);
  }
  return larger < keep;
}

#endif
