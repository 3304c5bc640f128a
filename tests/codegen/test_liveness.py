"""Values are freed right after their last use: tried in a process where no frame is evaluated by Dynamo.

torch 2.13 leaves Dynamo's frame evaluation on for good when a backend raises, as other tests let it. CPython
then keeps the arguments of every call alive until the call returns.
"""

import subprocess
import sys
from pathlib import Path


def test_in_a_process_of_its_own():
    cases = Path(__file__).with_name("liveness_process.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, cwd=cases.parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
