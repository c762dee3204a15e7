// zipvl._plan: the plans, for tests: usable without a GPU and without Torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/text.h"
#include "cpu/plan.h"
#include "cuda/decode_attn/plan.h"
#include "cuda/layer/plan.h"
#include "cuda/probe_scores/plan.h"
#include "cuda/select_tokens/plan.h"
#include "cuda/sparse_attn/plan.h"

namespace py = pybind11;
using py::literals::operator""_a;
using namespace zipvl::plan;  // NOLINT: this file is nothing but its binding

namespace {

// Binds a plan: its fields, and its description as str().
template <typename Plan, typename... Fields>
py::class_<Plan> bind_plan(py::module_& m, const char* name, std::pair<const char*, Fields Plan::*>... fields) {
  py::class_<Plan> bound(m, name);
  (bound.def_readonly(fields.first, fields.second), ...);
  return bound.def("__str__", &Plan::describe);
}
#define FIELD(name) std::pair<const char*, decltype(&Plan::name)>(#name, &Plan::name)

using Size = std::int64_t;

void check_positive(std::initializer_list<std::pair<const char*, Size>> sizes) {
  for (const auto& [name, size] : sizes) {
    if (size < 1) {
      throw std::invalid_argument(zipvl::join(name, " must be at least 1, got ", size));
    }
  }
}

void check_sizes(Size batch, Size query_heads, Size kv_heads, Size tokens, Size head_dim, Size threads) {
  check_positive({{"threads", threads}});
  if (batch < 0 || tokens < 0 || query_heads < 1 || kv_heads < 1 || head_dim < 1 || query_heads % kv_heads != 0) {
    throw std::invalid_argument(zipvl::join(
        "sizes must satisfy batch, tokens >= 0, heads and head_dim >= 1, query_heads % kv_heads == 0; got batch ",
        batch, ", query_heads ", query_heads, ", kv_heads ", kv_heads, ", tokens ", tokens, ", head_dim ", head_dim));
  }
}

}  // namespace

