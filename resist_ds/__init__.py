"""ResIST: train a deep residual network as shallow sub-ResNets (arXiv 2107.00961, UAI 2022)."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`from resist_ds import ResIST`; the import of torch waits until then."""
    if name == "ResIST":
        from resist_ds.api import ResIST

        return ResIST
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
