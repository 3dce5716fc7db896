"""Before torch is imported: one thread a process, since pytest runs one process a core, and none that spins while waiting."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

pytest_plugins = ["tests.exported"]
