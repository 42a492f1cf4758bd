"""Learning on real photographs: some of CIFAR-10 as JPEG files, where they lie beside the repository."""

import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from resist_ds.comm import Comm
from resist_ds.options.config import Config
from resist_ds.trainer import Trainer

ARCHIVE = Path(__file__).parents[3] / "shared" / "data" / "cifar10-jpeg.tar.xz"
TRAIN, TEST = 300, 60  # images per class


@pytest.mark.data
@pytest.mark.skipif(not ARCHIVE.exists(), reason=f"no {ARCHIVE.name} beside the repository")
def test_learns_well_above_chance(tmp_path: Path) -> None:
    """Four narrow sub-ResNets, 3,000 images, about 6 passes: chance is 10 %."""
    wanted: Counter[tuple[str, str]] = Counter()
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            parts = Path(member.name).parts[-3:]
            if not member.isfile() or len(parts) < 3:
                continue
            split, label, name = parts
            wanted[split, label] += 1
            if wanted[split, label] <= (TRAIN if split == "train" else TEST):
                target = tmp_path / "data" / split / label / name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())
    config = Config(
        dataset="imagefolder",
        data_dir=str(tmp_path / "data"),
        img_size=32,
        workers=4,
        batch_size=16,
        local_steps=20,
        rounds=14,
        lr=0.05,
        schedule="cosine",
        cpu_threads=1,
        eval_every=0,
        log_with="none",
        progress=False,
        output_dir=str(tmp_path / "run"),
    )
    Trainer(Comm(), config).run()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["samples_seen"] == 14 * 20 * 4 * 16
    assert records[-1]["eval/accuracy"] > 0.25
