// zipvl_layer: the attention of one layer, from queries or hidden states to outputs and packed keys and values
// (docs/ops.md, steps 1 to 6). zipvl_attn and zipvl_prefill are this op with queries given. On CUDA it is one sequence
// of kernels: checked once, planned once, one workspace, nothing between the launches but the stream. Where a step has
// no kernel for the inputs, the ops run one by one.
#include "cpu/tokens.h"
#include "ops/args.h"
#include "ops/aten.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include <algorithm>

#include "ops/cuda_steps.h"
#endif

namespace zipvl {
namespace ops {
namespace {

// The arguments of zipvl_attn and zipvl_prefill.
struct AttnArgs {
  Tensor q, k, v;
  LayerOptions options;
  static AttnArgs read(Arguments& in) { return {in.tensor(), in.tensor(), in.tensor(), LayerOptions::read(in)}; }
};

struct LayerResult {
  Tensor out, index, count;
  OptionalTensor k_packed, v_packed;  // where they were asked for
};

void check_given(const char* op, const char* name, const OptionalTensor& tensor, bool needed, const char* with) {
  if (tensor.has_value() != needed) {
    checks::fail(op, name, needed ? " must be given with " : " must be given with hidden alone, not with ", with,
                 needed ? ", got None" : ", got a tensor");
  }
}

checks::AttentionSizes check_hidden(const char* op, const LayerArgs& args) {
  const LayerProjections& given = args.projections;
  const Tensor &k = args.k, &hidden = *given.hidden;
  check_given(op, "q_weight", given.q_weight, true, "hidden");
  check_given(op, "cos", given.cos, true, "hidden");
  check_given(op, "sin", given.sin, true, "hidden");
  checks::kv_pair(op, {"k", k}, {"v", args.v});
  checks::linear(op, {"hidden", hidden}, {"q_weight", *given.q_weight});
  checks::same_device(op, hidden, {"k", k});
  checks::same_dtype(op, {"hidden", hidden}, {"k", k});
  checks::shape(op, {"hidden", hidden}, {k.size(0), hidden.size(1), hidden.size(2)});
  checks::last_tokens(op, {"hidden", hidden}, 1, k.size(2), args.options.causal);
  if (given.q_weight->size(0) % k.size(3) != 0) {
    checks::fail(op, "q_weight must have a multiple of k's head dim ", k.size(3), " outputs, got ",
                 given.q_weight->size(0));
  }
  for (const checks::Named& table : {checks::Named{"cos", *given.cos}, checks::Named{"sin", *given.sin}}) {
    checks::rank(op, table, 3, "[B or 1, n, D]");
    if (table.tensor.size(2) != k.size(3)) {
      checks::fail(op, table.name, " must have k's head dim ", k.size(3), ", got ", table.tensor.size(2));
    }
  }
  checks::query_projection(op, {{"hidden", hidden},
                                {"q_weight", *given.q_weight},
                                "q_bias",
                                given.q_bias,
                                {"cos", *given.cos},
                                {"sin", *given.sin},
                                "q_norm_weight",
                                given.q_norm_weight,
                                "q_norm_eps",
                                given.q_norm_eps});
  const std::int64_t query_heads = given.q_weight->size(0) / k.size(3);
  checks::heads_divide(op, "k", k.size(1), query_heads);
  return {k.size(0), query_heads, k.size(1), hidden.size(1), k.size(2), k.size(3)};
}

checks::AttentionSizes check(const char* op, const LayerArgs& args) {
  const LayerProjections& given = args.projections;
  const LayerOptions& options = args.options;
  if (args.q.has_value() == given.hidden.has_value()) {
    checks::fail(op, "exactly one of q and hidden must be given, got ", args.q ? "both" : "neither");
  }
  checks::AttentionSizes sizes{};
  if (args.q) {
    check_given(op, "q_weight", given.q_weight, false, "q");
    check_given(op, "q_bias", given.q_bias, false, "q");
    check_given(op, "q_norm_weight", given.q_norm_weight, false, "q");
    check_given(op, "cos", given.cos, false, "q");
    check_given(op, "sin", given.sin, false, "q");
    sizes = checks::attention_inputs(op, *args.q, {"k", args.k}, checks::Named{"v", args.v});
    checks::last_tokens(op, {"q", *args.q}, 2, sizes.tokens, options.causal);
  } else {
    sizes = check_hidden(op, args);
  }
  if (given.o_weight) {
    const checks::Named weight{"o_weight", *given.o_weight};
    checks::rank(op, weight, 2, "[outputs, Hq * D]");
    checks::shape(op, weight, {given.o_weight->size(0), sizes.query_heads * sizes.head_dim});
    checks::same_device(op, args.k, weight);
    checks::same_dtype(op, {"k", args.k}, weight);
  }
  if (args.budget_score.has_value() != args.rank_score.has_value()) {
    checks::fail(op, "budget_score and rank_score must be given together, got ",
                 args.budget_score ? "budget_score" : "rank_score", " alone");
  }
  if (args.budget_score) {
    checks::shape(op, {"budget_score", *args.budget_score}, {sizes.batch, sizes.tokens});
    checks::scores(op, *args.budget_score, *args.rank_score);
    checks::same_device(op, args.k, {"budget_score", *args.budget_score});
  }
  checks::budget(op, options.tau, options.ratio, options.min_tokens);
  checks::probe_counts(op, options.num_recent, options.num_random, options.seed);
  checks::not_negative(op, {{"keep_recent", options.keep_recent}});
  checks::scale(op, options.scale);
  checks::mask(op, "keep_mask", options.keep_mask, args.k, sizes.batch, sizes.tokens);
  checks::mask(op, "token_mask", options.token_mask, args.k, sizes.batch, sizes.tokens);
  checks::neighbourhood(op, options.local_window, options.num_sinks);
  checks::needs_causal(op, options.causal, options.local_window);
  checks::mask(op, "extra_mask", options.extra_mask, args.k, sizes.batch, sizes.tokens);
  checks::last_key(op, options.last_key, args.k, sizes.batch, sizes.queries, options.causal);
  checks::share(op, "max_ratio", options.max_ratio);
  return sizes;
}

// B = 0 or no tokens.
LayerResult nothing(const LayerArgs& args, const checks::AttentionSizes& sizes) {
  const auto [B, Hq, Hkv, n, N, D] = sizes;
  const auto like_k = [&](const aten::Sizes& shape) {
    return aten::empty(shape, args.k.scalar_type(), args.k.device());
  };
  const OptionalTensor& o_weight = args.projections.o_weight;
  LayerResult result{o_weight ? like_k({B, n, o_weight->size(0)}) : aten::transpose(like_k({B, n, Hq, D}), 1, 2),
                     aten::zeros({B, N}, aten::ScalarType::Int, args.k.device()),
                     aten::zeros({B}, aten::ScalarType::Int, args.k.device()), std::nullopt, std::nullopt};
  if (args.pack) {
    result.k_packed = like_k({B, Hkv, N, D});
    result.v_packed = like_k({B, Hkv, N, D});
  }
  return result;
}

// ---- the ops one by one, on any device

// keep_mask and the `keep_recent` last real tokens of each row.
OptionalTensor tokens_to_keep(const LayerArgs& args, const checks::AttentionSizes& sizes) {
  const LayerOptions& options = args.options;
  if (options.keep_recent == 0) {
    return options.keep_mask;
  }
  const Tensor real = cpu::real_tokens(options.token_mask, sizes.batch, sizes.tokens, args.k.device());
  const Tensor recent = cpu::last_real_tokens(real, options.keep_recent);
  return options.keep_mask ? aten::logical_or(*options.keep_mask, recent) : recent;
}

// The queries of the rows that `index` names, in their places.
Tensor project(const LayerArgs& args, const Tensor& index, const OptionalTensor& count) {
  const LayerProjections& given = args.projections;
  return project_queries({*given.hidden, *given.q_weight, given.q_bias, *given.cos, *given.sin, index, count,
                          given.q_norm_weight, given.q_norm_eps});
}

Tensor every_row(const LayerArgs& args, const checks::AttentionSizes& sizes) {
  const Tensor rows = aten::iota(sizes.queries, aten::ScalarType::Int, args.k.device());
  return aten::expand(aten::unsqueeze(rows, 0), {sizes.batch, sizes.queries});
}

LayerResult step_by_step(const LayerArgs& args, const checks::AttentionSizes& sizes) {
  const LayerOptions& options = args.options;
  const bool last_alone = sizes.queries != sizes.tokens;
  const bool every = options.all_queries || options.local_window > 0 || last_alone;  // row has an output
  OptionalTensor all = args.q;                                                       // queries, where every row has one
  if (!all && every) {
    all = project(args, every_row(args, sizes), std::nullopt);
  }
  OptionalTensor budget_score = args.budget_score, rank_score = args.rank_score;
  if (!budget_score) {
    // Only the shape and device of tensors [B, H, n, D] and [B, H, N, D] matter here.
    const Tensor probes = probe_index({all ? *all : args.k, options.num_recent, options.num_random, options.seed,
                                       options.token_mask, last_alone ? OptionalTensor(args.k) : std::nullopt});
    std::tie(budget_score, rank_score) =
        probe_scores({all ? *all : project(args, probes, std::nullopt), args.k, probes, options.scale, options.causal,
                      options.token_mask, options.last_key});
  }
  const auto [index, count] = select_tokens({*budget_score, *rank_score, options.tau, options.ratio, options.min_tokens,
                                             tokens_to_keep(args, sizes), options.token_mask, options.local_window,
                                             options.num_sinks, options.extra_mask, options.max_ratio});
  const Tensor q = all ? *all : project(args, index, count);
  // Kernels of the plain attention take no mask: padding is zeroed below.
  const bool plain = options.local_window == 0 && !last_alone && !options.last_key;
  Tensor out = sparse_attn({q, args.k, args.v, index, count, options.scale, options.causal, options.all_queries,
                            plain ? std::nullopt : options.token_mask, options.local_window, options.num_sinks,
                            options.last_key});
  if (plain && options.all_queries && options.token_mask) {
    aten::masked_fill_(out, aten::unsqueeze(aten::unsqueeze(aten::logical_not(*options.token_mask), 1), 3), 0.0);
  }
  if (args.projections.o_weight) {
    const Tensor rows =
        aten::reshape(aten::transpose(out, 1, 2), {sizes.batch, sizes.queries, sizes.query_heads * sizes.head_dim});
    out = every ? aten::call("aten::linear", "", rows, *args.projections.o_weight, OptionalTensor())
                : project_outputs({rows, *args.projections.o_weight, index, count});
  }
  LayerResult result{out, index, count, std::nullopt, std::nullopt};
  if (args.pack) {
    std::tie(result.k_packed, result.v_packed) = pack_kv({args.k, args.v, index, count});
  }
  return result;
}

}  // namespace
}  // namespace ops

#ifdef ZIPVL_CUDA_OPS
namespace cuda {
namespace {

struct Steps {
  ProbeScoresStep scores;
  plan::SelectTokensPlan select;
  SparseAttnStep attention;
  plan::LayerPlan plan;
};

// The layer's kernels under way: its arguments, results and workspace.
class Layer {
 public:
  Layer(const char* op, const ops::LayerArgs& args, const checks::AttentionSizes& sizes)
      : op_(op), args_(args), options_(args.options), sizes_(sizes), stream_(stream_of(args.k)) {}

