"""A model that only loading shows to be none: said in one line as soon as an engine says so, and nothing is left."""

import subprocess
import sys
from pathlib import Path

from app.local_process import RunFolder
from tests.local.commands import ROOT

REASON = "model '/some/folder': the checkpoint lacks lm_head.weight"
# In the place of a server: an engine has refused the model, and Serve goes on trying.
FAKE = f"""#!{sys.executable}
import time
print("Traceback (most recent call last):")
print("deployments.errors.UnsupportedModelError: {REASON}", flush=True)
time.sleep(300)
"""


def test_a_refusal_ends_the_start_at_once_in_one_line_and_leaves_nothing(
    tmp_path: Path, folder: RunFolder, port: int
) -> None:
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    code = "import sys, app.local; sys.executable = sys.argv.pop(1); sys.exit(app.local.main())"
    command = [sys.executable, "-c", code, str(fake), "--run-dir", str(folder.path), "up", "--port", str(port)]
    failed = subprocess.run(
        [*command, "--app", "tests.tiny_graphs:healthy"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (failed.returncode, failed.stderr) == (1, f"{REASON}\n")
    assert folder.server() is None
