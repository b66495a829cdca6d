#include "fibers.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

namespace emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kMaxDynamicShared = 232448;  // what a CTA can ask for on any of our targets
constexpr uint8_t kPoison = 0xFF;             // NaN in every float type, -1 in integers

// Meetings of one group of threads. `generation` rises when everyone has come.
struct Meeting {
  const char* op = nullptr;
  uint32_t arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  uint32_t live = 0;
  uint32_t mask = 0;
  Meeting meeting;
  Met coming;
  Met met;
};

struct Copy {
  void* destination;
  std::vector<uint8_t> bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<uint8_t[]> stack;
  void* fake_stack = nullptr;
  Thread thread;
  Warp* warp = nullptr;
  // Blocked while *waits_for == seen.
  const uint64_t* waits_for = nullptr;
  uint64_t seen = 0;
  bool done = false;
  std::vector<Copy> open_copies;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  Meeting barrier;
  size_t size = 0;
  size_t live = 0;
  size_t running = 0;
  bool descending = false;
  const std::function<void()>* body = nullptr;
};

Block block;
ucontext_t caller;
void* caller_fake_stack;
const void* caller_stack;
size_t caller_stack_bytes;

alignas(1024) uint8_t dynamic_shared_bytes[kMaxDynamicShared];
size_t dynamic_shared_size = 0;

void release(Meeting& meeting) {
  meeting.op = nullptr;
  meeting.arrived = 0;
  ++meeting.generation;
}

[[noreturn]] void report_deadlock() {
  for (size_t i = 0; i < block.size; ++i) {
    const Fiber& fiber = *block.fibers[i];
    const Meeting& at_warp = fiber.warp->meeting;
    const bool in_warp = fiber.waits_for == &at_warp.generation;
    fprintf(stderr, "thread %zu: %s\n", i, fiber.done ? "returned" : in_warp ? at_warp.op : block.barrier.op);
  }
  fail("deadlock: every remaining thread waits");
}