  // Nothing where a step has no kernel for these inputs.
  std::optional<ops::LayerResult> run() {
    const auto [B, Hq, Hkv, n, N, D] = sizes_;
    if (!projections_have_kernels()) {
      return std::nullopt;
    }
    if (args_.q) {
      queries_ = args_.q;
    } else {
      queries_ = empty_attention_output(B, Hq, n, D, args_.k);
    }
    if (!plan_steps()) {
      return std::nullopt;
    }
    index_ = empty({B, N}, ScalarType::Int, args_.k);
    count_ = empty({B}, ScalarType::Int, args_.k);
    if (args_.pack) {
      k_packed_ = empty({B, Hkv, N, D}, args_.k.scalar_type(), args_.k);
      v_packed_ = empty({B, Hkv, N, D}, args_.k.scalar_type(), args_.k);
    }
    std::optional<Tensor> workspace = empty({steps_.plan.workspace.bytes}, ScalarType::Byte, args_.k);
    space_ = workspace->mutable_data_ptr<std::uint8_t>();
    select();
    const Tensor heads = attend();
    workspace.reset();  // its memory serves the output projection, which comes later in the stream
    return ops::LayerResult{project(heads), *index_, *count_, k_packed_, v_packed_};
  }

 private:
  bool projects() const { return args_.projections.hidden.has_value(); }
  bool last_alone() const { return sizes_.queries != sizes_.tokens; }
  // Whether projections are of every row, because every row has an output, or because rows are not tokens.
  bool every_row() const { return options_.all_queries || is_ranged(); }
  bool projects_chosen_outputs() const { return args_.projections.o_weight && !every_row(); }
  bool is_ranged() const { return options_.local_window > 0 || last_alone() || options_.last_key.has_value(); }
  bool extends() const {
    return options_.local_window > 0 || options_.num_sinks > 0 || options_.extra_mask.has_value();
  }

  bool projections_have_kernels() const {
    const ops::LayerProjections& given = args_.projections;
    const bool queries =
        !projects() ||
        why_not_query_projection(*given.hidden, *given.cos, *given.sin, given.q_bias, given.q_norm_weight).empty();
    // Attention outputs are contiguous rows of whole heads, of a head dim that their kernel takes: they can be moved.
    const bool outputs = !projects_chosen_outputs() || why_not_output_projection(*given.o_weight).empty();
    return queries && outputs;
  }

  bool plan_steps() {
    const std::int64_t probes = options_.num_recent + options_.num_random;
    const double scale = ops::scale_or_default(options_.scale, sizes_.head_dim);
    const bool scored = args_.budget_score.has_value();
    if (!scored) {
      steps_.scores = probe_scores_step(sizes_, *queries_, args_.k, probes, scale, options_.causal, options_.token_mask,
                                        options_.last_key);
      if (steps_.scores.launch == nullptr) {
        return false;
      }
    }
    steps_.select = select_tokens_plan(sizes_.batch, sizes_.tokens, args_.k.get_device_index());
    steps_.attention =
        sparse_attn_step(sizes_, *queries_, args_.k, args_.v, scale, options_.causal, options_.all_queries);
    if (steps_.attention.plan.kernel == plan::SparseAttnKernel::kAten) {
      return false;
    }
    if (is_ranged()) {
      ranged_.emplace(ranged_attn_step(sizes_, steps_.attention, options_.all_queries, options_.local_window,
                                       options_.num_sinks, options_.token_mask, options_.last_key));
    }
    steps_.plan = plan::plan_layer({sizes_.batch, sizes_.kv_heads, sizes_.tokens, sizes_.head_dim, probes,
                                    options_.token_mask.has_value(), args_.pack, projects() && !every_row(), scored,
                                    last_alone(), extends(), ranged_ ? ranged_->workspace.bytes : 0},
                                   steps_.scores.plan, steps_.select, steps_.attention.plan);
    return steps_.plan.native;
  }

