"""A script with a model, data and passes of its own: plain blocks with dropout, shuffled. Its argument says what it
does: `whole` trains to the end, `again` forgets that there was one, `break` leaves and saves after seven steps,
`resume` goes on from there."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from titan_slurm.accelerate import Accelerator


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


what = sys.argv[1]
# Each has a place of its own for what is saved by itself.
place = Path("whole" if what in ("whole", "again") else what)
place.mkdir(exist_ok=True)
os.chdir(place)
accelerator = Accelerator(gradient_accumulation_steps=2)
set_seed(1)
model = Model()
inputs = torch.randn(44, 16)
# Five steps of two batches in each pass, and a last one of a single batch.
loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=2, shuffle=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
if what == "resume":
    assert accelerator.load_state("../saved") == 7
    assert accelerator.completed_steps == 7
if what == "again":
    try:
        next(iter(loader))
    except RuntimeError as error:
        assert "own has a checkpoint of step 20 already: call accelerator.load_state()" in str(error)
    else:
        raise AssertionError("an earlier training was overwritten")
for _ in range(0 if what == "again" else 4):
    for x, y in loader:
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
        if what == "break" and accelerator.current_step == 7 and accelerator.sync_gradients:
            break
    if what == "break" and accelerator.completed_steps == 7:
        accelerator.save_state("../saved")
        break
