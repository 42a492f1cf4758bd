"""A folder per wing of the package; `run`: whole runs; `project`: what is around the package."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""Of the checkout."""