  template <typename T>
  T* at(std::int64_t offset) const {
    return reinterpret_cast<T*>(space_ + offset);
  }

  // Queries of the tokens that `index` [B, places] names, into their places.
  void project_queries(const ChosenRows& chosen) {
    const ops::LayerProjections& given = args_.projections;
    project_chosen_queries(op_, chosen, *given.hidden, *given.q_weight, given.q_bias, *given.cos, *given.sin,
                           given.q_norm_weight, given.q_norm_eps, aten::transpose(*queries_, 1, 2));
  }

  // Steps 1 to 4.
  void select() {
    const plan::LayerWorkspace& space = steps_.plan.workspace;
    if (projects() && every_row()) {
      const ops::LayerProjections& given = args_.projections;
      project_all_queries(op_, *given.hidden, *given.q_weight, given.q_bias, *given.cos, *given.sin,
                          given.q_norm_weight, given.q_norm_eps, aten::transpose(*queries_, 1, 2));
    }
    std::int32_t* keep_from = options_.token_mask ? at<std::int32_t>(space.keep_from) : nullptr;
    if (steps_.plan.draws_ahead) {
      draw(keep_from);
    }
    if (!args_.budget_score) {
      score();
    }
    SelectTokensParams select =
        select_tokens_params(sizes_.batch, sizes_.tokens, steps_.select, options_.tau, options_.ratio,
                             options_.max_ratio, options_.min_tokens, options_.keep_mask, options_.token_mask);
    if (args_.budget_score) {
      select.budget_score = matrix<float>(*args_.budget_score, select.budget_stride);
      select.rank_score = matrix<float>(*args_.rank_score, select.rank_stride);
    } else {
      select.budget_score = steps_.scores.params.accumulated;
      select.rank_score = steps_.scores.params.normalized;
      select.budget_stride[0] = select.rank_stride[0] = sizes_.tokens;
      select.budget_stride[1] = select.rank_stride[1] = 1;
    }
    select.keep_from = keep_from;
    select.keep_last = static_cast<int>(std::min(options_.keep_recent, sizes_.tokens));
    select.index = extends() ? at<std::int32_t>(space.selected) : index_->mutable_data_ptr<std::int32_t>();
    select.count = extends() ? at<std::int32_t>(space.num_selected) : count_->mutable_data_ptr<std::int32_t>();
    select.workspace = steps_.select.workspace_bytes > 0 ? space_ + space.select_tokens : nullptr;
    launch_selection(select);
    if (extends()) {
      extend(select);
    }
  }

