"""The public names of jquant, each listed once; everything else is in a package named for what it holds.

`import jquant as jq` gives these as `jq.prepare` and so on, and the packages as `jq.observers`, `jq.training`.
"""

from typing import TYPE_CHECKING

from jquant import analysis as analysis
from jquant import board as board
from jquant import calibration as calibration
from jquant import config as config
from jquant import evaluation as evaluation
from jquant import flax as flax
from jquant import functions as functions
from jquant import graph as graph
from jquant import images as images
from jquant import observers as observers
from jquant import ops as ops
from jquant import plan as plan
from jquant import program as program
from jquant import ptq as ptq
from jquant import quantizers as quantizers
from jquant import reference as reference
from jquant import targets as targets
from jquant import training as training
from jquant.calibration.collection import calibrate as calibrate
from jquant.config import templates as templates
from jquant.config.qconfig import QConfig as QConfig
from jquant.config.qconfig import float16 as float16
from jquant.config.qconfig import high_precision as high_precision
from jquant.config.qconfig import int2 as int2
from jquant.config.qconfig import int3 as int3
from jquant.config.qconfig import int4 as int4
from jquant.config.qconfig import int8 as int8
from jquant.config.qconfig import int16 as int16
from jquant.evaluation.loop import evaluate as evaluate
from jquant.functions.quantized import quantize as quantize
from jquant.functions.trace import trace as trace
from jquant.meanings.apply import apply as apply
from jquant.meanings.apply import apply_with_taps as apply_with_taps
from jquant.meanings.stablehlo import from_stablehlo as from_stablehlo
from jquant.meanings.stablehlo import to_stablehlo as to_stablehlo
from jquant.plan.describe import describe as describe
from jquant.plan.describe import explain as explain
from jquant.plan.prepare import prepare as prepare
from jquant.program.cache import use_compilation_cache as use_compilation_cache
from jquant.program.candidates import stack_programs as stack_programs
from jquant.program.files import load as load
from jquant.program.files import save as save
from jquant.program.integers import run as run
from jquant.program.integers import run_with_taps as run_with_taps
from jquant.program.lower import lower as lower
from jquant.quantizers import fake_quant as fake_quant
from jquant.quantizers import lsq as lsq
from jquant.quantizers import lsq_plus as lsq_plus
from jquant.quantizers import pact as pact
from jquant.training.state import TrainState as TrainState
from jquant.training.state import apply_train as apply_train
from jquant.training.state import labels as labels
from jquant.types import CalibrationError as CalibrationError
from jquant.types import ConversionError as ConversionError
from jquant.types import FormatError as FormatError
from jquant.types import FrozenMap as FrozenMap
from jquant.types import Graph as Graph
from jquant.types import GraphError as GraphError
from jquant.types import Input as Input
from jquant.types import InputError as InputError
from jquant.types import JQuantError as JQuantError
from jquant.types import LoweringError as LoweringError
from jquant.types import Model as Model
from jquant.types import Node as Node
from jquant.types import Plan as Plan
from jquant.types import Policy as Policy
from jquant.types import Program as Program
from jquant.types import QConfigError as QConfigError
from jquant.types import QuantSpec as QuantSpec
from jquant.types import Target as Target

if not TYPE_CHECKING:  # type checkers take the imports above for the public names
    __all__ = [name for name in sorted(globals()) if name != "TYPE_CHECKING" and not name.startswith("_")]
