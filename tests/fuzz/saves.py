"""Kills processes in the middle of their saves, and saves on a disk that is full: no file may be lost.

    python tests/fuzz/saves.py --count 200 --write        # and writes the table into docs/reliability.md (an hour)
    python tests/fuzz/saves.py --kinds program,report --count 20

A process saves two contents in turn, to the same place, and gets SIGKILL at a random moment. Then every file that has
its name holds one of the two as a whole, and the next save leaves no other file. A checkpoint is restored: it is that
of the last save that returned, or a later one, with the bits that were saved. A folder whose process was killed can be
opened at once, since a dead owner holds no lock.

The full disk is a tmpfs with a page less than a save needs, two pages less, and so on. The save is refused with the
path that was asked for, the old files are whole, and nothing else is left. Mounting one needs root.

  lost      a file was neither the old nor the new one, or a checkpoint was not that of its step
  left      a temporary file was there after the next save
  unnamed   the error of a full disk was no OSError with the path of a file
"""

import argparse
import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parent / "golden"))

import jax  # noqa: E402
import make  # noqa: E402
import numpy as np  # noqa: E402

import jquant as jq  # noqa: E402
from jquant import analysis, training  # noqa: E402
from jquant.cli.settings import ImageSettings  # noqa: E402
from jquant.cli.state import State, save_state  # noqa: E402
from jquant_converters import to_encodings, to_onnx  # noqa: E402

PAGE = 4096
SIZES = 20  # of free space, at most
SECONDS = 120.0  # for one save beside other work; more is a hang

Save = Callable[[Path, int], object]
"""Writes the content 0 or 1 into a folder."""


def _of_models(save: Callable[[Path, jq.Model], object]) -> Callable[[], Save]:
    """A kind of files that follow from a model; the other content has other scales."""

    def build() -> Save:
        model = make.make_model()
        qparams = jax.tree.map(lambda scale: 2 * scale, model.qparams)
        models = model, jq.Model(model.plan, model.params, qparams)
        return lambda folder, which: save(folder, models[which])

    return build


def _program() -> Save:
    programs = [jq.lower(make.make_model()) for _ in range(2)]
    return lambda folder, which: jq.save(folder / "net.jq", programs[which], metadata={"which": "no" * 3000 * which})


def _state(folder: Path, model: jq.Model) -> None:
    graph, params = make.make_graph()
    state = State(graph, params, make.QCONFIG, jq.targets.NASH_E, model.qparams, None, ImageSettings())
    save_state(folder / "net.jqs", state)


def _function() -> Save:
    made = []
    for dtype in (jq.int8, jq.int16):
        qconfig = jq.QConfig({"*": jq.Policy(weight=jq.int8(axis="out"), output=dtype())})
        made.append(jq.quantize(make.function, make.function_params(), qconfig, [make.rows()]))
    return lambda folder, which: jq.functions.save(folder / "net.jqf", *made[which])


def _march() -> Save:
    targets = jq.targets.NASH_E, jq.targets.NASH_P
    return lambda folder, which: jq.targets.dump(targets[which], folder / "march.toml")


def _cases() -> Save:
    def save(folder: Path, which: int) -> None:
        inputs = {"x": np.full((2, 2, 40, 40), which, np.float32)}
        order = np.array([which, 1 - which])
        analysis.cases.BadCases(inputs, order, np.array([0.5, 0.25]), "float", "bit_true", "l1", "y").save(
            folder / "cases.npz"
        )

    return save


def _report() -> Save:
    model = make.make_model()
    comparison = analysis.compare(model, make.images(), "float", "bit_true")

    def save(folder: Path, which: int) -> None:
        summary = [{"mode": "float" if which else "bit_true", "top-1": 1.0}]
        analysis.write_report(folder, "a report", summary, {"modes": comparison}, about={"date": "today"})

    return save


@dataclass(frozen=True)
class Kind:
    """A kind of files: `build` makes what writes them."""

    build: Callable[[], Save]


