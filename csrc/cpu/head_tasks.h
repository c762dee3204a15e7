// Work on the CPU split by key/value head, one thread a head: each thread keeps its blocks in its own cache, and
// threads meet once a block instead of once an ATen call. Inside a task ATen runs on one thread.
//
// A task may write only tensors that it made: under torch.inference_mode the caller's tensors cannot be written from
// another thread, where that mode is off.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "ops/aten.h"

namespace zipvl::cpu {

// Calls `make(task)` for each of `tasks` tasks and returns what they made, in order. One task runs on this thread, with
// ATen's own threads inside.
template <typename Make>
std::vector<Tensor> run_tasks(std::int64_t tasks, const Make& make) {
  std::vector<Tensor> made;
  if (tasks == 1) {
    made.push_back(make(0));
    return made;
  }
  std::vector<std::optional<Tensor>> slots(static_cast<std::size_t>(tasks));
  torch::stable::parallel_for(0, tasks, /*grain_size=*/1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t task = begin; task < end; ++task) {
      slots[static_cast<std::size_t>(task)] = make(task);
    }
  });
  for (const std::optional<Tensor>& slot : slots) {
    made.push_back(*slot);
  }
  return made;
}

}  // namespace zipvl::cpu
