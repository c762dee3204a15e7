// One sparse_attn problem as the kernels take it, and the launches of both families. No Torch.
// The Hopper family needs pack_kv before it (sm90/params.h) and, for all queries under causal attention, seen_tokens.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/element.h"

namespace zipvl::cuda {

// Rows of queries and the keys that each of them sees, where a pass of attention over a list of keys is not the usual
// one: within or outside a window, of queries that are the last of the tokens, up to a given last key
// (row_ranges.cu). A list of keys is the packed selection, the packed real tokens, or all tokens as they lie.
struct RowRanges {
  const int2* range;  // [batch, queries]: a row sees places [x, y) of the list
  // [batch, ceil(queries / 32)], of 32 rows: the least x and the largest y of those that see anything, the largest x
  // and the least y of all
  const int4* group;
  const std::int32_t* query;     // [batch, queries]: the query of each row; null: row r is query r
  const std::int32_t* num_rows;  // [batch]; null: every query has a row
  int num_sinks;                 // a row sees the places below min(num_sinks, range.x) as well
  float* lse;                    // [batch, query_heads, queries]: log2 of the sum of 2**score of a row; or null
  bool in_window;                // a pass within a window
  bool merges;                   // lse and `out` hold another pass over other keys, with which this one's is merged
};
constexpr int kRowGroup = 32;

struct SparseAttnParams {
  // Strides are of batch, head and token, in elements; the last dimension's is 1. Every row starts at a multiple of 16
  // bytes, so strides of dimensions larger than 1 are multiples of 8.
  const void* q;  // [batch, query_heads, tokens, head_dim]
  const void* k;  // [batch, kv_heads, tokens, head_dim]
  const void* v;  // [batch, kv_heads, tokens, head_dim]
  std::int64_t q_stride[3], k_stride[3], v_stride[3];
  void* out;  // [batch, tokens, query_heads, head_dim], contiguous, aligned to 16 bytes; may be q, in the same layout
  // Where the rows of tokens outside the selection get zeros: [batch, tokens, zero_row_bytes], contiguous,
  // zero_row_bytes and alignment multiples of 16 bytes. `out`, or what a later kernel computes from it; null: nowhere.
  void* zeros;
  std::int64_t zero_row_bytes;

  const std::int32_t* index;  // [batch, tokens], strides index_stride in elements; the first count of a row ascend
  std::int64_t index_stride[2];
  const std::int32_t* count;  // [batch], stride count_stride
  std::int64_t count_stride;

  // Workspace [batch, kv_heads, capacity, head_dim], contiguous, for families that pack K and V; null otherwise.
  void *k_packed, *v_packed;
  std::int64_t capacity;

  std::int64_t batch, query_heads, kv_heads, tokens;  // query_heads % kv_heads == 0; tokens below 2**31
  int head_dim;                                       // 64, 96, 128 or 256
  Element element;
  float scale;  // above 0
  bool causal, all_queries;

  // ranges.range null: q and out have `tokens` rows, and rows see the selection up to themselves. Otherwise they have
  // `queries` rows, `zeros` is null, causal and all_queries do not matter, and the list of keys is
  //   sm_80: the tokens that index and count name; with index null all tokens.
  //   sm_90: k_packed and v_packed; with those null k and v themselves.
  RowRanges ranges;
  std::int64_t queries;
};

// The inputs of the kernel that fills RowRanges: one pass's rows and list of keys.
struct RowRangesPass {
  int2* range;
  int4* group;
  std::int32_t* query;     // null: a row for every query
  std::int32_t* num_rows;  // null with `query`
  // The tokens whose queries have rows, as `index` and `count` of a selection; unused where every query has a row.
  const std::int32_t* row_index;
  const std::int32_t* row_count;
  std::int64_t row_index_stride[2], row_count_stride;
  // The list of keys likewise; null: all tokens.
  const std::int32_t* key_index;
  const std::int32_t* key_count;
  std::int64_t key_index_stride[2], key_count_stride;
  bool in_window;  // the keys of the window, or those before it that are no sinks
};

// Causal. Strides in elements.
struct RowRangesParams {
  RowRangesPass pass[2];
  int passes;
  const bool* token_mask;  // [batch, tokens], or null: every token is real; rows of others see nothing
  std::int64_t mask_stride[2];
  const std::int32_t* last_key;  // [batch, queries]: the last token a query sees, or null: its own
  std::int64_t last_key_stride[2];
  const std::int32_t* real_index;  // [batch, tokens], contiguous: the real tokens; null with token_mask
  const std::int32_t* real_count;  // [batch]
  int batch, queries, tokens;      // the queries are those of the last tokens
  int local_window, num_sinks;
};

cudaError_t launch_row_ranges(const RowRangesParams& params, cudaStream_t stream);

// How many selected tokens stand at or before each token: what a query of all_queries sees under causal attention.
struct SeenTokensParams {
  std::int32_t* seen;            // [batch, tokens], contiguous
  const std::int32_t* index;     // [batch, tokens]
  std::int64_t index_stride[2];  // in elements
  const std::int32_t* count;     // [batch]
  std::int64_t count_stride;
  std::int64_t batch, tokens;
};

cudaError_t launch_seen_tokens(const SeenTokensParams& params, cudaStream_t stream);

// Zeros in the output rows of tokens that are not real, where attention computes every row.
struct ZeroPaddingParams {
  void* out;                    // [batch, tokens, row_bytes], contiguous, aligned to 16 bytes
  const bool* token_mask;       // [batch, tokens]
  std::int64_t mask_stride[2];  // in elements
  std::int64_t batch, tokens;   // batch below 65,536
  std::int64_t row_bytes;       // of all heads of a token, a multiple of 16
};

cudaError_t launch_zero_padding(const ZeroPaddingParams& params, cudaStream_t stream);

// The portable kernel (sm_80 and later). A scale not above 0, a head_dim that SparseAttnParams does not name, or a grid
// that does not fit, is cudaErrorInvalidValue. The packed workspace is not used.
cudaError_t launch_sparse_attn_sm80(const SparseAttnParams& params, cudaStream_t stream);

namespace sparse_attn::sm90 {
// The Hopper kernel. params.k_packed and v_packed hold the selected rows already; scale is above 0, batch at most 64,
// count * blocks fits an int. seen: SeenTokensParams::seen, or null unless all_queries and causal.
cudaError_t launch_sparse_attn(const SparseAttnParams& params, const std::int32_t* seen, int num_sms,
                               cudaStream_t stream);
}  // namespace sparse_attn::sm90

}  // namespace zipvl::cuda
