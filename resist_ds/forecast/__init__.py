"""What a run will take, before anything runs: memory, multiply-adds and bytes, counted on fake tensors.

A prediction is always called one.
"""