  void launch_selection(const SelectTokensParams& select) const {
#ifdef ZIPVL_HAS_SM90
    if (steps_.plan.selects_sums) {
      check_launch(op_, launch_select_sums(select, steps_.scores.params, stream_));
      return;
    }
#endif
    check_launch(op_, launch_select_tokens(select, steps_.select, stream_));
  }

  // The last of step 4: what is selected on top of the budget; and the real tokens, where attention needs their list.
  void extend(const SelectTokensParams& selected) {
    ExtendSelectionParams extend =
        extend_selection_params(sizes_.batch, sizes_.tokens, options_.local_window, options_.num_sinks,
                                options_.extra_mask, options_.token_mask);
    extend.index = selected.index;
    extend.count = selected.count;
    extend.extended_index = index_->mutable_data_ptr<std::int32_t>();
    extend.extended_count = count_->mutable_data_ptr<std::int32_t>();
    if (ranged_ && ranged_->lists_real) {
      const std::int64_t ranged = steps_.plan.workspace.ranged;
      extend.real_index = at<std::int32_t>(ranged + ranged_->workspace.real_index);
      extend.real_count = at<std::int32_t>(ranged + ranged_->workspace.real_count);
    }
    check_launch(op_, launch_extend_selection(extend, stream_));
  }

  // Step 1: the probes, and where the last real tokens of each row begin.
  void draw(std::int32_t* keep_from) {
    ProbeIndexParams draw = probe_index_params(sizes_.batch, sizes_.queries, sizes_.tokens, options_.num_recent,
                                               options_.num_random, options_.seed, options_.token_mask);
    draw.out = at<std::int32_t>(steps_.plan.workspace.probe_index);
    draw.keep_from = keep_from;
    draw.keep_recent = options_.keep_recent;
    check_launch(op_, launch_probe_index(draw, stream_));
    if (projects() && !every_row() && !args_.budget_score) {
      ChosenRows chosen{};
      chosen.index = draw.out;
      chosen.index_stride[0] = chosen.places = options_.num_recent + options_.num_random;
      chosen.index_stride[1] = 1;
      chosen.batch = sizes_.batch;
      chosen.tokens = sizes_.tokens;
      project_queries(chosen);
    }
  }

