"""How a run is started: on this machine, and with torchrun, deepspeed, mpirun or Slurm. Nothing here imports torch."""
