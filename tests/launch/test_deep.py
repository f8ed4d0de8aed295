"""Where torchtitan cannot be asked, that is said; what it answers is tested beside it, in tests/train."""

import sys

import pytest

from tests.conftest import CommandLine
from titan_slurm.launch import deep


def test_an_installation_without_torch(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep, "_COMMAND", (sys.executable, "-c", "import no_such_torch"))
    outcome = cli("validate", "llama3_debug", "--deep")
    assert outcome.code == 2
    assert outcome.errors == [
        "--deep: torchtitan could not be asked: ModuleNotFoundError: No module named 'no_such_torch'"
    ]
