"""What a terminal sees and a pipe does not: progress; and the completion of a shell."""

import subprocess
import sys

from support.terminal import ENVIRONMENT, on_terminal

TRACK = "from jquant.host.progress import track; print(sum(track(range(3), 'counting')))"


def test_progress_is_for_a_terminal_alone() -> None:
    out, seen = on_terminal(TRACK)
    assert out == b"3\n"
    assert b"counting" in seen
    assert b"100%" in seen
    hidden = subprocess.run([sys.executable, "-c", TRACK], env=ENVIRONMENT, capture_output=True, check=True)
    assert (hidden.stdout, hidden.stderr) == (b"3\n", b"")


def test_the_shell_completes_commands_and_options() -> None:
    def completed(words: str) -> list[str]:
        asked = {"_JQUANT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        command = [sys.executable, "-c", "from jquant.cli import main; main()"]
        done = subprocess.run(command, env=ENVIRONMENT | asked, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("jquant qu") == ["quantize"]
    assert "--checkpoints" in completed("jquant train --c")
