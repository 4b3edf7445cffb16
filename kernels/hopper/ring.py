"""A ring of stages in shared memory, filled by one warpgroup and read by others.

    use i        producer                                      each consumer
                 fill(i): waits for empty[i % stages],
                   from the second round on
                 copies, which arrive at full[i % stages]  ->  take(i): waits for full[i % stages]
                                                               reads the stage
                 fill(i + stages) goes on                  <-  release(i): arrives at empty[i % stages]

A barrier is one bit of phase, so nobody may run a round ahead: the producer cannot, for it waits for `empty`, and a
consumer cannot, for it waits for `full`.
"""
import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


@dataclasses.dataclass(frozen=True)
class Ring:
    """full, empty: arrays of barriers, the first with `parts` a stage, where readers wait for a part of it only."""

    full: Any
    empty: Any
    stages: int
    parts: int = 1

    def stage(self, use):
        """Where use number `use` (an int or an i32 scalar) lies."""
        return use % self.stages if isinstance(use, int) else lax.rem(use, jnp.int32(self.stages))

    def fill(self, use):
        """Waits until all consumers have released the stage. -> the stage."""
        stage = self.stage(use)
        pl.when(use >= self.stages)(lambda: plgpu.barrier_wait(self.empty.at[stage]))
        return stage

    def arriving(self, stage, part=0):
        """The barrier that the copies into a stage arrive at."""
        return self.full.at[stage if self.parts == 1 else stage * self.parts + part]

    def take(self, use, part=0):
        """Waits until the stage is full. -> the stage."""
        stage = self.stage(use)
        plgpu.barrier_wait(self.arriving(stage, part))
        return stage

    def release(self, stage) -> None:
        plgpu.barrier_arrive(self.empty.at[stage])

    def drain(self, uses) -> None:
        """Waits until the last stages of `uses` uses have been released."""
        @pl.loop(jnp.maximum(uses, self.stages), uses + self.stages)
        def _(use):
            plgpu.barrier_wait(self.empty.at[self.stage(use)])
