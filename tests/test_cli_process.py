"""The command as a process: signals, terminals, pipes, shell completion, and how soon it answers."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from examples.tiny_model import write_tiny_model
from fastldm import png
from fastldm.cli import main
from fastldm.signals import WORDS
from fastldm.weights import write
from tests.single import disk

COMMAND = (sys.executable, "-m", "fastldm")
SMALL = ("--size", "32x24", "--steps", "1", "--seed", "1")
NO_TORCH = """
import runpy, sys
try:
    runpy.run_module("fastldm", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory; the model is the variable's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLDM_MODEL", str(model))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "prompts.txt").write_text("a cat\nthe red cat\na dog\n")
    return tmp_path


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Ctrl-C is on, also where the tests run in the background, and in the processes that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def started(*words: object, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*COMMAND, *map(str, words)], text=True, **pipes)


def finished(*words: object) -> tuple[int, str, str]:
    running = started(*words)
    stdout, stderr = running.communicate(timeout=120)
    return running.returncode, stdout, stderr


def wait_for(what: Callable[[], bool], running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not what() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert running.poll() is None, "it was too quick to be stopped"


# -------------------------------------------------------------------------------------------------------- being stopped


@pytest.mark.parametrize("number", WORDS)
def test_what_is_done_stays(number: signal.Signals) -> None:
    """Stopped while the second of three is painted; run again, it goes on."""
    words = ("--prompts", "prompts.txt", "-o", "made", "--size", "64x64", "--steps", 60)
    running = started(*words)
    wait_for(Path("made/0001.png").exists, running)
    running.send_signal(number)
    stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stderr) == (128 + number, f"fastldm: {WORDS[number]}\n")
    assert stdout in ("", "made/0001.png\n")  # it may come between the file and its line
    assert os.listdir("made") == ["0001.png"]
    if number == signal.SIGINT:
        assert finished(*words) == (0, "made/0002.png\nmade/0003.png\n", "")


