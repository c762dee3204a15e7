// The portable kernels before the attention on a CPU: probe_index, probe_scores (mma.sync), select_tokens by one block
// a row, by their scores and by their sums, pack_kv and pack_paged, each on what the one before it gave, against
// float64 or exactly.
//
//   selection CASES SEED    prints a line a case, and ends with status 1 where one is wrong
#include "cuda/select_tokens/select_tokens.cu"
#include "cuda/select_tokens/sm90/select_sums.cu"

#include "cuda/pack_kv/pack_kv.h"
#include "cuda/pack_paged/params.h"
#include "cuda/probe_scores/passes.h"
#include "cuda/probe_scores/sm80/passes.cuh"
#include "cuda_on_cpu.h"
#include "reference.h"
#include "scored_layer.h"

namespace zipvl::cuda {
namespace select_tokens {
namespace {
alignas(16) thread_local uint4 dynamic_shared[emulated::kSharedBytes / sizeof(uint4)];
const emulated::DynamicShared registered(reinterpret_cast<unsigned char*>(dynamic_shared));
}  // namespace
}  // namespace select_tokens
namespace probe_scores::sm80 {
alignas(1024) thread_local unsigned char shared_bytes[emulated::kSharedBytes];
const emulated::DynamicShared registered(shared_bytes);
}  // namespace probe_scores::sm80
}  // namespace zipvl::cuda

namespace {

using namespace zipvl;
using namespace zipvl::cuda;
using emulated::uniform;

using Token = __half;
constexpr int D = 64;

struct Layer : emulated::ScoredLayer<Token, D> {
  std::vector<Token> v;
  std::vector<std::int32_t> index, count;

  explicit Layer(const emulated::Case& of) : ScoredLayer(of) { fill(v, k.size()); }

  // The selection that those very scores ask for.
  bool select_tokens() {
    index.assign(c.batch * c.tokens, -7);
    count.assign(c.batch, -7);
    SelectTokensParams params{};
    params.budget_score = accumulated.data();
    params.rank_score = normalized.data();
    params.token_mask = c.masked ? mask.get() : nullptr;
    params.index = index.data();
    params.count = count.data();
    params.budget_stride[0] = params.rank_stride[0] = params.mask_stride[0] = c.tokens;
    params.budget_stride[1] = params.rank_stride[1] = params.mask_stride[1] = 1;
    params.batch = c.batch;
    params.tokens = c.tokens;
    params.min_tokens = 1;
    params.tau = c.tau;
    params.ratio = c.ratio;
    params.max_ratio = 1.0;
    params.blocks_per_row = 1;
    params.tokens_per_block = 4096;
    launch_select_tokens(params, nullptr);
    std::vector<std::int32_t> of_sums(index.size(), -7), count_of_sums(count.size(), -7);
    params.budget_score = params.rank_score = nullptr;
    params.index = of_sums.data();
    params.count = count_of_sums.data();
    launch_select_sums(params, scores, nullptr);
    bool right = of_sums == index && count_of_sums == count;
    for (int b = 0; b < c.batch; ++b) {
      right = right && selected_rightly(b);
    }
    return right;
  }

