"""The value that training works on: one trajectory, with labels at the positions that predict kept steps.

Numpy arrays only; it knows neither RUNs nor models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True)
class Example:
    """One trajectory, cut after the last position that predicts a kept step. A causal model does not need the rest."""

    input_ids: Ints  # [L]
    positions: Ints  # [n], the index in input_ids that predicts each kept step
    label_ids: Ints  # [sum of the label sizes]
    label_weights: npt.NDArray[np.float32]  # the same shape
    label_offsets: Ints  # [n + 1]

    def only(self, index: int) -> Example:
        """One kept step with its prefix: the unit of the published recipe."""
        begin, end = self.label_offsets[index], self.label_offsets[index + 1]
        return Example(
            input_ids=self.input_ids[: self.positions[index] + 1],
            positions=self.positions[index : index + 1],
            label_ids=self.label_ids[begin:end],
            label_weights=self.label_weights[begin:end],
            label_offsets=np.array([0, end - begin]),
        )
