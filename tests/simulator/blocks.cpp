// The bodies of blocks.h.
#include "blocks.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <semaphore>
#include <thread>
#include <utility>

namespace emulated {

void DynamicShared::poison(std::size_t asked) {
  for (const std::ptrdiff_t offset : offsets()) {
    std::memset(at_offset(offset), 0xFF, used);
  }
  used = asked;
}

void DynamicShared::check(std::size_t asked) {
  for (const std::ptrdiff_t offset : offsets()) {
    const unsigned char* rest = at_offset(offset) + asked;
    const std::size_t bytes = kSharedBytes - asked;
    if (bytes > 0 && (rest[0] != 0xFF || std::memcmp(rest, rest + 1, bytes - 1) != 0)) {
      fail("a block wrote past the shared memory that it asked for");
    }
  }
}

void DynamicShared::check_read(const unsigned char* begin, const unsigned char* end) {
  for (const std::ptrdiff_t offset : offsets()) {
    if (begin >= at_offset(offset) && end <= at_offset(offset) + used) {
      return;
    }
  }
  fail("a product reads outside of the shared memory that its block asked for");
}

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
  Cluster(int size, int threads, unsigned seed);

  int size() const { return static_cast<int>(members_.size()); }

  // Block `rank` waits until all are there and it is its turn.
  void enter(int rank);
  // A round of the block's threads is over, in which something happened or not.
  void pass(int rank, bool progress);
  void leave(int rank);

  // Where block `rank` has what lies at this offset from shared_base.
  unsigned char* pointer(int rank, std::ptrdiff_t offset) const;

  // Returns the number of the barrier's phase; it is over once phase() is another.
  long arrive();
  long phase() const { return phase_; }

 private:
  void hand_on(int rank);

  struct Member {
    unsigned char* base = nullptr;
    bool left = false;
    std::binary_semaphore turn{0};
  };

  int threads_, late_ = -1, stuck_ = 0, arrived_ = 0;
  std::atomic<int> entered_ = 0;
  long phase_ = 0;
  std::vector<Member> members_;
  Draws draw_;
};

// What a thread has started, in groups that end where it commits them.
template <typename T>
class Block::Groups {
 public:
  void start(T item) { items_.push_back(std::move(item)); }
  void commit() { ends_.push_back(items_.size()); }
  bool empty() const { return items_.empty(); }
  // Items of every group, which stay behind as empty ones.
  std::vector<T> take() {
    std::fill(ends_.begin(), ends_.end(), 0);
    return std::exchange(items_, {});
  }
  // Calls all of the groups but the last `pending` ones.
  void finish(int pending) {
    const auto groups = static_cast<std::ptrdiff_t>(ends_.size()) - pending;
    if (groups <= 0) {
      return;
    }
    const std::size_t end = ends_[groups - 1];
    std::for_each_n(items_.begin(), end, [](const T& item) { item(); });
    items_.erase(items_.begin(), items_.begin() + static_cast<std::ptrdiff_t>(end));
    ends_.erase(ends_.begin(), ends_.begin() + groups);
    for (std::size_t& later : ends_) {
      later -= end;
    }
  }

 private:
  std::vector<T> items_;
  std::vector<std::size_t> ends_;
};

struct Block::Copy {
  void* target;
  const void* source;  // null: zeros
  int bytes;

  void operator()() const { source != nullptr ? std::memcpy(target, source, bytes) : std::memset(target, 0, bytes); }
};

struct Block::Fiber {
  Stacks::Stack stack = Stacks::take();
  Place place;
  long cluster_phase = 0;  // in which it arrived last
  Groups<Copy> copies, stores;
  Groups<std::function<void()>> products;
};

struct Block::Warp {
  Meeting all;
  std::map<unsigned, Meeting> some;  // by mask
};

struct Block::Condition {
  bool (*true_now)(void* of, std::int64_t value);
  void* of;
  std::int64_t value;
  std::vector<int> waiting;
};

Cluster::Cluster(int size, int threads, unsigned seed) : threads_(size * threads), members_(size), draw_(seed) {
  if (draw_(2) == 0) {
    late_ = static_cast<int>(draw_(size));
  }
}

void Cluster::enter(int rank) {
  members_[rank].base = shared_base;
  if (++entered_ == size()) {
    hand_on(static_cast<int>(draw_(size())));
  }
  members_[rank].turn.acquire();
}

void Cluster::pass(int rank, bool progress) {
  stuck_ = progress ? 0 : stuck_ + 1;
  if (stuck_ > 3 * size()) {
    fail("every thread of a cluster waits");
  }
  if (!progress || draw_(4) == 0) {
    hand_on(rank);
    members_[rank].turn.acquire();
  }
}

