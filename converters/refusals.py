"""What a reader cannot import, in one error: every place, the reason, and the next step."""

from collections.abc import Sequence

SHOWN = 50  # places; of a model that is foreign all through, the first ones say enough


def listed(head: str, places: Sequence[str], remedy: str) -> str:
    """The message of a reader that went on to the end of the model.

    Args:
      head: such as "jquant has no operator for".
      places: one line a place: operator, name, shapes and reason.
      remedy: the next step.
    """
    more = [f"and {len(places) - SHOWN} more"] if len(places) > SHOWN else []
    return "\n  ".join([f"{head}:", *places[:SHOWN], *more]) + f"\n{remedy}"
