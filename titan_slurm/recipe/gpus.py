"""GPUs by name: what fits in one, and how fast it can be at best."""

import re
from dataclasses import dataclass

from titan_slurm.errors import bad_input, did_you_mean

_GIB = 2**30
_TERA = 10**12


@dataclass(frozen=True)
class Gpu:
    """A GPU: `memory` in bytes, as torch reports it, and dense peaks in floating-point operations per second."""

    name: str
    memory: int
    bf16: float
    fp32: float


# Memory: what cudaGetDeviceProperties says, a little less than on the box. Peaks: the vendors' data sheets, without
# sparsity and for the SXM form where there are several; those of bf16 are the ones that torchtitan computes MFU with.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("V100", int(31.7 * _GIB), 125 * _TERA, 15.7 * _TERA),
        Gpu("A100-40", int(39.4 * _GIB), 312 * _TERA, 19.5 * _TERA),
        Gpu("A100-80", int(79.2 * _GIB), 312 * _TERA, 19.5 * _TERA),
        Gpu("A40", int(44.4 * _GIB), 149.7 * _TERA, 37.4 * _TERA),
        Gpu("A6000", int(47.5 * _GIB), 154.85 * _TERA, 38.7 * _TERA),
        Gpu("L40S", int(44.4 * _GIB), 362 * _TERA, 91.6 * _TERA),
        Gpu("H100", int(79.1 * _GIB), 989 * _TERA, 67 * _TERA),
        Gpu("H20", int(95.1 * _GIB), 148 * _TERA, 44 * _TERA),
        Gpu("H200", int(139.8 * _GIB), 989 * _TERA, 67 * _TERA),
        Gpu("GH200", int(94.5 * _GIB), 989 * _TERA, 67 * _TERA),
        Gpu("B200", int(178.3 * _GIB), 2250 * _TERA, 75 * _TERA),
        Gpu("GB200", int(184.0 * _GIB), 2500 * _TERA, 80 * _TERA),
        Gpu("B300", int(267.6 * _GIB), 2250 * _TERA, 75 * _TERA),
        Gpu("MI250X", int(63.9 * _GIB), 191.5 * _TERA, 47.9 * _TERA),
        Gpu("MI300X", int(191.7 * _GIB), 1300 * _TERA, 163.4 * _TERA),
        Gpu("MI325X", int(255.7 * _GIB), 1300 * _TERA, 163.4 * _TERA),
    )
}


def find_gpu(name: str) -> Gpu | None:
    """The GPU of that name, in any case. Slurm's types and the driver's names (nvidia_a100-sxm4-40gb) are names too."""
    words = re.split(r"[-_ ]+", name.upper())
    if "A100" in words:
        return GPUS["A100-40" if any(word.startswith("40") for word in words) else "A100-80"]
    return next((GPUS[word] for word in words if word in GPUS), None)


def named_gpu(name: str, where: str) -> Gpu:
    """The same, or BadInputError, which names the place that `name` stands in."""
    gpu = find_gpu(name)
    if gpu is None:
        raise bad_input(where, f"no GPU {name!r} is known", did_you_mean(name.upper(), GPUS))
    return gpu
