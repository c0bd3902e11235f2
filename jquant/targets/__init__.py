"""Marches that a model can be prepared for."""

from jquant.targets.nash import NASH_B, NASH_E, NASH_H, NASH_M, NASH_P

__all__ = ["NASH_B", "NASH_E", "NASH_H", "NASH_M", "NASH_P"]
