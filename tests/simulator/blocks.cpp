// The bodies of blocks.h.
#include "blocks.h"

#include <algorithm>
#include <numeric>
#include <thread>

namespace emulated {

void DynamicShared::poison() {
  for (const std::ptrdiff_t offset : offsets()) {
    std::memset(at_offset(offset), 0xFF, kSharedBytes);
  }
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

void Cluster::enter(int rank) {
  std::unique_lock<std::mutex> lock(mutex_);
  bases_[rank] = shared_base;
  if (++entered_ == size()) {
    hand_on(static_cast<int>(schedule_() % bases_.size()));
  }
  changed_.wait(lock, [&] { return turn_ == rank; });
}

void Cluster::pass(int rank, bool progress) {
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

void Cluster::leave(int rank) {
  const std::unique_lock<std::mutex> lock(mutex_);
  left_[rank] = true;
  stuck_ = 0;
  hand_on(rank);
}

unsigned char* Cluster::pointer(int rank, std::ptrdiff_t offset) const {
  if (left_[rank]) {
    fail("a store into the shared memory of a block that has ended");
  }
  return bases_[rank] + offset;
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

Block::Block(int threads, const std::function<void()>& body, Cluster* cluster, int rank)
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

Block::~Block() {
  for (Fiber& fiber : fibers_) {
    Stacks::give_back(std::move(fiber.stack));
  }
}

void Block::run() {
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

void Block::start_copy(void* target, const void* source, int bytes) {
  if ((reinterpret_cast<std::uintptr_t>(target) | reinterpret_cast<std::uintptr_t>(source)) % bytes != 0) {
    fail("an asynchronous copy is not aligned to its size");
  }
  start({target, source, bytes}, fibers_[thread].copies);
}

void Block::commit_copies() { fibers_[thread].copies.emplace_back(); }

void Block::finish_copies(int pending) { finish_copies(fibers_[thread].copies, pending); }

void Block::start_event(std::function<void()> event) {
  if (schedule_() % 2 == 0) {
    event();
  } else {
    events_.push_back(std::move(event));
  }
}

void Block::after_copies(const std::function<void()>& then) {
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

void Block::wait_until(const std::function<bool()>& true_now) {
  Fiber& fiber = fibers_[thread];
  while (!true_now()) {
    fiber.until = true_now;
    fiber.place.leave_for(scheduler_);
  }
}

void Block::wait_cluster() {
  const long phase = fibers_[thread].cluster_phase;
  wait_until([this, phase] { return cluster_ == nullptr || cluster_->phase() != phase; });
}

void Block::start_store(void* target, const void* source, int bytes) {
  start({target, source, bytes}, fibers_[thread].stores);
}

void Block::commit_stores() { fibers_[thread].stores.emplace_back(); }

void Block::finish_stores(int pending) { finish_copies(fibers_[thread].stores, pending); }

bool Block::product_is_late() {
  const auto& groups = fibers_[thread].products;
  return std::any_of(groups.begin(), groups.end(), [](const auto& group) { return !group.empty(); }) ||
         schedule_() % 2 == 0;
}

void Block::start_product(std::function<void()> product) {
  fibers_[thread].products.back().push_back(std::move(product));
}

void Block::commit_products() { fibers_[thread].products.emplace_back(); }

void Block::finish_products(int pending) {
  auto& groups = fibers_[thread].products;
  while (static_cast<int>(groups.size()) > pending + 1) {
    for (const auto& product : groups.front()) {
      product();
    }
    groups.pop_front();
  }
}

void Block::arrive_named(int id, int threads) {
  if (++named_[id].arrived == threads) {
    named_[id].arrived = 0;
    ++named_[id].generation;
  }
}

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
  const auto any = [](const auto& groups) {
    return std::any_of(groups.begin(), groups.end(), [](const auto& group) { return !group.empty(); });
  };
  if (any(fiber.stores) || any(fiber.products)) {
    fail("a thread ends before what it stores has been read, or before a product is done");
  }
  fiber.done = true;
  fiber.place.leave_for(block.scheduler_);
}

void Block::start(const Copy& copy, std::deque<std::vector<Copy>>& groups) {
  if (schedule_() % 2 == 0) {
    copy.finish();
  } else {
    groups.back().push_back(copy);
  }
}

void Block::finish_copies(std::deque<std::vector<Copy>>& groups, int pending) {
  while (static_cast<int>(groups.size()) > pending + 1) {
    for (const Copy& copy : groups.front()) {
      copy.finish();
    }
    groups.pop_front();
  }
}

void Block::finish_event(std::size_t i) {
  const std::function<void()> event = std::move(events_[i]);
  events_.erase(events_.begin() + static_cast<std::ptrdiff_t>(i));
  event();
}

void Block::meet(Meeting& meeting, int threads) {
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

const void* Block::exchange(unsigned mask, const void* mine, std::size_t bytes) {
  Meeting& meeting = meetings_[thread / kWarp][mask];
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
        DynamicShared::poison();
        block.run();
        DynamicShared::check(shared_bytes);
      }
    }
  }
}

}  // namespace emulated
