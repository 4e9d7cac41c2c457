// Reads of all earlier tokens, and positions.
#include "attention_step.h"
#include "kernel.h"
#include "linear_attention.h"
#include "rope.h"
#include "rope_table.h"
#include "softmax_read.h"

namespace helmholtz {

FORWARD_KERNEL(attention_step)
KERNEL(linear_attention)
KERNEL(rope)
KERNEL_OF_CONSTANTS(rope_table)
KERNEL(softmax_read)
FORWARD_KERNEL(softmax_step)

}  // namespace helmholtz