  bool selected_rightly(int b) const {
    std::vector<int> order;
    for (int n = 0; n < c.tokens; ++n) {
      if (real(b, n)) {
        order.push_back(n);
      }
    }
    const auto tokens = static_cast<int>(order.size());
    const float *budget = &accumulated[b * c.tokens], *rank = &normalized[b * c.tokens];
    double total = 0.0;
    std::vector<double> mass;
    for (const int n : order) {
      mass.push_back(budget[n]);
      total += budget[n];
    }
    int wanted = c.ratio > 0.0 ? static_cast<int>(std::ceil(c.ratio * tokens)) : tokens;
    if (c.ratio <= 0.0 && total > 0.0) {
      std::sort(mass.rbegin(), mass.rend());
      double reached = 0.0;
      for (wanted = 0; wanted < tokens && reached < c.tau * total; ++wanted) {
        reached += mass[wanted];
      }
    }
    wanted = total > 0.0 ? std::clamp(wanted, std::min(1, tokens), tokens) : tokens;
    std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return rank[x] > rank[y]; });
    order.resize(wanted);
    std::sort(order.begin(), order.end());
    return count[b] == wanted && std::equal(order.begin(), order.end(), &index[b * c.tokens]);
  }

  // The selected rows, bit for bit.
  bool pack_kv() const {
    std::vector<Token> k_packed(k.size(), Token(NAN)), v_packed(v.size(), Token(NAN));
    PackKvParams params{};
    params.k = k.data();
    params.v = v.data();
    params.k_packed = k_packed.data();
    params.v_packed = v_packed.data();
    params.index = index.data();
    params.count = count.data();
    for (auto* strides : {params.k_stride, params.v_stride, params.k_packed_stride, params.v_packed_stride}) {
      strides[2] = D;
      strides[1] = std::int64_t{c.tokens} * D;
      strides[0] = c.kv_heads * strides[1];
    }
    params.index_stride[0] = c.tokens;
    params.index_stride[1] = params.count_stride = 1;
    params.batch = c.batch;
    params.heads = c.kv_heads;
    params.tokens = params.capacity = c.tokens;
    params.head_dim = D;
    params.element_bytes = sizeof(Token);
    params.tail = 1;
    params.num_sms = 4;
    launch_pack_kv(params, nullptr);
    bool right = true;
    for (int head = 0; head < c.batch * c.kv_heads; ++head) {
      const int b = head / c.kv_heads;
      for (int place = 0; place < count[b]; ++place) {
        const std::size_t to = (static_cast<std::size_t>(head) * c.tokens + place) * D;
        const std::size_t from = (static_cast<std::size_t>(head) * c.tokens + index[b * c.tokens + place]) * D;
        right = right && std::memcmp(&k_packed[to], &k[from], D * sizeof(Token)) == 0 &&
                std::memcmp(&v_packed[to], &v[from], D * sizeof(Token)) == 0;
      }
    }
    return right;
  }

  // The selected rows in the blocks of their batch row, bit for bit, and nothing anywhere else.
  bool pack_paged() const {
    const int block_size = uniform(1, 40), table_blocks = uniform(1, c.tokens / block_size + 2);
    const int blocks = c.batch * table_blocks + 1;
    std::vector<std::int32_t> table(c.batch * table_blocks), capacity(c.batch), first(c.batch), stored(c.batch, -7);
    for (std::size_t i = 0; i < table.size(); ++i) {  // some are none
      table[i] = uniform(0, 7) == 0 ? blocks + uniform(0, 9) : static_cast<std::int32_t>(table.size() - i);
    }
    for (int b = 0; b < c.batch; ++b) {
      capacity[b] = uniform(-1, table_blocks * block_size);
      first[b] = uniform(-1, table_blocks * block_size / 2);
    }
    const bool given = uniform(0, 1) == 1;
    const std::size_t row = std::size_t{D} * c.kv_heads, slots = std::size_t(blocks) * block_size;
    std::vector<Token> k_cache(slots * row), v_cache(slots * row);
    PackPagedParams params{};
    params.k = k.data();
    params.v = v.data();
    params.k_cache = k_cache.data();
    params.v_cache = v_cache.data();
    params.index = index.data();
    params.count = count.data();
    params.block_table = table.data();
    params.capacity = given ? capacity.data() : nullptr;
    params.first_slot = given ? first.data() : nullptr;
    params.stored = stored.data();
    for (auto* strides : {params.k_stride, params.v_stride}) {
      strides[2] = D;
      strides[1] = std::int64_t{c.tokens} * D;
      strides[0] = c.kv_heads * strides[1];
    }
    for (auto* strides : {params.k_cache_stride, params.v_cache_stride}) {
      strides[2] = D;
      strides[1] = static_cast<std::int64_t>(row);
      strides[0] = block_size * strides[1];
    }
    params.index_stride[0] = c.tokens;
    params.table_stride[0] = table_blocks;
    params.index_stride[1] = params.table_stride[1] = 1;
    params.count_stride = params.capacity_stride = params.first_slot_stride = 1;
    params.batch = c.batch;
    params.heads = c.kv_heads;
    params.tokens = c.tokens;
    params.head_dim = D;
    params.blocks = blocks;
    params.block_size = block_size;
    params.table_blocks = table_blocks;
    params.element_bytes = sizeof(Token);
    params.num_sms = 4;
    std::vector<Token> k_wanted(k_cache), v_wanted(v_cache);
    launch_pack_paged(params, nullptr);
    bool right = true;
    for (int b = 0; b < c.batch; ++b) {
      const int begin = given ? first[b] : 0, end = table_blocks * block_size;
      const int room = begin < 0 ? 0 : std::max(given ? std::min(capacity[b], end - begin) : end, 0);
      const int fits = std::min(count[b], room);
      right = right && stored[b] == fits;
      for (int i = 0; i < fits; ++i) {
        const int slot = begin + i, block = table[b * table_blocks + slot / block_size];
        if (block >= blocks) {
          continue;
        }
        const int token = index[b * c.tokens + count[b] - fits + i];
        for (int head = 0; head < c.kv_heads; ++head) {
          const std::size_t from = ((static_cast<std::size_t>(b) * c.kv_heads + head) * c.tokens + token) * D;
          const std::size_t to = (static_cast<std::size_t>(block) * block_size + slot % block_size) * row + head * D;
          std::copy_n(&k[from], D, &k_wanted[to]);
          std::copy_n(&v[from], D, &v_wanted[to]);
        }
      }
    }
    return right && std::memcmp(k_cache.data(), k_wanted.data(), k_cache.size() * sizeof(Token)) == 0 &&
           std::memcmp(v_cache.data(), v_wanted.data(), v_cache.size() * sizeof(Token)) == 0;
  }
};

// Rows as long as they are selected from sums: what the scores' last kernel and the selection give of the same ones.
struct Sums {
  int batch, parts, tokens, probes;
  bool causal, masked, drawn;
  double tau, ratio;
  std::vector<float> sums, accumulated, normalized;
  std::vector<std::int32_t> positions;
  std::unique_ptr<bool[]> mask;

  Sums()
      : batch(uniform(1, 2)),
        parts(uniform(1, 20)),
        tokens(uniform(1, 3413)),
        probes(uniform(1, 160)),
        causal(uniform(0, 3) != 0),
        masked(uniform(0, 1) == 0),
        drawn(!masked && uniform(0, 1) == 0),
        tau(0.5 + 0.1 * uniform(0, 4)),
        ratio(uniform(0, 1) == 0 ? 0.1 * uniform(1, 10) : 0.0),
        sums(static_cast<std::size_t>(batch) * parts * tokens),
        accumulated(batch * tokens, NAN),
        normalized(batch * tokens, NAN),
        positions(batch * probes),
        mask(new bool[batch * tokens]) {
    tokens -= uniform(0, 1) == 0 && tokens > 4 ? tokens % 4 : 0;
    const int values = uniform(0, 1) == 0 ? 3 : 1 << 20;  // few: ties
    for (float& sum : sums) {
      sum = uniform(0, 5) == 0 ? 0.0F : static_cast<float>(uniform(1, values)) / static_cast<float>(values);
    }
    for (int i = 0; i < batch * probes; ++i) {
      const int recent = tokens - 1 - i % probes;
      positions[i] = uniform(0, 9) == 0 ? -1 : uniform(0, 1) == 0 ? std::max(recent, 0) : uniform(0, tokens - 1);
    }
    for (int i = 0; i < batch * tokens; ++i) {
      mask[i] = !masked || uniform(0, 4) != 0;
    }
  }

  bool selected_alike() {
    ProbeScoresParams from{};
    from.probe_index = positions.data();
    from.probe_stride[0] = probes;
    from.probe_stride[1] = 1;
    from.token_mask = masked ? mask.get() : nullptr;
    from.mask_stride[0] = tokens;
    from.mask_stride[1] = 1;
    from.accumulated = accumulated.data();
    from.normalized = normalized.data();
    from.sums = sums.data();
    from.batch = batch;
    from.query_heads = 7 * parts;
    from.kv_heads = parts;
    from.row_splits = 1;
    from.tokens = tokens;
    from.probes = probes;
    from.causal = causal;
    if (drawn) {
      from.draw = draw_probes(tokens, probes / 2, probes - probes / 2, 7);
      for (int i = 0; i < batch * probes; ++i) {
        positions[i] = static_cast<std::int32_t>(from.draw.rank(i % probes));
      }
    }
    from.cluster_blocks = uniform(0, 1);
    probe_scores::launch_finish_scores(from, nullptr);
    from.probe_index = drawn ? nullptr : positions.data();
    SelectTokensParams params{};
    params.token_mask = from.token_mask;
    params.mask_stride[0] = params.budget_stride[0] = params.rank_stride[0] = tokens;
    params.mask_stride[1] = params.budget_stride[1] = params.rank_stride[1] = 1;
    params.batch = batch;
    params.tokens = tokens;
    params.min_tokens = 1;
    params.tau = tau;
    params.ratio = ratio;
    params.max_ratio = 1.0;
    params.blocks_per_row = 1;
    params.tokens_per_block = plan::kSelectTokensPerCopy;
    std::vector<std::int32_t> index[2], count[2];
    for (const bool by_sums : {false, true}) {
      index[by_sums].assign(batch * tokens, -7);
      count[by_sums].assign(batch, -7);
      params.index = index[by_sums].data();
      params.count = count[by_sums].data();
      params.budget_score = by_sums ? nullptr : accumulated.data();
      params.rank_score = by_sums ? nullptr : normalized.data();
      by_sums ? launch_select_sums(params, from, nullptr) : launch_select_tokens(params, nullptr);
    }
    return index[0] == index[1] && count[0] == count[1] && count[0][0] >= 0;
  }
};

}  // namespace

// What host code asks of the device.
extern "C" cudaError_t cudaMemset2DAsync(void*, std::size_t, int, std::size_t, std::size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
extern "C" cudaError_t cudaLaunchCooperativeKernel(const void*, dim3, dim3, void**, std::size_t, cudaStream_t) {
  return cudaErrorNotSupported;  // blocks that wait for each other
}
namespace zipvl::cuda {
bool runs_hopper_code(int /*device*/) { return false; }
}  // namespace zipvl::cuda

int main(int count, char** arguments) {
  return emulated::run_cases(count, arguments, [](emulated::Report& report) {
    Layer layer(emulated::random_case());
    const emulated::Case& c = layer.c;
    const bool probes = layer.probe_index();
    const double scores = layer.probe_scores(
        [](const ProbeScoresParams& params) {
          probe_scores::launch_passes<probe_scores::sm80::Passes<Token, D>>(params, nullptr);
        },
        /*clusters=*/false);
    const bool selection = layer.select_tokens(), packed = layer.pack_kv(), paged = layer.pack_paged();
    Sums sums;
    report(sums.selected_alike(), "%d rows of %d tokens, %d probes, %d parts%s", sums.batch, sums.tokens, sums.probes,
           sums.parts, sums.masked ? ", masked" : "");
    report(
        probes && scores < 1e-4 && selection && packed && paged,
        "batch %d heads %2d/%d tokens %3d probes %2d + %2d%s%s: probes %d scores %.1e selection %d packed %d paged %d",
        c.batch, c.query_heads, c.kv_heads, c.tokens, c.recent, c.random, c.causal ? " causal" : "",
        c.masked ? " masked" : "", probes, scores, selection, packed, paged);
  });
}
