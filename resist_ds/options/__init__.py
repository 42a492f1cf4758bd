"""Every option: its type, default and limits; what was typed, presets, DeepSpeed's JSON files.

Also the strategies as facts. Imports no torch, so that a mistake is answered at once.
"""
