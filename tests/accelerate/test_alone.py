"""Scripts that run without titan-slurm around them, on CPU ranks of this machine."""

import json
from pathlib import Path

from tests.accelerate.alone import recipe_file, train_in_turn

SCRIPT = Path(__file__).with_name("train_blocks.py")
RECIPE = (
    "base/debug",
    "training.batch_size=2",
    "training.seq_len=64",
    "training.gradient_accumulation_steps=2",
    "training.max_steps=20",
    "checkpointing.save_interval=1000",
    "checkpointing.save_dir=own",
    "checkpointing.keep_latest=2",
    "memory.gradient_checkpointing=true",
)


def test_a_script_goes_on_within_a_pass_over_its_data_as_if_it_had_not_ended(tmp_path: Path) -> None:
    whats = [["whole"], ["again"], ["break"], ["resume"], ["stream"], ["stream-on"], ["refused"]]
    lines = train_in_turn(tmp_path, SCRIPT, 2, whats, recipe_file(tmp_path, *RECIPE))
    whole, again, begun, resumed, streamed, streamed_on, _ = lines
    # 44 samples are 11 batches for each of two ranks: five steps of two batches, and one of what is left.
    assert len(whole) == 20
    assert again == []
    assert begun == whole[:7]
    assert resumed == whole[7:]
    commit = json.loads((tmp_path / "saved" / "step-7" / "commit.json").read_text())
    assert commit["step"] == 7
    assert len(streamed) == 20
    assert streamed_on == streamed[7:]
    # What a script saves in a place of its own is not the recipe's to remove.
    assert len(list((tmp_path / "streamed").glob("step-*"))) == 20
    # The last step is saved by itself where the recipe says, whatever the script does.
    assert (tmp_path / "resume" / "own" / "step-20" / "commit.json").exists()
