// The ops' CPU implementations, one row an op.
#include <torch/csrc/stable/library.h>

#include "ops/ops.h"

STABLE_TORCH_LIBRARY_IMPL(zipvl, CPU, m) {
  m.impl("probe_index", TORCH_BOX(&zipvl::ops::probe_index));
  m.impl("probe_scores", TORCH_BOX(&zipvl::ops::probe_scores));
  m.impl("select_tokens", TORCH_BOX(&zipvl::ops::select_tokens));
  m.impl("pack_kv", TORCH_BOX(&zipvl::ops::pack_kv));
  m.impl("sparse_attn", TORCH_BOX(&zipvl::ops::sparse_attn));
  m.impl("zipvl_attn", TORCH_BOX(&zipvl::ops::zipvl_attn));
  m.impl("zipvl_prefill", TORCH_BOX(&zipvl::ops::zipvl_prefill));
  m.impl("project_queries", TORCH_BOX(&zipvl::ops::project_queries));
  m.impl("project_outputs", TORCH_BOX(&zipvl::ops::project_outputs));
  m.impl("decode_attn", TORCH_BOX(&zipvl::ops::decode_attn));
  m.impl("quantize_kv", TORCH_BOX(&zipvl::ops::quantize_kv));
  m.impl("decode_attn_quantized", TORCH_BOX(&zipvl::ops::decode_attn_quantized));
}
