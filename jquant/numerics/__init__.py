"""Exact arithmetic: the only place that rounds, shifts or saturates."""
