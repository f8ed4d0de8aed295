"""Train a small Llama or Gemma, with random weights, by a loop of Hugging Face Accelerate's.

On Slurm:           titan-slurm submit llama3_debug --script train_with_accelerator.py --nodes 2 -- --model gemma
On this machine:    TORCHTITAN_CONFIG_PATH=llama3_debug accelerate launch --multi_gpu --num_processes 2 \
                        train_with_accelerator.py --model gemma
(--multi_gpu is Accelerate's word for several processes; without a GPU they train on the CPU.)
"""

import argparse
import math

import torch
from accelerate.utils import set_seed
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from titan_slurm.accelerate import Accelerator, TorchTitanPlugin

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    # With a cache, transformers lets the documents of a sequence see each other, whatever position_ids say.
    "use_cache": False,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "gemma": Gemma3TextConfig(**SIZES, query_pre_attn_scalar=32, sliding_window=32, sliding_window_pattern=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="llama")
    parser.add_argument("--recipe", help="a recipe; TORCHTITAN_CONFIG_PATH, or the run's own, if left out")
    arguments = parser.parse_args()

    accelerator = Accelerator(torchtitan_plugin=TorchTitanPlugin(arguments.recipe))
    recipe = accelerator.torchtitan_plugin.recipe
    steps, warmup = recipe.training.max_steps, recipe.lr_schedule.warmup_steps or 1

    set_seed(recipe.training.seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[arguments.model])
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.optimizer.lr or 3e-3,
        betas=(recipe.optimizer.beta1, recipe.optimizer.beta2),
        weight_decay=recipe.optimizer.weight_decay,
    )

    def rate(turn: int) -> float:
        # Accelerate turns the schedule once per process and step.
        step = turn / accelerator.num_processes
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, accelerator.training_data(), scheduler)
    accelerator.load_state()

    losses: list[torch.Tensor] = []
    while not accelerator.should_stop():
        for batch in loader:
            with accelerator.accumulate(model):
                logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
                loss = cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
                accelerator.backward(loss)
                losses.append(loss.detach())
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), recipe.training.max_grad_norm)
                    mean = accelerator.reduce(torch.stack(losses).mean(), "mean")
                    losses.clear()
                    rate_now = scheduler.get_last_lr()[0]
                    accelerator.log({"loss": mean, "grad_norm": norm, "lr": rate_now})
                    accelerator.print(f"step {accelerator.current_step}: loss {mean.item():.9g}")
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.should_stop():
                break


if __name__ == "__main__":
    main()
