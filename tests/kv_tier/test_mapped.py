"""What Linux tells of mapped files: where they are, and which pages have memory."""

import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from deployments.kv_tier.mapped import is_written, mappings

PAGE = mmap.PAGESIZE


def test_a_page_has_memory_once_any_process_has_written_to_it() -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="kvrelay-test-") as file:
        os.truncate(file.name, 8 * PAGE)
        with mmap.mmap(file.fileno(), 8 * PAGE) as memory:
            (region,) = mappings(file.name)
            assert len(region) == 8 * PAGE
            assert mappings("/dev/shm/kvrelay-test-")[0] == region
            assert not any(is_written(page) for page in region[::PAGE])
            memory[2 * PAGE + 5] = 1
            code = f"f = open({file.name!r}, 'r+b', buffering=0); f.seek({5 * PAGE}); f.write(b'x')"
            subprocess.run([sys.executable, "-c", code], check=True)
            assert [is_written(page + 7) for page in region[::PAGE]] == [i in (2, 5) for i in range(8)]
            assert Path(file.name).read_bytes()[5 * PAGE] == ord("x")
            assert not is_written(region.start + 6 * PAGE), "reading gives a page no memory"
    assert mappings(file.name) == []
