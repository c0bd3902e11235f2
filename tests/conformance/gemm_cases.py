"""Convolutions in every dimension and kernel choice, linear layers, matrix products and table lookup."""

from dataclasses import replace

from conformance.harness import Case

from jquant import ops
from jquant.types import Op


def each_format(case: Case) -> tuple[Case, ...]:
    """int8 and int16 operands and weights, never both int16; int8, int16 and high-precision outputs."""
    found = [case, replace(case, output="int16"), replace(case, output="int32")]
    wide = replace(case, inputs=("int16",), output="int16")
    found += [wide, replace(wide, output="int8"), replace(wide, output="int32")]
    if "weight" in case.op.weight_roles:
        found += [replace(case, weight="int16"), replace(case, weight="int16", output="int32")]
        found += [replace(case, weight="int4")]
    return tuple(found)


def conv(channels: int, out: int, size: tuple[int, ...], kernel: tuple[int, ...], **options) -> Case:
    rank = len(size)
    ones = (1,) * rank
    fields = {"strides": ones, "padding": ((1, 1),) * rank, "dilation": ones} | options
    op = ops.Conv(**fields)
    params = {"weight": (out, channels // op.groups, *kernel), "bias": (out,)}
    return Case(op=op, shapes=((channels, *size),), params=params)


def transposed(channels: int, out: int, size: tuple[int, ...], kernel: tuple[int, ...], **options) -> Case:
    rank = len(size)
    ones = (1,) * rank
    fields = {"strides": (2,) * rank, "padding": ((1, 1),) * rank, "output_padding": (0,) * rank, "dilation": ones}
    op = ops.ConvTranspose(**fields | options)
    params = {"weight": (channels, out // op.groups, *kernel), "bias": (out,)}
    return Case(op=op, shapes=((channels, *size),), params=params)


def plain(case: Case, *outputs: str) -> tuple[Case, ...]:
    return tuple(replace(case, output=output, inputs=(output,)) for output in outputs or ("int8", "int16"))


def matmul(a: tuple[int, ...], b: tuple[int, ...], **options) -> Case:
    # The integers of a product have a spread of about 2^(bits of b) * sqrt(K) times those of a.
    op = ops.MatMul(**options)
    products = a[-2 if op.transpose_a else -1]
    return Case(op=op, shapes=(a, b), input_scales=(2.0**-7, 2.0**-8), output_scale=2.0**-8 * products**0.5)


def matmul_formats(case: Case) -> tuple[Case, ...]:
    a, b = case.input_scales
    wide = replace(case, inputs=("int16", "int8"), output="int16", input_scales=(a / 256, b))
    swapped = replace(wide, inputs=("int8", "int16"), input_scales=(a, b / 256))
    each = (case, replace(case, output="int16"), replace(case, output="int32"), wide, replace(wide, output="int32"))
    return (*each, swapped, replace(swapped, output="int8"), replace(swapped, output="int32"))


def lookup(rows: int, dim: int, output: str) -> Case:
    op: Op = ops.Embedding()
    return Case(
        op=op, shapes=((7, 3),), inputs=(f"index:{rows}",), output=output, params={"weight": (rows, dim)},
        output_scale=2.0**-6,
    )  # fmt: skip


DENSE = conv(8, 6, (7, 6), (3, 3))
LINEAR = Case(op=ops.Linear(), shapes=((40,),), params={"weight": (12, 40), "bias": (12,)})
TRANSPOSED = transposed(6, 4, (5, 4), (4, 4))
MATMUL = matmul((2, 9, 16), (2, 16, 7))

CASES = (
    *each_format(DENSE),
    *each_format(LINEAR),
    *each_format(TRANSPOSED),
    *matmul_formats(MATMUL),
    lookup(50, 12, "int8"),
    lookup(50, 12, "int16"),
    # every kernel, one to three dimensions
    *plain(conv(3, 8, (12, 12), (3, 3), strides=(2, 2))),
    *plain(conv(6, 5, (9, 8), (3, 2), strides=(2, 1), padding=((2, 0), (1, 2)), dilation=(2, 1))),
    *plain(conv(8, 8, (8, 9), (3, 3), groups=8, dilation=(1, 2))),
    *plain(conv(4, 12, (8, 9), (3, 3), groups=4)),
    *plain(conv(24, 12, (6, 6), (3, 3), groups=6)),
    *plain(conv(36, 4, (5, 5), (3, 3), groups=2)),
    *plain(conv(6, 5, (20,), (3,), strides=(2,))),
    *plain(conv(12, 6, (15,), (4,), groups=3)),
    *plain(conv(4, 6, (4, 5, 5), (3, 2, 3), strides=(2, 1, 1))),
    *plain(conv(6, 6, (4, 5, 4), (2, 3, 3), groups=3)),
    # the limbs: more than 512 products of int16 and int8
    replace(conv(64, 4, (5, 5), (3, 3)), inputs=("int16",), output="int16"),
    replace(conv(64, 4, (5, 5), (3, 3)), weight="int16"),
    # post-processing
    *plain(conv(4, 6, (7, 6), (3, 3), activation="relu")),
    *plain(conv(4, 6, (7, 6), (3, 3), activation="relu6"), "int8", "int16"),
    *plain(transposed(4, 6, (5, 4), (3, 3), activation="relu6")),
    # transposed: phases of one size and of several, cut windows, dilation, groups, one to three dimensions
    *plain(transposed(4, 6, (5, 4), (3, 3), output_padding=(1, 1))),
    *plain(transposed(4, 6, (5, 4), (2, 2), padding=((0, 0), (0, 0)))),
    *plain(transposed(6, 4, (4, 5), (3, 2), strides=(3, 1), dilation=(2, 3), padding=((2, 2), (1, 1)), groups=2)),
    *plain(transposed(5, 5, (4, 5), (4, 4), groups=5)),
    *plain(transposed(6, 4, (9,), (4,))),
    *plain(transposed(4, 3, (3, 4, 3), (3, 2, 3))),
    # matrix products: broadcast batches, transposed operands, a vector
    matmul((3, 1, 5, 8), (1, 4, 8, 6)),
    matmul((5, 8), (8, 6)),
    matmul((4, 9, 16), (4, 7, 16), transpose_b=True),
    matmul((4, 16, 9), (4, 7, 16), transpose_a=True, transpose_b=True),
    *matmul_formats(matmul((3, 700), (700, 5)))[3:],
)
