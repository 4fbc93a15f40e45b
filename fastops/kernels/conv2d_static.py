"""Every configuration that the conv2d launchers compile, on layers of AlexNet at batch 256, for the static gate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import triton

from fastops.kernels import conv2d, conv2d_backward, conv2d_boxes, conv2d_gather, epilogue
from fastops.kernels._static import StaticCase
from fastops.kernels.conv2d import Shape, Tile, precision

TMA_TARGETS = (90, 100, 120)
NAMES = {"16-bit": ("fp16", "bf16"), "tf32": ("fp32",), "ieee": ("fp32",)}
BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}


def _layer(c: int, k: int, taps: int, size: int, out: int, stride: int = 1, padding: int = 1) -> Shape:
    return Shape(256, c, size, size, k, taps, taps, out, out, (stride, stride), (padding, padding), (1, 1))


CONV1 = _layer(3, 64, 11, 224, 55, 4, 2)
CONV2 = _layer(64, 192, 5, 27, 27, 1, 2)
CONV4 = _layer(384, 256, 3, 13, 13)
NARROW = _layer(192, 64, 3, 28, 28)
STRIDED = _layer(128, 256, 3, 28, 14, 2)


def static_cases() -> list[StaticCase]:
    """The cases: forward by form, arithmetic and width of tile, then gradients, then the epilogue."""
    return [*_gather_cases(), *_box_cases(), *_batch_cases(), *_gradient_cases(), *_epilogue_cases()]


def _constexprs(shape: Shape, kind: str, tile: Tile, strides: bool = True) -> dict[str, Any]:
    values = {
        "C": shape.c, "R": shape.r, "S": shape.s,
        "PAD_H": shape.padding[0], "PAD_W": shape.padding[1], "DILATION_H": 1, "DILATION_W": 1,
        "HAS_BIAS": True, "RELU": True, "PRECISION": precision(kind),
        "BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c,
    }  # fmt: skip
    if strides:
        values |= {"STRIDE_H": shape.stride[0], "STRIDE_W": shape.stride[1]}
    return values


def _case(
    form: str,
    shape: Shape,
    kind: str,
    tile: Tile,
    dtype: str,
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    **more: Any,
) -> StaticCase:
    pixels = shape.n * shape.p * shape.q
    reduction = shape.r * shape.s * shape.c
    numbers = dtype if kind == "16-bit" else f"{dtype} {kind}"
    return StaticCase(
        name=f"conv2d.{form}[{tile.block_m}x{tile.block_n}x{tile.block_c},{numbers}]",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=conv2d.NUM_WARPS,
        num_stages=tile.num_stages,
        work_per_thread=tile.block_m * tile.block_n * tile.block_c / (32 * conv2d.NUM_WARPS),
        sample=f"N=256 C={shape.c} {shape.h}x{shape.w} K={shape.k} {shape.r}x{shape.s} stride {shape.stride[0]}",
        flops=2.0 * pixels * shape.k * reduction,
        bytes=float(BYTES[dtype] * (math.prod(shape[:4]) + shape.k * reduction + pixels * shape.k)),
        **more,
    )


def _gather_cases() -> Iterator[StaticCase]:
    forms = [
        ("gather", conv2d_gather.gather_kernel, NARROW if narrow else STRIDED, kind, tile)
        for (kind, narrow), tile in conv2d.GATHER_TILES.items()
    ] + [
        ("gather_flat", conv2d_gather.gather_flat_kernel, CONV1, kind, tile) for kind, tile in conv2d.FLAT_TILES.items()
    ]
    strides = [f"stride_{name}" for name in ("xn", "xh", "xw", "yn", "yp", "yq")]
    for form, kernel, shape, kind, tile in forms:
        even = ["stride_xn", *strides[3:]] if shape.c % 16 else strides
        whole = {"EVEN_K": True} if form == "gather" else {}
        for dtype in NAMES[kind]:
            yield _case(
                    form, shape, kind, tile, dtype, kernel,
                    dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "y_ptr"), f"*{dtype}")
                    | dict.fromkeys((*strides, "N", "H", "W", "K", "P", "Q"), "i32"),
                    _constexprs(shape, kind, tile)
                    | {"stride_xc": 1, "stride_yk": 1, "BLOCK_M": tile.block_m} | whole,
                    divisible_by_16=("x_ptr", "w_ptr", "bias_ptr", "y_ptr", "K", *even),
                    grid=triton.cdiv(shape.n * shape.p * shape.q, tile.block_m) * triton.cdiv(shape.k, tile.block_n),
                )  # fmt: skip


def _box_cases() -> Iterator[StaticCase]:
    for (kind, narrow), tile in conv2d.BOX_TILES.items():
        shape = NARROW if narrow else CONV2
        box = conv2d.choose_box(shape, tile.block_m)
        pixels = ",".join(map(str, box))
        for dtype in NAMES[kind]:
            yield _case(
                "boxes", shape, kind, tile, dtype, conv2d_boxes.boxes_kernel,
                {
                    "x_desc": f"tensordesc<{dtype}[{pixels},{tile.block_c}]>",
                    "w_desc": f"tensordesc<{dtype}[{tile.block_n},{tile.block_c}]>",
                    "bias_ptr": f"*{dtype}",
                    "y_desc": f"tensordesc<{dtype}[{pixels},{tile.block_n}]>",
                    "K": "i32", "P": "i32", "Q": "i32",
                },
                _constexprs(shape, kind, tile, strides=False)
                | {"BOX_N": box[0], "BOX_H": box[1], "BOX_W": box[2]},
                divisible_by_16=("bias_ptr", "K"), targets=TMA_TARGETS,
                grid=triton.cdiv(shape.n, box[0]) * triton.cdiv(shape.p, box[1]) * triton.cdiv(shape.q, box[2])
                * triton.cdiv(shape.k, tile.block_n),
            )  # fmt: skip


def _batch_cases() -> Iterator[StaticCase]:
    for (kind, wide), tile in conv2d.BATCH_TILES.items():
        shape = CONV4 if wide else CONV2
        for dtype in NAMES[kind]:
            yield _case(
                "batch", shape, kind, tile, dtype, conv2d_boxes.batch_kernel,
                {
                    "x_desc": f"tensordesc<{dtype}[{tile.block_m},{tile.block_c}]>",
                    "w_desc": f"tensordesc<{dtype}[{tile.block_n},{tile.block_c}]>",
                    "bias_ptr": f"*{dtype}",
                    "y_desc": f"tensordesc<{dtype}[{tile.block_m},{tile.block_n}]>",
                }
                | dict.fromkeys(("H", "W", "K", "P", "Q"), "i32"),
                _constexprs(shape, kind, tile) | {"BLOCK_M": tile.block_m},
                divisible_by_16=("bias_ptr", "K"), targets=TMA_TARGETS,
                grid=triton.cdiv(shape.n, tile.block_m) * shape.p * shape.q * (shape.k // tile.block_n),
            )  # fmt: skip


def _gradient_cases() -> Iterator[StaticCase]:
    shape = STRIDED
    window = {
        "R": shape.r, "S": shape.s, "STRIDE_H": 2, "STRIDE_W": 2, "PAD_H": 1, "PAD_W": 1,
        "DILATION_H": 1, "DILATION_W": 1,
    }  # fmt: skip
    grad = [f"stride_{name}" for name in ("gn", "gp", "gq")]
    images = [f"stride_{name}" for name in ("xn", "xh", "xw")]
    even = (*grad, *images)
    for kind, tile in conv2d_backward.INPUT_TILES.items():
        for dtype in NAMES[kind]:
            yield _case(
                "input_grad", shape, kind, tile, dtype, conv2d_backward.input_grad_kernel,
                dict.fromkeys(("grad_ptr", "w_ptr", "dx_ptr"), f"*{dtype}")
                | dict.fromkeys((*even, "N", "H", "W", "C", "P", "Q"), "i32"),
                window | {"stride_gk": 1, "stride_xc": 1, "K": shape.k, "PRECISION": precision(kind)}
                | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c},
                divisible_by_16=("grad_ptr", "w_ptr", "dx_ptr", "C", *even),
                grid=triton.cdiv(shape.n * shape.h * shape.w, tile.block_m) * triton.cdiv(shape.c, tile.block_n),
            )  # fmt: skip
    for kind, tile in conv2d_backward.WEIGHT_TILES.items():
        split, _ = conv2d_backward.split_pixels(shape.n * shape.p * shape.q)
        elements = triton.cdiv(shape.r * shape.s * shape.c, tile.block_m)
        for dtype in NAMES[kind]:
            yield _case(
                "weight_grad", shape, kind, tile, dtype, conv2d_backward.weight_grad_kernel,
                dict.fromkeys(("x_ptr", "grad_ptr"), f"*{dtype}") | {"part_ptr": "*fp32"}
                | dict.fromkeys((*even, "N", "H", "W", "K", "P", "Q", "pixels"), "i32"),
                window | {"stride_gk": 1, "stride_xc": 1, "C": shape.c, "PRECISION": precision(kind)}
                | {"BLOCK_J": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_M": tile.block_c},
                divisible_by_16=("x_ptr", "grad_ptr", "part_ptr", "K", *even),
                options=conv2d_backward.WEIGHT_OPTIONS.get(kind, {}),
                grid=split * elements * triton.cdiv(shape.k, tile.block_n),
            )  # fmt: skip


def _epilogue_cases() -> Iterator[StaticCase]:
    n, k, p, q, u, v = 256, 64, 55, 55, 27, 27  # conv1 of AlexNet and its 3x3 stride 2 max-pool
    pool = {"POOL_H": 3, "POOL_W": 3, "STRIDE_H": 2, "STRIDE_W": 2, "PAD_H": 0, "PAD_W": 0}
    for layout in epilogue.BLOCKS:
        for dtype in ("fp16", "bf16", "fp32"):
            size = BYTES[dtype]
            maps, pooled = n * k * p * q, n * k * u * v

            def case(what, kernel, pointers, strides, sizes, constexprs, pixels, moved, layout=layout):
                block_m, block_n = (epilogue.POOL_BLOCKS if "pool" in what else epilogue.BLOCKS)[layout]
                blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n}
                rows = triton.cdiv(pixels, block_m)
                if "backward" in what:
                    rows, _ = epilogue.partial_rows(pixels, block_m)
                unit = "k" if layout == "channels_last" else "m"
                fixed = {s: 1 for s in strides if s.endswith(unit) or (unit == "m" and s.endswith("xq"))}
                signature = {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}
                signature |= dict.fromkeys([s for s in strides if s not in fixed] + sizes, "i32")
                even = [s for s in strides if s not in fixed and layout == "channels_last"]
                return StaticCase(
                    name=f"epilogue.{what}[{layout},{dtype}]", kernel=kernel, signature=signature,
                    constexprs=constexprs | fixed | blocks, num_warps=4, num_stages=3,
                    divisible_by_16=(*(f"{name}_ptr" for name in pointers), *even, "K"),
                    grid=rows * triton.cdiv(k, block_n), sample="conv1 of AlexNet, N=256", bytes=float(moved),
                )  # fmt: skip

            yield case(
                "bias_relu", epilogue.bias_relu_kernel, dict.fromkeys(("x", "bias", "y"), dtype),
                ["stride_yn", "stride_yk", "stride_ym"], ["N", "K", "PQ"], {"HAS_BIAS": True},
                n * p * q, 2 * maps * size,
            )  # fmt: skip
            yield case(
                "relu_backward", epilogue.relu_backward_kernel,
                {"grad": dtype, "y": dtype, "dx": dtype, "partial": "fp32"},
                ["stride_yn", "stride_yk", "stride_ym"], ["N", "K", "PQ", "tiles"], {"WANT_BIAS": True},
                n * p * q, 3 * maps * size,
            )  # fmt: skip
            yield case(
                "bias_relu_pool", epilogue.bias_relu_pool_kernel,
                {"x": dtype, "bias": dtype, "z": dtype, "code": "u8"},
                [f"stride_{s}" for s in ("xn", "xk", "xp", "xq", "zn", "zk", "zm")], ["N", "K", "P", "Q", "U", "V"],
                pool | {"HAS_BIAS": True, "WANT_CODES": True, "UNROLL": 9},
                n * u * v, maps * size + pooled * (size + 1),
            )  # fmt: skip
            yield case(
                "relu_pool_backward", epilogue.relu_pool_backward_kernel,
                {"grad": dtype, "code": "u8", "dx": dtype, "partial": "fp32"},
                [f"stride_{s}" for s in ("zn", "zk", "zm", "xn", "xk", "xm")], ["N", "K", "P", "Q", "U", "V", "tiles"],
                pool | {"WANT_BIAS": True, "UNROLL": 4},
                n * p * q, maps * size + pooled * (size + 1),
            )  # fmt: skip
