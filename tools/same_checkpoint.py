#!/usr/bin/env python3
"""Whether two checkpoint folders hold the same, bit for bit: model, optimizer, schedule, data position, whatever layout
of ranks wrote them. Prints how many entries were compared, then each that differs. Exit code 1 if any does.

    python tools/same_checkpoint.py runs/a/checkpoints/step-60 runs/b/checkpoints/step-60
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys


def entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists, by dotted name."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from entries(each, f"{name}.{key}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from entries(each, f"{name}.{index}")
    else:
        yield name.removeprefix("."), value


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def main() -> int:
    one, other = (dict(entries(_load_state_dict_from_keys(checkpoint_id=path))) for path in sys.argv[1:3])
    missing = object()
    names = sorted(one.keys() | other.keys())
    different = [name for name in names if not same(one.get(name, missing), other.get(name, missing))]
    print(f"{len(names)} entries")
    for name in different:
        print(f"differs: {name}")
    return int(bool(different) or not names)


if __name__ == "__main__":
    sys.exit(main())
