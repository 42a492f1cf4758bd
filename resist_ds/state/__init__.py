"""What is on the disk: checkpoints, saving and resuming, exporting, the folder of a run.

A checkpoint is whole or not there, and nothing is ever unpickled.
"""
