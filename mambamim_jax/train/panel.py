"""The panel of a run: pictures of what the network makes of a few crops."""

from __future__ import annotations

from typing import Any

import jax

from mambamim_jax import visualise
from mambamim_jax.train.sharding import Placement
from mambamim_jax.train.step import RUN_SELDOM, State, Task, step_key
from mambamim_jax.types import NumpyArray

CROPS = 2


class Panel:
    """Pictures of the same crops, with the same patches hidden, all through a run.

    Args:
      batch: as a loader gives it; its first crops are drawn.
    """

    def __init__(self, task: Task, batch: dict[str, NumpyArray], seed: int, placement: Placement):
        assert task.panel
        whole, given = placement.everywhere, placement.put({name: batch[name] for name in task.inputs})
        self.batch = jax.jit(_first_crops, out_shardings=whole)(given)
        panel = placement.traced(task.panel)
        self.function = jax.jit(panel, out_shardings=whole, compiler_options=RUN_SELDOM)
        self.titles, self.key = task.titles, step_key(seed, 0)

    def draw(self, state: State, heading: str) -> NumpyArray | None:
        """The picture; None on all processes but the first, which only take their part in the computation."""
        parts = self.function(state["params"], state["batch_stats"], self.batch, self.key)
        if jax.process_index():
            return None
        volumes = {title: jax.device_get(parts[title])[0] for title in self.titles}
        return visualise.draw_panel(volumes, heading)


def _first_crops(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: part[:CROPS] for name, part in batch.items()}
