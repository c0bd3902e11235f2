"""From a float graph to a plan: what runs, in which formats, with which scales."""

from jquant.plan.files import load, plan_from_json, plan_to_json, save

__all__ = [
    "load",
    "plan_from_json",
    "plan_to_json",
    "save",
]
