"""From a TOML recipe to a torchtitan training on Slurm that survives what Slurm does to it."""

__version__ = "0.1.0"
