// The ops and the layer share this on CUDA: facts about the device and its tensors, and the steps of the layer as
// parameters made of checked tensors and launches that allocate nothing.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

#include "cuda/common/element.h"
#include "cuda/common/launch.h"
#include "cuda/layer/plan.h"
#include "cuda/pack_kv/pack_kv.h"
#include "cuda/probe_index/params.h"
#include "cuda/probe_scores/params.h"
#include "cuda/probe_scores/plan.h"
#include "cuda/projections/projections.h"
#include "cuda/select_tokens/extend_selection.h"
#include "cuda/select_tokens/params.h"
#include "cuda/select_tokens/plan.h"
#include "cuda/sparse_attn/params.h"
#include "cuda/sparse_attn/plan.h"
#include "ops/args.h"
#include "ops/checks.h"

namespace zipvl::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// ---- the device
// sm90: Hopper's own kernels (wgmma, TMA). sm80: mma.sync and cp.async, also what later GPUs run.
enum class KernelFamily { kSm90, kSm80 };

// The family for this device. ZIPVL_FORCE_SM80=1 in the environment, read on every call, takes sm80 on Hopper too.
KernelFamily kernel_family(int device);

int num_sms(int device);
int shared_bytes_per_block(int device);  // the most that a block may ask for

// The current stream of the tensor's device.
cudaStream_t stream_of(const Tensor& tensor);

// Throws, naming the op, unless `error` is success.
void check_launch(const char* op, cudaError_t error);

// ---- tensors
// A contiguous tensor on the device of `like`, or one of given strides (in elements); its content is undefined.
Tensor empty(std::initializer_list<std::int64_t> sizes, ScalarType type, const Tensor& like);
Tensor empty_strided(std::initializer_list<std::int64_t> sizes, std::initializer_list<std::int64_t> strides,
                     ScalarType type, const Tensor& like);

// [B, H, N, D] as attention ops return it: the transposed view of a contiguous [B, N, H, D].
Tensor empty_attention_output(std::int64_t batch, std::int64_t heads, std::int64_t tokens, std::int64_t head_dim,
                              const Tensor& like);
inline Tensor empty_attention_output(const Tensor& q) {
  return empty_attention_output(q.size(0), q.size(1), q.size(2), q.size(3), q);
}

inline bool is_half(const Tensor& x) {
  return x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16;
}

inline Element element_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::Half ? Element::kFloat16 : Element::kBFloat16;
}

// Whether x begins at a multiple of 16 bytes, and so does every row of its last dimension.
bool rows_are_aligned(const Tensor& x);

// The strides of the first dimensions, in elements.
template <int Dims>
void copy_strides(const Tensor& x, std::int64_t (&strides)[Dims]) {
  for (int dim = 0; dim < Dims; ++dim) {
    strides[dim] = x.stride(dim);
  }
}

// The data of a matrix, and its strides.
template <typename T>
const T* matrix(const Tensor& x, std::int64_t (&strides)[2]) {
  copy_strides(x, strides);
  return x.const_data_ptr<T>();
}
template <typename T>
const T* optional_matrix(const std::optional<Tensor>& x, std::int64_t (&strides)[2]) {
  return x ? matrix<T>(*x, strides) : nullptr;
}

// ---- what `explain` says
// The sizes of a call on inputs like q [B, H, N, D], with as many key/value heads.
checks::AttentionSizes sizes_like(const Tensor& q);

// The kernels of a family, or ATen's ops where there is a reason against them.
ops::Implementation implementation_of(KernelFamily family, const std::string& reason);

// ---- the steps of the layer
// Without `out` and `keep_from`. The probes are drawn among the last `queries` of the tokens.
ProbeIndexParams probe_index_params(std::int64_t batch, std::int64_t queries, std::int64_t tokens,
                                    std::int64_t num_recent, std::int64_t num_random, std::int64_t seed,
                                    const ops::OptionalTensor& token_mask);

struct ProbeScoresStep {
  using Launch = cudaError_t (*)(const ProbeScoresParams&, cudaStream_t);
  plan::ProbeScoresCudaPlan plan;
  ProbeScoresParams params;  // without probe_index, workspace and results
  Launch launch;             // null: no kernel takes these inputs, plan.reason says why, and the rest is undefined
  KernelFamily family;       // of `launch`
};

ProbeScoresStep probe_scores_step(const checks::AttentionSizes& sizes, const Tensor& q, const Tensor& k,
                                  std::int64_t probes, double scale, bool causal, const ops::OptionalTensor& token_mask,
                                  const ops::OptionalTensor& last_key);

plan::SelectTokensPlan select_tokens_plan(std::int64_t batch, std::int64_t tokens, int device);

