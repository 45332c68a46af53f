// The derivatives of the attention ops on CUDA: what op.py has in Python for every device, which takes as long as a
// small kernel does. A forward op is differentiated once, by its backward op.
//
// Knows torch's autograd and the ops' names; knows no kernel.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <memory>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using torch::jit::Stack;

// The derivative of an attention op with respect to q, k and v, its first arguments, by the op `backward`.
struct Attention : torch::autograd::Function<Attention> {
  using Tensors = torch::autograd::variable_list;

  static Tensors forward(torch::autograd::AutogradContext* ctx, const c10::OperatorHandle& op,
                         const c10::OperatorHandle& backward, const Tensor& q, const Tensor& k, const Tensor& v,
                         const std::vector<c10::IValue>& rest) {
    Stack stack = {q, k, v};
    stack.insert(stack.end(), rest.begin(), rest.end());
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      op.callBoxed(stack);
    }
    const Tensor out = stack[0].toTensor(), lse = stack[1].toTensor();
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["rest"] = c10::ivalue::Tuple::create(rest);
    ctx->saved_data["backward"] = reinterpret_cast<int64_t>(&backward);
    ctx->set_materialize_grads(false);
    return {out, lse};
  }

  static Tensors backward(torch::autograd::AutogradContext* ctx, Tensors gradients) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "flash_attention has no second derivative (create_graph=True); "
                "kernels.classic_attention computes the same and can be differentiated any number of times");
    const auto& [dout, dlse] = std::tie(gradients[0], gradients[1]);
    if (!dout.defined() && !dlse.defined()) return Tensors(6);
    const Tensors saved = ctx->get_saved_variables();
    Stack stack = {dout.defined() ? dout : at::zeros_like(saved[3]),
                   dlse.defined() ? c10::IValue(dlse) : c10::IValue()};
    stack.insert(stack.end(), saved.begin(), saved.end());
    const auto rest = ctx->saved_data["rest"].toTuple();
    stack.insert(stack.end(), rest->elements().begin(), rest->elements().end());
    reinterpret_cast<const c10::OperatorHandle*>(ctx->saved_data["backward"].toInt())->callBoxed(stack);
    return {Tensor(), Tensor(), stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), Tensor()};
  }
};

// An attention op as autograd sees it.
class Differentiated : public c10::OperatorKernel {
 public:
  explicit Differentiated(const char* backward)
      : backward_(c10::Dispatcher::singleton().findSchemaOrThrow(backward, "")) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
    const auto first = stack->end() - op.schema().arguments().size();
    const Tensor q = first[0].toTensor(), k = first[1].toTensor(), v = first[2].toTensor();
    if (!at::GradMode::is_enabled() || !(q.requires_grad() || k.requires_grad() || v.requires_grad())) {
      const at::AutoDispatchBelowADInplaceOrView below;
      return op.callBoxed(stack);
    }
    const std::vector<c10::IValue> rest(first + 3, stack->end());
    stack->erase(first, stack->end());
    for (Tensor& x : Attention::apply(op, backward_, q, k, v, rest)) stack->emplace_back(std::move(x));
  }

 private:
  c10::OperatorHandle backward_;
};

torch::CppFunction by(const char* backward) {
  return torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Differentiated>(backward));
}

}  // namespace

TORCH_LIBRARY_IMPL(kernels, AutogradCUDA, library) {
  library.impl("flash_attention_forward", by("kernels::flash_attention_backward"));
  library.impl("flash_attention_varlen_forward", by("kernels::flash_attention_varlen_backward"));
}
