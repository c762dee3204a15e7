// Blocks of threads on a CPU, one after the other, and clusters of them. A thread is a fiber. Fibers of a block take
// turns in one thread of the host and change only where they wait, in an order drawn anew each round from a fixed seed;
// now and then a warp sleeps while the others go on. The blocks of a cluster have a thread of the host each, of which
// one runs at a time. What is asynchronous (copies, matrix products of a warpgroup, stores into another block) happens
// at once or as late as it may, as chance will have it.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
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

// Dynamic shared memory, which the test program defines under the name that the kernels declare:
//   alignas(1024) thread_local unsigned char shared[kSharedBytes];
//   const emulated::DynamicShared registered(shared);
// A block finds all ones in it, and must leave them where it asked for nothing.
class DynamicShared {
 public:
  explicit DynamicShared(const unsigned char* bytes) { offsets().push_back(bytes - shared_base); }
  static void poison() {
    for (const std::ptrdiff_t offset : offsets()) {
      std::memset(shared_base + offset, 0xFF, kSharedBytes);
    }
  }
  static void check(std::size_t asked) {
    for (const std::ptrdiff_t offset : offsets()) {
      const unsigned char* rest = shared_base + offset + asked;
      const std::size_t bytes = kSharedBytes - asked;
      if (bytes > 0 && (rest[0] != 0xFF || std::memcmp(rest, rest + 1, bytes - 1) != 0)) {
        fail("a block wrote past the shared memory that it asked for");
      }
    }
  }

 private:
  static std::vector<std::ptrdiff_t>& offsets() {
    static std::vector<std::ptrdiff_t> list;
    return list;
  }
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

// Stacks that no fiber has now.
class Stacks {
 public:
  using Stack = std::unique_ptr<unsigned char[]>;

  static Stack take() {
    const std::unique_lock<std::mutex> lock(mutex());
    if (spare().empty()) {
      return Stack(new unsigned char[kStackBytes]);
    }
    Stack stack = std::move(spare().back());
    spare().pop_back();
    return stack;
  }
  static void give_back(Stack stack) {
    const std::unique_lock<std::mutex> lock(mutex());
    spare().push_back(std::move(stack));
  }

 private:
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static std::vector<Stack>& spare() {
    static std::vector<Stack> list;
    return list;
  }
};

// The blocks of a cluster, each in a thread of the host. One runs at a time: the others wait for their turn. Of some
// clusters one block begins only when no other can go on.
class Cluster {
 public:
  Cluster(int size, int threads, unsigned seed) : threads_(size * threads), bases_(size), left_(size), schedule_(seed) {
    late_ = schedule_() % 2 == 0 ? static_cast<int>(schedule_() % size) : -1;
  }

  int size() const { return static_cast<int>(bases_.size()); }

  // Block `rank` waits until all are there and it is its turn.
  void enter(int rank) {
    std::unique_lock<std::mutex> lock(mutex_);
    bases_[rank] = shared_base;
    if (++entered_ == size()) {
      hand_on(static_cast<int>(schedule_() % bases_.size()));
    }
    changed_.wait(lock, [&] { return turn_ == rank; });
  }
  // A round of the block's threads is over, in which something happened or not.
  void pass(int rank, bool progress) {
    stuck_ = progress ? 0 : stuck_ + 1;
    if (stuck_ > 3 * size()) {
      fail("every thread of a cluster waits");
    }
    if (progress && schedule_() % 4 != 0) {
      return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    hand_on(rank);
    changed_.wait(lock, [&] { return turn_ == rank; });
  }
  void leave(int rank) {
    const std::unique_lock<std::mutex> lock(mutex_);
    left_[rank] = true;
    stuck_ = 0;
    hand_on(rank);
  }

  // Where block `rank` has what lies at this offset from shared_base.
  unsigned char* pointer(int rank, std::ptrdiff_t offset) const {
    if (left_[rank]) {
      fail("a store into the shared memory of a block that has ended");
    }
    return bases_[rank] + offset;
  }

  // Returns the number of the barrier's phase; it is over once phase() is another.
  long arrive() {
    const long phase = phase_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++phase_;
    }
    return phase;
  }
  long phase() const { return phase_; }

