// pack_paged on the CPU: a loop over tokens and heads, on memory.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/tokens.h"
#include "ops/aten.h"

namespace zipvl::cpu {

using aten::empty;
using aten::ScalarType;
namespace {

constexpr std::int64_t kGrain = 1024;  // rows of K and V that are worth a thread

std::int64_t entry(const Tensor& vector, std::int64_t b) {
  return vector.const_data_ptr<std::int32_t>()[b * vector.stride(0)];
}

// Where the rows of K or of V come from and go to. Strides in bytes.
struct Copy {
  const std::byte* from;  // of batch row b
  std::byte* to;
  std::int64_t from_head, from_token, to_block, to_slot, to_head;

  Copy(const Tensor& x, const Tensor& cache, std::int64_t b) {
    const auto bytes = static_cast<std::int64_t>(x.element_size());
    from = static_cast<const std::byte*>(x.const_data_ptr()) + b * x.stride(0) * bytes;
    to = static_cast<std::byte*>(cache.mutable_data_ptr());
    from_head = x.stride(1) * bytes;
    from_token = x.stride(2) * bytes;
    to_block = cache.stride(0) * bytes;
    to_slot = cache.stride(1) * bytes;
    to_head = cache.stride(2) * bytes;
  }

  void row(std::int64_t head, std::int64_t token, std::int64_t block, std::int64_t slot, std::size_t bytes) const {
    std::memcpy(to + block * to_block + slot * to_slot + head * to_head, from + head * from_head + token * from_token,
                bytes);
  }
};

}  // namespace

Tensor pack_paged(const ops::PackPagedArgs& args) {
  const auto& [k, v, index, count, block_table, k_cache, v_cache, capacity, first_slot] = args;
  const std::int64_t batch = k.size(0), heads = k.size(1), tokens = k.size(2);
  const std::int64_t blocks = k_cache.size(0), block_size = k_cache.size(1);
  const std::size_t row_bytes = static_cast<std::size_t>(k.size(3)) * k.element_size();
  const Tensor stored = empty({batch}, ScalarType::Int, k.device());
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t first = first_slot ? entry(*first_slot, b) : 0;
    std::int64_t room = first < 0 ? 0 : std::max<std::int64_t>(block_table.size(1) * block_size - first, 0);
    if (capacity) {
      room = std::clamp<std::int64_t>(entry(*capacity, b), 0, room);
    }
    const std::int64_t selected = host_count(count, b, tokens), fits = std::min(selected, room);
    stored.mutable_data_ptr<std::int32_t>()[b] = static_cast<std::int32_t>(fits);
    const std::int32_t* positions = index.const_data_ptr<std::int32_t>() + b * index.stride(0);
    const std::int32_t* table = block_table.const_data_ptr<std::int32_t>() + b * block_table.stride(0);
    const Copy keys(k, k_cache, b), values(v, v_cache, b);
    const std::int64_t skipped = selected - fits, place_stride = index.stride(1), table_stride = block_table.stride(1);
    torch::stable::parallel_for(0, fits, kGrain / heads + 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const std::int64_t slot = first + i, token = positions[(skipped + i) * place_stride];
        const std::int64_t block = table[slot / block_size * table_stride];
        if (token < 0 || token >= tokens || block < 0 || block >= blocks) {
          continue;
        }
        for (std::int64_t head = 0; head < heads; ++head) {
          keys.row(head, token, block, slot % block_size, row_bytes);
          values.row(head, token, block, slot % block_size, row_bytes);
        }
      }
    });
  }
  return stored;
}

}  // namespace zipvl::cpu
