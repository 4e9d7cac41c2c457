// What a model has beside its mixers.
#include "code_lookup.h"
#include "cross_entropy.h"
#include "kernel.h"
#include "rms_norm.h"
#include "sample.h"
#include "swiglu.h"
#include "token_energy.h"

namespace helmholtz {

KERNEL(code_lookup)
KERNEL(cross_entropy)
KERNEL(rms_norm)
KERNEL_OF_CONSTANTS(sample)
KERNEL(swiglu)
FORWARD_KERNEL(token_energy)

}  // namespace helmholtz
