"""FSDP in Accelerate's loop against torchtitan's loop: the same recipe, model, data, and weights to begin with."""

from pathlib import Path

from tests.accelerate.alone import recipe_file, train_in_turn
from tests.train.conftest import LocalRun

SCRIPT = Path(__file__).with_name("train_llama.py")
SETTINGS = (
    "training.seq_len=64",
    "training.batch_size=2",
    "training.global_batch_size=8",
    "training.max_steps=20",
    "lr_schedule.warmup_steps=0",
    "lr_schedule.decay_ratio=0.0",
    "optimizer.lr=1e-3",
    "wandb.enabled=false",
)
LLAMA = """
[recipe]
schema = 1
extends = "base/debug.toml"
[model]
name = "llama3"
vocab_size = 2048
embed_dim = 128
num_layers = 2
num_heads = 4
num_kv_heads = 2
intermediate_size = 256
"""


def test_accelerates_loop_trains_what_torchtitans_trains(tmp_path: Path) -> None:
    recipe, weights = tmp_path / "llama.toml", tmp_path / "weights"
    recipe.write_text(LLAMA)
    file = recipe_file(tmp_path, str(recipe), *SETTINGS)
    (scripts,) = train_in_turn(tmp_path, SCRIPT, 2, [[str(weights)]], file)
    run = LocalRun(tmp_path / "runs" / "torchtitan", *SETTINGS, f"model.initial_weights={weights}", recipe=str(recipe))
    run.run.path.parent.mkdir()
    run.train()
    torchtitans = list(run.losses().values())
    assert len(torchtitans) == len(scripts) == 20
    assert torchtitans[-1] < torchtitans[0] - 0.1
    apart = [abs(float(one) - other) for one, other in zip(scripts, torchtitans, strict=True)]
    assert max(apart) < 1e-3, apart
