"""Triton kernels for GPUs, the operators' implementation for CUDA tensors.

Nothing here is imported before a CUDA tensor meets an operator (``helmholtz.kernels.gpu``, whose table names the module
of each). A module NAME.py holds

- kernels: ``triton.jit``, no autotuning, computing in float32; offsets into tensors in int64;
- a launcher per operator, ``name`` and ``name_backward``, of the operator's own arguments: it chooses the blocks from
  dtypes, widths and ``target()`` alone, launches by ``launch`` and reads nothing back;
- ``CALLS``, the calls that ``tools/triton_kernels.py`` compiles for each kind of GPU: launchers are run on tensors
  without memory, and every kernel that they would launch is compiled as it would be. So each call stands for a
  specialisation: dtypes, widths, optional arguments::

      CALLS = {"bf16 64": ("name", lambda new: (new(2, 5, 64, dtype=torch.bfloat16), None, 1e-6))}

  ``new(*shape, dtype=torch.float32)`` makes a tensor. ``name_backward`` has entries of its own.
"""
