#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.4.6: `safetensors.numpy.load` of the same bytes gives a dict whose keys stand in another
# order from call to call, in one process; `load_file` of the same content, and `safe_open(...).keys()`, give one order.
# Seen: "load: several orders, load_file: one order, keys: one order".
# What follows: to print or hash what `load` read, sort its keys first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
seen=$("$folder/venv/bin/python" - "$folder/a.safetensors" <<'PY'
import sys

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load, load_file, save

path = sys.argv[1]
content = save({name: np.ones(2, np.float32) for name in ("alpha", "beta", "gamma", "delta", "epsilon")})
with open(path, "wb") as file:
    file.write(content)


def keys() -> tuple[str, ...]:
    with safe_open(path, framework="numpy") as opened:
        return tuple(opened.keys())


def orders(read) -> str:
    return "several orders" if len({read() for _ in range(50)}) > 1 else "one order"


ways = {"load": lambda: tuple(load(content)), "load_file": lambda: tuple(load_file(path)), "keys": keys}
print(", ".join(f"{name}: {orders(read)}" for name, read in ways.items()))
PY
)
echo "$seen"
[ "$seen" = "load: several orders, load_file: one order, keys: one order" ] || { echo changed; exit 1; }
