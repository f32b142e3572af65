"""What all launch scripts do the same way: output that cannot be printed, Ctrl-C, a package that is missing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mambamim_jax.paths import home

ROOT = Path(__file__).parents[1]
START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have turned it off for what it started
from mambamim_jax.program import run
"""


def start(main: str, encoding: str = "utf-8", **options) -> subprocess.Popen:
    """A process that runs the lines of a ``main(arguments)``."""
    body = "\n".join(f"    {line}" for line in main.strip().splitlines())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    command = [sys.executable, "-W", "error", "-c", f"{START}\ndef main(arguments):\n{body}\nrun(main)\n"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, text=True, encoding=encoding, env=environment, **pipes)


def test_every_launch_script_runs_as_such():
    scripts = sorted((ROOT / "launch").glob("*.py"))
    assert len(scripts) > 5
    for script in scripts:
        assert (
            script.read_text(encoding="utf-8")
            .rpartition('if __name__ == "__main__":\n    ')[2]
            .startswith("run(main")
        )


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", "a ? b ? 2"), ("latin-1", "a ? b ± 2"), ("utf-8", "a → b ± 2")]
)
def test_characters_that_the_output_lacks(encoding, printed):
    process = start(r'print("a \u2192 b \xb1 2")', encoding, env={"PYTHONIOENCODING": encoding})
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert out == printed + "\n"


WORK = """
for step in range(9):
    print("step", step, flush=True)
open(os.environ["DONE"], "w").close()
return 3
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_work_goes_on_without_a_reader(tmp_path, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    environment = {"DONE": str(tmp_path / "done"), "PYTHONUNBUFFERED": unbuffered}
    process = start(WORK, stdout=writing, env=environment)
    os.close(writing)
    assert process.communicate()[1] == "nobody reads the output any more; going on without it\n"
    assert process.returncode == 3
    assert (tmp_path / "done").exists()
    reading, writing = os.pipe()
    os.close(reading)
    process = start(WORK, stdout=writing, stderr=writing, env=environment)
    os.close(writing)
    assert process.wait() == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_work_goes_on_where_its_output_finds_no_room(tmp_path, unbuffered):
    environment = {"DONE": str(tmp_path / "done"), "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        process = start(WORK, stdout=full, env=environment)
        said = "no room for the output; going on, some of its lines are lost\n"
        assert process.communicate()[1] == said
        assert process.returncode == 3
        assert start(WORK, stdout=full, stderr=full, env=environment).wait() == 3
    assert (tmp_path / "done").exists()


def test_a_reader_that_has_seen_enough_is_no_error():
    process = start(
        'print("first")\nsys.stdin.read()\nprint()', stdin=subprocess.PIPE, env={"PYTHONUNBUFFERED": "1"}
    )
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdout = None
    assert process.communicate()[1] == ""
    assert process.returncode == 0


WAITING = """
import threading, types
sys.modules["jax"] = types.ModuleType("jax")
threading.Thread(target=threading.Event().wait).start()  # as one that compiles
print("ready", flush=True)
threading.Event().wait()
"""


def test_ctrl_c_is_one_line_and_waits_for_no_thread():
    with start(WAITING) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "interrupted; run the same command again to start over\n"


def test_a_user_who_does_not_exist_is_one_line(tmp_path):
    says = "error: ~nosuchuser/x: no home folder for ~nosuchuser here; write the whole path\n"
    common = ["--predictions=~nosuchuser/x", "--labels=y", "--output=z"]
    for script, *arguments in (
        ("evaluate", *common),
        ("pretrain", f"--config={ROOT}/configs/pretrain.py:demo", "--workdir=~nosuchuser/x"),
        ("preprocess", f"--config={ROOT}/configs/data.py", "--source=~nosuchuser/x", "--store=z"),
    ):
        command = [sys.executable, ROOT / "launch" / f"{script}.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", says)
    assert not list(tmp_path.iterdir())


def test_one_helper_expands_users():
    own = ROOT / "mambamim_jax" / "paths.py"
    for path in {*(ROOT / "mambamim_jax").rglob("*.py"), *(ROOT / "launch").glob("*.py")} - {own}:
        assert "expanduser" not in path.read_text(encoding="utf-8"), path
    assert home("~/x") == Path.home() / "x"
    assert home("x/~y") == Path("x/~y")


COLLECTING = """
import gc, threading
gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT) if gc.callbacks.pop() else None)
gc.collect()
threading.Event().wait(60)
print("waited for nothing")
"""


def test_ctrl_c_in_a_garbage_collection_is_not_lost():
    process = start(COLLECTING)
    assert process.communicate() == ("", "interrupted; run the same command again to start over\n")
    assert process.returncode == 130


def test_a_missing_package_is_one_line():
    process = start("import no_such_package")
    _, err = process.communicate()
    assert process.returncode == 2
    assert (
        err == "error: no module named no_such_package; install what pyproject.toml lists: pip install -e .\n"
    )
    process = start("import mambamim_jax.no_such_module")
    assert "Traceback" in process.communicate()[1]
    assert process.returncode == 1
