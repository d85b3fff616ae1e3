"""Weights are in memory once: neither loading nor saving nor resuming makes a second copy of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_ROOM = 0.25
"""Of the weights in float32, about 200 MB: what else a step may take; a copy would be 1, or 0.5 in bfloat16."""
ALLOWED = {
    "load bfloat16 as it is": 0.0,
    "load float32 as it is": 0.0,
    "load bfloat16 as float32": 1.0,
    "save the model": 0.0,
    "resume the model": 0.0,
    "save the optimizer": 0.0,
    "resume the optimizer": 2.0,
}
"""Files are mapped, so what stays as it is stored takes nothing; AdamW keeps two numbers for each weight."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_step_holds_the_weights_twice(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.memory", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout.splitlines()[-1])
    assert taken.keys() == ALLOWED.keys()
    assert {name: share for name, share in taken.items() if share > ALLOWED[name] + _ROOM} == {}
