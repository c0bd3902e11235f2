"""The second process finds the programs of the first: counted as hits and misses of JAX's persistent cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.terminal import ENVIRONMENT

import jquant as jq

SCRIPT = """
import collections, json, sys
import jax, jax.numpy as jnp, numpy as np
import jquant as jq
jq.use_compilation_cache(sys.argv[1])
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event]))
x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6)
weight = jax.device_put(np.eye(6, dtype=np.float32))
graph, params = jq.trace(lambda w, x: jax.nn.relu(x @ w), weight, x)[:2]
model = jq.prepare(graph, params, jq.QConfig(jq.templates.int8_default()), target=jq.targets.NASH_E)
program = jq.lower(jq.calibrate(model, [x]))
found = {name: seen["/jax/compilation_cache/cache_" + name] for name in ("hits", "misses")}
print(json.dumps(found | {"y": np.asarray(jq.run(program, x)).tolist()}))
"""


def start(folder: Path) -> dict:
    done = subprocess.check_output([sys.executable, "-c", SCRIPT, str(folder)], env=ENVIRONMENT, text=True)
    return json.loads(done)


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    first, second = start(tmp_path / "new"), start(tmp_path / "new")
    assert first["misses"] > 0 == second["misses"]
    assert second["hits"] >= first["misses"]
    assert first["y"] == second["y"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        jq.use_compilation_cache(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        jq.use_compilation_cache(tmp_path / "file")
