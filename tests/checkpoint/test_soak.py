"""Two minutes of benchmarks/soak.py: no wrong token, no stop, no growth, with faults injected from a seed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_soak():
    seed = int.from_bytes(os.urandom(2), "little")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "soak.py"), "--seconds", "120", "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    print(done.stdout[-3000:], done.stderr[-3000:])
    figures = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0 and not figures["problems"] and figures["rollouts"] > 5 and figures["reloads"] > 3
