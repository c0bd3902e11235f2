"""Scales as the buffers of fake-quantizers in a torch model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from jquant.plan.batch_norm import kept_batch_norm
from jquant.plan.scales import check_qparams, quantizer_of, scale_of
from jquant.types import ConversionError, Model, Plan


def fake_quant_state_dict(
    model: Model,
    *,
    weight: str = "{}.weight_fake_quant",
    output: str = "{}.activation_post_process",
) -> dict[str, torch.Tensor]:
    """The scales of a model as buffers of FakeQuantize modules, for `load_state_dict(..., strict=False)`.

    `{path}.weight_fake_quant.scale` and `.zero_point` for a weight at `{path}.weight`, and
    `{path}.activation_post_process.scale` and `.zero_point` for a value made by the module at that path, as torch.ao
    names them in a model that `prepare_qat` made; plugins that follow it do the same. A value made by fused modules has
    an entry for every one of them that ends in it, since a model may have its fake-quantizer at any: for conv, norm and
    activation at all three paths; where an addition was fused, at that of the addition and of what followed, not at
    the convolution, whose own output does not exist here. An input gets the path of its QuantStub.

    A model's observers overwrite scales while they run: switch them off after loading
    (`model.apply(torch.ao.quantization.disable_observer)`).

    A weight that folding copied has no entry, since the module has none for it: one layer in front of two batch norms.

    Args:
      model: calibrated or trained.
      weight, output: where a fake-quantizer is, `{}` being the path of the module.

    Returns:
      {key: float32 [1] or [channels] scales, int32 zero points, all 0}.

    Raises:
      ConversionError: a quantizer with a learned offset. CalibrationError: scales missing or broken.
    """
    plan, qparams = model.plan, model.qparams
    check_qparams(plan, qparams)
    if any(kept_batch_norm(node) is not None for node in plan.graph.nodes):
        raise ConversionError("the plan keeps batch norm for training; call jq.training.fold_batch_norm first")
    found: dict[str, torch.Tensor] = {}

    def put(prefix: str, name: str) -> None:
        spec = plan.spec(name)
        if spec.is_float:
            return
        if quantizer_of(spec).has_offset:
            raise ConversionError(f"{name!r} has a learned offset in real numbers; train with jq.lsq")
        scale = torch.from_numpy(np.array(scale_of(name, plan, qparams), np.float32).reshape(-1))
        found[f"{prefix}.scale"] = scale
        found[f"{prefix}.zero_point"] = torch.zeros(scale.shape, dtype=torch.int32)

    for key in plan.weights:
        if key.endswith(".weight"):
            put(weight.format(key.removesuffix(".weight")), key)
    for name in plan.owned:
        for path in _paths(plan, name):
            put(output.format(path), name)
    return found


def _paths(plan: Plan, name: str) -> list[str]:
    """The modules whose output a value is: its own, and those that were fused into it."""
    fused = [old for old, new in plan.renamed.items() if new == name]
    node: Any = plan.graph.by_name.get(name)
    if node is None or not getattr(node.op, "addend", False):
        return [name, *fused]
    order = {row.name: i for i, row in enumerate(plan.resolutions)}
    fused.sort(key=lambda old: order.get(old, -1))
    return fused[-1:] if node.op.activation == "none" else fused[-2:]  # the addition, and the activation behind it
