"""`validate` says what a recipe costs, and whether it fits the GPU; not to fit is no mistake."""

import json
from typing import Any

import pytest

from tests.conftest import CommandLine

ON_SLURM = ("--cluster", "slurm", "--set", "data.tokenizer=python_docs", "--set", "data.dataset=python_docs")


def validated(cli: CommandLine, *arguments: str) -> dict[str, Any]:
    outcome = cli("validate", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    values: dict[str, Any] = json.loads(outcome.out)
    return values


def test_the_cost_follows_the_verdict(cli: CommandLine) -> None:
    outcome = cli("validate", "llama3_8b", *ON_SLURM, "--gpu", "H100")
    assert outcome.code == 0 and "warning" not in outcome.err
    first, *lines = outcome.out.splitlines()
    assert ": valid: " in first
    assert [line.split()[0] for line in lines if not line.startswith("   ")] == [
        "parameters",
        "tokens",
        "checkpoint",
        "memory",
        "speed",
    ]
    assert "8.03 B" in outcome.out and "96.4 GB each" in outcome.out and "40% of the H100's peak" in outcome.out


def test_cpus_get_parameters_disk_and_tokens_alone(cli: CommandLine) -> None:
    out = cli("validate", "llama3_debug").out
    assert "6.16 M" in out and "74 MB each" in out
    assert "memory" not in out and "speed" not in out
    assert validated(cli, "llama3_debug")["estimate"]["memory"] is None


@pytest.mark.parametrize("place", ["--gpu", "recipe"])
def test_what_does_not_fit_is_valid_with_a_warning(cli: CommandLine, place: str) -> None:
    says_gpu = ("--gpu", "A100-40") if place == "--gpu" else ("--set", "slurm.gpu_type=nvidia_a100-sxm4-40gb")
    outcome = cli("validate", "llama3_8b", *ON_SLURM, "--set", "training.batch_size=4", *says_gpu)
    assert outcome.code == 0 and ": valid: " in outcome.out
    warning = next(line for line in outcome.err.splitlines() if line.startswith("warning: "))
    assert "do not fit the 39 GiB of an A100-40" in warning
    assert 'memory.activation_checkpointing = "full"' in warning


def test_submit_says_so_too(cli: CommandLine) -> None:
    settings = ("--set", "training.batch_size=8", "--set", "slurm.gpu_type=a100-40")
    outcome = cli("submit", "llama3_8b", *ON_SLURM, *settings, "--dry-run")
    assert outcome.code == 0
    assert "do not fit the 39 GiB of an A100-40" in outcome.err


def test_a_site_may_call_its_gpus_what_it_likes_and_a_user_may_not(cli: CommandLine) -> None:
    assert validated(cli, "llama3_8b", *ON_SLURM, "--set", "slurm.gpu_type=big")["estimate"]["gpu"] is None
    outcome = cli("validate", "llama3_8b", *ON_SLURM, "--gpu", "h10")
    assert outcome.code == 2
    assert outcome.errors == ["--gpu h10: no GPU 'h10' is known (did you mean 'H100'?)"]


def test_mfu_and_gpu_decide_on_speed(cli: CommandLine) -> None:
    def speed(*more: str) -> float:
        return float(validated(cli, "llama3_8b", *ON_SLURM, *more)["estimate"]["tokens_per_second"])

    assert speed("--gpu", "H100", "--mfu", "0.2") == pytest.approx(speed("--gpu", "H100") / 2)
    assert speed("--gpu", "A100") < speed("--gpu", "H100") < speed("--gpu", "B200")
    assert cli("validate", "llama3_8b", *ON_SLURM, "--mfu", "40").code == 2


def test_json_has_every_number(cli: CommandLine) -> None:
    values = validated(cli, "llama3_8b", *ON_SLURM, "--gpu", "H100")
    assert values["layout"]["data_parallel"] == 16
    memory = values["estimate"]["memory"]
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
    assert values["estimate"]["fits"] is True
