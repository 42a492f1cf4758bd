"""What a run tells: measurements, records, trackers (wandb first), words at the terminal, pictures.

Whatever only informs never ends a run.
"""
