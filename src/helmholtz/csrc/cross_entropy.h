// Mean negative log-likelihood of the targets, straight from the logits: nothing of their size is kept. Floor: 1 number
// in forward, 1 in and 1 out backward, and one exp each.
#pragma once

#include "common.h"

namespace helmholtz {

inline int64_t counted(const Tensor& targets, int64_t ignored) {
  const int64_t* target = in<int64_t>(targets);
  return targets.numel() - std::count(target, target + targets.numel(), ignored);
}

// log(sum of exp) of a row
template <typename S, typename T>
INLINE T log_sum_exp(const S* x, int64_t width) {
  T top = -std::numeric_limits<T>::infinity(), sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t v = 0; v < width; ++v) top = std::max(top, static_cast<T>(wide(x[v])));
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < width; ++v) sum += exp_of(wide(x[v]) - top);
  return top + log_of(sum);
}

template <typename S, typename T = at::opmath_type<S>>
void losses_of(const Tensor& logits, const Tensor& targets, int64_t ignored, const Tensor& losses, const Tensor& totals) {
  const int64_t width = logits.size(1);
  const S* from = in<S>(logits);
  const int64_t* target = in<int64_t>(targets);
  T *loss = out<T>(losses), *total = out<T>(totals);
  each(logits.size(0), [&](int64_t row) {
    loss[row] = total[row] = 0;
    if (target[row] == ignored) return;
    TORCH_CHECK_INDEX(target[row] >= 0 && target[row] < width, "targets: ", target[row], " is not in [0, ", width, ")");
    total[row] = log_sum_exp<S, T>(from + row * width, width);
    loss[row] = total[row] - wide(from[row * width + target[row]]);
  });
}

template <typename S, typename T = at::opmath_type<S>>
void logits_backward(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& totals,
                     int64_t ignored, const Tensor& dlogits) {
  const int64_t width = logits.size(1);
  const S* from = in<S>(logits);
  const T* total = in<T>(totals);
  const int64_t* target = in<int64_t>(targets);
  S* to = out<S>(dlogits);
  const T grad = *in<T>(dloss) / T(std::max<int64_t>(counted(targets, ignored), 1));
  each(logits.size(0), [&](int64_t row) {
    const S* x = from + row * width;
    S* dx = to + row * width;
    if (target[row] == ignored) {
      std::fill_n(dx, width, S(0));
      return;
    }
#pragma omp simd
    for (int64_t v = 0; v < width; ++v) dx[v] = narrow<S>(exp_of(wide(x[v]) - total[row]) * grad);
    dx[target[row]] = narrow<S>((exp_of(wide(x[target[row]]) - total[row]) - T(1)) * grad);
  });
}

// the mean, and the logarithm of each row's sum
inline std::tuple<Tensor, Tensor> cross_entropy_cpu(const Tensor& logits, const Tensor& targets, int64_t ignored) {
  const Tensor from = logits.contiguous(), to = targets.contiguous();
  const auto wide_type = logits.options().dtype(at::toOpMathType(logits.scalar_type()));
  Tensor losses = at::empty({from.size(0)}, wide_type), totals = at::empty_like(losses);
  STORED(from, S, losses_of<S>(from, to, ignored, losses, totals));
  return {losses.sum().div_(std::max<int64_t>(counted(to, ignored), 1)), totals};
}

inline Tensor cross_entropy_backward_cpu(const Tensor& dloss, const Tensor& logits, const Tensor& targets,
                                         const Tensor& totals, int64_t ignored) {
  const Tensor from = logits.contiguous(), to = targets.contiguous();
  Tensor dlogits = at::empty_like(from);
  STORED(from, S, logits_backward<S>(dloss, from, to, totals, ignored, dlogits));
  return dlogits;
}

struct CrossEntropy : torch::autograd::Function<CrossEntropy> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& targets, int64_t ignored) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = OPERATOR("cross_entropy", decltype(cross_entropy_cpu));
    auto [mean, totals] = op.call(logits, targets, ignored);
    ctx->save_for_backward({logits, targets, totals});
    ctx->saved_data["ignored"] = ignored;
    ctx->mark_non_differentiable({totals});
    return {mean, totals};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = OPERATOR("cross_entropy_backward", decltype(cross_entropy_backward_cpu));
    const auto s = ctx->get_saved_variables();
    return {op.call(grads[0], s[0], s[1], s[2], ctx->saved_data["ignored"].toInt()), Tensor(), Tensor()};
  }
};

inline std::tuple<Tensor, Tensor> cross_entropy_autograd(const Tensor& logits, const Tensor& targets, int64_t ignored) {
  auto both = CrossEntropy::apply(logits, targets, ignored);
  return {both[0], both[1]};
}

}  // namespace helmholtz