void Cluster::leave(int rank) {
  members_[rank].left = true;
  stuck_ = 0;
  hand_on(rank);
}

unsigned char* Cluster::pointer(int rank, std::ptrdiff_t offset) const {
  if (members_[rank].left) {
    fail("a store into the shared memory of a block that has ended");
  }
  return members_[rank].base + offset;
}

long Cluster::arrive() {
  const long phase = phase_;
  if (++arrived_ == threads_) {
    arrived_ = 0;
    ++phase_;
  }
  return phase;
}

void Cluster::hand_on(int rank) {
  const auto there = [](const Member& member) { return !member.left; };
  if (stuck_ >= size() || std::count_if(members_.begin(), members_.end(), there) == 1) {
    late_ = -1;
  }
  for (int next = 1; next <= size(); ++next) {
    if (const int other = (rank + next) % size(); there(members_[other]) && other != late_) {
      members_[other].turn.release();
      return;
    }
  }
}

Block::Block(int threads, const std::function<void()>& body, Cluster* cluster, int rank)
    : cluster_(cluster), rank_(rank), body_(body), fibers_(threads), draw_(rank + 1), warps_(threads / kWarp) {}

Block::~Block() {
  for (Fiber& fiber : fibers_) {
    Stacks::give_back(std::move(fiber.stack));
  }
}

void Block::run() {
  current_block = this;
  running_ = static_cast<int>(fibers_.size());
  ready_.resize(running_);
  std::iota(ready_.begin(), ready_.end(), 0);
  for (Fiber& fiber : fibers_) {
    fiber.place.start(fiber.stack.get(), &Block::enter);
  }
  asleep_ = -1;
  const bool late = draw_(2) == 0;  // what is asynchronous waits until nothing else can go on
  while (running_ > 0) {
    ask();
    bool moved = false;
    for (std::size_t turns = ready_.size(); turns > 0 && !ready_.empty(); --turns) {
      moved = take_turn() || moved;
    }
    const bool stuck = !moved && events_.empty() && asleep_ < 0;
    if (stuck && running_ > 0 && cluster_ == nullptr) {
      fail("every thread waits");
    }
    if (!events_.empty() && (!moved || (!late && draw_(4) == 0))) {
      finish_event(draw_(events_.size()));
    } else if (!moved) {
      ready_.swap(sleeping_);
      asleep_ = -1;
    } else if (asleep_ < 0 && draw_(8) == 0) {
      asleep_ = static_cast<int>(draw_(warps_.size()));
    }
    if (running_ > 0 && cluster_ != nullptr) {
      cluster_->pass(rank_, !stuck);
    }
  }
  while (!events_.empty()) {
    finish_event(0);
  }
  for (Fiber& fiber : fibers_) {
    fiber.copies = {};  // that nobody waited for
  }
  for (Warp& warp : warps_) {
    warp.all.arrived = 0;
    warp.some.clear();
  }
  for (Meeting& meeting : named_) {
    meeting.arrived = 0;
  }
  barrier_.arrived = 0;
  counts_[0] = counts_[1] = 0;
}

void Block::leave() { fibers_[thread].place.leave_for(scheduler_); }

bool Block::take_turn() {
  std::swap(ready_[draw_(ready_.size())], ready_.back());
  const int next = ready_.back();
  ready_.pop_back();
  if (next / kWarp == asleep_) {
    sleeping_.push_back(next);
    return false;
  }
  thread = next;
  scheduler_.leave_for(fibers_[next].place);
  return true;
}

void Block::ask() {
  std::erase_if(waiting_, [this](const Condition& condition) {
    const bool over = condition.true_now(condition.of, condition.value);
    if (over) {
      ready_.insert(ready_.end(), condition.waiting.begin(), condition.waiting.end());
    }
    return over;
  });
}

void Block::start_copy(void* target, const void* source, int bytes) {
  if ((reinterpret_cast<std::uintptr_t>(target) | reinterpret_cast<std::uintptr_t>(source)) % bytes != 0) {
    fail("an asynchronous copy is not aligned to its size");
  }
  start({target, source, bytes}, fibers_[thread].copies);
}

void Block::commit_copies() { fibers_[thread].copies.commit(); }

void Block::finish_copies(int pending) { fibers_[thread].copies.finish(pending); }

void Block::start_event(std::function<void()> event) {
  if (draw_(2) == 0) {
    event();
  } else {
    events_.push_back(std::move(event));
  }
}

