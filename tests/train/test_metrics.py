"""What is written of a logged step, with no training around it; tests/train/test_lock.py has that of a real one."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train import data_helpers  # noqa: F401 (torchtitan on a CPU)
from titan_slurm.run import metrics
from titan_slurm.train.metrics import MetricsProcessor, _StepLogger, peak_flops

STEP = {
    "loss_metrics/global_avg_loss": 5.0,
    "loss_metrics/global_max_loss": 6.0,
    "grad_norm": 1.0,
    "throughput(tps)": 100.0,
    "memory/max_active(GiB)": -1.0,
    "lr/group_0": 0.1,
}


def logger(folder: Path, attempt: int, tensorboard: Path | None = None) -> _StepLogger:
    """The logger of two ranks in an attempt of the run in that folder."""
    config = MetricsProcessor.Config(
        metrics_file=str(folder / "metrics.jsonl"),
        attempt=attempt,
        tokens_per_step=8,
        enable_tensorboard=tensorboard is not None,
        tensorboard_folder=str(tensorboard or ""),
    )
    made = _StepLogger(config, world_size=2)
    made.times = {"step_seconds": 0.5, "data_seconds": 0.1}
    return made


def test_steps_that_are_done_again_are_marked(tmp_path: Path) -> None:
    first = logger(tmp_path, 1)
    for step in (1, 2, 3):
        first.log(STEP, step)
    second = logger(tmp_path, 2)
    for step in (2, 3, 4):
        second.log(STEP, step)
    # It fell back farther than the attempt before had come.
    logger(tmp_path, 3).log(STEP, 4)
    lines = [(line["attempt"], line["step"], line["replayed"]) for line in metrics.logged(tmp_path / "metrics.jsonl")]
    assert lines == [
        (1, 1, False),
        (1, 2, False),
        (1, 3, False),
        (2, 2, True),
        (2, 3, True),
        (2, 4, False),
        (3, 4, True),
    ]


def test_a_run_has_one_speed_and_one_count_of_tokens(tmp_path: Path) -> None:
    logger(tmp_path, 1).log(STEP, 3)
    [line] = metrics.logged(tmp_path / "metrics.jsonl")
    assert (line["tokens_per_second"], line["tokens"], line["lr"]) == (200.0, 24, 0.1)
    assert "memory_active_gib" not in line


def test_a_validation_has_a_line_of_its_own(tmp_path: Path) -> None:
    logger(tmp_path, 1).log({"validation_metrics/loss": 4.5}, 3)
    [line] = metrics.validations(tmp_path / "metrics.jsonl")
    assert (line["step"], line["attempt"], line["validation_loss"]) == (3, 1, 4.5)


def test_what_else_torchtitan_logs_is_kept_under_its_names(tmp_path: Path) -> None:
    logger(tmp_path, 1).log({**STEP, "experts/imbalance": 2.0}, 3)
    [line] = metrics.logged(tmp_path / "metrics.jsonl")
    assert line["more"] == {"throughput(tps)": 100.0, "lr/group_0": 0.1, "experts/imbalance": 2.0}


def test_tensorboard_has_one_curve_over_all_attempts(tmp_path: Path) -> None:
    for attempt, steps in ((1, range(1, 6)), (2, range(4, 8))):
        one = logger(tmp_path, attempt, tmp_path / "tensorboard")
        for step in steps:
            one.log({**STEP, "loss_metrics/global_avg_loss": float(attempt)}, step)
        # The first is killed, and has nothing left to write.
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    curve = [(each.step, each.value) for each in read.Scalars("loss_metrics/global_avg_loss")]
    assert curve == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0), (7, 2.0)]


def test_a_file_that_cannot_be_written_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one = logger(tmp_path / "gone", 1, tmp_path / "file" / "tensorboard")
    for step in (3, 4):
        one.log(STEP, step)
    one.close()
    assert one.last["step"] == 4


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H20-3e", 148e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_gpu(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
    # Of fp32 there is no such number: it depends on what PyTorch may round to.
    assert peak_flops(name, "float32") is None
