"""A script that keeps milestones of its own, logs nothing, evaluates for longer than a step may take, hangs within its
fifth step once, and runs out of data after the sixth of ten. In German: zufällig."""

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from titan_slurm.accelerate import Accelerator

parser = argparse.ArgumentParser()
parser.add_argument("--milestones", type=Path, required=True)
milestones = parser.parse_args().milestones


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


accelerator = Accelerator()
model = Model()
optimizer = torch.optim.AdamW(model.parameters())
# Six steps of two batches.
loader = DataLoader(TensorDataset(torch.randn(24, 8)), batch_size=2)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
scheduler = accelerator.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
began = accelerator.load_state(milestones / "step-2")
print(f"began at {began}")
hangs = milestones / "hung"
for (x,) in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(x).pow(2).mean())
        if accelerator.current_step == 5 and not hangs.exists():
            hangs.touch()
            time.sleep(600)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        if accelerator.current_step == 2:
            print("evaluating")
            time.sleep(4)
        accelerator.save_state(milestones)
print("evaluating")
time.sleep(4)