 private:
  void hand_on(int rank) {
    if (stuck_ >= size() || std::count(left_.begin(), left_.end(), false) == 1) {
      late_ = -1;
    }
    for (int next = 1; next <= size(); ++next) {
      if (const int other = (rank + next) % size(); !left_[other] && other != late_) {
        turn_ = other;
        break;
      }
    }
    changed_.notify_all();
  }

  int threads_, late_, entered_ = 0, turn_ = -1, stuck_ = 0, arrived_ = 0;
  long phase_ = 0;
  std::vector<unsigned char*> bases_;
  std::vector<bool> left_;
  std::mt19937 schedule_;
  std::mutex mutex_;
  std::condition_variable changed_;
};

// Threads that wait for each other: a warp's lanes of one mask, or a barrier. What each brought is kept until the next
// but one meeting, by when all have read it.
struct Meeting {
  int arrived = 0;
  long generation = 0;
  alignas(16) unsigned char brought[2][kWarp][64];
};

class Block {
 public:
  // cluster: null outside of one.
  Block(int threads, const std::function<void()>& body, Cluster* cluster = nullptr, int rank = 0)
      : cluster_(cluster),
        rank_(rank),
        body_(body),
        fibers_(threads),
        order_(threads),
        schedule_(rank + 1),
        meetings_(threads / kWarp) {
    std::iota(order_.begin(), order_.end(), 0);
    for (Fiber& fiber : fibers_) {
      fiber.stack = Stacks::take();
    }
  }
  ~Block() {
    for (Fiber& fiber : fibers_) {
      Stacks::give_back(std::move(fiber.stack));
    }
  }

  void run() {
    current_block = this;
    for (std::size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& fiber = fibers_[i];
      fiber.place.start(fiber.stack.get(), &Block::enter);
      fiber.done = false;
      fiber.copies.assign(1, {});
      fiber.stores.assign(1, {});
      fiber.products.assign(1, {});
    }
    int asleep = -1;  // a warp, until no other can go on
    for (bool any = true; any;) {
      any = false;
      bool moved = false;
      std::shuffle(order_.begin(), order_.end(), schedule_);
      for (const int i : order_) {
        Fiber& fiber = fibers_[i];
        if (fiber.done) {
          continue;
        }
        any = true;
        if (i / kWarp == asleep) {
          continue;
        }
        if ((fiber.waits_for != nullptr && fiber.waits_for->generation == fiber.since) ||
            (fiber.until && !fiber.until())) {
          continue;
        }
        fiber.waits_for = nullptr;
        fiber.until = nullptr;
        moved = true;
        thread = i;
        scheduler_.leave_for(fiber.place);
      }
      const bool stuck = any && !moved && events_.empty() && asleep < 0;
      if (stuck && cluster_ == nullptr) {
        fail("every thread waits");
      }
      if (!events_.empty() && (!moved || schedule_() % 4 == 0)) {
        finish_event(schedule_() % events_.size());
      } else if (!moved) {
        asleep = -1;
      } else if (asleep < 0 && schedule_() % 8 == 0) {
        asleep = static_cast<int>(schedule_() % meetings_.size());
      }
      if (any && cluster_ != nullptr) {
        cluster_->pass(rank_, !stuck);
      }
    }
    while (!events_.empty()) {
      finish_event(0);
    }
    std::fill_n(named_, kNamedBarriers, Meeting{});
    meetings_.assign(meetings_.size(), {});
    barrier_ = {};
    counts_[0] = counts_[1] = 0;
  }

  // What the lanes of `mask` brought; every one of them calls.
  template <typename T>
  const T* exchange(unsigned mask, const T& mine) {
    static_assert(sizeof(T) <= sizeof(Meeting::brought[0][0]));
    Meeting& meeting = meetings_[thread / kWarp][mask];
    T* places = reinterpret_cast<T*>(meeting.brought[meeting.generation % 2][0]);
    places[thread % kWarp] = mine;
    meet(meeting, __builtin_popcount(mask));
    return places;
  }

  // Asynchronous copies: each is done at once or when it is waited for, as chance will have it. At once finds a buffer
  // that another thread still reads; late, a wait that is missing.
  void start_copy(void* target, const void* source, int bytes) {
    if ((reinterpret_cast<std::uintptr_t>(target) | reinterpret_cast<std::uintptr_t>(source)) % bytes != 0) {
      fail("an asynchronous copy is not aligned to its size");
    }
    start({target, source, bytes}, fibers_[thread].copies);
  }
  void commit_copies() { fibers_[thread].copies.emplace_back(); }
  void finish_copies(int pending) { finish_copies(fibers_[thread].copies, pending); }

