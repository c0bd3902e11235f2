"""Evaluation of models and programs on data: `jq.evaluate` and its metrics."""

from jquant.evaluation.detection import COCO_THRESHOLDS as COCO_THRESHOLDS
from jquant.evaluation.detection import MeanAveragePrecision as MeanAveragePrecision
from jquant.evaluation.extremes import Largest as Largest
from jquant.evaluation.extremes import Worst as Worst
from jquant.evaluation.extremes import WorstSamples as WorstSamples
from jquant.evaluation.loop import Evaluation as Evaluation
from jquant.evaluation.loop import evaluate as evaluate
from jquant.evaluation.metrics import Accuracy as Accuracy
from jquant.evaluation.metrics import Agreement as Agreement
from jquant.evaluation.metrics import Confusion as Confusion
from jquant.evaluation.metrics import HostMean as HostMean
from jquant.evaluation.metrics import MeanAbsoluteError as MeanAbsoluteError
from jquant.evaluation.metrics import MeanIoU as MeanIoU
from jquant.evaluation.metrics import Metric as Metric
from jquant.evaluation.metrics import SignalToNoise as SignalToNoise
