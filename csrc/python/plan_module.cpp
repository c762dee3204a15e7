// zipvl._plan: plans and build information, usable without a GPU and without Torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "cpu/probe_scores_plan.h"
#include "cpu/sparse_attn_plan.h"
#include "cuda/decode_attn/plan.h"
#include "cuda/layer/plan.h"
#include "cuda/probe_scores/plan.h"
#include "cuda/select_tokens/plan.h"
#include "cuda/sparse_attn/plan.h"
#include "plan/layer_cost.h"
#include "python/build_info.h"

namespace py = pybind11;
using namespace zipvl::plan;  // NOLINT: this file is nothing but its binding

namespace {

void check_sizes(std::int64_t batch, std::int64_t query_heads, std::int64_t kv_heads, std::int64_t tokens,
                 std::int64_t head_dim, std::int64_t threads) {
  if (threads < 1) {
    throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  }
  if (batch < 0 || tokens < 0 || query_heads < 1 || kv_heads < 1 || head_dim < 1 || query_heads % kv_heads != 0) {
    throw std::invalid_argument(
        "sizes must satisfy batch, tokens >= 0, heads and head_dim >= 1, query_heads % kv_heads == 0; got batch " +
        std::to_string(batch) + ", query_heads " + std::to_string(query_heads) + ", kv_heads " +
        std::to_string(kv_heads) + ", tokens " + std::to_string(tokens) + ", head_dim " + std::to_string(head_dim));
  }
}

void check_share(double share, double least) {
  if (!(share >= least && share <= 1.0)) {
    throw std::invalid_argument("a share of the tokens must be in " + std::string(least > 0.0 ? "(" : "[") +
                                "0, 1], got " + std::to_string(share));
  }
}

}  // namespace