  // What happens at once or later, in any order: while others work, or when nothing else can.
  void start_event(std::function<void()> event) {
    if (schedule_() % 2 == 0) {
      event();
    } else {
      events_.push_back(std::move(event));
    }
  }
  // Once this thread's copies so far are done, wherever they stand.
  void after_copies(const std::function<void()>& then) {
    std::vector<Copy> all;
    for (auto& group : fibers_[thread].copies) {
      all.insert(all.end(), group.begin(), group.end());
      group.clear();
    }
    start_event([all, then] {
      for (const Copy& copy : all) {
        copy.finish();
      }
      then();
    });
  }
  void wait_until(const std::function<bool()>& true_now) {
    Fiber& fiber = fibers_[thread];
    while (!true_now()) {
      fiber.until = true_now;
      fiber.place.leave_for(scheduler_);
    }
  }

  // The cluster's: a block outside of one is one of its own.
  int rank() const { return rank_; }
  int cluster_size() const { return cluster_ == nullptr ? 1 : cluster_->size(); }
  void arrive_cluster() { fibers_[thread].cluster_phase = cluster_ == nullptr ? -1 : cluster_->arrive(); }
  void wait_cluster() {
    const long phase = fibers_[thread].cluster_phase;
    wait_until([this, phase] { return cluster_ == nullptr || cluster_->phase() != phase; });
  }
  unsigned char* in_block(int rank, std::ptrdiff_t offset) const {
    return cluster_ == nullptr ? shared_base + offset : cluster_->pointer(rank, offset);
  }

  // Copies out of shared memory, in groups of their own.
  void start_store(void* target, const void* source, int bytes) {
    start({target, source, bytes}, fibers_[thread].stores);
  }
  void commit_stores() { fibers_[thread].stores.emplace_back(); }
  void finish_stores(int pending) { finish_copies(fibers_[thread].stores, pending); }

  // Matrix products of a warpgroup, in groups. Whether one is late: after a late one all are, until they are finished.
  bool product_is_late() {
    const auto& groups = fibers_[thread].products;
    return std::any_of(groups.begin(), groups.end(), [](const auto& group) { return !group.empty(); }) ||
           schedule_() % 2 == 0;
  }
  void start_product(std::function<void()> product) { fibers_[thread].products.back().push_back(std::move(product)); }
  void commit_products() { fibers_[thread].products.emplace_back(); }
  void finish_products(int pending) {
    auto& groups = fibers_[thread].products;
    while (static_cast<int>(groups.size()) > pending + 1) {
      for (const auto& product : groups.front()) {
        product();
      }
      groups.pop_front();
    }
  }

  // Barriers by number: `threads` arrivals, of which those of synchronize_named wait.
  void synchronize_named(int id, int threads) { meet(named_[id], threads); }
  void arrive_named(int id, int threads) {
    if (++named_[id].arrived == threads) {
      named_[id].arrived = 0;
      ++named_[id].generation;
    }
  }

  // All threads of the block; how many brought true.
  int synchronize(bool value) {
    const long generation = barrier_.generation;
    const int threads = static_cast<int>(fibers_.size());
    if (barrier_.arrived + 1 == threads) {
      counts_[(generation + 1) % 2] = 0;  // of the barrier before, which all have read
    }
    int& count = counts_[generation % 2];
    count += value ? 1 : 0;
    meet(barrier_, threads);
    return count;
  }

  static inline thread_local Block* current_block = nullptr;
  static inline thread_local int thread = 0;

 private:
  struct Copy {
    void* target;
    const void* source;  // null: zeros
    int bytes;

    void finish() const { source != nullptr ? std::memcpy(target, source, bytes) : std::memset(target, 0, bytes); }
  };
  struct Fiber {
    Stacks::Stack stack;
    Place place;
    Meeting* waits_for = nullptr;
    long since = 0;
    bool done = true;
    long cluster_phase = 0;  // in which it arrived last
    std::function<bool()> until;
    // Committed groups, and the one that is not.
    std::deque<std::vector<Copy>> copies, stores;
    std::deque<std::vector<std::function<void()>>> products;
  };

