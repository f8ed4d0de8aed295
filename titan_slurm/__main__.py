from titan_slurm.cli import main

main()
