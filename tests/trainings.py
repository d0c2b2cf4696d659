"""For tests that train."""

from mhdet.training.learner import Callback, StopFit


class Stop(Callback):
    "Ends a training after a batch of an epoch."

    def __init__(self, epoch, batch):
        self.place = epoch, batch

    def after_batch(self, learner):
        if (learner.epoch, learner.batch) == self.place:
            raise StopFit("stopped by a test")
