"""With ``TRITON_INTERPRET=1`` operations with a Triton kernel take it for CPU tensors, in triton's interpreter.

The interpreter computes with numpy, which has no bf16: it multiplies the bits of such matrices, cuts a float32 short to
make one, where a GPU rounds to nearest even, and takes bits for numbers in casts to other types. All are mended here.
float64 takes the plain form.
"""

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def install() -> None:
    """Before triton and helmholtz are imported."""
    os.environ["HELMHOLTZ_CACHE"] = (
        "/nowhere"  # no compiled library: gradients come from Python, as on a bare GPU
    )
    import numpy as np

    np.seterr(all="ignore")  # a GPU warns of nothing
    _mend()
    from helmholtz import kernels
    from helmholtz.kernels import gpu
    from helmholtz.ops.triton import _shared

    assert not kernels.LOADED
    _shared.assumed = _shared.Target("cuda", 90)
    gpu.register("CPU", with_gradients=True)
    kernels.usable = lambda operator, *x: kernels.usable_by_triton(operator, x, "cpu")


def _mend() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        of, wanted = x.dtype.scalar, to.scalar
        if of == tl.bfloat16 and wanted != tl.bfloat16:
            x = interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if wanted != tl.bfloat16 or of == tl.bfloat16:
            return cast(self, x, to)
        wide = np.ascontiguousarray(cast(self, x, tl.float32).data)
        bits = wide.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return interpreter.TensorHandle(
            np.where(np.isnan(wide), 0x7FC0, rounded).astype(np.uint16).reshape(x.data.shape), tl.bfloat16
        )

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *options)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    interpreter.ScanOps.generic_scan = _scan
    _quicken(interpreter)


def _scan(self: Any, inputs: list[Any]) -> list[Any]:
    """Slices at a time, where the interpreter's own goes through single numbers."""
    import numpy as np

    given = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    found = [np.array(x) for x in given]
    for i in range(1, len(given[0])):
        pairs = [
            self.to_tensor(x[j], like.dtype)
            for j, xs in ((i - 1, found), (i, given))
            for x, like in zip(xs, inputs, strict=True)
        ]
        combined = self.combine_fn.fn(*pairs)
        for to, value in zip(found, combined if isinstance(combined, tuple) else (combined,), strict=True):
            to[i] = value.handle.data
    return [
        self.to_tensor(np.ascontiguousarray(np.moveaxis(x, 0, self.axis)), y.dtype)
        for x, y in zip(found, inputs, strict=True)
    ]


def _quicken(interpreter: Any) -> None:
    """Half of a small test's time goes to patching triton's language again at every call of a function in a kernel."""
    patch, patched = interpreter._patch_lang, set()

    class Kept:
        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            patched.clear()
            self.scope.restore()

    def once_in_a_launch(fn: Any) -> Any:
        if fn.__module__ in patched:
            return None
        patched.add(fn.__module__)
        return Kept(patch(fn))

    interpreter._patch_lang = once_in_a_launch
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
