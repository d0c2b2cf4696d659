"Test processes side by side compute with one thread each, as do their children: more threads than cores are slower than one."
import os

if "PYTEST_XDIST_WORKER" in os.environ: os.environ.setdefault("OMP_NUM_THREADS", "1")
