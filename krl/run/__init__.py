"""What a run is: devices, disk and screen; the optimiser step, checkpoints, metrics."""