@pytest.mark.parametrize("number", WORDS)
def test_in_the_middle_of_a_write(monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> None:
    """The second signal comes while the half file is taken away."""
    Path("x.png").write_bytes(b"before")

    class Stopping(disk.File):
        def write(self, data: Any) -> int:
            half = self.file.write(data[: len(data) // 2])
            self.file.flush()
            assert len(os.listdir(".")) == 3
            os.kill(os.getpid(), number)
            return int(half)

    unlink = Path.unlink

    def unlink_late(self: Path, missing_ok: bool = False) -> None:
        os.kill(os.getpid(), number)
        unlink(self, missing_ok=missing_ok)

    def opened(path: Any, mode: str) -> Stopping:
        return Stopping(open(path, mode), disk.Disk(9))

    monkeypatch.setattr(write, "open", opened, raising=False)
    monkeypatch.setattr(Path, "unlink", unlink_late)
    result = CliRunner().invoke(main, ["a cat", "-o", "x.png", *SMALL])
    assert (result.exit_code, result.stdout) == (128 + number, "")
    assert result.stderr == f"fastldm: {WORDS[number]}\n"
    assert sorted(os.listdir()) == ["prompts.txt", "x.png"]
    assert Path("x.png").read_bytes() == b"before"


def test_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in WORDS]
    CliRunner().invoke(main, ["a cat", *SMALL])
    assert [signal.getsignal(number) for number in WORDS] == before


@pytest.mark.parametrize(
    ("number", "library"),
    [
        (signal.SIGINT, "libc10"),
        (signal.SIGINT, "libtorch_python"),
        (signal.SIGINT, "numpy/_core"),
        (signal.SIGTERM, "libtorch_python"),
    ],
)
def test_while_torch_is_imported(number: signal.Signals, library: str) -> None:
    """It is stopped when it has mapped one of torch's libraries, which takes a second from the first to the last."""
    running = started("a cat", *SMALL, "--steps", 1000)
    maps = Path(f"/proc/{running.pid}/maps")
    wait_for(lambda: library in maps.read_text(), running)
    running.send_signal(number)
    stdout, stderr = running.communicate(timeout=60)
    assert (running.returncode, stdout, stderr) == (128 + number, "", f"fastldm: {WORDS[number]}\n")
    assert os.listdir() == ["prompts.txt"]


def test_a_signal_that_was_switched_off_stays_so() -> None:
    """As with nohup, and in the background of a script."""
    words = ("a cat", "--size", "64x64", "--steps", "60", "--seed", "1")
    running = started(*words, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    maps = Path(f"/proc/{running.pid}/maps")
    wait_for(lambda: "libtorch_python" in maps.read_text(), running)
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=60) == ("out.png\n", "")
    assert running.returncode == 0


# -------------------------------------------------------------------------------------------------- terminals and pipes


def on_a_terminal(*words: object) -> tuple[str, str]:
    """What goes to the standard output, a pipe, and to the standard error, a terminal."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    running = started(*words, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            block = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(leader)
    stdout, _ = running.communicate(timeout=60)
    assert running.returncode == 0
    return stdout, shown.decode()


def test_a_bar_over_the_images_on_a_terminal() -> None:
    """With the share that is done, the time left and the rate, of this run alone."""
    words = ("--prompts", "prompts.txt", "-o", "made", *SMALL)
    stdout, shown = on_a_terminal(*words)
    assert stdout == "made/0001.png\nmade/0002.png\nmade/0003.png\n"
    assert "| 0/3 [" in shown
    assert re.search(r"33%\|.*\| 1/3 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(image/s|s/image)\]", shown)
    assert "/1 [" not in shown, "there is one bar, not another over the steps"
    os.unlink("made/0003.png")
    assert "| 2/3 [" in on_a_terminal(*words)[1].partition("\r")[2]


def test_one_image_on_a_terminal() -> None:
    stdout, shown = on_a_terminal("a cat", "--size", "32x24", "--steps", "3")
    assert stdout == "out.png\n"
    assert "| 0/3 [" in shown
    settings = png.parsed(png.read(Path("out.png")).text or "").settings
    assert f"seed {settings['Seed']}\r\n" in shown, "a random seed is told"


def test_silence_in_a_pipe() -> None:
    assert finished("a cat", *SMALL[:4]) == (0, "out.png\n", "")
    code, stdout, stderr = finished("--prompts", "prompts.txt", *SMALL, "--json")
    assert (code, stderr) == (0, "")
    assert [json.loads(line)["path"] for line in stdout.splitlines()] == [f"out/000{k}.png" for k in (1, 2, 3)]


@pytest.mark.parametrize("words", [("samplers",), ("--prompts", "prompts.txt", *SMALL), ("--help",)], ids=" ".join)
def test_nobody_reads(words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    running = started(*words, stdout=writer)
    os.close(writer)
    _, stderr = running.communicate(timeout=60)
    assert (running.returncode, stderr) == (1, "")


# ----------------------------------------------------------------------------------------------------------- completion


def completed(line: str, shell: str = "bash") -> list[str]:
    """What bash is told to offer behind the last word of a line: "type,value"; without torch."""
    words = line.split(" ")
    shown = {"_FASTLDM_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['fastldm']\n{NO_TORCH}"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **shown},
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_completion_of_commands_and_options() -> None:
    assert completed("fastldm ") == [f"plain,{name}" for name in sorted(main.commands)]
    assert completed("fastldm sam") == ["plain,samplers"]
    assert completed("fastldm --sa") == ["plain,--sampler"]
    assert completed("fastldm cat --n") == ["plain,--negative", "plain,--n"]
    assert completed("fastldm convert a b --dt") == ["plain,--dtype"]


def test_completion_of_samplers_choices_and_paths() -> None:
    assert completed("fastldm cat --sampler dpmpp_2m_k") == ["plain,dpmpp_2m_karras"]
    assert completed("fastldm --sampler unipc_3_") == [f"plain,unipc_3_{k}" for k in ("karras", "exponential", "beta")]
    assert completed("fastldm cat --dtype b") == ["plain,bf16"]
    assert completed("fastldm cat --model fo") == ["file,fo"]
    assert completed("fastldm info fo") == ["file,fo"]
    assert completed("fastldm completion ") == ["plain,bash", "plain,zsh", "plain,fish"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes(here: Path) -> None:
    """The script, in a real bash, with a command of that name on the path."""
    (here / "bin").mkdir()
    (here / "bin/fastldm").write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    (here / "bin/fastldm").chmod(0o755)
    script = """
        PATH="$PWD/bin:$PATH"; eval "$(fastldm completion bash)"
        COMP_WORDS=(fastldm "'a cat'" --sampler dpmpp_2m_k); COMP_CWORD=3
        _fastldm_completion fastldm; echo "${COMPREPLY[@]}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("dpmpp_2m_karras\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts(shell: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"_FASTLDM_COMPLETE={shell}_complete" in result.stdout


# -------------------------------------------------------------------------------------------------- how soon it answers

SOON = {
    "help": ({}, ["--help"]),
    "help of painting": ({}, ["paint", "--help"]),
    "samplers": ({}, ["samplers"]),
    "info of an image": ({}, ["info", "x.png"]),
    "completion": (
        {"_FASTLDM_COMPLETE": "bash_complete", "COMP_WORDS": "fastldm cat --sampler dp", "COMP_CWORD": "3"},
        [],
    ),
}


@pytest.mark.parametrize(("variables", "words"), SOON.values(), ids=SOON.keys())
def test_it_answers_in_half_a_second(variables: dict[str, str], words: list[str]) -> None:
    """Of the processor's time: a busy machine does not make it slow. The best of three."""
    import PIL.Image

    settings = {"Steps": "1", "Seed": "1", "Size": "8x8"}
    png.write(PIL.Image.new("RGB", (8, 8)), Path("x.png"), png.Parameters("a", "", settings), new=True)
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([*COMMAND, *words], env={**os.environ, **variables}, capture_output=True, check=True)
        after = os.times()
        times.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert min(times) < 0.5
