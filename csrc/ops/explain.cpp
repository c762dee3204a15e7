// explain: which implementation an op takes for inputs of a kind, and why not the native one. The one answer to that
// question: zipvl.support, `zipvl doctor` and tests ask it.
#include "ops/args.h"
#include "ops/checks.h"
#ifdef ZIPVL_CUDA_OPS
#include "ops/cuda_steps.h"
#endif

namespace zipvl::ops {
namespace {

struct ExplainArgs {
  std::string op;
  Tensor q;
  static ExplainArgs read(Arguments& in) { return {in.text(), in.tensor()}; }
};

}  // namespace

static std::string explain(const ExplainArgs& args) {
  checks::rank("explain", {"q", args.q}, 4, "[B, H, N, D]");
  const Explanation* known = Explanation::first;
  while (known != nullptr && args.op != known->op) {
    known = known->next;
  }
  if (known == nullptr) {
    checks::fail("explain", "op must name an op of torch.ops.zipvl, got ", args.op);
  }
#ifdef ZIPVL_CUDA_OPS
  if (known->explain != nullptr) {
    const cuda::DeviceGuard guard(args.q.get_device_index());
    const Implementation found = known->explain(args.q);
    return found.reason.empty() ? found.name : join(found.name, ": ", found.reason);
  }
#endif
  return "cpu";
}

}  // namespace zipvl::ops

ZIPVL_OP(explain, "(str op, Tensor q) -> str", nullptr)
