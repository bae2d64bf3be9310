"""The command line itself: quick to answer, and what it says of a user's mistakes."""

import resource
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "trl", "pydantic", "sentence_transformers")


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "arguments", [("-c", "import llmdistill"), ("-m", "llmdistill", "--help")], ids=["import", "help"]
)
def test_starts_in_under_a_second(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_python(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_help_imports_nothing_heavy():
    check = (
        "import sys, runpy; sys.argv = ['llmdistill', '--help']\n"
        "try: runpy.run_module('llmdistill', run_name='__main__')\n"
        f"except SystemExit: print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = run_python("-c", check)
    assert "run" in result.stdout
    assert result.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("run", "nowhere.yaml"), "Cannot read the recipe nowhere.yaml: No such file"),
        (("samples", "smollm2-instruct"), "no sample model `smollm2-instruct`. Did you mean `smollm2-135m-instruct`"),
        (
            ("evaluate", "recipes/quickstart.yaml", "training.output_dir=/nowhere/run"),
            "no trained model in /nowhere/run",
        ),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_one(arguments, complaint):
    result = run_python("-m", "llmdistill", *arguments)
    assert result.returncode == 1
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr
