// Every schema of torch.ops.zipvl, once. Meanings: docs/ops.md. An op is added here and in the rooms that
// CONTRIBUTING.md lists.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(zipvl, m) {
  m.def(
      "probe_index(Tensor q, *, int num_recent=64, int num_random=64, int seed=0, Tensor? token_mask=None) -> Tensor");
  m.def(
      "probe_scores(Tensor q, Tensor k, Tensor probe_index, *, float? scale=None, bool causal=True, "
      "Tensor? token_mask=None) -> (Tensor accumulated, Tensor normalized)");
  m.def(
      "select_tokens(Tensor budget_score, Tensor rank_score, *, float tau=0.975, float? ratio=None, "
      "int min_tokens=1, Tensor? keep_mask=None, Tensor? token_mask=None) -> (Tensor index, Tensor count)");
  m.def("pack_kv(Tensor k, Tensor v, Tensor index, Tensor count) -> (Tensor k_packed, Tensor v_packed)");
  m.def(
      "sparse_attn(Tensor q, Tensor k, Tensor v, Tensor index, Tensor count, *, float? scale=None, "
      "bool causal=True, bool all_queries=False) -> Tensor");
  m.def(
      "zipvl_attn(Tensor q, Tensor k, Tensor v, *, float tau=0.975, float? ratio=None, int num_recent=64, "
      "int num_random=64, int seed=0, int keep_recent=1, int min_tokens=1, bool all_queries=False, "
      "float? scale=None, bool causal=True, Tensor? keep_mask=None, Tensor? token_mask=None) "
      "-> (Tensor out, Tensor index, Tensor count)");
  m.def(
      "zipvl_prefill(Tensor q, Tensor k, Tensor v, *, float tau=0.975, float? ratio=None, int num_recent=64, "
      "int num_random=64, int seed=0, int keep_recent=1, int min_tokens=1, bool all_queries=False, "
      "float? scale=None, bool causal=True, Tensor? keep_mask=None, Tensor? token_mask=None, "
      "float dense_above=1.0) "
      "-> (Tensor out, Tensor index, Tensor count, Tensor k_packed, Tensor v_packed)");
  m.def(
      "project_queries(Tensor x, Tensor weight, Tensor? bias, Tensor cos, Tensor sin, Tensor index, "
      "Tensor? count=None, *, Tensor? norm_weight=None, float norm_eps=1e-06) -> Tensor");
  m.def("project_outputs(Tensor x, Tensor weight, Tensor index, Tensor count) -> Tensor");
  m.def(
      "decode_attn(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, *, float? scale=None) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "quantize_kv(Tensor k, Tensor v, Tensor index, Tensor count, *, int high_bits=4, int low_bits=2, "
      "Tensor? v_factor=None, Tensor? token_mask=None) "
      "-> (Tensor high, Tensor high_blocks, Tensor low, Tensor low_blocks, Tensor v_factor)");
  m.def(
      "decode_attn_quantized(Tensor q, Tensor high, Tensor high_blocks, Tensor low, Tensor low_blocks, "
      "Tensor v_factor, *, int high_bits=4, int low_bits=2, Tensor? k_recent=None, Tensor? v_recent=None, "
      "Tensor? recent_lengths=None, float? scale=None) -> (Tensor out, Tensor lse)");
}
