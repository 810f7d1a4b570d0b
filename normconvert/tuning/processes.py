"""The processes of a run: one, or those that ``accelerate launch`` has started. accelerate finds them and joins them.

Gradients are averaged here, in one piece after the backward pass, since the training norms exchange statistics within
it, in the same order in each process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from normconvert.errors import InputError


class Processes:
    """This process among the others.

    Attributes:
        rank, world: which one it is, and how many there are.
        device: where it computes.

    Args:
        device: ``cpu``, ``cuda``, ...; of several processes on GPUs each takes its own.

    Raises:
        InputError: accelerate is not installed.
    """

    def __init__(self, device: str = "cpu") -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise InputError("swap needs accelerate: pip install 'normconvert[swap]'") from error
        state: Any = PartialState(cpu=device == "cpu")
        self.rank, self.world = int(state.process_index), int(state.num_processes)
        self.device: torch.device = state.device if self.world > 1 else torch.device(device)
        self._state = state

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            self._state.wait_for_everyone()

    def mean(self, values: Iterable[float]) -> list[float]:
        """Numbers averaged over the processes."""
        here = torch.tensor(list(values), dtype=torch.float64, device=_where(self.device))
        if self.world > 1:
            dist.all_reduce(here)
        return [value / self.world for value in here.tolist()]

    def gathered(self, rows: Tensor) -> Tensor:
        """The columns of all processes, side by side: (n, columns here) -> (n, columns of all), on the CPU."""
        if self.world == 1:
            return rows
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, rows)
        return torch.cat(found, 1)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes; one that is missing here counts as zero."""
        if self.world == 1:
            return
        parameters = list(parameters)
        # All processes must send pieces of one length, or each number is added to another parameter's.
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([_grad(p).reshape(-1) for p in parameters])
        dist.all_reduce(flat)
        flat /= self.world
        start = 0
        for parameter in parameters:
            n = parameter.numel()
            _grad(parameter).copy_(flat[start : start + n].reshape(parameter.shape))
            start += n


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _where(device: torch.device) -> torch.device:
    # Not every accelerator has float64, in which these numbers are.
    return device if device.type == "cuda" else torch.device("cpu")
