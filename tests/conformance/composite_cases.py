"""Composites: every value of the chain that they become, with scales from data."""

from dataclasses import replace

from conformance.harness import Case

from jquant import ops

_NORM = {"weight": (6,), "bias": (6,)}
_LSTM = {"weight_ih": (12, 4), "weight_hh": (12, 3), "bias_ih": (12,), "bias_hh": (12,)}
_GRU = {"weight_ih": (9, 4), "weight_hh": (9, 3), "bias_ih": (9,), "bias_hh": (9,)}


def formats(**options) -> tuple[Case, ...]:
    """The composite from int8 and from int16, scales calibrated."""
    return tuple(
        Case(**options | {"inputs": (f, *options.get("inputs", ())), "output": f}, calibrated=True)
        for f in ("int8", "int16")
    )


def recurrent(**options) -> tuple[Case, ...]:
    """Operands up to 4: the gates of a state in [-1, 1] are added to those of the input in one accumulator."""
    eight, sixteen = formats(**options)
    count = len(eight.shapes)
    return replace(eight, input_scales=(2.0**-5,) * count), replace(sixteen, input_scales=(2.0**-13,) * count)


CASES = (
    *formats(op=ops.Softmax(axis=-1), shapes=((3, 40),)),
    *formats(op=ops.Softmax(axis=1), shapes=((7, 3, 4),)),
    *formats(op=ops.Softmax(axis=-1), shapes=((3, 40), (3, 40)), inputs=("bool",)),
    *formats(op=ops.LogSoftmax(axis=-1), shapes=((3, 40),)),
    *formats(op=ops.Div(), shapes=((3, 40), (3, 40)), nonzero=True),
    *formats(op=ops.Div(), shapes=((3, 40), (3, 1)), nonzero=True),
    *formats(op=ops.Variance(axes=(2,)), shapes=((9, 20),)),
    *formats(op=ops.Variance(axes=(1, 2), keepdims=True, correction=0), shapes=((9, 20),)),
    *formats(op=ops.Norm(axes=(-1,), order="1"), shapes=((9, 20),)),
    *formats(op=ops.Norm(axes=(-1,), order="2"), shapes=((9, 20),)),
    *formats(op=ops.Norm(axes=(-1,), order="max", keepdims=True), shapes=((9, 20),)),
    *formats(op=ops.LayerNorm(), shapes=((5, 6),), params=_NORM),
    *formats(op=ops.LayerNorm(rank=2), shapes=((3, 5, 6),)),
    *formats(op=ops.RmsNorm(), shapes=((5, 6),), params={"weight": (6,)}),
    *formats(op=ops.GroupNorm(groups=3), shapes=((6, 4, 4),), params=_NORM),
    *formats(op=ops.InstanceNorm(), shapes=((6, 4, 4),), params=_NORM),
    *formats(op=ops.Attention(), shapes=((2, 5, 4), (2, 6, 4), (2, 6, 3))),
    *formats(op=ops.Attention(causal=True), shapes=((2, 5, 4), (2, 5, 4), (2, 5, 3))),
    *recurrent(op=ops.Lstm(), shapes=((2, 4),), params=_LSTM),
    *recurrent(op=ops.Lstm(reverse=True, output="cell"), shapes=((2, 4), (3,), (3,)), params=_LSTM),
    *recurrent(op=ops.Gru(), shapes=((2, 4),), params=_GRU),
    *recurrent(op=ops.Gru(reverse=True, output="hidden"), shapes=((2, 4), (3,)), params=_GRU),
)
