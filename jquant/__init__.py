"""jquant: quantization for JAX as pure functions, and an integer simulator of the Nash BPU.

The way of a model: a float `Graph` (imported by `jquant_converters.from_torch`), `prepare`, `calibrate`, `apply` or
`apply_train` (fake-quant), `lower`, `run` (integers). Every step is a pure function of pytrees.
"""

from jquant import analysis, ops, reference, targets
from jquant.apply import apply, apply_with_taps
from jquant.calibrate import calibrate, finalize_stats, init_stats, merge_stats, update_stats
from jquant.checkpoint import load, save
from jquant.integer import run, run_with_taps
from jquant.ir.graph import validate
from jquant.ir.serialize import graph_from_json, graph_to_json
from jquant.lower import lower
from jquant.observers import min_max, moving_average, mse
from jquant.ops.base import constraints, derived_scale, eval_float, eval_integer, lower_op, to_channels_last
from jquant.prepare import explain, prepare
from jquant.qat import Trainable, TrainState, apply_train, labels
from jquant.qconfig import QConfig, high_precision, int2, int3, int4, int8, int16, uint4, uint8
from jquant.quantizers import fake_quant, lsq, pact
from jquant.simulate import evaluate_float
from jquant.types import (
    CalibrationError,
    ConversionError,
    FormatError,
    FrozenMap,
    Graph,
    GraphError,
    Input,
    InputError,
    JQuantError,
    LoweringError,
    Node,
    NodeFormat,
    Observer,
    Op,
    Plan,
    Policy,
    Program,
    QConfigError,
    Quantizer,
    QuantSpec,
    Target,
)

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "ConversionError",
    "FormatError",
    "FrozenMap",
    "Graph",
    "GraphError",
    "Input",
    "InputError",
    "JQuantError",
    "LoweringError",
    "Node",
    "NodeFormat",
    "Observer",
    "Op",
    "Plan",
    "Policy",
    "Program",
    "QConfig",
    "QConfigError",
    "QuantSpec",
    "Quantizer",
    "Target",
    "TrainState",
    "Trainable",
    "__version__",
    "analysis",
    "apply",
    "apply_train",
    "apply_with_taps",
    "calibrate",
    "constraints",
    "derived_scale",
    "eval_float",
    "eval_integer",
    "evaluate_float",
    "explain",
    "fake_quant",
    "finalize_stats",
    "graph_from_json",
    "graph_to_json",
    "high_precision",
    "init_stats",
    "int16",
    "int2",
    "int3",
    "int4",
    "int8",
    "labels",
    "load",
    "lower",
    "lower_op",
    "lsq",
    "merge_stats",
    "min_max",
    "moving_average",
    "mse",
    "ops",
    "pact",
    "prepare",
    "reference",
    "run",
    "run_with_taps",
    "save",
    "targets",
    "to_channels_last",
    "uint4",
    "uint8",
    "update_stats",
    "validate",
]
