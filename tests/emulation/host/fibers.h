// Runs the threads of a CTA as fibers of one host thread, and lets the lanes of a warp meet.
//
// A fiber runs until it meets others (a warp collective or a barrier) or returns, so threads take turns at
// exactly the places where CUDA orders them. Any other order is possible on a GPU: `descending` starts from
// the last thread instead of the first, which shows results that depend on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

struct Index {
  unsigned x, y, z;
};

// What a fiber sees of itself and of the launch.
struct Thread {
  Index index;
  Index block;
  Index block_size;
  Index grid_size;
  unsigned lane;
};

const Thread& current();

// Runs one CTA to its end. Aborts with a message on a deadlock: lanes or threads that wait for ones that have
// returned or wait elsewhere.
void run_block(const std::function<void()>& body, Index block, Index block_size, Index grid_size,
               bool descending);

// __syncthreads().
void barrier();

// The most a lane hands over when lanes meet: an MMA's a, b and c fragments.
constexpr int kMeetWords = 12;

struct Words {
  uint32_t word[kMeetWords];
};

// What the 32 lanes of the warp handed over, valid until the lane meets others again.
using Met = Words[32];

// Waits until every lane of `mask` has come with the same `op`. The mask must name every lane that has not
// returned.
const Met& meet(const char* op, uint32_t mask, const Words& mine);

// Asynchronous copies of the current thread: the destination reads as poison until the group is waited for.
void copy_async(void* destination, const void* source, size_t bytes);
void commit_copies();
void wait_copies(size_t pending);

// Dynamic shared memory of the CTA: `bytes` from the start may be touched (AddressSanitizer sees to it).
uint8_t* dynamic_shared();
void set_dynamic_shared(size_t bytes);

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulation
