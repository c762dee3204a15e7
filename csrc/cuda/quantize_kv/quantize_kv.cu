// Keys and values of both segments into blocks of 64 tokens: one block of threads each. Float32 arithmetic, correctly
// rounded and never fused, so that the bytes are those of the CPU.
#include <algorithm>
#include <cstdint>

#include "common/math.h"
#include "common/quantized_block.h"
#include "cuda/common/dispatch.h"
#include "cuda/common/launch.h"
#include "cuda/common/warp.cuh"
#include "cuda/quantize_kv/params.h"

namespace zipvl::cuda {
namespace {

using quantized::kBlockTokens;

constexpr int kThreads = 256;

// The largest absolute value of each channel over the real tokens. Bits of floats that are not negative order as
// integers do, and a maximum does not depend on the order it is taken in.
template <typename ElementType>
__global__ void __launch_bounds__(kThreads) largest_kernel(const __grid_constant__ QuantizeKvParams params) {
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kSplitChunk;
  const std::int64_t end = min(params.tokens, first + kSplitChunk);
  for (std::int64_t b = blockIdx.z; b < params.batch; b += gridDim.z) {
    for (std::int64_t h = blockIdx.y; h < params.heads; h += gridDim.y) {
      const auto* v = static_cast<const ElementType*>(params.v) + b * params.v_stride[0] + h * params.v_stride[1];
      // Threads of a warp take neighbouring channels; where channels are few, several tokens at once.
      const int lanes = min(params.head_dim, kThreads), groups = kThreads / lanes;
      const int group = static_cast<int>(threadIdx.x) / lanes;
      for (int d = static_cast<int>(threadIdx.x) % lanes; d < params.head_dim && group < groups; d += lanes) {
        float max_abs = 0.0F;
        for (std::int64_t n = first + group; n < end; n += groups) {
          if (params.token_mask == nullptr ||
              params.token_mask[b * params.mask_stride[0] + n * params.mask_stride[1]]) {
            max_abs = fmaxf(max_abs, fabsf(static_cast<float>(v[n * params.v_stride[2] + d])));
          }
        }
        atomicMax(params.largest + (b * params.heads + h) * params.head_dim + d, __float_as_uint(max_abs));
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) factor_kernel(const __grid_constant__ QuantizeKvParams params) {
  const std::int64_t channels = params.batch * params.heads * params.head_dim;
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(kThreads) + threadIdx.x; i < channels;
       i += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    params.v_factor[i] = quantized::channel_factor(__uint_as_float(params.largest[i]));
  }
}

// One block's tokens in shared memory and its words under construction.
struct BlockBuilder {
  float* rows;           // [kBlockTokens, head_dim + 1]: a column's elements on different banks
  std::uint32_t* words;  // [kBlockTokens * head_dim * bits / 32]
  const int* position;   // [kBlockTokens]; -1: zeros
  int tokens, head_dim;

  __device__ float& at(int token, int d) const { return rows[token * (head_dim + 1) + d]; }
  __device__ int word_count(int bits) const { return kBlockTokens * head_dim * bits / 32; }

  // Loads the rows of `source` [tokens, head_dim] and clears the words.
  template <typename ElementType>
  __device__ void load(const ElementType* source, std::int64_t stride, int bits) const {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < tokens * head_dim; i += kThreads) {
      const int token = i / head_dim, d = i % head_dim;
      at(token, d) = position[token] < 0 ? 0.0F : static_cast<float>(source[position[token] * stride + d]);
    }
    for (int i = static_cast<int>(threadIdx.x); i < word_count(bits); i += kThreads) {
      words[i] = 0;
    }
    __syncthreads();
  }
  __device__ void put(quantized::CodePlace place, float x, float scale, float zero, int bits) const {
    std::uint32_t code = quantized::code_of(x, scale, zero, bits);
    if (bits == 8) {
      atomicOr(words + place.word, (code & 15U) << place.shift);
      place.word += quantized::kUpperHalf;
      code >>= 4;
    }
    atomicOr(words + place.word, code << place.shift);
  }
  __device__ void write(std::uint8_t* codes, int bits) const {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < word_count(bits); i += kThreads) {
      reinterpret_cast<std::uint32_t*>(codes)[i] = words[i];
    }
  }
};

// Stores a range's scale and zero, rounded to ElementType, and returns them as they were stored.
template <typename ElementType>
__device__ float2 put_range(float lowest, float highest, int bits, ElementType* scale, ElementType* zero) {
  store_element(scale, quantized::step_of(lowest, highest, bits));
  store_element(zero, lowest);
  return {static_cast<float>(*scale), static_cast<float>(*zero)};
}

template <typename ElementType>
__device__ void pack_keys(const BlockBuilder& builder, std::uint8_t* block, const quantized::BlockLayout& layout,
                          int bits) {
  for (int d = static_cast<int>(threadIdx.x); d < builder.head_dim; d += kThreads) {
    float lowest = builder.at(0, d), highest = lowest;
    for (int t = 1; t < builder.tokens; ++t) {
      lowest = fminf(lowest, builder.at(t, d));
      highest = fmaxf(highest, builder.at(t, d));
    }
    const int place = quantized::parameter_place(d);
    const float2 range =
        put_range(lowest, highest, bits, reinterpret_cast<ElementType*>(block + layout.k_scale) + place,
                  reinterpret_cast<ElementType*>(block + layout.k_zero) + place);
    for (int t = 0; t < builder.tokens; ++t) {
      builder.put(quantized::key_code_place(bits, t, d), builder.at(t, d), range.x, range.y, bits);
    }
  }
  builder.write(block + layout.k_codes, bits);
}

template <typename ElementType>
__device__ void pack_values(const BlockBuilder& builder, std::uint8_t* block, const quantized::BlockLayout& layout,
                            int bits, const float* factor) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  auto* scales = reinterpret_cast<ElementType*>(block + layout.v_scale);
  auto* zeros = reinterpret_cast<ElementType*>(block + layout.v_zero);
  for (int t = static_cast<int>(threadIdx.x) / kWarpThreads; t < kBlockTokens; t += kThreads / kWarpThreads) {
    if (t >= builder.tokens) {  // read with weight 0: they must be numbers
      if (lane == 0) {
        store_element(scales + t, 0.0F);
        store_element(zeros + t, 0.0F);
      }
      continue;
    }
    float lowest = INFINITY, highest = -INFINITY;
    for (int d = lane; d < builder.head_dim; d += kWarpThreads) {
      const float x = builder.at(t, d) / factor[d];
      builder.at(t, d) = x;
      lowest = fminf(lowest, x);
      highest = fmaxf(highest, x);
    }
    for (int offset = kWarpThreads / 2; offset > 0; offset /= 2) {
      lowest = fminf(lowest, __shfl_xor_sync(kAllLanes, lowest, offset));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, offset));
    }
    ElementType scale, zero;
    const float2 range = put_range(lowest, highest, bits, &scale, &zero);
    if (lane == 0) {
      scales[t] = scale;
      zeros[t] = zero;
    }
    for (int d = lane; d < builder.head_dim; d += kWarpThreads) {
      builder.put(quantized::value_code_place(bits, t, d), builder.at(t, d), range.x, range.y, bits);
    }
  }
  builder.write(block + layout.v_codes, bits);
}

// gridDim.x: the blocks of the high segment, then those of the low one. Four blocks a multiprocessor: with more the
// registers do not hold it.
template <typename ElementType>
__global__ void __launch_bounds__(kThreads, 4) pack_kernel(const __grid_constant__ QuantizeKvParams params) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ int position[kBlockTokens];
  const int segment = blockIdx.x < params.capacity ? 0 : 1;
  const std::int64_t number = blockIdx.x - segment * params.capacity;
  BlockBuilder builder{};
  builder.head_dim = params.head_dim;
  const quantized::Bits bits = params.bits[segment];
  builder.rows = reinterpret_cast<float*>(shared);
  builder.words = reinterpret_cast<std::uint32_t*>(builder.rows + kBlockTokens * (params.head_dim + 1));
  builder.position = position;
  const quantized::BlockLayout layout = quantized::block_layout(params.head_dim, bits, sizeof(ElementType));
  for (std::int64_t b = blockIdx.z; b < params.batch; b += gridDim.z) {
    const std::int64_t given = segment == 0 ? params.count[b * params.count_stride] : params.rest_count[b];
    const std::int64_t total = min(max(given, std::int64_t{0}), params.tokens);
    const std::int64_t first = number * kBlockTokens;
    if (first >= total) {
      continue;
    }
    builder.tokens = static_cast<int>(min(static_cast<std::int64_t>(kBlockTokens), total - first));
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < builder.tokens) {
      const std::int64_t place = first + threadIdx.x;
      const int n = segment == 0 ? params.index[b * params.index_stride[0] + place * params.index_stride[1]]
                                 : params.rest[b * params.tokens + place];
      position[threadIdx.x] = n >= 0 && n < params.tokens ? n : -1;
    }
    for (std::int64_t h = blockIdx.y; h < params.heads; h += gridDim.y) {
      std::uint8_t* block = params.packed[segment] + ((b * params.heads + h) * params.capacity + number) * layout.bytes;
      if (threadIdx.x < quantized::kHeaderBytes / 4) {
        reinterpret_cast<int*>(block)[threadIdx.x] = threadIdx.x == 0 ? builder.tokens : 0;
      }
      builder.load(static_cast<const ElementType*>(params.k) + b * params.k_stride[0] + h * params.k_stride[1],
                   params.k_stride[2], bits.keys);
      pack_keys<ElementType>(builder, block, layout, bits.keys);
      builder.load(static_cast<const ElementType*>(params.v) + b * params.v_stride[0] + h * params.v_stride[1],
                   params.v_stride[2], bits.values);
      pack_values<ElementType>(builder, block, layout, bits.values,
                               params.v_factor + (b * params.heads + h) * params.head_dim);
    }
  }
}

template <typename ElementType>
cudaError_t launch_for(const QuantizeKvParams& params, cudaStream_t stream) {
  const auto grid_of = [](std::int64_t n) { return static_cast<unsigned>(std::min(n, kMaxGridYZ)); };
  if (params.largest != nullptr) {
    largest_kernel<ElementType>
        <<<dim3(static_cast<unsigned>(params.chunks), grid_of(params.heads), grid_of(params.batch)), kThreads, 0,
           stream>>>(params);
    const std::int64_t channels = params.batch * params.heads * params.head_dim;
    factor_kernel<<<grid_of(ceil_div<std::int64_t>(channels, kThreads)), kThreads, 0, stream>>>(params);
  }
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    return error;
  }
  if (const cudaError_t error = launch_split_tokens(params, stream); error != cudaSuccess) {
    return error;
  }
  const int max_bits =
      std::max({params.bits[0].keys, params.bits[0].values, params.bits[1].keys, params.bits[1].values});
  const int shared = kBlockTokens * (params.head_dim + 1) * static_cast<int>(sizeof(float)) +
                     kBlockTokens * params.head_dim * max_bits / 8;
  const dim3 grid(static_cast<unsigned>(2 * params.capacity), grid_of(params.heads), grid_of(params.batch));
  return launch_kernel(pack_kernel<ElementType>,
                       {.grid = grid, .threads = kThreads, .shared_bytes = static_cast<unsigned>(shared)}, stream,
                       params);
}

}  // namespace

cudaError_t launch_quantize_kv(const QuantizeKvParams& params, cudaStream_t stream) {
  return params.element
             ? dispatch_element(*params.element,
                                [&]<typename ElementType>() { return launch_for<ElementType>(params, stream); })
             : launch_for<float>(params, stream);
}

}  // namespace zipvl::cuda
