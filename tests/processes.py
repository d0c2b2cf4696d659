"""For tests that start, watch and stop programs."""

import time

LIMIT = 200  # seconds; on an idle machine none takes more than twenty


def until(condition, child):
    "Wait till `condition()` is true, or fail: the child has ended, or time is up."
    end = time.monotonic() + LIMIT
    while not condition():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end, "time is up"
        time.sleep(0.02)
