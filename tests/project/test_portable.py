"""`make portable`: that a setting reaches the kernels of the ranks, and that the table says what happened."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from resist_ds.comm import Comm
from tests import THREADS
from tests.conftest import Ranks
from tools import portable

PASSES = "def test_one(): pass\ndef test_other(): pass\n"
FAILS = "import os\ndef test_it(): assert os.environ.get('RESIST_TEST_CAPABILITY') != 'DEFAULT'\n"


def kernels(comm: Comm, folder: Path) -> tuple[str, str, int]:
    """What torch and oneDNN take a rank's processor for, and its threads."""
    said, stdout = folder / f"onednn{comm.rank}", os.dup(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        F.conv2d(torch.ones(2, 16, 8, 8), torch.ones(16, 16, 3, 3))
    os.dup2(stdout, 1)
    isa = re.search(r"info,cpu,isa:(.*)", said.read_text())
    return torch.backends.cpu.get_cpu_capability(), isa[1] if isa else "", torch.get_num_threads()


ONEDNN = {
    "AVX512": "Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions",
    "AVX2": "Intel AVX2",
    "DEFAULT": "Intel SSE4.1",
}


@pytest.mark.ranks
@pytest.mark.numerical
def test_the_ranks_compute_on_the_processor_that_was_asked_for(ranks: Ranks, tmp_path: Path) -> None:
    asked = os.environ.get("RESIST_TEST_CAPABILITY", torch.backends.cpu.get_cpu_capability())
    for capability, isa, threads in ranks(kernels, 2, tmp_path):
        assert (capability, threads) == (asked, THREADS)
        assert "RESIST_TEST_CAPABILITY" not in os.environ or isa == ONEDNN[asked]


def test_a_failure_on_one_processor_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two of the tests pass everywhere, the third as if on this processor only."""
    (tmp_path / "test_some.py").write_text(PASSES + FAILS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [*portable.PYTEST[:4], "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini")]
    monkeypatch.setattr(portable, "PYTEST", (*command, str(tmp_path)))
    here, *_, oldest = (replace(processor, threads=(2,)) for processor in portable.PROCESSORS)
    lacking = portable.Processor("AVX-1024", "AVX1024", {}, (), here=False)
    monkeypatch.setattr(portable, "PROCESSORS", (here, lacking, oldest))
    assert portable.main() == 1
    table = [line.split() for line in capfd.readouterr().out.splitlines()[-4:]]
    assert table[0] == ["as", "if", "on", "threads", "passed", "failed", "skipped", "seconds"]
    assert table[1][:-1] == ["this", "one", "2", "3", "0", "0"]
    assert " ".join(table[2]) == "AVX-1024 skipped: this processor has no AVX-1024"
    assert table[3][:-1] == ["SSE4.1", "2", "2", "1", "0"]
    monkeypatch.setattr(portable, "PROCESSORS", (here, lacking))
    assert portable.main(["-k", "other"]) == 0
    assert portable.main(["-k", "nothing"]) == 1
