"""A source of weights for `generate(weights=)`."""

import types


class Scripted:
    """Weights that turn up at the n-th look, as a Reader's would: {look: (step, state)}."""

    def __init__(self, arrivals: dict, active_step: int = 3):
        self.arrivals, self.active_step, self.looks = arrivals, active_step, 0

    def take(self):
        self.looks += 1
        if self.looks not in self.arrivals:
            return None
        self.active_step, state = self.arrivals[self.looks]
        return types.SimpleNamespace(step=self.active_step, state=state)
