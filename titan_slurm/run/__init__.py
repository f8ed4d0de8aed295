"""The run directory: the one thing that both sides of Slurm share. Standard library only, so that every node,
container and login shell that has Python can read and write it."""
