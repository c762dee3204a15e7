// pack_paged: the selected rows of K and V, written into the blocks of a paged cache (docs/ops.md, "pack_paged").
#include "cpu/cpu.h"
#include "ops/args.h"
#include "ops/aten.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include "cuda/pack_paged/params.h"
#include "ops/cuda_steps.h"
#endif

namespace zipvl {
namespace ops {
namespace {

constexpr const char* kOp = "pack_paged";

// A view of a paged cache, [blocks, block_size, Hkv, D].
void check_cache(const PackPagedArgs& args, checks::Named cache) {
  checks::rank(kOp, cache, 4, "[blocks, block_size, Hkv, D]");
  checks::same_device(kOp, args.k, cache);
  checks::same_dtype(kOp, {"k", args.k}, cache);
  checks::unit_last_stride(kOp, cache);
  checks::shape(kOp, cache, {args.k_cache.size(0), args.k_cache.size(1), args.k.size(1), args.k.size(3)});
}

void check(const PackPagedArgs& args) {
  const Tensor& k = args.k;
  const std::int64_t batch = k.dim() > 0 ? k.size(0) : 0;
  checks::kv_pair(kOp, {"k", k}, {"v", args.v});
  checks::selection(kOp, k, args.index, args.count, batch, k.size(2));
  const checks::Named table{"block_table", args.block_table};
  checks::dtype(kOp, table, checks::ScalarType::Int);
  checks::rank(kOp, table, 2, "[B, blocks of a row]");
  checks::shape(kOp, table, {batch, args.block_table.size(1)});
  checks::same_device(kOp, k, table);
  check_cache(args, {"k_cache", args.k_cache});
  check_cache(args, {"v_cache", args.v_cache});
  if (args.capacity) {
    checks::int_vector(kOp, k, {"capacity", *args.capacity}, batch);
  }
  if (args.first_slot) {
    checks::int_vector(kOp, k, {"first_slot", *args.first_slot}, batch);
  }
}

}  // namespace
}  // namespace ops

#ifdef ZIPVL_CUDA_OPS
namespace cuda {
namespace {

ops::Implementation explain(const Tensor& /*q*/) { return implementation_of(KernelFamily::kSm80, ""); }

// Strides of the first three dimensions. One of size 1 has any stride, which must not spoil the others' alignment.
void set_strides(std::int64_t (&strides)[3], const Tensor& x) {
  for (std::int64_t d = 0; d < 3; ++d) {
    strides[d] = x.size(d) > 1 ? x.stride(d) : 0;
  }
}

Tensor run(const ops::PackPagedArgs& args) {
  const auto& [k, v, index, count, block_table, k_cache, v_cache, capacity, first_slot] = args;
  const DeviceGuard guard(k.get_device_index());
  const Tensor stored = empty({k.size(0)}, ScalarType::Int, k);
  PackPagedParams params{};
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.k_cache = k_cache.mutable_data_ptr();
  params.v_cache = v_cache.mutable_data_ptr();
  set_strides(params.k_stride, k);
  set_strides(params.v_stride, v);
  set_strides(params.k_cache_stride, k_cache);
  set_strides(params.v_cache_stride, v_cache);
  params.index = matrix<std::int32_t>(index, params.index_stride);
  params.count = count.const_data_ptr<std::int32_t>();
  params.count_stride = count.stride(0);
  params.block_table = matrix<std::int32_t>(block_table, params.table_stride);
  params.capacity = capacity ? capacity->const_data_ptr<std::int32_t>() : nullptr;
  params.capacity_stride = capacity ? capacity->stride(0) : 0;
  params.first_slot = first_slot ? first_slot->const_data_ptr<std::int32_t>() : nullptr;
  params.first_slot_stride = first_slot ? first_slot->stride(0) : 0;
  params.stored = stored.mutable_data_ptr<std::int32_t>();
  params.batch = k.size(0);
  params.heads = k.size(1);
  params.tokens = k.size(2);
  params.head_dim = k.size(3);
  params.blocks = k_cache.size(0);
  params.block_size = k_cache.size(1);
  params.table_blocks = block_table.size(1);
  params.element_bytes = static_cast<int>(k.element_size());
  params.num_sms = num_sms(k.get_device_index());
  check_launch(ops::kOp, launch_pack_paged(params, stream_of(k)));
  return stored;
}

}  // namespace
}  // namespace cuda
#endif

namespace ops {

static Tensor pack_paged(const PackPagedArgs& args) {
  check(args);
  const bool has_slots = args.k_cache.size(0) > 0 && args.k_cache.size(1) > 0 && args.block_table.size(1) > 0;
  if (args.k.size(0) == 0 || args.k.size(2) == 0 || !has_slots) {
    return aten::zeros({args.k.size(0)}, aten::ScalarType::Int, args.k.device());
  }
#ifdef ZIPVL_CUDA_OPS
  return cuda::run(args);
#else
  return cpu::pack_paged(args);
#endif
}

}  // namespace ops
}  // namespace zipvl

ZIPVL_OP(pack_paged,
         "(Tensor k, Tensor v, Tensor index, Tensor count, Tensor block_table, Tensor(a!) k_cache, "
         "Tensor(b!) v_cache, *, Tensor? capacity=None, Tensor? first_slot=None) -> Tensor",
         &zipvl::cuda::explain)
