"""Scripts that run alone, with no run of titan-slurm around them: ranks forked from one process, so that what takes
longest, the imports, is done once."""

import faulthandler
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from titan_slurm.launch.create import resolved_toml
from titan_slurm.recipe.resolve import parse_set, resolve

_PATIENCE_S = 130


def recipe_file(folder: Path, name: str, *settings: str) -> Path:
    """A recipe with its settings, as a file in `folder`."""
    file = folder / "recipe.toml"
    file.write_text(resolved_toml(resolve(name, [parse_set(each) for each in settings], {}, own_model=True)))
    return file


def train_in_turn(
    folder: Path, script: Path, ranks: int, arguments: list[list[str]], recipe: Path | None = None
) -> list[list[str]]:
    """Train by `script` in `folder` on so many ranks, once with each of `arguments`; by a recipe, where they name none.
    Returns of each what it printed as the losses of its steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    if recipe:
        environment |= {"TORCHTITAN_CONFIG_PATH": str(recipe), "ACCELERATE_USE_TORCHTITAN": "true"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.accelerate.alone", str(script), str(ranks), json.dumps(arguments)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return [re.findall(r"^step \d+: loss (\S+)$", part, re.MULTILINE) for part in done.stdout.split("=== next\n")[1:]]


def _train(script: str, ranks: int, arguments: list[str]) -> int:
    store, port = _start_store()
    print("=== next", flush=True)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            os._exit(_run(script, arguments))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.kill(store, signal.SIGKILL)
    os.waitpid(store, 0)
    return max(map(abs, codes))


def _start_store() -> tuple[int, int]:
    """The process of a store as torchrun has one, and its port, which the kernel gives. Not in the process that forks
    the ranks: what the store's thread holds at that moment nobody would ever release in them."""
    parent, (to_read, to_write) = os.getpid(), os.pipe()
    child = os.fork()
    if child == 0:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(to_write, str(store.port).encode())
        os.close(to_write)
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)
    os.close(to_write)
    with os.fdopen(to_read) as port:
        return child, int(port.read())


def _run(script: str, arguments: list[str]) -> int:
    sys.argv = [script, *arguments]
    # Sooner than whoever waits for this loses patience, and what was said with it.
    faulthandler.dump_traceback_later(_PATIENCE_S, exit=True)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as left:
        return int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    # What the script will import; nothing of it starts threads that a fork would miss.
    import transformers.models.gemma3.modeling_gemma3
    import transformers.models.llama.modeling_llama  # noqa: F401

    import titan_slurm.accelerate.accelerator  # noqa: F401

    sys.exit(max(_train(sys.argv[1], int(sys.argv[2]), each) for each in json.loads(sys.argv[3])))
