"""What the user asks for: patterns to policies, as values, files and templates."""

from jquant.config.files import qconfig_from_json, qconfig_from_toml, qconfig_to_json, qconfig_to_toml
from jquant.config.qconfig import consistency, uint4, uint8

__all__ = [
    "consistency",
    "qconfig_from_json",
    "qconfig_from_toml",
    "qconfig_to_json",
    "qconfig_to_toml",
    "uint4",
    "uint8",
]
