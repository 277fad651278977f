"""``python -m kvb`` that has to stop early: one line that says why, and no traceback."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys

import pytest

import kvb
from kvb import __main__ as command_line


def stopping(error):
    def stop():
        raise error

    return stop


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "Interrupted."),
        (BrokenPipeError(), 141, "Stopped: nobody reads the output any longer."),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/figure.png"),
            1,
            "Cannot write out/figure.png: No space left on device. Make room and try again.",
        ),
    ],
)
def test_why_it_stopped(error, status, line, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "_info", stopping(error))
    assert command_line.main(["info"]) == status
    assert capsys.readouterr().err == line + "\n"


def test_other_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(command_line, "_info", stopping(FileNotFoundError(errno.ENOENT, "No such file")))
    with pytest.raises(FileNotFoundError):
        command_line.main(["info"])


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        command_line.main(["--version"])
    assert capsys.readouterr().out == f"kvb {kvb.__version__}\n"


@pytest.mark.parametrize(("called", "name"), [("/bin/kvb", "kvb"), ("/site/kvb/__main__.py", "python -m kvb")])
def test_usage_names_the_command_as_it_was_called(called, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [called])
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["no-such-command"])
    assert f"usage: {name} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("no-such-command", "invalid choice: 'no-such-command' (choose from "),
        ("demo --seed x", "argument --seed: expected an integer from 0 to 2**63 - 1, got 'x'"),
        ("check --seconds -1", "argument --seconds: expected a number of seconds, got '-1'"),
        ("check --processes 0", "argument --processes: expected a positive integer, got '0'"),
        ("check --device tpu", "--device must be one of the devices of this machine, cpu"),
        ("check --json no/such/file", "There is no folder no/such to write to. Make it, or choose another one."),
        ("report model.safetensors --out no/such/page", "There is no folder no/such to write to."),
        ("protocol --heads worst", "--heads must be of bottleneck, "),
    ],
)
def test_wrong_usage_is_one_line_and_status_two(words, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(words.split())
    assert stopped.value.code == 2
    assert line in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("report no-such-file", "There is no file no-such-file."),
        ("report text", "text is neither a torch zip file nor safetensors"),
        ("report .", "There is no file model.safetensors."),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(words, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no tensors in here")
    with pytest.raises(SystemExit, match=f"^{re.escape(line)}"):
        command_line.main(words.split())


def run(stdout):
    return subprocess.run(
        [sys.executable, "-m", "kvb", "info"], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )


def test_a_reader_that_has_gone():
    reading, writing = os.pipe()
    os.close(reading)
    done = run(writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "Stopped: nobody reads the output any longer.\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk():
    with open("/dev/full", "w") as full:
        done = run(full)
    message = "Cannot write the output: No space left on device. Make room and try again.\n"
    assert (done.returncode, done.stderr) == (1, message)


def test_operators_are_defined_once():
    """Loading their room again changes nothing; defining them again is refused, and what is there goes on working."""
    code = """if True:
        import importlib, sys, torch, kvb
        importlib.reload(kvb.ops)
        sys.modules.pop("kvb.ops")
        importlib.import_module("kvb.ops")
        try:
            importlib.reload(sys.modules["kvb.ops.schemas"])
        except ImportError as error:
            print(error)
        print(kvb.KeyValueBottleneck(2, 9, 3, 4)(torch.randn(5, 2, 3)).shape)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = "kvb.ops cannot be loaded twice: PyTorch keeps operators as long as a process lives; restart it"
    assert done.stdout.splitlines() == [message, "torch.Size([5, 2, 4])"], done.stderr
