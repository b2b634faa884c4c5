from __future__ import annotations

import subprocess
import sys

import pytest

from maisi_tools.errors import InputError, find_input_error

INSTALL = "from maisi_tools.errors import InputError, report_input_errors; report_input_errors()\n"


def run(code: str, repo_root) -> subprocess.CompletedProcess:
    environment = {"PYTHONPATH": str(repo_root / "tools"), "PATH": ""}
    return subprocess.run([sys.executable, "-c", INSTALL + code], capture_output=True, text=True, env=environment)


RAISE = "raise InputError('size 17 is not usable')"


@pytest.mark.parametrize(
    "code",
    [
        RAISE,
        f"try: {RAISE}\nexcept ValueError as error: raise RuntimeError('parsing failed') from error",
        f"try: {RAISE}\nexcept ValueError: {{}}['key']",
        f"report_input_errors()\n{RAISE}",
        "from maisi_tools.errors import TrainingError; raise TrainingError('size 17 is not usable')",
    ],
    ids=["plain", "cause", "context", "installed twice", "training stopped"],
)
def test_input_error_is_one_line_and_status_1(code, repo_root):
    done = run(code, repo_root)
    assert done.returncode == 1
    assert done.stderr == "error: size 17 is not usable\n"


def test_other_errors_keep_their_traceback(repo_root):
    done = run("raise ValueError('a bug')", repo_root)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "ValueError: a bug" in done.stderr


def test_previous_hook_still_runs(repo_root):
    code = (
        "import sys; sys.excepthook = lambda *a: print('previous'); report_input_errors(); report_input_errors(); 1/0"
    )
    done = run(code, repo_root)
    assert done.returncode == 1
    assert (done.stdout, done.stderr) == ("previous\n", "")


def test_find_input_error_ends_on_a_cycle():
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__context__ = second, first
    assert find_input_error(first) is None
    second.__cause__ = InputError("found")
    assert find_input_error(first) is second.__cause__
    assert find_input_error(None) is None
