// The ops' CUDA implementations, one row an op. Rows of zipvl::ops have no native kernel of their own and run over
// ATen on the GPU or call the others: correct, without a copy to the host.
#include <torch/csrc/stable/library.h>

#include "cuda/ops/ops.h"
#include "ops/ops.h"

STABLE_TORCH_LIBRARY_IMPL(zipvl, CUDA, m) {
  m.impl("probe_index", TORCH_BOX(&zipvl::cuda::probe_index));
  m.impl("probe_scores", TORCH_BOX(&zipvl::cuda::probe_scores));
  m.impl("select_tokens", TORCH_BOX(&zipvl::cuda::select_tokens));
  m.impl("pack_kv", TORCH_BOX(&zipvl::cuda::pack_kv));
  m.impl("sparse_attn", TORCH_BOX(&zipvl::cuda::sparse_attn));
  m.impl("zipvl_attn", TORCH_BOX(&zipvl::cuda::zipvl_attn));
  m.impl("zipvl_prefill", TORCH_BOX(&zipvl::cuda::zipvl_prefill));
  m.impl("project_queries", TORCH_BOX(&zipvl::cuda::project_queries));
  m.impl("project_outputs", TORCH_BOX(&zipvl::cuda::project_outputs));
  m.impl("decode_attn", TORCH_BOX(&zipvl::cuda::decode_attn));
  m.impl("quantize_kv", TORCH_BOX(&zipvl::cuda::quantize_kv));
  m.impl("decode_attn_quantized", TORCH_BOX(&zipvl::cuda::decode_attn_quantized));
}
