// Blocks of threads on a CPU, one after the other, and clusters of them. A thread is a fiber. Fibers of a block take
// turns in one thread of the host and change only where they wait. Who is next is drawn from a fixed seed, among those
// that can go on; those that cannot cost nothing. Now and then a warp sleeps while the others go on. The blocks of a
// cluster have a thread of the host each, of which one runs at a time. What is asynchronous (copies, matrix products of
// a warpgroup, stores into another block) happens at once or as late as it may, as chance will have it. What is not a
// template is in blocks.cpp, which every program links and no sanitizer slows down. So is what only that file needs:
// the standard library's large headers take longer to compile than most kernels.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace emulated {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = 256 * 1024;
constexpr int kSharedBytes = 232448;  // of a block on Hopper
constexpr int kNamedBarriers = 16;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// Addresses of shared memory are offsets from here, the same in every thread of the host; aligned as far as any kernel
// asks of an address.
alignas(1024) inline thread_local unsigned char shared_base[16];
inline unsigned char* at_offset(std::ptrdiff_t offset) {
  return reinterpret_cast<unsigned char*>(reinterpret_cast<std::uintptr_t>(shared_base) + offset);
}

// Dynamic shared memory, which the test program defines under the name that the kernels declare:
//   alignas(1024) thread_local unsigned char shared[kSharedBytes];
//   const emulated::DynamicShared registered(shared);
// A block finds all ones in it, and must leave them where it asked for nothing.
class DynamicShared {
 public:
  explicit DynamicShared(const unsigned char* bytes) { offsets().push_back(bytes - shared_base); }
  // For a block that asks for so many bytes: after the first one, all but what the one before asked for are ones still.
  static void poison(std::size_t asked);
  static void check(std::size_t asked);
  // Of a product, which no sanitizer sees: only from what the block asked for.
  static void check_read(const unsigned char* begin, const unsigned char* end);

 private:
  static std::vector<std::ptrdiff_t>& offsets() {
    static std::vector<std::ptrdiff_t> list;
    return list;
  }
  static inline thread_local std::size_t used = kSharedBytes;  // of the block that runs
};

// Where a stack was left. Changing stacks by hand makes no system call, unlike swapcontext, which makes two.
#if defined(__x86_64__)
class Place {
 public:
  // Leaves this stack here, until somebody leaves another one for it.
  void leave_for(const Place& other) { change(&top_, other.top_); }
  // The start of entry(), which never returns, on a new stack.
  void start(unsigned char* stack, void (*entry)()) {
    const auto end = reinterpret_cast<std::uintptr_t>(stack + kStackBytes) / 16 * 16;
    void** top = reinterpret_cast<void**>(end) - (kSaved + 2);  // entry is reached as by a call: 8 bytes off alignment
    std::fill_n(top, kSaved, nullptr);
    top[kSaved] = reinterpret_cast<void*>(entry);
    top_ = top;
  }

 private:
  static constexpr int kSaved = 6;

  // Pushes the registers that a call keeps.
  [[gnu::naked, gnu::noinline]] static void change(void** /*left*/, void* /*taken*/) {
    asm("push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
        "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
        "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret");
  }

  void* top_ = nullptr;
};
#else
class Place {
 public:
  void leave_for(const Place& other) { swapcontext(&context_, &other.context_); }
  void start(unsigned char* stack, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }

 private:
  ucontext_t context_;
};
#endif

// Numbers from a fixed seed.
class Draws {
 public:
  explicit Draws(unsigned seed) : state_(seed) {}
  // At least 0 and less than `below`.
  unsigned operator()(std::size_t below) {
    state_ = state_ * 6364136223846793005U + 1442695040888963407U;
    return static_cast<unsigned>((state_ >> 33) % below);
  }

 private:
  std::uint64_t state_;
};

// Threads that wait for each other: a warp's lanes of one mask, or a barrier. What each brought is kept until the next
// but one meeting, by when all have read it.
struct Meeting {
  int arrived = 0;
  long generation = 0;
  std::vector<int> waiting;
  alignas(16) unsigned char brought[2][kWarp][64];
};

class Cluster;

class Block {
 public:
  // cluster: null outside of one.
  Block(int threads, const std::function<void()>& body, Cluster* cluster = nullptr, int rank = 0);
  ~Block();

  void run();

