"""What to do next, as the guides say it, with the numbers it is concluded from. None of it is a prediction."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jquant.analysis.comparison import Comparison, LayerError
from jquant.analysis.findings import Finding
from jquant.ops.table import TABLE_FUNCTIONS
from jquant.types import JQuantError, integer_range

TABLE_LSB = 3.0  # one, and half a step of rounding in a line, its index, the entries and between them
_TABLES = {function.__name__ for function in TABLE_FUNCTIONS}
ALMOST, GOOD, FAIR = 0.99, 0.95, 0.90  # of the float accuracy, after calibration (features, section 4.2)


def advise(
    float_accuracy: float, calibrated: float, qat: float | None = None, *, target: float | None = None
) -> list[Finding]:
    """The next step, from accuracies that were measured.

    Args:
      float_accuracy, calibrated, qat: of the same data, in any unit where more is better; qat None: not trained yet.
      target: what is to be reached; None: 99 % of float.

    Returns:
      Findings in the order to act on. Calibrated and QAT accuracy usually go together, and how closely is not known:
      there is no predicted accuracy here.

    Raises:
      JQuantError: a float accuracy that is not positive, one that is not finite, or fractions beside percent.

    Example:
      >>> from jquant.analysis import advise
      >>> print(advise(72.0, 71.5)[0].message)
      calibration keeps 99.3 % of float: at the target
    """
    _check_measured({"float": float_accuracy, "calibrated": calibrated, "QAT": qat, "target": target})
    if not float_accuracy > 0:
        raise JQuantError(
            f"the float accuracy must be positive, not {float_accuracy}: train and check the float model first"
        )
    goal = ALMOST * float_accuracy if target is None else target
    numbers = {"float": float_accuracy, "calibrated": calibrated, "target": goal}
    share = f"calibration keeps {100 * calibrated / float_accuracy:.1f} % of float"
    if qat is not None:
        return _after_training(goal, numbers | {"qat": qat})
    if goal > float_accuracy:
        return [_say("error", "the target is above the float accuracy", "improve the float model first", numbers)]
    if calibrated >= goal:
        return [_say("note", f"{share}: at the target", "nothing to do; evaluate the integers", numbers)]
    ratio = calibrated / float_accuracy
    if ratio >= ALMOST or calibrated >= ALMOST * goal:
        fix = "try observers (mse, percentile; jq.calibration.reset_scale needs no data), more samples, jq.ptq"
        return [_say("note", f"{share}: almost at the target, calibration is enough", fix, numbers)]
    if ratio >= GOOD:
        fix = "train (QAT) from the calibrated state, with activation scales frozen: jq.templates.fixed_activations"
        return [_say("note", f"{share}: good", fix, numbers)]
    if ratio > FAIR:
        fix = "train (QAT) from the calibrated state; let scales learn"
        return [_say("note", f"{share}: fair; other observers will change little", fix, numbers)]
    fix = (
        "do not train yet: find what is hostile to quantization (check_model, compare by own_sqnr, sensitivity), try "
        "int16 values everywhere to see whether resolution is the cause at all (jq.templates.weight8_activation16)"
    )
    return [_say("warning", f"{share}: too little to train from", fix, numbers)]


def _check_measured(accuracies: Mapping[str, float | None]) -> None:
    """Every accuracy is a number, and all have one unit."""
    given = {name: value for name, value in accuracies.items() if value is not None}
    for name, value in given.items():
        if not np.isfinite(value):
            raise JQuantError(f"the {name} accuracy is {value}: evaluate it on data that give a finite one")
        if value < 0:
            raise JQuantError(f"the {name} accuracy is {value}; give a metric where more is better, from 0 on")
    fractions = {name: value for name, value in given.items() if 0 < value <= 1}
    percent = {name: value for name, value in given.items() if value > 1.5}
    if fractions and percent:
        one, other = next(iter(fractions.items())), next(iter(percent.items()))
        raise JQuantError(
            f"the {one[0]} accuracy is {one[1]:g} and the {other[0]} accuracy {other[1]:g}: a fraction and percent? "
            "Give all in one unit"
        )


def _after_training(goal: float, numbers: Mapping[str, float]) -> list[Finding]:
    calibrated, qat = numbers["calibrated"], numbers["qat"]
    if qat >= goal:
        return [_say("note", "QAT reaches the target", "evaluate the integers, and deploy these", numbers)]
    if qat == calibrated:
        fix = (
            "look whether training moves anything: jq.training.check_states(..., calibrated=model, trained=['*']), the "
            "rates, and what labels freeze"
        )
        return [_say("warning", "QAT is as good as calibration, to the last digit: it changed nothing", fix, numbers)]
    if qat < calibrated:
        fix = (
            "look for a fault in the pipeline: float training through the same code must keep the float accuracy; mode "
            "'float' must equal float bit for bit; learning rate 0 must give the calibrated accuracy; then learning "
            "rate, schedule and augmentation"
        )
        return [_say("error", "QAT is worse than calibration", fix, numbers)]
    if qat >= ALMOST * goal:
        fix = "train longer, or at another learning rate; give the most sensitive layers int16"
        return [_say("note", "QAT is better than calibration and close to the target", fix, numbers)]
    fix = "go back to calibration: debug it until it improves clearly (compare, sensitivity), and only then train again"
    return [_say("warning", "QAT is better than calibration and far from the target", fix, numbers)]


def _say(level: Any, message: str, fix: str, numbers: Mapping[str, float]) -> Finding:
    return Finding(level=level, check="accuracy", where="", message=message, fix=fix, numbers=numbers)


# ---------------------------------------------------------------------------------------------------------------------
# Layer by layer


def layer_advice(comparison: Comparison, *, sqnr_below: float = 20.0) -> list[Finding]:
    """For every value whose own error is large: is it clamped, rounded or made by a coarse table, and what helps.

    A value is clamped where values of `a` lie beyond what the scale covers, rounded otherwise: the diagnosis that the
    guides make by comparing ranges and similarity. Rounding costs half an LSB at most: a function whose table is
    further away has a table error, which no other scale mends.

    Args:
      comparison: of "float" against a quantized meaning.
      sqnr_below: dB; what counts as a large error of the node alone.

    Returns:
      Findings, the worst first.
    """
    found = []
    rows = [row for row in comparison.rows if row.scale is not None]
    for row in sorted(rows, key=lambda r: _level(r)):
        if _level(row) >= sqnr_below and not (row.saturated or 0) > 0.01:
            continue
        if (row.saturated or 0) > 0.001:
            found.append(_clamped(row))
        else:
            found.append(_off_function(row) if _is_off(row) else _beyond(row) or _rounded(row))
    return found


def _level(row: LayerError) -> float:
    return row.sqnr if row.own_sqnr is None else row.own_sqnr


def covering_scale(row: LayerError) -> float:
    """The scale (real per LSB) at which the format of a value covers the largest that was seen."""
    return _peak(row) / _steps(row.dtype)


def _peak(row: LayerError) -> float:
    return max(abs(row.minimum), abs(row.maximum))


def _steps(dtype: str) -> int:
    """From zero to the end of a format."""
    return integer_range(dtype)[1] + 1


def _clamped(row: LayerError) -> Finding:
    assert row.scale is not None
    return Finding(
        level="warning",
        check="clamp error",
        where=row.name,
        message=f"{100 * (row.saturated or 0):.2f} % of the values lie beyond what the scale covers",
        fix=f"calibrate on more samples (50 to 100), or fix the scale: jq.{row.dtype}(scale={covering_scale(row):.4g})",
        numbers={
            "seen": _peak(row),
            "covered": row.scale * _steps(row.dtype),
            "saturated": row.saturated,
            "dB": _level(row),
        },
    )


def _is_off(row: LayerError) -> bool:
    """Whether a table is further from its function than rounding and saturation explain."""
    largest = 0.0 if row.saturated else row.own_max_lsb or 0.0
    return row.operator in _TABLES and (largest > TABLE_LSB or _own_rms_lsb(row) > 1)


def _own_rms_lsb(row: LayerError) -> float:
    """The root of the mean square of the node's own error, in LSB: 0.29 where it only rounds."""
    power = row.mse * 10 ** (min(row.sqnr, 300) / 10)  # of the value itself
    return float(np.sqrt(power / 10 ** (_level(row) / 10))) / (row.scale or 1.0)


