"""Settings of a whole process are tried in one of their own."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, threading, torch
from deployments.engine.process import configure_process

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    x = torch.ones(512, 1024)  # 2 MiB, as activations are
    for _ in range(20):
        y = torch.cat([x, x]).mul(2.0)

counts = []

def loop():  # an engine runs in a thread of its own
    for _ in range(4):  # the heap grows to what is needed
        step()
    before = faults()
    for _ in range(5):
        step()
    counts.append(faults() - before)

others = threading.Event()  # threads that were there before have their own arenas
for _ in range(4):
    threading.Thread(target=lambda: (bytearray(1 << 17), others.wait()), daemon=True).start()
if sys.argv[1] == "configured":
    configure_process(num_threads=1)
    assert torch.get_num_threads() == 1
else:
    torch.set_num_threads(1)
thread = threading.Thread(target=loop)
thread.start()
thread.join()
print(counts[0])
"""


def count_faults(mode: str) -> int:
    result = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_an_engines_process_does_not_fault_its_activations_in_anew_in_every_step() -> None:
    assert count_faults("configured") < 0.2 * count_faults("plain")


KERNEL = """
import numba, torch
from deployments.engine.kernels.cpu import silu_mul, use_torch_threads
from deployments.engine.process import configure_process
configure_process(num_threads=1)
assert torch.get_num_threads() == 1  # what torch computes first in a thread sets OpenMP's number
silu_mul(torch.zeros(4, 8))
use_torch_threads()
print(torch.get_num_threads(), numba.get_num_threads())
"""


def test_torch_and_the_kernels_keep_the_number_of_threads_after_a_kernel_ran() -> None:
    settings = {**os.environ, "NUMBA_NUM_THREADS": "2"}  # as on two cores
    command = [sys.executable, "-c", KERNEL]
    assert subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout == "1 1\n"