  // What the lanes of `mask` brought; every one of them calls.
  template <typename T>
  const T* exchange(unsigned mask, const T& mine) {
    static_assert(sizeof(T) <= sizeof(Meeting::brought[0][0]));
    return static_cast<const T*>(exchange(mask, &mine, sizeof mine));
  }
  const void* exchange(unsigned mask, const void* mine, std::size_t bytes);

  // Asynchronous copies: each is done at once or when it is waited for, as chance will have it. At once finds a buffer
  // that another thread still reads; late, a wait that is missing.
  void start_copy(void* target, const void* source, int bytes);
  void commit_copies();
  void finish_copies(int pending);

  // What happens at once or later, in any order: while others work, or when nothing else can.
  void start_event(std::function<void()> event);
  // Once this thread's copies so far are done, wherever they stand.
  void after_copies(const std::function<void()>& then);
  // Until true_now(of, value), which is asked once for all threads that wait for the same.
  void wait_until(bool (*true_now)(void* of, std::int64_t value), void* of, std::int64_t value);

  // The cluster's: a block outside of one is one of its own.
  int rank() const { return rank_; }
  int cluster_size() const;
  void arrive_cluster();
  void wait_cluster();
  unsigned char* in_block(int rank, std::ptrdiff_t offset) const;

  // Copies out of shared memory, in groups of their own.
  void start_store(void* target, const void* source, int bytes);
  void commit_stores();
  void finish_stores(int pending);

  // Matrix products of a warpgroup, in groups. Whether one is late: after a late one all are, until they are finished.
  bool product_is_late();
  void start_product(std::function<void()> product);
  void commit_products();
  void finish_products(int pending);

  // Barriers by number: `threads` arrivals, of which those of synchronize_named wait.
  void synchronize_named(int id, int threads) { meet(named_[id], threads); }
  void arrive_named(int id, int threads) { arrive(named_[id], threads); }

  // All threads of the block; how many brought true.
  int synchronize(bool value);

  static inline thread_local Block* current_block = nullptr;
  static inline thread_local int thread = 0;

 private:
  struct Copy;
  struct Fiber;
  struct Warp;
  struct Condition;
  template <typename T>
  class Groups;

  static void enter();

  void leave();  // this thread for the next one

  // Lets a thread that can go on do so: whether one could that is not asleep.
  bool take_turn();
  // Threads whose conditions hold now can go on.
  void ask();
  void start(const Copy& copy, Groups<Copy>& groups);
  void finish_event(std::size_t i);

  // Whether all are there now.
  bool arrive(Meeting& meeting, int threads);
  void meet(Meeting& meeting, int threads);

  Cluster* cluster_;
  int rank_;
  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  int running_ = 0;            // fibers that have not ended
  std::vector<int> ready_;     // threads that can go on
  int asleep_ = -1;            // a warp, until no other can go on
  std::vector<int> sleeping_;  // its threads that could
  std::vector<Condition> waiting_;
  Draws draw_;
  std::vector<Warp> warps_;
  Meeting barrier_;
  Meeting named_[kNamedBarriers];
  std::vector<std::function<void()>> events_;  // that have not happened yet
  int counts_[2] = {0, 0};                     // of the barrier before and the next one, in turn
  Place scheduler_;
};

struct Index {
  int value;
  operator unsigned() const { return static_cast<unsigned>(value); }
};
struct Index3 {
  Index x, y, z;
};
struct ThreadIndex {
  struct {
    operator unsigned() const { return static_cast<unsigned>(Block::thread); }
  } x;
};
inline thread_local Index3 block_index, grid_size;

// Either of the host's thread.
template <bool kGrid>
struct Index3OfThread {
  template <Index Index3::* kAxis>
  struct Axis {
    operator unsigned() const { return (kGrid ? grid_size : block_index).*kAxis; }
  };
  Axis<&Index3::x> x;
  Axis<&Index3::y> y;
  Axis<&Index3::z> z;
};

// kernel(): of every thread of every block, one block (or cluster of blocks) after the other.
void launch(const dim3& grid, int threads, std::size_t shared_bytes, const std::function<void()>& kernel,
            int cluster = 1);

template <typename T>
T shuffle(unsigned mask, T value, int from) {
  return Block::current_block->exchange(mask, value)[from];
}

}  // namespace emulated
