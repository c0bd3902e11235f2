"""Damages files by the thousand, and counts what their readers do.

    python tests/fuzz/run.py --count 10000                   # mutants a reader; a run that was stopped goes on
    python tests/fuzz/run.py --readers program,onnx --count 500
    python tests/fuzz/run.py --seed 17 --readers onnx        # one mutant, in this process: shows the traceback
    python tests/fuzz/run.py --count 10000 --write           # and writes the table into docs/reliability.md

A reader runs in a process of its own, so that a crash or a hang of outside software ends no run. A mutant is made of
the reader's name and a seed, and no file is kept: `FOLDER/NAME.json` holds the seeds of all findings. These are

  raw      another error than one of jquant
  unnamed  an error that does not name the file, or is longer than a few lines
  changed  a file that carries a digest was read as something else
  hung     no answer within 60 seconds
  crashed  the process died
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

FOLDER = HERE.parents[1] / "out" / "fuzz"
SECONDS = 60.0  # for one mutant of a few kilobytes
LONGEST = 3000  # characters of a message
SAVE_EVERY = 2.0  # seconds
FINDINGS = ("raw", "unnamed", "changed", "hung", "crashed")


def judge(reader: Any, path: Path, original: Any) -> tuple[str, str]:
    """What became of a file: "refused", "same", "read" or a finding; and the message."""
    from jquant.types import JQuantError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = reader.read(path)
    except JQuantError as error:
        message = str(error)
        return ("refused" if str(path) in message and len(message) < LONGEST else "unnamed"), message
    except Exception:
        return "raw", traceback.format_exc()
    if reader.content(value) == original:
        return "same", ""
    return ("changed", "") if reader.sealed else ("read", "")


class Record:
    """The counts of a reader, and what is left to do, as a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"next": 0, "counts": {}, "findings": [], "seconds": 0.0, "megabytes": 0}
        if path.is_file():
            self.data = json.loads(path.read_text())

    def add(self, seed: int, outcome: str, message: str) -> None:
        self.data["next"] = seed + 1
        self.data["counts"][outcome] = self.data["counts"].get(outcome, 0) + 1
        if outcome in FINDINGS:
            self.data["findings"].append([seed, outcome, message[-1500:]])

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1))
        partial.replace(self.path)


def record_of(folder: Path, name: str) -> Record:
    return Record(folder / f"{re.sub(r'[^a-z.]', '_', name)}.json")


def work(name: str, count: int, folder: Path) -> None:
    """The mutants of one reader, from where its record ends."""
    from readers import READERS, mutant

    reader, record = READERS[name], record_of(folder, name)
    whole = reader.whole()
    now = record.path.with_suffix(".now")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / f"mutant{reader.suffix}"
        originals = []
        for content in whole:
            path.write_bytes(content)
            originals.append(reader.content(reader.read(path)))
        saved = start = time.monotonic()
        for seed in range(record.data["next"], count):
            now.write_text(str(seed))
            chosen, content = mutant(reader, whole, name, seed)
            path.write_bytes(content)
            record.add(seed, *judge(reader, path, originals[chosen]))
            if time.monotonic() - saved > SAVE_EVERY:
                record.data["seconds"] += time.monotonic() - saved
                saved = time.monotonic()
                record.data["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
                record.save()
        record.data["seconds"] += time.monotonic() - max(saved, start)
    record.data["megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    record.save()


def watch(name: str, count: int, folder: Path) -> None:
    """Runs the reader in processes until it is done; a mutant that ends one is a finding, and is left out."""
    while (record := record_of(folder, name)).data["next"] < count:
        now = record.path.with_suffix(".now")
        now.unlink(missing_ok=True)
        command = [sys.executable, __file__, "--worker", name, "--count", str(count), "--folder", str(folder)]
        with record.path.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            hung = False
            while process.poll() is None:
                time.sleep(0.2)
                if now.is_file() and time.time() - now.stat().st_mtime > SECONDS:
                    process.kill()
                    process.wait()
                    hung = True
        if process.returncode == 0:
            continue
        if not now.is_file() or process.returncode == 1:
            raise RuntimeError(f"{name}: {record.path.with_suffix('.log').read_text()[-1500:]}")
        seed, record = int(now.read_text()), record_of(folder, name)
        for passed in range(record.data["next"], seed):  # judged since the last save, and not recorded
            record.add(passed, "refused or read", "")
        record.add(seed, "hung" if hung else "crashed", f"return code {process.returncode}")
        record.save()


def rows(folder: Path, names: list[str]) -> list[list[object]]:
    found: list[list[object]] = []
    for name in names:
        data = record_of(folder, name).data
        counts = data["counts"]
        refused = counts.get("refused", 0) + counts.get("refused or read", 0)
        kinds = [counts.get(kind, 0) for kind in ("same", "read", *FINDINGS)]
        found.append([name, data["next"], refused, *kinds, f"{data['seconds']:.0f}", data["megabytes"]])
    return found


HEAD = ("reader", "mutants", "refused", "same", "read", *FINDINGS, "seconds", "MB at most")


def show(name: str, seed: int) -> None:
    from readers import READERS, mutant

    reader = READERS[name]
    whole = reader.whole()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / f"mutant{reader.suffix}"
        path.write_bytes(mutant(reader, whole, name, seed)[1])
        print(reader.content(reader.read(path)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--readers", default="")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--worker")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.count, given.folder)
        return 0
    from readers import READERS

    names = [name for name in READERS if not given.readers or name.split(",")[0] in given.readers.split(",")]
    if given.seed is not None:
        show(names[0], given.seed)
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        watch(name, given.count, given.folder)
        print(*rows(given.folder, [name])[0], sep="\t", flush=True)
    found = rows(given.folder, names)
    if given.write:
        from support.reliability import table, write_section

        write_section("files", f"python tests/fuzz/run.py --count {given.count} --write", table(HEAD, found))
    return int(any(record_of(given.folder, name).data["findings"] for name in names))


if __name__ == "__main__":
    sys.exit(main())
