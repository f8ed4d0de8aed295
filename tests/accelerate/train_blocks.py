"""A script with a model, data and passes of its own: plain blocks with dropout, shuffled. Its argument says what it
does: `whole` trains to the end, `again` forgets that there was one, `break` leaves and saves after seven steps,
`resume` goes on from there; `stream` does the same with samples that have no numbers, and saves as it goes,
`stream-on` goes on from its seventh step; `refused` does what cannot be done."""

import os
import sys
from pathlib import Path
from typing import Any

import tomli
import torch
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from titan_slurm.accelerate import Accelerator, TorchTitanPlugin
from titan_slurm.errors import BadInputError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Dropout(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Stream(IterableDataset[Any]):
    def __init__(self, inputs: torch.Tensor) -> None:
        self.inputs = inputs

    def __iter__(self) -> Any:
        return ((x, x.sum(0, keepdim=True)) for x in self.inputs)


def refuse() -> None:
    """Each of these is told at once."""
    recipe = tomli.loads(Path(os.environ["TORCHTITAN_CONFIG_PATH"]).read_text())
    recipe["checkpointing"]["resume_from_checkpoint"] = "nowhere"
    accelerator = Accelerator(gradient_accumulation_steps=2, torchtitan_plugin=TorchTitanPlugin(recipe))
    said = []

    def expect(act: Any) -> None:
        try:
            act()
        except BadInputError as error:
            said.append(str(error))

    expect(accelerator.load_state)
    model = Model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    expect(lambda: accelerator.prepare(Model()))
    expect(accelerator.load_state)
    # To ask is no step.
    assert not accelerator.should_stop()
    expect(optimizer.step)
    expected = ["there is nothing yet to load", "a second model", "there is no checkpoint in", "no data loader"]
    for line, text in zip(said, expected, strict=True):
        assert text in line, line


what = sys.argv[1]
# Each has a place of its own for what is saved by itself.
place = Path("whole" if what in ("whole", "again") else what)
place.mkdir(exist_ok=True)
os.chdir(place)
if what == "refused":
    refuse()
    sys.exit()
# Loading as the script will have it keeps the recipe's order of samples.
loading = {} if what == "whole" else {"dataloader_config": DataLoaderConfiguration(non_blocking=True)}
accelerator = Accelerator(gradient_accumulation_steps=2, **loading)
set_seed(1)
model = Model()
inputs = torch.randn(44, 16)
# Five steps of two batches in each pass, and a last one of a single batch.
loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=2, shuffle=True)
if what.startswith("stream"):
    loader = DataLoader(Stream(inputs), batch_size=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
if what == "resume":
    assert accelerator.load_state("../saved") == 7
    assert accelerator.completed_steps == 7
if what == "stream-on":
    assert accelerator.load_state("../streamed/step-7") == 7
if what == "again":
    try:
        next(iter(loader))
    except RuntimeError as error:
        assert "own has a checkpoint of step 20 already: call accelerator.load_state()" in str(error)
    else:
        raise AssertionError("an earlier training was overwritten")
for _ in range(0 if what == "again" else 4):
    for x, y in loader:
        # Whether it is asked before or after the batch's work, a step is counted when it is done.
        assert not accelerator.should_stop()
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            mean = accelerator.reduce(loss.detach(), "mean")
            accelerator.print(f"step {accelerator.current_step}: loss {mean.item():.9g}")
            if what == "stream":
                accelerator.save_state("../streamed")
        if what == "break" and accelerator.current_step == 7 and accelerator.sync_gradients:
            break
    if what == "break" and accelerator.completed_steps == 7:
        accelerator.save_state("../saved")
        break
