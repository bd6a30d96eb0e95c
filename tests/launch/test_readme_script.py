"""The script that the README prints, pasted into a file and started as it says: it trains."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.test_train import environment as environment_of_tests
from tests.ranks import free_port

pytestmark = pytest.mark.launch

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCHER = Path(sys.executable).parent / "deepspeed"
TIME_LIMIT_S = 300  # the first start on a machine compiles an operation of DeepSpeed's


def test_the_readmes_script_trains_two_stages_from_anywhere(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (tmp_path / "my_script.py").write_text(script, encoding="utf-8")
    command = [str(LAUNCHER), "--num_gpus", "2", "--master_port", str(free_port()), "my_script.py"]
    environment = {**environment_of_tests(), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", done.stdout, flags=re.MULTILINE)]
    assert len(losses) >= 2, done.stdout
    assert losses[-1] < losses[0] / 2  # patterns of ten classes in noise: 2.3 is chance
    assert " ".join(["deepspeed", *command[1:3], "my_script.py"]) in readme