PYBIND11_MODULE(_plan, m) {
  m.doc() = "Launch plans of zipvl.";
  {
    using Plan = ProbeScoresPlan;
    bind_plan<Plan>(m, "ProbeScoresPlan", FIELD(heads_per_block), FIELD(probes_per_block), FIELD(head_tasks),
                    FIELD(blocks), FIELD(workspace_bytes), FIELD(flops));
  }
  m.def(
      "plan_probe_scores",
      [](Size batch, Size query_heads, Size kv_heads, Size tokens, Size probes, Size head_dim, Size threads) {
        check_sizes(batch, query_heads, kv_heads, tokens, head_dim, threads);
        check_positive({{"probes", probes}});
        return plan_probe_scores({batch, query_heads, kv_heads, tokens, probes, head_dim, threads});
      },
      py::kw_only(), "batch"_a, "query_heads"_a, "kv_heads"_a, "tokens"_a, "probes"_a, "head_dim"_a, "threads"_a = 1);

  py::enum_<SelectTeam>(m, "SelectTeam")
      .value("BLOCK", SelectTeam::kBlock)
      .value("CLUSTER", SelectTeam::kCluster)
      .value("GRID", SelectTeam::kGrid)
      .value("NONE", SelectTeam::kNone);
  {
    using Plan = SelectTokensPlan;
    bind_plan<Plan>(m, "SelectTokensPlan", FIELD(team), FIELD(reason), FIELD(blocks_per_row), FIELD(tokens_per_block),
                    FIELD(row_groups), FIELD(workspace_bytes));
  }
  m.def(
      "plan_select_tokens",
      [](Size batch, Size tokens, Size num_sms, Size shared_bytes, bool clusters) {
        if (batch < 0 || tokens < 0 || num_sms < 1) {
          throw std::invalid_argument(zipvl::join("sizes must satisfy batch, tokens >= 0, num_sms >= 1; got batch ",
                                                  batch, ", tokens ", tokens, ", num_sms ", num_sms));
        }
        return plan_select_tokens({batch, tokens, num_sms, shared_bytes, clusters});
      },
      py::kw_only(), "batch"_a, "tokens"_a, "num_sms"_a, "shared_bytes"_a, "clusters"_a);

  {
    using Plan = ProbeScoresCudaPlan;
    bind_plan<Plan>(m, "ProbeScoresCudaPlan", FIELD(reason), FIELD(rows), FIELD(rows_padded), FIELD(cluster_blocks),
                    FIELD(chunk_keys), FIELD(splits), FIELD(row_splits), FIELD(first_items), FIELD(second_items),
                    FIELD(flops), FIELD(exponentials))
        .def_property_readonly("workspace_bytes", [](const Plan& plan) { return plan.workspace.bytes; });
  }
  m.def(
      "plan_probe_scores_cuda",
      [](Size batch, Size query_heads, Size kv_heads, Size tokens, Size probes, Size head_dim, bool masked,
         bool clusters, bool half_precision, bool aligned) {
        check_sizes(batch, query_heads, kv_heads, tokens, head_dim, /*threads=*/1);
        check_positive({{"tokens", tokens}, {"probes", probes}});
        return plan_probe_scores_cuda(
            {batch, query_heads, kv_heads, tokens, probes, head_dim, masked, clusters, half_precision, aligned});
      },
      py::kw_only(), "batch"_a, "query_heads"_a, "kv_heads"_a, "tokens"_a, "probes"_a, "head_dim"_a, "masked"_a = false,
      "clusters"_a = true, "half_precision"_a = true, "aligned"_a = true);

  {
    using Plan = SparseAttnPlan;
    bind_plan<Plan>(m, "SparseAttnPlan", FIELD(rows_per_block), FIELD(head_tasks), FIELD(blocks),
                    FIELD(workspace_bytes), FIELD(flops));
  }
  m.def(
      "plan_sparse_attn",
      [](Size batch, Size query_heads, Size kv_heads, Size tokens, Size head_dim, Size keys, bool causal,
         bool all_queries, bool count_on_host, Size threads) {
        check_sizes(batch, query_heads, kv_heads, tokens, head_dim, threads);
        if (keys < 0 || keys > tokens) {
          throw std::invalid_argument(zipvl::join("keys must be in [0, ", tokens, "], got ", keys));
        }
        return plan_sparse_attn(
            {batch, query_heads, kv_heads, tokens, head_dim, keys, causal, all_queries, count_on_host, threads});
      },
      py::kw_only(), "batch"_a, "query_heads"_a, "kv_heads"_a, "tokens"_a, "head_dim"_a, "keys"_a, "causal"_a = true,
      "all_queries"_a = false, "count_on_host"_a = true, "threads"_a = 1);

  py::enum_<SparseAttnKernel>(m, "SparseAttnKernel")
      .value("SM90", SparseAttnKernel::kSm90)
      .value("SM80", SparseAttnKernel::kSm80)
      .value("ATEN", SparseAttnKernel::kAten);
  {
    using Plan = SparseAttnCudaPlan;
    bind_plan<Plan>(m, "SparseAttnCudaPlan", FIELD(kernel), FIELD(reason), FIELD(capacity), FIELD(seen_tokens),
                    FIELD(workspace_bytes));
  }
  m.def(
      "plan_sparse_attn_cuda",
      [](Size batch, Size query_heads, Size kv_heads, Size tokens, Size head_dim, bool half_precision, bool aligned,
         double scale, bool causal, bool all_queries, bool hopper) {
        check_sizes(batch, query_heads, kv_heads, tokens, head_dim, 1);
        return plan_sparse_attn_cuda({batch, query_heads, kv_heads, tokens, head_dim, half_precision, aligned, scale,
                                      causal, all_queries, hopper});
      },
      py::kw_only(), "batch"_a, "query_heads"_a, "kv_heads"_a, "tokens"_a, "head_dim"_a, "half_precision"_a = true,
      "aligned"_a = true, "scale"_a = 1.0, "causal"_a = true, "all_queries"_a = false, "hopper"_a = true);

  {
    using Plan = LayerPlan;
    bind_plan<Plan>(m, "LayerPlan", FIELD(native), FIELD(draws_ahead), FIELD(selects_sums), FIELD(selection_bytes),
                    FIELD(attention_bytes))
        .def_property_readonly("workspace_bytes", [](const Plan& plan) { return plan.workspace.bytes; })
        .def_property_readonly("offsets", [](const Plan& plan) {
          const LayerWorkspace& at = plan.workspace;
          return std::map<std::string, std::int64_t>{
              {"probe_index", at.probe_index}, {"keep_from", at.keep_from},       {"accumulated", at.accumulated},
              {"normalized", at.normalized},   {"probe_scores", at.probe_scores}, {"select_tokens", at.select_tokens},
              {"k_packed", at.k_packed},       {"v_packed", at.v_packed},         {"seen", at.seen}};
        });
  }
  m.def(
      "plan_layer",
      [](Size batch, Size query_heads, Size kv_heads, Size tokens, Size head_dim, Size probes, bool masked,
         bool half_precision, bool all_queries, bool hopper, Size num_sms, Size shared_bytes, bool returns_packed,
         bool projects, bool scored) {
        check_sizes(batch, query_heads, kv_heads, tokens, head_dim, 1);
        check_positive({{"tokens", tokens}, {"probes", probes}, {"num_sms", num_sms}});
        return plan_layer(
            {batch, kv_heads, tokens, head_dim, probes, masked, returns_packed, projects, scored, /*last_alone=*/false,
             /*extends=*/false, /*ranged_bytes=*/0},
            plan_probe_scores_cuda({batch, query_heads, kv_heads, tokens, probes, head_dim, masked, hopper,
                                    half_precision, /*aligned=*/true}),
            plan_select_tokens({batch, tokens, num_sms, shared_bytes, hopper}),
            plan_sparse_attn_cuda({batch, query_heads, kv_heads, tokens, head_dim, half_precision, /*aligned=*/true,
                                   /*scale=*/1.0, /*causal=*/true, all_queries, hopper}));
      },
      py::kw_only(), "batch"_a, "query_heads"_a, "kv_heads"_a, "tokens"_a, "head_dim"_a, "probes"_a = 128,
      "masked"_a = false, "half_precision"_a = true, "all_queries"_a = false, "hopper"_a = true, "num_sms"_a = 132,
      "shared_bytes"_a = 232448, "returns_packed"_a = false, "projects"_a = false, "scored"_a = false);

  {
    using Plan = DecodeAttnCudaPlan;
    bind_plan<Plan>(m, "DecodeAttnCudaPlan", FIELD(reason), FIELD(warps), FIELD(blocks), FIELD(head_chunks),
                    FIELD(shared_bytes), FIELD(partials), FIELD(workspace_bytes));
  }
  m.def(
      "plan_decode_attn_cuda",
      [](Size batch, Size query_heads, Size kv_heads, Size slots, Size head_dim, bool half_precision, bool aligned,
         Size num_sms, Size shared_bytes) {
        check_sizes(batch, query_heads, kv_heads, slots, head_dim, /*threads=*/1);
        return plan_decode_attn_cuda(
            {batch, query_heads, kv_heads, head_dim, slots, half_precision, aligned, num_sms, shared_bytes});
      },
      py::kw_only(), "batch"_a, "query_heads"_a, "kv_heads"_a, "slots"_a, "head_dim"_a, "half_precision"_a = true,
      "aligned"_a = true, "num_sms"_a, "shared_bytes"_a);
  m.def(
      "plan_decode_attn_quantized_cuda",
      [](Size batch, Size query_heads, Size kv_heads, Size slots, Size head_dim, Size high_blocks, Size low_blocks,
         std::pair<int, int> high_bits, std::pair<int, int> low_bits, Size num_sms, Size shared_bytes) {
        check_sizes(batch, query_heads, kv_heads, slots, head_dim, /*threads=*/1);
        return plan_decode_attn_quantized_cuda(
            {batch, query_heads, kv_heads, head_dim, slots, /*half_precision=*/true,
             /*aligned=*/true, num_sms, shared_bytes},
            {high_blocks, low_blocks, {high_bits.first, high_bits.second}, {low_bits.first, low_bits.second}});
      },
      py::kw_only(), "batch"_a, "query_heads"_a, "kv_heads"_a, "slots"_a, "head_dim"_a, "high_blocks"_a, "low_blocks"_a,
      "high_bits"_a = std::pair(4, 4), "low_bits"_a = std::pair(4, 2), "num_sms"_a, "shared_bytes"_a);
}