void Block::after_copies(const std::function<void()>& then) {
  start_event([all = fibers_[thread].copies.take(), then] {
    for (const Copy& copy : all) {
      copy();
    }
    then();
  });
}

void Block::wait_until(bool (*true_now)(void* of, std::int64_t value), void* of, std::int64_t value) {
  while (!true_now(of, value)) {
    const auto same = [&](const Condition& c) { return c.true_now == true_now && c.of == of && c.value == value; };
    auto at = std::find_if(waiting_.begin(), waiting_.end(), same);
    if (at == waiting_.end()) {
      at = waiting_.insert(at, {true_now, of, value, {}});
    }
    at->waiting.push_back(thread);
    leave();
  }
}

int Block::cluster_size() const { return cluster_ == nullptr ? 1 : cluster_->size(); }

unsigned char* Block::in_block(int rank, std::ptrdiff_t offset) const {
  return cluster_ == nullptr ? at_offset(offset) : cluster_->pointer(rank, offset);
}

void Block::arrive_cluster() {
  if (cluster_ != nullptr) {
    fibers_[thread].cluster_phase = cluster_->arrive();
  }
}

void Block::wait_cluster() {
  if (cluster_ != nullptr) {
    const auto is_over = [](void* cluster, std::int64_t phase) {
      return static_cast<const Cluster*>(cluster)->phase() != phase;
    };
    wait_until(is_over, cluster_, fibers_[thread].cluster_phase);
  }
}

void Block::start_store(void* target, const void* source, int bytes) {
  start({target, source, bytes}, fibers_[thread].stores);
}

void Block::commit_stores() { fibers_[thread].stores.commit(); }

void Block::finish_stores(int pending) { fibers_[thread].stores.finish(pending); }

bool Block::product_is_late() { return !fibers_[thread].products.empty() || draw_(2) == 0; }

void Block::start_product(std::function<void()> product) { fibers_[thread].products.start(std::move(product)); }

void Block::commit_products() { fibers_[thread].products.commit(); }

void Block::finish_products(int pending) { fibers_[thread].products.finish(pending); }

int Block::synchronize(bool value) {
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

void Block::enter() {
  Block& block = *current_block;
  block.body_();
  Fiber& fiber = block.fibers_[thread];
  if (!fiber.stores.empty() || !fiber.products.empty()) {
    fail("a thread ends before what it stores has been read, or before a product is done");
  }
  --block.running_;
  block.leave();
}

void Block::start(const Copy& copy, Groups<Copy>& groups) {
  if (draw_(2) == 0) {
    copy();
  } else {
    groups.start(copy);
  }
}

void Block::finish_event(std::size_t i) {
  const std::function<void()> event = std::move(events_[i]);
  events_.erase(events_.begin() + static_cast<std::ptrdiff_t>(i));
  event();
}

bool Block::arrive(Meeting& meeting, int threads) {
  if (++meeting.arrived < threads) {
    return false;
  }
  meeting.arrived = 0;
  ++meeting.generation;
  ready_.insert(ready_.end(), meeting.waiting.begin(), meeting.waiting.end());
  meeting.waiting.clear();
  return true;
}

void Block::meet(Meeting& meeting, int threads) {
  if (!arrive(meeting, threads)) {
    meeting.waiting.push_back(thread);
    leave();
  }
}

const void* Block::exchange(unsigned mask, const void* mine, std::size_t bytes) {
  Warp& warp = warps_[thread / kWarp];
  Meeting& meeting = mask == 0xFFFFFFFFU ? warp.all : warp.some[mask];
  unsigned char* places = meeting.brought[meeting.generation % 2][0];
  std::memcpy(places + thread % kWarp * bytes, mine, bytes);
  meet(meeting, __builtin_popcount(mask));
  return places;
}

namespace {

// A cluster whose first block is `first`, of a grid of one dimension.
void launch_cluster(int first, int size, int threads, std::size_t shared_bytes, const std::function<void()>& kernel) {
  static unsigned clusters = 0;
  Cluster cluster(size, threads, ++clusters);
  std::vector<std::thread> blocks;
  const Index3 grid = grid_size;
  for (int rank = 0; rank < size; ++rank) {
    blocks.emplace_back([&, rank] {
      grid_size = grid;
      block_index = {first + rank, 0, 0};
      DynamicShared::poison(shared_bytes);
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

}  // namespace

void launch(const dim3& grid, int threads, std::size_t shared_bytes, const std::function<void()>& kernel, int cluster) {
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
        DynamicShared::poison(shared_bytes);
        block.run();
        DynamicShared::check(shared_bytes);
      }
    }
  }
}

}  // namespace emulated
