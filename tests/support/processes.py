"""Tests that need devices or processes of their own: a script in a fresh interpreter, which ends with "equal"."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def start(script: str, devices: int, *arguments: str) -> subprocess.Popen[str]:
    """Runs a script on so many host devices, with the helpers of the tests importable."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_pair(script: str, devices: int) -> tuple[subprocess.Popen[str], ...]:
    """The same script in two processes, with (rank, port) as its arguments, for `jax.distributed` over loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return tuple(start(script, devices, str(rank), port) for rank in range(2))


def finish(*processes: subprocess.Popen[str]) -> None:
    try:
        for process in processes:
            out, error = process.communicate(timeout=600)
            assert process.returncode == 0, error[-3000:]
            assert out.splitlines()[-1:] == ["equal"]  # after what the collectives say
    finally:
        for process in processes:
            process.kill()
            process.communicate()  # closes its pipes, whose warning would fall on another test
