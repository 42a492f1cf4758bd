"""The README's picture shows what docs/RESULTS.md says, and goes with it when that changes."""

import pytest
from PIL import Image

from tests import ROOT
from tools import draw_results
from tools.accuracy import records

TEXT = draw_results.RESULTS.read_text(encoding="utf-8")
RECORDS = records.load(draw_results.RECORDS)


def test_figures_are_read_off_the_tables() -> None:
    speed, sent, _, accuracy = draw_results.figures(TEXT, RECORDS).values()
    assert [bar.name for bar in speed] == ["resist", "local_sgd", "ddp"]
    for bar in (*speed, *accuracy):
        assert bar.low <= bar.value <= bar.high
    for bar in (*speed, *sent):  # as the table writes them
        assert f"**{bar.value:,.0f}**" in TEXT or f"**{bar.value}" in TEXT


def test_the_picture_was_drawn_from_the_tables_as_they_are() -> None:
    with Image.open(draw_results.PICTURE) as picture:
        carried = picture.info["Description"]
    assert carried == draw_results.as_json(draw_results.figures(TEXT, RECORDS)), (
        "run python tools/draw_results.py"
    )
    assert "docs/results.png" in (ROOT / "README.md").read_text()


def test_a_table_without_figures_is_no_picture() -> None:
    with pytest.raises(ValueError, match="is no figure"):
        draw_results.figures(
            TEXT.replace("| speed (samples/s) | **", "| speed (samples/s) | about "), RECORDS
        )
    with pytest.raises(ValueError, match="no table under"):
        draw_results.figures(TEXT.replace("## Strategies", "## The strategies"), RECORDS)
    with pytest.raises(ValueError, match="has no run of resist"):
        draw_results.figures(TEXT, [])