  // Step 2.
  void score() {
    const plan::LayerWorkspace& space = steps_.plan.workspace;
    ProbeScoresParams& scores = steps_.scores.params;
    if (steps_.plan.draws_ahead) {
      scores.probe_index = at<std::int32_t>(space.probe_index);
      scores.probe_stride[0] = options_.num_recent + options_.num_random;
      scores.probe_stride[1] = 1;
    } else {
      scores.draw = draw_probes(sizes_.tokens, options_.num_recent, options_.num_random,
                                static_cast<std::uint64_t>(options_.seed));
    }
    if (!steps_.plan.selects_sums) {
      scores.accumulated = at<float>(space.accumulated);
      scores.normalized = at<float>(space.normalized);
    }
    place_workspace(scores, steps_.scores.plan.workspace, space_ + space.probe_scores);
    check_launch(op_, steps_.scores.launch(scores, stream_));
  }

  // Step 5, and the packed keys and values; [B, Hq, N, D].
  Tensor attend() {
    const plan::LayerWorkspace& space = steps_.plan.workspace;
    if (projects() && !every_row()) {
      project_queries(chosen_rows(*index_, *count_, sizes_.tokens));
    }
    // Queries that are the layer's own are read once, and outputs take their places; two passes read them twice.
    const Tensor out = projects() && !ranged_ ? *queries_
                                              : empty_attention_output(sizes_.batch, sizes_.query_heads, sizes_.queries,
                                                                       sizes_.head_dim, args_.k);
    SparseAttnParams& params = steps_.attention.params;
    params.out = out.mutable_data_ptr();
    if (projects_chosen_outputs()) {  // it reads and writes selected rows alone
      projected_ =
          empty({sizes_.batch, sizes_.queries, args_.projections.o_weight->size(0)}, args_.k.scalar_type(), args_.k);
      params.zeros = projected_->mutable_data_ptr();
      params.zero_row_bytes = projected_->size(2) * static_cast<std::int64_t>(args_.k.element_size());
    } else if (!options_.all_queries && !ranged_) {
      params.zeros = params.out;
    }
    params.index = matrix<std::int32_t>(*index_, params.index_stride);
    params.count = count_->const_data_ptr<std::int32_t>();
    params.count_stride = 1;
    params.capacity = sizes_.tokens;  // the copy engine reads rows past it as 0
    params.k_packed = args_.pack ? k_packed_->mutable_data_ptr() : space_ + space.k_packed;
    params.v_packed = args_.pack ? v_packed_->mutable_data_ptr() : space_ + space.v_packed;
    if (args_.pack && steps_.attention.plan.kernel == plan::SparseAttnKernel::kSm80) {  // does not pack by itself
      PackKvParams pack = pack_kv_params(args_.k, args_.v, params.k_packed, params.v_packed, params.capacity);
      pack.index = matrix<std::int32_t>(*index_, pack.index_stride);
      pack.count = params.count;
      pack.count_stride = params.count_stride;
      check_launch(op_, launch_pack_kv(pack, stream_));
    }
    if (ranged_) {
      launch_ranged_attn(op_, params, steps_.attention.plan, *ranged_, at<unsigned char>(space.ranged), !extends(),
                         args_.k.get_device_index(), stream_);
      return out;
    }
    launch_sparse_attn(op_, params, steps_.attention.plan, at<std::int32_t>(space.seen), args_.k.get_device_index(),
                       stream_);
    if (options_.all_queries && options_.token_mask) {
      zero_padding(op_, params, *options_.token_mask, stream_);
    }
    return out;
  }

  // The output projection of the rows that have an output, where there is one.
  Tensor project(const Tensor& heads) {
    const ops::OptionalTensor& weight = args_.projections.o_weight;
    if (!weight) {
      return heads;
    }
    const Tensor rows = aten::reshape(aten::transpose(heads, 1, 2),
                                      {sizes_.batch, sizes_.queries, sizes_.query_heads * sizes_.head_dim});
    if (!projected_) {
      return aten::call("aten::linear", "", rows, *weight, ops::OptionalTensor());
    }
    project_chosen_outputs(op_, chosen_rows(*index_, *count_, sizes_.queries), rows, *weight, *projected_);
    return *projected_;
  }

