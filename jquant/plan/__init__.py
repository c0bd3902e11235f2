"""From a float graph to a plan: what runs, in which formats, with which scales."""

from jquant.plan.files import plan_from_json, plan_to_json

__all__ = [
    "plan_from_json",
    "plan_to_json",
]