KINDS = {
    "program": Kind(_program),
    "state": Kind(_of_models(_state)),
    "model": Kind(_of_models(lambda folder, model: jq.plan.save(folder / "net.jqm", model))),
    "function": Kind(_function),
    "march": Kind(_march),
    "bad cases": Kind(_cases),
    "report": Kind(_report),
    "StableHLO": Kind(_of_models(lambda folder, model: jq.to_stablehlo(folder / "net.stablehlo", model))),
    "ONNX": Kind(_of_models(lambda folder, model: to_onnx(model, form="float", path=folder / "net.onnx"))),
    "encodings": Kind(_of_models(lambda folder, model: to_encodings(model, path=folder / "net.encodings"))),
}
CHECKPOINT = "checkpoint"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def is_partial(name: str) -> bool:
    return name.endswith(".partial")


def both(save: Save, folder: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The two contents, which must not depend on when they are written."""
    found = []
    for which in (0, 1, 0, 1):
        save(folder, which)
        found.append(contents(folder))
    if found[:2] != found[2:] or found[0] == found[1]:
        raise RuntimeError(f"two saves of {sorted(found[0])} are to give two contents, the same each time")
    return found[0], found[1]


# ---------------------------------------------------------------------------------------------------------------------
# Kills


@contextmanager
def saving(save: Save, folder: Path) -> Iterator[int]:
    """A process that saves both contents in turn, and does nothing else."""
    child = os.fork()
    if child == 0:
        try:
            for i in range(10**9):
                save(folder, i % 2)
        finally:
            os._exit(1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def check_kills(kind: Kind, count: int, seed: int) -> Counter[str]:
    """What `count` kills found."""
    rng, found = random.Random(seed), Counter[str]()
    save = kind.build()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.monotonic()
        wanted = both(save, folder)
        once = (time.monotonic() - start) / 4
        for _ in range(count):
            with saving(save, folder) as child:
                time.sleep(rng.uniform(0, 4 * once))
                if os.waitpid(child, os.WNOHANG)[0]:
                    raise RuntimeError("a save failed by itself")
            now = contents(folder)
            found["inside"] += any(map(is_partial, now))
            whole = all(v in (wanted[0].get(n), wanted[1].get(n)) for n, v in now.items() if not is_partial(n))
            found["lost"] += not whole or not set(wanted[0]) <= set(now)
            save(folder, 0)
            found["left"] += contents(folder) != wanted[0]
            found["kills"] += 1
    return found


TRAINS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import saves
saves.train(Path(sys.argv[1]))
"""


def _stepped(state: jq.TrainState, step: int) -> jq.TrainState:
    """The state of a step, which follows from its number."""
    numbers = jax.tree.map(lambda leaf: np.full_like(leaf, step), state.trainable)
    return replace(state, step=np.full_like(state.step, step), trainable=numbers)


def train(folder: Path) -> None:
    """Saves one step after the other, and notes each that is saved."""
    model = make.make_model()
    state = make.fresh_state(model)
    checkpoints = training.open_checkpoints(folder / "run", model)
    found = checkpoints.restore(state)
    for step in range(1 + (0 if found is None else found.step), 10**9):
        save_step(checkpoints, state, step, folder)


def save_step(checkpoints: training.Checkpoints, fresh: jq.TrainState, step: int, folder: Path) -> None:
    checkpoints.save(_stepped(fresh, step), position={"batch": step})
    with (folder / "saved").open("a") as file:
        file.write(f"{step}\n")


def _saved(folder: Path) -> int:
    lines = (folder / "saved").read_text().splitlines() if (folder / "saved").is_file() else []
    return max(map(int, lines), default=0)


def check_checkpoints(count: int, seed: int) -> Counter[str]:
    rng, found = random.Random(seed), Counter[str]()
    model = make.make_model()
    fresh = make.fresh_state(model)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for _ in range(count):
            before, start = _saved(folder), time.monotonic()
            process = subprocess.Popen([sys.executable, "-c", TRAINS, str(folder), str(HERE)], env=environment)
            while _saved(folder) == before:
                if process.poll() is not None or time.monotonic() - start > SECONDS:
                    process.kill()
                    raise RuntimeError(f"a training saved nothing, return code {process.wait()}")
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
            process.kill()
            process.wait()
            names = os.listdir(folder / "run")
            found["inside"] += any("tmp" in name for name in names)
            with closing(training.open_checkpoints(folder / "run", model)) as checkpoints:
                restored = checkpoints.restore(fresh)
                step = 0 if restored is None else restored.step
                found["lost"] += restored is None or step < _saved(folder) or restored.position != {"batch": step}
                if restored is not None:
                    pairs = zip(jax.tree.leaves(restored.state), jax.tree.leaves(_stepped(fresh, step)), strict=True)
                    found["lost"] += not all(np.array_equal(a, b) for a, b in pairs)
                save_step(checkpoints, fresh, step + 1, folder)
            found["left"] += any("tmp" in name for name in os.listdir(folder / "run"))
            found["kills"] += 1
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


@contextmanager
def small_disk(pages: int) -> Iterator[Path]:
    """A file system of so many pages. OSError: it cannot be mounted here."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "disk"
        folder.mkdir()
        size = f"size={pages * PAGE},nr_inodes=1000"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(done.returncode, done.stderr.strip() or "mount failed", str(folder))
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)


def pages_of(content: dict[str, bytes]) -> int:
    return sum(-(-len(value) // PAGE) for value in content.values())


def check_full_disk(kind: Kind) -> Counter[str]:
    """Saves the larger content over the smaller, with too few free pages for it."""
    save, found = kind.build(), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        made = both(save, Path(temporary))
    old, new = sorted((0, 1), key=lambda which: pages_of(made[which]))
    needed = max(-(-len(value) // PAGE) for value in made[new].values())  # files are replaced one after the other
    for free in sorted({round(i * (needed - 1) / SIZES) for i in range(SIZES + 1)}):
        with small_disk(pages_of(made[old]) + free) as folder:
            save(folder, old)
            try:
                save(folder, new)
                found["unnamed"] += 1
            except OSError as error:
                named = error.filename is not None and Path(error.filename).name in made[old]
                found["unnamed"] += error.errno != errno.ENOSPC or not named
            now = contents(folder)
            found["left"] += now.keys() != made[old].keys()
            found["lost"] += any(now.get(n) not in (made[old][n], made[new][n]) for n in made[old])
            found["full"] += 1
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The command


HEAD = ("kind", "kills", "inside a save", "full disks", "lost", "left", "unnamed", "seconds")


def row(name: str, count: int) -> list[object]:
    start = time.monotonic()
    found = check_checkpoints(count, 1) if name == CHECKPOINT else check_kills(KINDS[name], count, 1)
    full: object = "-"
    if name != CHECKPOINT:
        try:
            on_full = check_full_disk(KINDS[name])
            full, found = on_full["full"], found + on_full
        except PermissionError:
            raise
        except OSError as error:
            full = f"not measured ({error.strerror})"
    counts = [found["kills"], found["inside"], full, found["lost"], found["left"], found["unnamed"]]
    return [name, *counts, f"{time.monotonic() - start:.0f}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="kills a kind")
    parser.add_argument("--kinds", default="", help=f"of {', '.join([*KINDS, CHECKPOINT])}")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    given = parser.parse_args()
    names = given.kinds.split(",") if given.kinds else [*KINDS, CHECKPOINT]
    if unknown := set(names) - {*KINDS, CHECKPOINT}:
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")
    rows = []
    for name in names:
        rows.append(row(name, given.count))
        print(*rows[-1], sep="\t", flush=True)
    if given.write:
        from support.reliability import table, write_section

        write_section("saves", f"python tests/fuzz/saves.py --count {given.count} --write", table(HEAD, rows))
    return int(any(found for one in rows for found in one[4:7]))


if __name__ == "__main__":
    sys.exit(main())
