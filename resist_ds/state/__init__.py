"""What is on the disk: checkpoints, saving and resuming, exporting, the folder of a run.

`start` is what a run begins from: a checkpoint that is resumed, say. `policy` says when to save, `saver`
does it; `checkpoint` and `run_state` are the format, `storage` the files that are whole or not there;
`folder` is the run's own. Nothing is ever unpickled.
"""
