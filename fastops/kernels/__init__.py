"""Triton kernels and their launchers. Nothing here that imports triton is imported before the first launch.

Naming law: shape letters are those of the op's docstring; `x_ptr` is a pointer, `stride_xb` the stride of x along B in
elements, `BLOCK_M` a constexpr tile size, `HAS_BIAS` a constexpr switch. Offsets are int64 before they are multiplied
by a stride. A kernel is `<what>_kernel`, its launcher is the function that allocates the outputs and launches it.
"""
