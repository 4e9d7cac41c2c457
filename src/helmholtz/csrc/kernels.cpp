// The operators of helmholtz on CPU tensors. Their schemas and fake rules are defined in Python (kernels/operators.py).
// A backward operator has no derivative and says so.
#include "causal_conv.h"
#include "code_lookup.h"
#include "cross_entropy.h"
#include "gated_read.h"
#include "linear_attention.h"
#include "modulate.h"
#include "rms_norm.h"
#include "rnn_softmax.h"
#include "rope_table.h"
#include "sample.h"
#include "rope.h"
#include "scan.h"
#include "selective_scan.h"
#include "softmax_read.h"
#include "step.h"
#include "swiglu.h"
#include "tilt.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include <string>

namespace helmholtz {

// An operator's name as a template argument.
template <size_t N>
struct Name {
  char text[N];
  constexpr Name(const char (&from)[N]) { std::copy_n(from, N, text); }
};

// Where nothing is recorded an operator is called below autograd at once: a Function takes microseconds all the same.
template <Name name, auto recorded>
struct Differentiable;
template <Name name, typename R, typename... A, R (*recorded)(A...)>
struct Differentiable<name, recorded> {
  static R call(A... arguments) {
    if (at::GradMode::is_enabled()) return recorded(arguments...);
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow((std::string("helmholtz::") + name.text).c_str(), "")
                               .template typed<R(A...)>();
    return op.call(arguments...);
  }
};
#define WITH_GRADIENT(name) m.impl(#name, Differentiable<#name, name##_autograd>::call)

TORCH_LIBRARY_IMPL(helmholtz, CPU, m) {
  m.impl("causal_conv", causal_conv_cpu);
  m.impl("causal_conv_backward", causal_conv_backward_cpu);
  m.impl("code_lookup", code_lookup_cpu);
  m.impl("code_lookup_backward", code_lookup_backward_cpu);
  m.impl("scan", scan_cpu);
  m.impl("scan_backward", scan_backward_cpu);
  m.impl("gated_read", gated_read_cpu);
  m.impl("gated_read_backward", gated_read_backward_cpu);
  m.impl("linear_attention", linear_attention_cpu);
  m.impl("linear_attention_backward", linear_attention_backward_cpu);
  m.impl("linear_step", linear_step_cpu);
  m.impl("rnn_softmax_step", rnn_softmax_step_cpu);
  m.impl("rope_step", rope_step_cpu);
  m.impl("selective_step", selective_step_cpu);
  m.impl("modulate", modulate_cpu);
  m.impl("modulate_backward", modulate_backward_cpu);
  m.impl("tilt", tilt_cpu);
  m.impl("tilt_backward", tilt_backward_cpu);
  m.impl("rnn_softmax", rnn_softmax_cpu);
  m.impl("rnn_softmax_backward", rnn_softmax_backward_cpu);
  m.impl("rope_table", rope_table_cpu);
  m.impl("sample", sample_cpu);
  m.impl("selective_scan", selective_scan_cpu);
  m.impl("selective_scan_backward", selective_scan_backward_cpu);
  m.impl("rms_norm", rms_norm_cpu);
  m.impl("rms_norm_backward", rms_norm_backward_cpu);
  m.impl("swiglu", swiglu_cpu);
  m.impl("swiglu_backward", swiglu_backward_cpu);
  m.impl("rope", rope_cpu);
  m.impl("rope_backward", rope_backward_cpu);
  m.impl("cross_entropy", cross_entropy_cpu);
  m.impl("cross_entropy_backward", cross_entropy_backward_cpu);
  m.impl("softmax_read", softmax_read_cpu);
  m.impl("softmax_read_backward", softmax_read_backward_cpu);
}

TORCH_LIBRARY_IMPL(helmholtz, Autograd, m) {
  WITH_GRADIENT(causal_conv);
  WITH_GRADIENT(code_lookup);
  WITH_GRADIENT(scan);
  WITH_GRADIENT(gated_read);
  WITH_GRADIENT(linear_attention);
  WITH_GRADIENT(modulate);
  WITH_GRADIENT(tilt);
  WITH_GRADIENT(rnn_softmax);
  WITH_GRADIENT(selective_scan);
  WITH_GRADIENT(softmax_read);
  WITH_GRADIENT(rms_norm);
  WITH_GRADIENT(swiglu);
  WITH_GRADIENT(rope);
  WITH_GRADIENT(cross_entropy);
  for (const char* name : {
           "linear_step",
           "rnn_softmax_step",
           "rope_step",
           "selective_step",
           "causal_conv_backward",
           "code_lookup_backward",
           "cross_entropy_backward",
           "gated_read_backward",
           "linear_attention_backward",
           "modulate_backward",
           "rms_norm_backward",
           "rnn_softmax_backward",
           "rope_backward",
           "scan_backward",
           "selective_scan_backward",
           "softmax_read_backward",
           "swiglu_backward",
           "tilt_backward",
       })
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
}

}  // namespace helmholtz
