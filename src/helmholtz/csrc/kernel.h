// How a kernel's functions become operators. Schemas and fake rules are defined in Python (kernels/operators.py).
#pragma once

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include <algorithm>
#include <string>

#include "common.h"

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

// An operator that nothing is differentiated through: name_cpu.
#define KERNEL_OF_CONSTANTS(name) \
  TORCH_LIBRARY_IMPL(helmholtz, CPU, m) { m.impl(#name, name##_cpu); }

// One that has no derivative, and says so.
#define FORWARD_KERNEL(name) \
  KERNEL_OF_CONSTANTS(name)  \
  TORCH_LIBRARY_IMPL(helmholtz, Autograd, m) { m.impl(#name, torch::autograd::autogradNotImplementedFallback()); }

// One with a gradient: name_cpu, name_backward_cpu, and name_autograd, which calls both.
#define KERNEL(name)            \
  KERNEL_OF_CONSTANTS(name)     \
  FORWARD_KERNEL(name##_backward) \
  TORCH_LIBRARY_IMPL(helmholtz, Autograd, m) { m.impl(#name, Differentiable<#name, name##_autograd>::call); }

}  // namespace helmholtz
