// States that are carried from token to token.
#include "kernel.h"
#include "rnn_softmax.h"
#include "scan.h"
#include "selective_scan.h"
#include "ssd_step.h"
#include "step.h"

namespace helmholtz {

KERNEL(rnn_softmax)
KERNEL(scan)
KERNEL(selective_scan)
FORWARD_KERNEL(linear_step)
FORWARD_KERNEL(rnn_softmax_step)
FORWARD_KERNEL(rope_step)
FORWARD_KERNEL(selective_step)
FORWARD_KERNEL(ssd_step)

}  // namespace helmholtz
