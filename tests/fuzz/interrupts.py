"""Interrupts commands at random moments: each ends with exit code 130 and one line.

    python tests/fuzz/interrupts.py --count 500 --write     # and writes the table into docs/reliability.md
    python tests/fuzz/interrupts.py --commands train,report --count 20

Every command runs once as a whole, on the files of `jquant demo`, and then gets SIGINT at moments drawn from the whole
of that time. Two outcomes do not count: *done*, the command ended before its signal, with code 0; and *python*, in the
first hundredths of a second, before Python reads jquant: it ends in Python's own way.

  130       exit code 130, and one line on stderr behind those of the command's progress
  code      another exit code
  pages     a traceback, or not that line at the end
  left      a temporary file was left behind, or an input of the command changed
  hung      no end within a minute
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

COMMANDS = {
    "demo": "demo made --steps 30",
    "init": "init d/float.jqs -o q.toml",
    "inspect": "inspect d/net.jqs",
    "check": "check d/net.jqs -c d/q.toml",
    "calibrate": "calibrate d/float.jqs -c d/q.toml -d d/train.npz --samples 200 -o net.jqs",
    "quantize": "quantize d/float.jqs -c d/q.toml -d d/train.npz --samples 200 -o net.jq",
    "train": "train d/net.jqs -c d/q.toml -d d/train.npz -o trained.jqs --checkpoints run",
    "eval": "eval d/net.jqs -d d/test.npz --mode float --mode bit_true --position counts.json",
    "compare": "compare d/net.jqs -d d/test.npz --samples 64",
    "sensitivity": "sensitivity d/net.jqs -d d/test.npz --samples 64",
    "report": "report d/net.jqs -d d/test.npz --samples 64 -o report",
    "export": "export d/net.jq --to stablehlo -o net.stablehlo",
    "run": "run d/net.jq -d d/test.npz -o values.npz",
    "doctor": "doctor",
    "board": "board probe -o probes",
}
LINE = "error: interrupted; no file was left half-written\n"
FINDINGS = ("code", "pages", "left", "hung")
COUNTED = ("130", *FINDINGS)
SECONDS = 60.0


def start(command: str, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"XDG_CACHE_HOME": str(folder.parent / "cache"), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "jquant", *command.split()],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def prepared(files: Path, name: str) -> Path:
    """A folder of its own with the files of the demo."""
    folder = files.parent / name
    folder.mkdir()
    shutil.copytree(files, folder / "d")
    return folder


def inputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "d").iterdir()}


def interrupted(command: str, files: Path, name: str, after: float) -> tuple[str, float, str]:
    """What became of a command that got SIGINT after so many seconds, the seconds until it ended, and its stderr."""
    folder = prepared(files, name)
    whole = inputs(folder)
    process = start(command, folder)
    try:
        _, error = process.communicate(timeout=after)
        return "done", 0.0, error
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    try:
        _, error = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return "hung", SECONDS, process.communicate()[1]
    seconds = time.monotonic() - sent
    outcome = judge(process.returncode, error)
    if any(path.name.endswith(".partial") for path in folder.rglob("*")) or inputs(folder) != whole:
        outcome = "left"
    shutil.rmtree(folder)
    return outcome, seconds, error


def judge(code: int, error: str) -> str:
    if code == 0:
        return "done"
    began = code in (1, 130) and "KeyboardInterrupt" in error  # or it died by the signal
    if (began or code == -signal.SIGINT) and "/jquant/" not in error:
        return "python"
    if code not in (130, -signal.SIGINT):
        return "code"
    # Where the signal falls into a callback of XLA, Python says that it ignores it; the command ends all the same.
    told = "Traceback" in error and "Exception ignored in" not in error
    if code == 130 and error.endswith(LINE) and not told:
        return "130"
    return "pages"


def measured(files: Path) -> dict[str, float]:
    """Seconds of every command as a whole, the second time, when its compiled programs lie in the cache."""
    found = {}
    for name, command in COMMANDS.items():
        for i in range(2):
            begin = time.monotonic()
            process = start(command, prepared(files, f"whole-{name}-{i}"))
            error = process.communicate()[1]
            found[name] = time.monotonic() - begin
            if process.returncode not in (0, 3):
                raise RuntimeError(f"jquant {command}: {process.returncode}: {error[-1500:]}")
    return found


def check(names: list[str], count: int, seed: int) -> dict[str, Counter[str]]:
    """Interrupts commands in turn until so many were interrupted."""
    rng = random.Random(seed)
    found = {name: Counter[str]() for name in names}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(temporary)
        (folder / "files").mkdir()
        subprocess.run([sys.executable, "-m", "jquant", "demo", "d", "-q"], cwd=folder / "files", check=True)
        files = folder / "files" / "d"
        whole = measured(files)

        def one(i: int, name: str, after: float) -> None:
            outcome, seconds, error = interrupted(COMMANDS[name], files, f"run-{i}", after)
            found[name][outcome] += 1
            longest[name] = max(longest[name], seconds)
            if outcome in FINDINGS:
                print(f"jquant {COMMANDS[name]}\n  after {after:.3f} s: {outcome}\n{error[-1500:]}", flush=True)

        longest = dict.fromkeys(names, 0.0)
        number = 0
        while (left := count - sum(n for c in found.values() for outcome, n in c.items() if outcome in COUNTED)) > 0:
            batch = [names[(number + i) % len(names)] for i in range(min(left, 2 * len(names)))]
            jobs = [(number + i, name, rng.uniform(0, whole[name])) for i, name in enumerate(batch)]
            number += len(batch)
            for job in [pool.submit(one, *job) for job in jobs]:
                job.result()
            print(f"{count - left} of {count}", file=sys.stderr, flush=True)
        for name in names:
            found[name]["longest"] = round(1000 * longest[name])
            found[name]["whole"] = round(1000 * whole[name])
    return found


SECONDS_OF = ("seconds to the end at most", "seconds as a whole")
HEAD = ("command", "interrupts", *COUNTED, "done before", "python", *SECONDS_OF)


def rows(found: dict[str, Counter[str]]) -> list[list[object]]:
    made: list[list[object]] = []
    for name, counts in found.items():
        kinds = [counts[kind] for kind in COUNTED]
        seconds = [f"{counts[kind] / 1000:.1f}" for kind in ("longest", "whole")]
        made.append([name, sum(kinds), *kinds, counts["done"], counts["python"], *seconds])
    sums = [sum(int(str(row[i])) for row in made) for i in range(1, len(HEAD) - 2)]
    return [*made, ["all", *sums, "", ""]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--commands", default="", help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write the table into docs/reliability.md")
    given = parser.parse_args()
    names = given.commands.split(",") if given.commands else list(COMMANDS)
    if unknown := set(names) - set(COMMANDS):
        parser.error(f"unknown commands: {', '.join(sorted(unknown))}")
    # Who started this may ignore the signal, as shells do for work in the background, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found = check(names, given.count, given.seed)
    for row in rows(found):
        print(*row, sep="\t")
    if given.write:
        from support.reliability import table, write_section

        command = f"python tests/fuzz/interrupts.py --count {given.count} --write"
        write_section("interrupts", command, table(HEAD, rows(found)))
    return int(any(counts[kind] for counts in found.values() for kind in FINDINGS))


if __name__ == "__main__":
    sys.exit(main())