// Leaves `from` for the next fiber that can run, or for run_block() when all have returned.
void switch_from(Fiber& from) {
  size_t next = block.running;
  for (size_t step = 1; step <= block.size; ++step) {
    const size_t i = (block.running + (block.descending ? block.size - step : step)) % block.size;
    const Fiber& candidate = *block.fibers[i];
    if (!candidate.done && (candidate.waits_for == nullptr || *candidate.waits_for != candidate.seen)) {
      next = i;
      break;
    }
  }
  void** keep_stack = from.done ? nullptr : &from.fake_stack;
  if (block.live == 0) {
    __sanitizer_start_switch_fiber(keep_stack, caller_stack, caller_stack_bytes);
    swapcontext(&from.context, &caller);
    return;
  }
  Fiber& to = *block.fibers[next];
  if (to.done || (to.waits_for != nullptr && *to.waits_for == to.seen)) {
    report_deadlock();
  }
  block.running = next;
  if (&to == &from) {
    return;
  }
  __sanitizer_start_switch_fiber(keep_stack, to.stack.get(), kStackBytes);
  swapcontext(&from.context, &to.context);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

Fiber& running() { return *block.fibers[block.running]; }

void wait(const uint64_t& generation) {
  Fiber& self = running();
  self.waits_for = &generation;
  self.seen = generation;
  switch_from(self);
  self.waits_for = nullptr;
}

void fiber_main() {
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (bottom < running().stack.get() || bottom > running().stack.get() + kStackBytes) {
    // Only the first fiber comes from run_block(); its stack is where the last one returns to.
    static bool known = false;
    if (!known) {
      caller_stack = bottom;
      caller_stack_bytes = bytes;
      known = true;
    }
  }
  (*block.body)();
  Fiber& self = running();
  self.done = true;
  self.warp->live &= ~(1u << self.thread.lane);
  --block.live;
  if (block.live > 0 && block.barrier.arrived == block.live) {
    release(block.barrier);
  }
  switch_from(self);
  abort();
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fputc('\n', stderr);
  abort();
}

const Thread& current() { return running().thread; }

void run_block(const std::function<void()>& body, Index at, Index block_size, Index grid_size,
               bool descending) {
  block.size = block.live = static_cast<size_t>(block_size.x) * block_size.y * block_size.z;
  block.barrier = {};
  memset(dynamic_shared_bytes, kPoison, dynamic_shared_size);
  block.descending = descending;
  block.body = &body;
  while (block.fibers.size() < block.size) {
    block.fibers.push_back(std::make_unique<Fiber>());
    block.fibers.back()->stack.reset(new uint8_t[kStackBytes]);
  }
  block.warps.clear();
  for (size_t i = 0; i < block.size; ++i) {
    if (i % 32 == 0) {
      block.warps.push_back(std::make_unique<Warp>());
    }
    Fiber& fiber = *block.fibers[i];
    const unsigned n = static_cast<unsigned>(i);
    fiber.thread = {{n % block_size.x, n / block_size.x % block_size.y, n / block_size.x / block_size.y},
                    at,
                    block_size,
                    grid_size,
                    n % 32};
    fiber.warp = block.warps.back().get();
    fiber.warp->live |= 1u << (i % 32);
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.open_copies.clear();
    fiber.groups.clear();
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    // A size would make AddressSanitizer clear its shadow of the whole stack at every switch, which takes
    // most of the time and forgets which variables are out of scope.
    fiber.context.uc_stack.ss_size = 0;
  }
  block.running = descending ? block.size - 1 : 0;
  Fiber& first = running();
  __sanitizer_start_switch_fiber(&caller_fake_stack, first.stack.get(), kStackBytes);
  swapcontext(&caller, &first.context);
  __sanitizer_finish_switch_fiber(caller_fake_stack, nullptr, nullptr);
}

void barrier() {
  block.barrier.op = "__syncthreads";
  if (++block.barrier.arrived == block.live) {
    release(block.barrier);
    return;
  }
  wait(block.barrier.generation);
}

const Met& meet(const char* op, uint32_t mask, const Words& mine) {
  Fiber& self = running();
  Warp& warp = *self.warp;
  Meeting& meeting = warp.meeting;
  if (mask != warp.live) {
    fail("%s: mask %08x, but lanes %08x have not returned", op, mask, warp.live);
  }
  if (meeting.op != nullptr && strcmp(meeting.op, op) != 0) {
    fail("lane %u comes with %s while others wait with %s", self.thread.lane, op, meeting.op);
  }
  meeting.op = op;
  meeting.arrived |= 1u << self.thread.lane;
  warp.coming[self.thread.lane] = mine;
  if (meeting.arrived == mask) {
    memcpy(&warp.met, &warp.coming, sizeof warp.met);
    release(meeting);
  } else {
    wait(meeting.generation);
  }
  return warp.met;
}

void copy_async(void* destination, const void* source, size_t bytes) {
  const uint8_t* from = static_cast<const uint8_t*>(source);
  running().open_copies.push_back({destination, std::vector<uint8_t>(from, from + bytes)});
  memset(destination, kPoison, bytes);
}

void commit_copies() { running().groups.push_back(std::move(running().open_copies)); }

void wait_copies(size_t pending) {
  std::deque<std::vector<Copy>>& groups = running().groups;
  for (; groups.size() > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      memcpy(copy.destination, copy.bytes.data(), copy.bytes.size());
    }
  }
}

uint8_t* dynamic_shared() { return dynamic_shared_bytes; }

void set_dynamic_shared(size_t bytes) {
  if (bytes > kMaxDynamicShared) {
    fail("%zu bytes of dynamic shared memory; at most %zu", bytes, kMaxDynamicShared);
  }
  ASAN_UNPOISON_MEMORY_REGION(dynamic_shared_bytes, kMaxDynamicShared);
  dynamic_shared_size = bytes;
  ASAN_POISON_MEMORY_REGION(dynamic_shared_bytes + bytes, kMaxDynamicShared - bytes);
}

}  // namespace emulation