PYBIND11_MODULE(_plan, m) {
  m.doc() = "Launch plans and build information of zipvl.";
  m.def("build_info", [] {
    py::dict info;
    for (const auto& [name, value] : zipvl::build_info()) {
      info[py::str(name)] = value;
    }
    return info;
  });

  py::class_<ProbeScoresPlan>(m, "ProbeScoresPlan")
      .def_readonly("heads_per_block", &ProbeScoresPlan::heads_per_block)
      .def_readonly("probes_per_block", &ProbeScoresPlan::probes_per_block)
      .def_readonly("head_tasks", &ProbeScoresPlan::head_tasks)
      .def_readonly("blocks", &ProbeScoresPlan::blocks)
      .def_readonly("workspace_bytes", &ProbeScoresPlan::workspace_bytes)
      .def_readonly("flops", &ProbeScoresPlan::flops)
      .def("__str__", &ProbeScoresPlan::describe);
  m.def(
      "plan_probe_scores",
      [](std::int64_t batch, std::int64_t query_heads, std::int64_t kv_heads, std::int64_t tokens, std::int64_t probes,
         std::int64_t head_dim, std::int64_t threads) {
        check_sizes(batch, query_heads, kv_heads, tokens, head_dim, threads);
        if (probes < 1) {
          throw std::invalid_argument("probes must be at least 1, got " + std::to_string(probes));
        }
        return plan_probe_scores({batch, query_heads, kv_heads, tokens, probes, head_dim, threads});
      },
      py::kw_only(), py::arg("batch"), py::arg("query_heads"), py::arg("kv_heads"), py::arg("tokens"),
      py::arg("probes"), py::arg("head_dim"), py::arg("threads") = 1);

  py::enum_<SelectTeam>(m, "SelectTeam")
      .value("BLOCK", SelectTeam::kBlock)
      .value("CLUSTER", SelectTeam::kCluster)
      .value("GRID", SelectTeam::kGrid)
      .value("NONE", SelectTeam::kNone);
  py::class_<SelectTokensPlan>(m, "SelectTokensPlan")
      .def_readonly("team", &SelectTokensPlan::team)
      .def_readonly("reason", &SelectTokensPlan::reason)
      .def_readonly("blocks_per_row", &SelectTokensPlan::blocks_per_row)
      .def_readonly("tokens_per_block", &SelectTokensPlan::tokens_per_block)
      .def_readonly("row_groups", &SelectTokensPlan::row_groups)
      .def_readonly("workspace_bytes", &SelectTokensPlan::workspace_bytes)
      .def("__str__", &SelectTokensPlan::describe);
  m.def(
      "plan_select_tokens",
      [](std::int64_t batch, std::int64_t tokens, std::int64_t num_sms, std::int64_t shared_bytes, bool clusters) {
        if (batch < 0 || tokens < 0 || num_sms < 1) {
          throw std::invalid_argument("sizes must satisfy batch, tokens >= 0, num_sms >= 1; got batch " +
                                      std::to_string(batch) + ", tokens " + std::to_string(tokens) + ", num_sms " +
                                      std::to_string(num_sms));
        }
        return plan_select_tokens({batch, tokens, num_sms, shared_bytes, clusters});
      },
      py::kw_only(), py::arg("batch"), py::arg("tokens"), py::arg("num_sms"), py::arg("shared_bytes"),
      py::arg("clusters"));

  py::class_<ProbeScoresCudaPlan>(m, "ProbeScoresCudaPlan")
      .def_readonly("reason", &ProbeScoresCudaPlan::reason)
      .def_readonly("rows", &ProbeScoresCudaPlan::rows)
      .def_readonly("rows_padded", &ProbeScoresCudaPlan::rows_padded)
      .def_readonly("cluster_blocks", &ProbeScoresCudaPlan::cluster_blocks)
      .def_readonly("chunk_keys", &ProbeScoresCudaPlan::chunk_keys)
      .def_readonly("splits", &ProbeScoresCudaPlan::splits)
      .def_readonly("row_splits", &ProbeScoresCudaPlan::row_splits)
      .def_readonly("first_items", &ProbeScoresCudaPlan::first_items)
      .def_readonly("second_items", &ProbeScoresCudaPlan::second_items)
      .def_property_readonly("workspace_bytes", [](const ProbeScoresCudaPlan& plan) { return plan.workspace.bytes; })
      .def_readonly("flops", &ProbeScoresCudaPlan::flops)
      .def_readonly("exponentials", &ProbeScoresCudaPlan::exponentials)
      .def("__str__", &ProbeScoresCudaPlan::describe);
  m.def(
      "plan_probe_scores_cuda",
      [](std::int64_t batch, std::int64_t query_heads, std::int64_t kv_heads, std::int64_t tokens, std::int64_t probes,
         std::int64_t head_dim, bool masked, bool clusters, bool half_precision, bool aligned) {
        check_sizes(batch, query_heads, kv_heads, tokens, head_dim, /*threads=*/1);
        if (tokens < 1 || probes < 1) {
          throw std::invalid_argument("tokens and probes must be at least 1, got " + std::to_string(tokens) + " and " +
                                      std::to_string(probes));
        }
        return plan_probe_scores_cuda(
            {batch, query_heads, kv_heads, tokens, probes, head_dim, masked, clusters, half_precision, aligned});
      },
      py::kw_only(), py::arg("batch"), py::arg("query_heads"), py::arg("kv_heads"), py::arg("tokens"),
      py::arg("probes"), py::arg("head_dim"), py::arg("masked") = false, py::arg("clusters") = true,
      py::arg("half_precision") = true, py::arg("aligned") = true);

  py::class_<SparseAttnPlan>(m, "SparseAttnPlan")
      .def_readonly("rows_per_block", &SparseAttnPlan::rows_per_block)
      .def_readonly("head_tasks", &SparseAttnPlan::head_tasks)
      .def_readonly("blocks", &SparseAttnPlan::blocks)
      .def_readonly("workspace_bytes", &SparseAttnPlan::workspace_bytes)
      .def_readonly("flops", &SparseAttnPlan::flops)
      .def("__str__", &SparseAttnPlan::describe);
  m.def(
      "plan_sparse_attn",
      [](std::int64_t batch, std::int64_t query_heads, std::int64_t kv_heads, std::int64_t tokens,
         std::int64_t head_dim, std::int64_t keys, bool causal, bool all_queries, bool count_on_host,
         std::int64_t threads) {
        check_sizes(batch, query_heads, kv_heads, tokens, head_dim, threads);
        if (keys < 0 || keys > tokens) {
          throw std::invalid_argument("keys must be in [0, " + std::to_string(tokens) + "], got " +
                                      std::to_string(keys));
        }
        return plan_sparse_attn(
            {batch, query_heads, kv_heads, tokens, head_dim, keys, causal, all_queries, count_on_host, threads});
      },
      py::kw_only(), py::arg("batch"), py::arg("query_heads"), py::arg("kv_heads"), py::arg("tokens"),
      py::arg("head_dim"), py::arg("keys"), py::arg("causal") = true, py::arg("all_queries") = false,
      py::arg("count_on_host") = true, py::arg("threads") = 1);

  py::enum_<SparseAttnKernel>(m, "SparseAttnKernel")
      .value("SM90", SparseAttnKernel::kSm90)
      .value("SM80", SparseAttnKernel::kSm80)
      .value("ATEN", SparseAttnKernel::kAten);
  py::class_<SparseAttnCudaPlan>(m, "SparseAttnCudaPlan")
      .def_readonly("kernel", &SparseAttnCudaPlan::kernel)
      .def_readonly("reason", &SparseAttnCudaPlan::reason)
      .def_readonly("capacity", &SparseAttnCudaPlan::capacity)
      .def_readonly("seen_tokens", &SparseAttnCudaPlan::seen_tokens)
      .def_readonly("workspace_bytes", &SparseAttnCudaPlan::workspace_bytes)
      .def("__str__", &SparseAttnCudaPlan::describe);
  m.def(
      "plan_sparse_attn_cuda",
      [](std::int64_t batch, std::int64_t query_heads, std::int64_t kv_heads, std::int64_t tokens,
         std::int64_t head_dim, bool half_precision, bool aligned, double scale, bool causal, bool all_queries,
         bool hopper) {
        check_sizes(batch, query_heads, kv_heads, tokens, head_dim, 1);
        return plan_sparse_attn_cuda({batch, query_heads, kv_heads, tokens, head_dim, half_precision, aligned, scale,
                                      causal, all_queries, hopper});
      },
      py::kw_only(), py::arg("batch"), py::arg("query_heads"), py::arg("kv_heads"), py::arg("tokens"),
      py::arg("head_dim"), py::arg("half_precision") = true, py::arg("aligned") = true, py::arg("scale") = 1.0,
      py::arg("causal") = true, py::arg("all_queries") = false, py::arg("hopper") = true);

  py::class_<ZipvlAttnPlan>(m, "ZipvlAttnPlan")
      .def_readonly("native", &ZipvlAttnPlan::native)
      .def_readonly("draws_ahead", &ZipvlAttnPlan::draws_ahead)
      .def_readonly("selects_sums", &ZipvlAttnPlan::selects_sums)
      .def_readonly("selection_bytes", &ZipvlAttnPlan::selection_bytes)
      .def_readonly("attention_bytes", &ZipvlAttnPlan::attention_bytes)
      .def_property_readonly("workspace_bytes", [](const ZipvlAttnPlan& plan) { return plan.workspace.bytes; })
      .def_property_readonly(
          "offsets",
          [](const ZipvlAttnPlan& plan) {
            const ZipvlAttnWorkspace& at = plan.workspace;
            return std::map<std::string, std::int64_t>{
                {"probe_index", at.probe_index}, {"keep_from", at.keep_from},       {"accumulated", at.accumulated},
                {"normalized", at.normalized},   {"probe_scores", at.probe_scores}, {"select_tokens", at.select_tokens},
                {"k_packed", at.k_packed},       {"v_packed", at.v_packed},         {"seen", at.seen}};
          })
      .def("__str__", &ZipvlAttnPlan::describe);
  m.def(
      "plan_zipvl_attn",
      [](std::int64_t batch, std::int64_t query_heads, std::int64_t kv_heads, std::int64_t tokens,
         std::int64_t head_dim, std::int64_t probes, bool masked, bool half_precision, bool all_queries, bool hopper,
         std::int64_t num_sms, std::int64_t shared_bytes, bool returns_packed) {
        check_sizes(batch, query_heads, kv_heads, tokens, head_dim, 1);
        if (tokens < 1 || probes < 1 || num_sms < 1) {
          throw std::invalid_argument("tokens, probes and num_sms must be at least 1, got " + std::to_string(tokens) +
                                      ", " + std::to_string(probes) + " and " + std::to_string(num_sms));
        }
        return plan_zipvl_attn(
            {batch, kv_heads, tokens, head_dim, probes, masked, returns_packed},
            plan_probe_scores_cuda(
                {batch, query_heads, kv_heads, tokens, probes, head_dim, masked, hopper, half_precision}),
            plan_select_tokens({batch, tokens, num_sms, shared_bytes, hopper}),
            plan_sparse_attn_cuda({batch, query_heads, kv_heads, tokens, head_dim, half_precision, /*aligned=*/true,
                                   /*scale=*/1.0, /*causal=*/true, all_queries, hopper}));
      },
      py::kw_only(), py::arg("batch"), py::arg("query_heads"), py::arg("kv_heads"), py::arg("tokens"),
      py::arg("head_dim"), py::arg("probes") = 128, py::arg("masked") = false, py::arg("half_precision") = true,
      py::arg("all_queries") = false, py::arg("hopper") = true, py::arg("num_sms") = 132,
      py::arg("shared_bytes") = 232448, py::arg("returns_packed") = false);

  py::class_<LayerCost>(m, "LayerCost")
      .def_readonly("dense_us", &LayerCost::dense_us)
      .def_readonly("zipvl_us", &LayerCost::zipvl_us)
      .def("__str__", &LayerCost::describe);
  m.def(
      "layer_cost",
      [](std::int64_t batch, std::int64_t query_heads, std::int64_t tokens, std::int64_t head_dim, double share,
         bool by_tau, bool all_queries) {
        check_sizes(batch, query_heads, query_heads, tokens, head_dim, 1);
        check_share(share, /*least=*/0.0);
        return plan_layer_cost({batch, query_heads, tokens, head_dim, share, by_tau, all_queries});
      },
      py::kw_only(), py::arg("batch") = 1, py::arg("query_heads"), py::arg("tokens"), py::arg("head_dim"),
      py::arg("share") = 1.0, py::arg("by_tau") = false, py::arg("all_queries") = false);
  m.def(
      "dense_below",
      [](std::int64_t query_heads, std::int64_t head_dim, std::optional<double> ratio, double tau, bool all_queries) {
        check_sizes(1, query_heads, query_heads, 1, head_dim, 1);
        const double share = ratio.value_or(tau);
        check_share(share, std::numeric_limits<double>::min());
        return plan_dense_below({query_heads, head_dim, share, !ratio.has_value(), all_queries});
      },
      py::kw_only(), py::arg("query_heads"), py::arg("head_dim"), py::arg("ratio") = std::nullopt,
      py::arg("tau") = 0.975, py::arg("all_queries") = false);
  m.attr("NEVER_PAYS") = kNeverPays;
  m.attr("MOST_FACTOR") = kMaxFactor;
  m.attr("MOST_EXTRA_US") = kMaxExtraUs;
  py::class_<DecodeAttnCudaPlan>(m, "DecodeAttnCudaPlan")
      .def_readonly("reason", &DecodeAttnCudaPlan::reason)
      .def_readonly("warps", &DecodeAttnCudaPlan::warps)
      .def_readonly("blocks", &DecodeAttnCudaPlan::blocks)
      .def_readonly("head_chunks", &DecodeAttnCudaPlan::head_chunks)
      .def_readonly("shared_bytes", &DecodeAttnCudaPlan::shared_bytes)
      .def_readonly("places", &DecodeAttnCudaPlan::places)
      .def_readonly("workspace_bytes", &DecodeAttnCudaPlan::workspace_bytes)
      .def("__str__", &DecodeAttnCudaPlan::describe);
  m.def(
      "plan_decode_attn_cuda",
      [](std::int64_t batch, std::int64_t query_heads, std::int64_t kv_heads, std::int64_t slots, std::int64_t head_dim,
         bool half_precision, bool aligned, std::int64_t num_sms, std::int64_t shared_bytes) {
        check_sizes(batch, query_heads, kv_heads, slots, head_dim, /*threads=*/1);
        return plan_decode_attn_cuda(
            {batch, query_heads, kv_heads, head_dim, slots, half_precision, aligned, num_sms, shared_bytes});
      },
      py::kw_only(), py::arg("batch"), py::arg("query_heads"), py::arg("kv_heads"), py::arg("slots"),
      py::arg("head_dim"), py::arg("half_precision") = true, py::arg("aligned") = true, py::arg("num_sms"),
      py::arg("shared_bytes"));
  m.def(
      "plan_decode_attn_quantized_cuda",
      [](std::int64_t batch, std::int64_t query_heads, std::int64_t kv_heads, std::int64_t slots, std::int64_t head_dim,
         std::int64_t high_blocks, std::int64_t low_blocks, int high_bits, int low_bits, std::int64_t num_sms,
         std::int64_t shared_bytes) {
        check_sizes(batch, query_heads, kv_heads, slots, head_dim, /*threads=*/1);
        return plan_decode_attn_quantized_cuda({batch, query_heads, kv_heads, head_dim, slots, /*half_precision=*/true,
                                                /*aligned=*/true, num_sms, shared_bytes},
                                               {high_blocks, low_blocks, high_bits, low_bits});
      },
      py::kw_only(), py::arg("batch"), py::arg("query_heads"), py::arg("kv_heads"), py::arg("slots"),
      py::arg("head_dim"), py::arg("high_blocks"), py::arg("low_blocks"), py::arg("high_bits") = 4,
      py::arg("low_bits") = 2, py::arg("num_sms"), py::arg("shared_bytes"));
}
