"""ResIST: train a deep residual network as shallow sub-ResNets (arXiv 2107.00961, UAI 2022)."""

__version__ = "0.1.0"
