"""What makes a local step: torch's own engine, DeepSpeed's, FSDP2's; the workers that take turns in it.

`place` makes a rank's workers: `workers` that take turns in an `engine`, or, where a net is `spread` over
all ranks, one of `fsdp` or `zero`. `local` runs ℓ steps of whichever, at the rates of `rates`.
`parallel` hands nets to libraries that communicate on their own: no other wing does.
"""
