"""What makes a local step: torch's own engine, DeepSpeed's, FSDP2's; the workers that take turns in it.

The only wing that hands nets to libraries which communicate on their own.
"""
