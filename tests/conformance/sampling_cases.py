"""Resizing and sampling: every mode, form and padding, on int8 and int16 data, with coordinates over all of int16."""

from itertools import product

from conformance.harness import Case, both, with_target

from jquant import ops

SIZE, OUT = (6, 9), (7, 4)
RESIZE_MODES = (("bilinear", False), ("bilinear", True), ("nearest", False), ("nearest-exact", False))
MODES = (("bilinear", "zeros"), ("bilinear", "border"), ("nearest", "zeros"), ("nearest", "border"))
RESIZES = (
    {"size": (12, 18)},
    {"size": (4, 13)},
    {"scale_factor": (1.7, 0.6)},
    {"scale_factor": (1.7, 0.6), "recompute_scale_factor": True},
)


def sampled(op: ops.GridSample | ops.Warp, coordinates: tuple[int, ...], *scales: float) -> tuple[Case, ...]:
    """Both data formats, the coordinates at scales that reach around the image and at random ones."""
    return tuple(
        Case(
            op=op,
            shapes=((3, *SIZE), coordinates),
            inputs=(dtype, "int16"),
            output=dtype,
            input_scales=(0.05, scale) if scale else None,
        )
        for dtype, scale in product(("int8", "int16"), (*scales, 0.0))
    )


def grid_samples(mode: str, padding: str) -> tuple[Case, ...]:
    absolute = ops.GridSample(mode=mode, padding=padding, coordinates="absolute")
    found = sampled(absolute, (*OUT, 2), 2.0**-8, 4e-4)
    for align_corners in (False, True):
        scale = ops.grid_scale(min(SIZE), align_corners=align_corners)
        found += sampled(ops.GridSample(mode=mode, padding=padding, align_corners=align_corners), (*OUT, 2), scale)
    return found


def warps(mode: str, padding: str) -> tuple[Case, ...]:
    return sampled(ops.Warp(mode=mode, padding=padding), (2, *SIZE), 2.0**-8, 4e-4)


def interpolations() -> tuple[Case, ...]:
    found: tuple[Case, ...] = ()
    for options in RESIZES:
        for mode, align_corners in (
            ("bilinear", False),
            ("bilinear", True),
            ("nearest", False),
            ("nearest-exact", False),
        ):
            found += both(op=ops.Interpolate(**options, mode=mode, align_corners=align_corners), shapes=((3, *SIZE),))
        found += both(op=ops.Interpolate(**options, mode="bilinear", coordinates="asymmetric"), shapes=((3, *SIZE),))
    bilinear = both(op=ops.Interpolate(size=(12, 13), mode="bilinear"), shapes=((3, *SIZE),))
    found += tuple(with_target(case, {"resize.weight_bits": bits}) for case in bilinear for bits in (4, 14))
    return found + both(op=ops.Interpolate(size=(25,), mode="bilinear"), shapes=((3, 16),))


def affine_grids() -> tuple[Case, ...]:
    return tuple(
        Case(
            op=ops.AffineGrid(size=size, align_corners=align_corners),
            shapes=((2, 3),),
            inputs=(dtype,),
            output="int16",
        )
        for size, align_corners, dtype in product(((6, 9), (1, 5)), (False, True), ("int8", "int16"))
    )


def regions(columns: int) -> tuple[Case, ...]:
    options = (
        {"output_size": (2, 3), "sampling_ratio": 2},
        {"output_size": (3, 2), "sampling_ratio": 3, "aligned": True, "spatial_scale": 0.25},
    )
    return tuple(
        Case(
            op=ops.RoiAlign(**one),
            shapes=((24, *SIZE), (columns,)),
            inputs=("int8", "int16"),
            input_scales=(0.05, scale) if scale else None,
        )
        for one, scale in product(options, (2e-3, 0.0))
    )


CASES = (
    *interpolations(),
    *(case for mode in MODES for case in grid_samples(*mode)),
    *(
        case
        for mode, padding in MODES
        for case in sampled(ops.Warp(mode=mode, padding=padding), (2, *SIZE), 2.0**-8, 4e-4)
    ),
    *affine_grids(),
    *regions(5),
    *regions(4),
)
