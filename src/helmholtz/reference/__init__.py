"""Every op once more in float64 loops, written from the equations: what the ops are tested against."""

from helmholtz.reference.recurrences import first_order_scan, linear_attention, rnn_softmax, selective_scan

__all__ = ["first_order_scan", "linear_attention", "rnn_softmax", "selective_scan"]
