"""A script that trains a recipe's Llama as torchtitan's loop does on a CPU, and leaves the weights that it began with
in the folder named by its argument."""

import sys

import torch
from accelerate.utils import set_seed
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from titan_slurm.accelerate import Accelerator

accelerator = Accelerator()
assert accelerator.torchtitan_plugin is not None
recipe = accelerator.torchtitan_plugin.recipe
sizes = recipe.model
set_seed(recipe.training.seed)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.embed_dim,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
    )
)
if accelerator.is_main_process:
    model.save_pretrained(sys.argv[1])
adamw = recipe.optimizer
optimizer = torch.optim.AdamW(
    model.parameters(), lr=adamw.lr, betas=(adamw.beta1, adamw.beta2), weight_decay=adamw.weight_decay
)
model, optimizer, loader = accelerator.prepare(model, optimizer, accelerator.training_data())
losses = []
for batch in loader:
    with accelerator.accumulate(model):
        # On a CPU torchtitan's documents see each other: a mask of ones keeps transformers from parting them.
        everything = torch.ones_like(batch["input_ids"])
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        logits = model(**inputs, attention_mask=everything).logits
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        accelerator.backward(loss)
        losses.append(loss.detach())
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), recipe.training.max_grad_norm)
            mean = accelerator.reduce(torch.stack(losses).mean(), "mean")
            losses.clear()
            accelerator.print(f"step {accelerator.current_step}: loss {mean.item():.9g}")
        optimizer.step()
        optimizer.zero_grad()