  const char* op_;
  const ops::LayerArgs& args_;
  const ops::LayerOptions& options_;
  const checks::AttentionSizes sizes_;
  const cudaStream_t stream_;
  Steps steps_{};
  std::optional<RangedAttnStep> ranged_;
  unsigned char* space_ = nullptr;
  std::optional<Tensor> queries_, index_, count_, k_packed_, v_packed_, projected_;
};

ops::Implementation explain(const Tensor& q) {
  const auto sizes = sizes_like(q);
  const std::string reasons[] = {
      probe_scores_step(sizes, q, q, /*probes=*/128, 1.0, true, std::nullopt, std::nullopt).plan.reason,
      select_tokens_plan(sizes.batch, sizes.tokens, q.get_device_index()).reason,
      sparse_attn_step(sizes, q, q, q, 1.0, true, false).plan.reason};
  const std::string* reason =
      std::find_if(std::begin(reasons), std::end(reasons) - 1, [](const std::string& text) { return !text.empty(); });
  return implementation_of(kernel_family(q.get_device_index()), *reason);
}

}  // namespace
}  // namespace cuda
#endif

namespace ops {
namespace {

LayerResult layer(const char* op, const LayerArgs& args) {
  const auto sizes = check(op, args);
  if (sizes.batch == 0 || sizes.tokens == 0) {
    return nothing(args, sizes);
  }
#ifdef ZIPVL_CUDA_OPS
  const cuda::DeviceGuard guard(args.k.get_device_index());
  if (auto result = cuda::Layer(op, args, sizes).run()) {
    return *result;
  }
#endif
  return step_by_step(args, sizes);
}

LayerArgs with_queries(const AttnArgs& args, bool pack) {
  return {args.q, args.k, args.v, {}, std::nullopt, std::nullopt, args.options, pack};
}

}  // namespace

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> zipvl_layer(const LayerArgs& args) {
  LayerResult result = layer("zipvl_layer", args);
  for (OptionalTensor* packed : {&result.k_packed, &result.v_packed}) {
    if (!*packed) {
      *packed = aten::empty({0}, args.k.scalar_type(), args.k.device());
    }
  }
  return {result.out, result.index, result.count, *result.k_packed, *result.v_packed};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> zipvl_prefill(const AttnArgs& args) {
  const LayerResult result = layer("zipvl_prefill", with_queries(args, /*pack=*/true));
  return {result.out, result.index, result.count, *result.k_packed, *result.v_packed};
}

static std::tuple<Tensor, Tensor, Tensor> zipvl_attn(const AttnArgs& args) {
  const LayerResult result = layer("zipvl_attn", with_queries(args, /*pack=*/false));
  return {result.out, result.index, result.count};
}

}  // namespace ops
}  // namespace zipvl

#define ZIPVL_LAYER_OPTIONS                                                                                   \
  "float tau=0.975, float? ratio=None, int num_recent=64, int num_random=64, int seed=0, int keep_recent=1, " \
  "int min_tokens=1, bool all_queries=False, float? scale=None, bool causal=True, Tensor? keep_mask=None, "   \
  "Tensor? token_mask=None, int local_window=0, int num_sinks=0, Tensor? extra_mask=None, "                   \
  "Tensor? last_key=None, float max_ratio=1.0"

ZIPVL_OP(zipvl_attn,
         "(Tensor q, Tensor k, Tensor v, *, " ZIPVL_LAYER_OPTIONS ") -> (Tensor out, Tensor index, Tensor count)",
         &zipvl::cuda::explain)
ZIPVL_OP(zipvl_prefill,
         "(Tensor q, Tensor k, Tensor v, *, " ZIPVL_LAYER_OPTIONS
         ") -> (Tensor out, Tensor index, Tensor count, Tensor k_packed, Tensor v_packed)",
         &zipvl::cuda::explain)
ZIPVL_OP(zipvl_layer,
         "(Tensor? q, Tensor k, Tensor v, *, Tensor? hidden=None, Tensor? q_weight=None, Tensor? q_bias=None, "
         "Tensor? q_norm_weight=None, float q_norm_eps=1e-06, Tensor? cos=None, Tensor? sin=None, "
         "Tensor? o_weight=None, Tensor? budget_score=None, Tensor? rank_score=None, " ZIPVL_LAYER_OPTIONS
         ", bool pack=False) -> (Tensor out, Tensor index, Tensor count, Tensor k_packed, Tensor v_packed)",
         &zipvl::cuda::explain)
