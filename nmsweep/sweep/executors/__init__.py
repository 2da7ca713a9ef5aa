"""Where the cells of a sweep run: in this process, in workers of this machine, on Slurm, on Ray. One class for each launcher."""
