// The ops' CUDA implementations, one row an op. Rows of zipvl::ops have no native kernel yet and run over ATen on the
// GPU: correct, without a copy to the host, not fast.
#include <torch/csrc/stable/library.h>

#include "cuda/ops/ops.h"
#include "ops/ops.h"

STABLE_TORCH_LIBRARY_IMPL(zipvl, CUDA, m) {
  m.impl("probe_index", TORCH_BOX(&zipvl::cuda::probe_index));
  m.impl("probe_scores", TORCH_BOX(&zipvl::ops::probe_scores));
  m.impl("select_tokens", TORCH_BOX(&zipvl::ops::select_tokens));
  m.impl("pack_kv", TORCH_BOX(&zipvl::ops::pack_kv));
  m.impl("sparse_attn", TORCH_BOX(&zipvl::ops::sparse_attn));
  m.impl("zipvl_attn", TORCH_BOX(&zipvl::ops::zipvl_attn));
  m.impl("decode_attn", TORCH_BOX(&zipvl::ops::decode_attn));
}
