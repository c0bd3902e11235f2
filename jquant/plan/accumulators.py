"""Weight scales that an accumulator can work with."""

from collections.abc import Mapping

from jquant.numerics.namespace import array_namespace, barrier, real
from jquant.numerics.rounding import divide
from jquant.ops.conv import Conv, ConvTranspose, Linear
from jquant.plan.scales import quantizer_of, scale_of, value_scales
from jquant.types import Array, Node, Params, Plan, QParams, Target

LARGEST_BIAS = 2**31 * (1 - 2**-20)  # int32, with room for the rounding of this file's own float arithmetic


def raise_folded_scales(plan: Plan, params: Params, qparams: QParams) -> dict[str, Array]:
    """Raises the weight scales of channels so near zero that their accumulator cannot hold bias or fused addend.

    A channel whose weights are almost zero (batch norm has learned to switch it off) has an accumulator of minute
    steps, `s_x * s_w`. Its bias would saturate at int32, and a fused addend has the multiplier `s_e / (s_x * s_w)`,
    which is below 2^15 on Nash marches. So s_w is at least `max(|b| / 2^31, s_e / 32767) / s_x`. A step of the
    accumulator is then still at most 2^-15 of one of the addend, so what is lost of the weights does not show.

    Args:
      plan, params: of a model. Of params the biases are read.
      qparams: complete.

    Returns:
      QParams; scales that are large enough, fixed, or of values stay as they are.
    """
    found, scales, floors = dict(qparams), value_scales(plan, qparams), dict[str, Array]()
    for node in plan.graph.nodes:
        if isinstance(node.op, Conv | ConvTranspose | Linear) and node.params["weight"] in plan.trained:
            key = node.params["weight"]
            floor = _smallest_scale(node, scales, params, plan.target, per_channel=key in plan.weight_axis)
            floors[key] = _larger(floors[key], floor) if key in floors else floor
    for key, floor in floors.items():
        spec, scale = plan.weights[key], scale_of(key, plan, qparams)
        raised = quantizer_of(spec).init(_larger(scale, floor), spec)
        found[key] = array_namespace(scale, floor).where(scale < floor, raised, qparams[key])
    return found


def _larger(a: Array, b: Array) -> Array:
    return array_namespace(a, b).maximum(a, b)


def _smallest_scale(
    node: Node, scales: Mapping[str, Array | None], params: Params, target: Target, *, per_channel: bool
) -> Array:
    """The smallest scale (real per LSB) that the weight of a node may have: scalar, or [channels]."""
    x_scale, *addends = (scales[name] for name in node.inputs)
    floor = real(0.0)
    if x_scale is None:
        return floor
    if "bias" in node.params:
        bias = abs(params[node.params["bias"]])
        if isinstance(node.op, ConvTranspose):  # groups share the scales of their channels
            bias = bias.reshape(node.op.groups, -1).max(0)
        floor = _floor(bias if per_channel else bias.max(), LARGEST_BIAS, x_scale)
    for scale in addends:
        if scale is not None:
            floor = _larger(floor, _floor(scale, 2**target.addend.multiplier_bits - 1, x_scale))
    return floor


def _floor(needed: Array, largest: float, x_scale: Array) -> Array:
    """needed / largest / x_scale; XLA would make one division of two, and its scale would differ from that of numpy."""
    return divide(barrier(divide(needed, real(largest))), x_scale)
