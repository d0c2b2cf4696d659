"For tests that start, watch and stop programs."
import time

LIMIT = 200                                                     # seconds; on an idle machine none takes more than twenty


def until(truth, child):
    "Wait till `truth()`, or fail: the child has ended, or time is up."
    end = time.monotonic() + LIMIT
    while not truth():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end, "time is up"
        time.sleep(.02)
