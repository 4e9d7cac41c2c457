// Around a mixer's read: what scales, tilts and gates its values.
#include "causal_conv.h"
#include "gated_read.h"
#include "kernel.h"
#include "modulate.h"
#include "tilt.h"

namespace helmholtz {

KERNEL(causal_conv)
KERNEL(gated_read)
KERNEL(modulate)
KERNEL(tilt)

}  // namespace helmholtz
