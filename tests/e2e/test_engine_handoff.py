"""Runs `engine_handoff_checks.py` in a process of its own.

Ray watches the chunks that a process owns in a thread that outlives `ray.shutdown`, and disturbs the next Ray there.
"""

import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).with_name("engine_handoff_checks.py")


def test_engines_hand_over_and_survive_each_other():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert ran.returncode == 0, ran.stdout[-5000:]
    assert "7 passed" in ran.stdout
