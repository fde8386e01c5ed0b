"""The peak that a run tells is its own."""

import subprocess
import sys

from qlora_dist.runtime import peak_resident_bytes

CHILD = "from qlora_dist.runtime import peak_resident_bytes; print(peak_resident_bytes())"


def test_a_process_does_not_tell_the_peak_of_the_one_that_started_it():
    held = bytearray(300_000_000)
    for place in range(0, len(held), 4096):
        held[place] = 1
    child = int(subprocess.run([sys.executable, "-c", CHILD], check=True, capture_output=True, text=True).stdout)
    assert peak_resident_bytes() > 300_000_000 > 2 * child