def _off_function(row: LayerError) -> Finding:
    return Finding(
        level="warning",
        check="table error",
        where=row.name,
        message=f"the table of {row.operator} is up to {row.own_max_lsb:.1f} LSB off its function: no rounding",
        fix="give it the table that jq.analysis.table_costs finds: another placement, input_range or more num_tables",
        numbers={"own_max_lsb": row.own_max_lsb or 0.0, "dB": _level(row)},
    )


def _beyond(row: LayerError) -> Finding | None:
    """More error than the step of the value itself makes."""
    if row.own_sqnr is None or (rms := _own_rms_lsb(row)) <= 1:
        return None
    return Finding(
        level="warning",
        check="error of the operator",
        where=row.name,
        message=f"the error is {rms:.1f} LSB, and rounding makes 0.3: the step of this value is not the cause",
        fix="look at the rows of its weights, which want a scale per channel, and at its operands",
        numbers={"own_rms_lsb": rms, "scale": row.scale or 0.0, "dB": _level(row)},
    )


def _rounded(row: LayerError) -> Finding:
    rms = np.sqrt(max(row.mse, 1e-30)) * 10 ** (min(row.sqnr, 300) / 20)
    peak = _peak(row)
    wide = peak > 30 * rms
    split = "; its range is wide for its typical size: split it in two, or clip it" if wide else ""
    more = "split the tensor in two parts of unlike range" if row.dtype == "int16" else "give it int16"
    return Finding(
        level="warning",
        check="rounding error",
        where=row.name,
        message="the range fits, and the steps are too coarse",
        fix=more + split,
        numbers={"scale": row.scale, "peak": peak, "rms": float(rms), "dB": _level(row)},
    )
