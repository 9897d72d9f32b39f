"""Devices, disk and screen: the optimiser step, checkpoints, evaluation, metrics and figures."""