// Without scores, keep_from, results and workspace.
SelectTokensParams select_tokens_params(std::int64_t batch, std::int64_t tokens, const plan::SelectTokensPlan& plan,
                                        double tau, std::optional<double> ratio, double max_ratio,
                                        std::int64_t min_tokens, const ops::OptionalTensor& keep_mask,
                                        const ops::OptionalTensor& token_mask);

cudaError_t launch_select_tokens(const SelectTokensParams& params, const plan::SelectTokensPlan& plan,
                                 cudaStream_t stream);

// A neighbourhood's additions to a selection. Without index, count and the outputs.
ExtendSelectionParams extend_selection_params(std::int64_t batch, std::int64_t tokens, std::int64_t local_window,
                                              std::int64_t num_sinks, const ops::OptionalTensor& extra_mask,
                                              const ops::OptionalTensor& token_mask);

// k, v and their packed forms [B, H, capacity, D]; `packed_stride` of both. Without index and count.
PackKvParams pack_kv_params(const Tensor& k, const Tensor& v, void* k_packed, void* v_packed, std::int64_t capacity);

struct SparseAttnStep {
  plan::SparseAttnCudaPlan plan;  // kAten: no kernel takes these inputs, and the rest is undefined
  SparseAttnParams params;        // without index, count, out, zeros (rows as out's) and the packed workspace
};

SparseAttnStep sparse_attn_step(const checks::AttentionSizes& sizes, const Tensor& q, const Tensor& k, const Tensor& v,
                                double scale, bool causal, bool all_queries);

// Packs K and V where the kernel wants it, counts what each query sees where plan.seen_tokens asks for it, and attends.
// params is complete; `seen` is [B, N], or null where it is not asked for.
void launch_sparse_attn(const char* op, const SparseAttnParams& params, const plan::SparseAttnCudaPlan& plan,
                        std::int32_t* seen, int device, cudaStream_t stream);

// Zeros in params.out of tokens that are not real, where attention computed every row.
void zero_padding(const char* op, const SparseAttnParams& params, const Tensor& token_mask, cudaStream_t stream);

// Attention in which rows see a window and the selection before it, or the selection up to a last key: where there is a
// window, queries are the last of the tokens, or last_key is given.
struct RangedAttnStep {
  bool all_queries;
  std::int64_t local_window, num_sinks;
  const ops::OptionalTensor &token_mask, &last_key;
  bool lists_real;  // the window's pass runs over the list of real tokens
  plan::RangedAttnWorkspace workspace;
};

RangedAttnStep ranged_attn_step(const checks::AttentionSizes& sizes, const SparseAttnStep& attention, bool all_queries,
                                std::int64_t local_window, std::int64_t num_sinks,
                                const ops::OptionalTensor& token_mask, const ops::OptionalTensor& last_key);

// params as for launch_sparse_attn, with queries and without ranges; `zeros` is not looked at: rows without output are
// 0. space: step.workspace.bytes of device memory. lists: the real tokens are still to be listed there.
void launch_ranged_attn(const char* op, const SparseAttnParams& params, const plan::SparseAttnCudaPlan& plan,
                        const RangedAttnStep& step, unsigned char* space, bool lists, int device, cudaStream_t stream);

// ---- projections of chosen rows
// The places of `index` [B, M], and the `tokens` they name; `count` [B] says how many of a row count, null: all.
ChosenRows chosen_rows(const Tensor& index, const ops::OptionalTensor& count, std::int64_t tokens);

// Why the kernels around a query projection do not take these inputs; empty where they do.
std::string why_not_query_projection(const Tensor& x, const Tensor& cos, const Tensor& sin,
                                     const ops::OptionalTensor& bias, const ops::OptionalTensor& norm_weight);

// Writes the queries of the chosen rows of x [B, N, C] into q, a contiguous [B, N, Hq, D]; other rows stay.
void project_chosen_queries(const char* op, const ChosenRows& chosen, const Tensor& x, const Tensor& weight,
                            const ops::OptionalTensor& bias, const Tensor& cos, const Tensor& sin,
                            const ops::OptionalTensor& norm_weight, double norm_eps, const Tensor& q);

// The same of every row: one product, whatever is selected.
void project_all_queries(const char* op, const Tensor& x, const Tensor& weight, const ops::OptionalTensor& bias,
                         const Tensor& cos, const Tensor& sin, const ops::OptionalTensor& norm_weight, double norm_eps,
                         const Tensor& q);

// Why the kernels around an output projection by `weight` [O, C] do not take it; empty where they do. The rows that
// they move are taken if why_not_rows says nothing.
std::string why_not_output_projection(const Tensor& weight);
std::string why_not_rows(const Tensor& x);

// Writes the chosen rows of x [B, N, C] times weight [O, C] into out, a contiguous [B, N, O]; other rows stay.
void project_chosen_outputs(const char* op, const ChosenRows& chosen, const Tensor& x, const Tensor& weight,
                            const Tensor& out);

}  // namespace zipvl::cuda
