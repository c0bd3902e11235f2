#!/bin/sh
# Exactness and throughput on the GPU or TPU of this machine, in less than 8 minutes; without one it says so and stops.
#
#   PYTHON=.venv/bin/python sh benchmarks/device.sh
#
# PYTHON is an environment with the requirements of the project and a JAX for the device (pip install "jax[cuda12]").
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # several processes share one device
export JAX_PLATFORMS="${JAX_PLATFORMS-}"    # JAX takes what it finds; the tests ask for a CPU where nothing is said

if [ "$("$PYTHON" -c 'import jax; print(jax.default_backend())')" = cpu ]; then
  echo "no GPU or TPU is here, or JAX is not the one for it: nothing was run"
  exit 0
fi
"$PYTHON" -c 'import jax; print(jax.__version__, jax.devices())'
timeout 240 "$PYTHON" -m pytest -q -n 4 -p no:cacheprovider tests/device tests/numerics/test_fused_convolution.py \
  tests/numerics/test_convolution.py
timeout 230 "$PYTHON" benchmarks/device.py "$@"