  // Not sanitized, because it is left without a return: its stack goes to others.
  [[gnu::no_sanitize_address]] static void enter() {
    Block& block = *current_block;
    block.work();
    block.fibers_[thread].place.leave_for(block.scheduler_);
  }
  [[gnu::noinline]] void work() {
    body_();
    Fiber& fiber = fibers_[thread];
    const auto any = [](const auto& groups) {
      return std::any_of(groups.begin(), groups.end(), [](const auto& group) { return !group.empty(); });
    };
    if (any(fiber.stores) || any(fiber.products)) {
      fail("a thread ends before what it stores has been read, or before a product is done");
    }
    fiber.done = true;
  }

  void start(const Copy& copy, std::deque<std::vector<Copy>>& groups) {
    if (schedule_() % 2 == 0) {
      copy.finish();
    } else {
      groups.back().push_back(copy);
    }
  }
  static void finish_copies(std::deque<std::vector<Copy>>& groups, int pending) {
    while (static_cast<int>(groups.size()) > pending + 1) {
      for (const Copy& copy : groups.front()) {
        copy.finish();
      }
      groups.pop_front();
    }
  }

  void finish_event(std::size_t i) {
    const std::function<void()> event = std::move(events_[i]);
    events_.erase(events_.begin() + static_cast<std::ptrdiff_t>(i));
    event();
  }

  void meet(Meeting& meeting, int threads) {
    Fiber& fiber = fibers_[thread];
    const long generation = meeting.generation;
    if (++meeting.arrived == threads) {
      meeting.arrived = 0;
      ++meeting.generation;
      return;
    }
    fiber.waits_for = &meeting;
    fiber.since = generation;
    fiber.place.leave_for(scheduler_);
  }

  Cluster* cluster_;
  int rank_;
  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  std::vector<int> order_;  // in which threads take their turns, another one each round
  std::mt19937 schedule_;
  std::vector<std::map<unsigned, Meeting>> meetings_;  // by warp and mask
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

// A cluster whose first block is `first`, of a grid of one dimension.
inline void launch_cluster(int first, int size, int threads, std::size_t shared_bytes,
                           const std::function<void()>& kernel) {
  static unsigned clusters = 0;
  Cluster cluster(size, threads, ++clusters);
  std::vector<std::thread> blocks;
  const Index3 grid = grid_size;
  for (int rank = 0; rank < size; ++rank) {
    blocks.emplace_back([&, rank] {
      grid_size = grid;
      block_index = {first + rank, 0, 0};
      DynamicShared::poison();
      Block block(threads, kernel, &cluster, rank);
      cluster.enter(rank);
      block.run();
      DynamicShared::check(shared_bytes);
      cluster.leave(rank);
    });
  }
  for (std::thread& block : blocks) {
    block.join();
  }
}

// kernel(): of every thread of every block, one block (or cluster of blocks) after the other.
inline void launch(const dim3& grid, int threads, std::size_t shared_bytes, const std::function<void()>& kernel,
                   int cluster = 1) {
  if (shared_bytes > kSharedBytes) {
    fail("a kernel asks for more shared memory than there is");
  }
  if (cluster > 1) {
    if (grid.x % cluster != 0 || grid.y != 1 || grid.z != 1) {
      fail("a grid is not made of whole clusters");
    }
    grid_size = {static_cast<int>(grid.x), 1, 1};
    for (int first = 0; first < grid_size.x.value; first += cluster) {
      launch_cluster(first, cluster, threads, shared_bytes, kernel);
    }
    return;
  }
  Block block(threads, kernel);
  grid_size = {static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z)};
  for (int z = 0; z < grid_size.z.value; ++z) {
    for (int y = 0; y < grid_size.y.value; ++y) {
      for (int x = 0; x < grid_size.x.value; ++x) {
        block_index = {x, y, z};
        DynamicShared::poison();
        block.run();
        DynamicShared::check(shared_bytes);
      }
    }
  }
}

template <typename T>
T shuffle(unsigned mask, T value, int from) {
  return Block::current_block->exchange(mask, value)[from];
}

}  // namespace emulated
