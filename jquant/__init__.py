"""jquant: quantization for JAX as pure functions, and an integer simulator of the Nash BPU.

The way of a model: a float `Graph` (imported by `jquant_converters.from_torch`), `prepare`, `calibrate`, `apply` or
`apply_train` (fake-quant), `lower`, `run` (integers). Every step is a pure function of pytrees.
"""

from jquant import analysis, flax, images, ops, ptq, quantizers, reference, targets, templates, training
from jquant.apply import apply, apply_with_taps
from jquant.batch_norm import fold_batch_norm, raise_collapsed_scales, set_batch_statistics, split_batch_stats
from jquant.calibrate import (
    calibrate,
    collect,
    finalize_stats,
    gather_stats,
    init_stats,
    merge_stats,
    reset_scale,
    update_stats,
)
from jquant.checkpoint import load, save
from jquant.describe import describe
from jquant.insert import insert_image_convert, insert_image_preprocess, insert_op, insert_roi_resize
from jquant.integer import run, run_with_taps
from jquant.ir.graph import validate
from jquant.ir.serialize import graph_from_json, graph_to_json
from jquant.lower import lower
from jquant.migrate import migrate_optimizer_state, parameter_sources
from jquant.observers import clip_std, histogram, kl, min_max, mix, moving_average, mse, norm, percentile
from jquant.ops.base import constraints, decompose, derived_scale, eval_float, eval_integer, lower_op, to_channels_last
from jquant.plan_file import plan_from_json, plan_to_json
from jquant.prepare import explain, prepare
from jquant.qat import Trainable, TrainState, apply_train, labels
from jquant.qconfig import QConfig, consistency, float16, high_precision, int2, int3, int4, int8, int16, uint4, uint8
from jquant.qconfig_file import qconfig_from_json, qconfig_from_toml, qconfig_to_json, qconfig_to_toml
from jquant.quantize import QuantizedFunction, quantize
from jquant.quantize_params import quantize_params, weight_qparams
from jquant.quantizers import adaround, fake_quant, float16_cast, forward_mode, lsq, lsq_plus, pact
from jquant.simulate import evaluate_float
from jquant.stablehlo import from_stablehlo, to_stablehlo
from jquant.states import States, check_states, find_states
from jquant.trace import trace
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
    "QuantizedFunction",
    "Quantizer",
    "States",
    "Target",
    "TrainState",
    "Trainable",
    "__version__",
    "adaround",
    "analysis",
    "apply",
    "apply_train",
    "apply_with_taps",
    "calibrate",
    "check_states",
    "clip_std",
    "collect",
    "consistency",
    "constraints",
    "decompose",
    "derived_scale",
    "describe",
    "eval_float",
    "eval_integer",
    "evaluate_float",
    "explain",
    "fake_quant",
    "finalize_stats",
    "find_states",
    "flax",
    "float16",
    "float16_cast",
    "fold_batch_norm",
    "forward_mode",
    "from_stablehlo",
    "gather_stats",
    "graph_from_json",
    "graph_to_json",
    "high_precision",
    "histogram",
    "images",
    "init_stats",
    "insert_image_convert",
    "insert_image_preprocess",
    "insert_op",
    "insert_roi_resize",
    "int16",
    "int2",
    "int3",
    "int4",
    "int8",
    "kl",
    "labels",
    "load",
    "lower",
    "lower_op",
    "lsq",
    "lsq_plus",
    "merge_stats",
    "migrate_optimizer_state",
    "min_max",
    "mix",
    "moving_average",
    "mse",
    "norm",
    "ops",
    "pact",
    "parameter_sources",
    "percentile",
    "plan_from_json",
    "plan_to_json",
    "prepare",
    "ptq",
    "qconfig_from_json",
    "qconfig_from_toml",
    "qconfig_to_json",
    "qconfig_to_toml",
    "quantize",
    "quantize_params",
    "quantizers",
    "raise_collapsed_scales",
    "reference",
    "reset_scale",
    "run",
    "run_with_taps",
    "save",
    "set_batch_statistics",
    "split_batch_stats",
    "targets",
    "templates",
    "to_channels_last",
    "to_stablehlo",
    "trace",
    "training",
    "uint4",
    "uint8",
    "update_stats",
    "validate",
    "weight_qparams",
]
