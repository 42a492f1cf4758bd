"""ResIST itself (paper, section 3): who holds what, and what a round does to the global model.

Pure plans (`partition`), then the exchanges that run them (`sync`, `evaluate`).
"""
