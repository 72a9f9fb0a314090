"""Training one model: loop, optimizer, schedule, checkpoints. No Ray, but for one glue module."""
