"""What a run needs of its devices before it costs anything; `python -m krl.plan`."""
