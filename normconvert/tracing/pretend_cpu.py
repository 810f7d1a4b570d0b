"""A model without weights that believes to have them, on the CPU.

A model on the meta device is asked to run by `torch.export` and to say which inputs it takes. Model code may look where
its tensors are (some of transformers casts to float32 on the CPU only), and what is traced has to be what the
verification runs. So the tensors are fake ones on the CPU meanwhile: shapes, dtypes and a device, no values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode

from normconvert.compat.torch import DisableTorchFunction, FakeTensorMode
from normconvert.tracing.operands import FACTS, operands

Result = TypeVar("Result")


@contextmanager
def pretending(model: nn.Module, device: str = "cpu") -> Iterator[FakeTensorMode]:
    """Fake tensors instead of parameters and buffers, and fake mode in force, within; the old ones afterwards.

    Args:
        model: on the meta device; tensors with values are faked as well. Tied ones stay tied.
        device: where the fake tensors pretend to be.
    """
    # Real tensors are let in: model code makes some in its constructor. With a shape environment a shape that depends
    # on values is a symbol instead of an error; static shapes keep all other sizes numbers.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    made: dict[int, Tensor] = {}
    held: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    with mode, torch.no_grad():
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    held.append((table, name, tensor))  # type: ignore[arg-type]
                    if id(tensor) not in made:
                        made[id(tensor)] = _fake(tensor, device)
        try:
            for table, name, tensor in held:
                table[name] = made[id(tensor)]
            yield mode
        finally:
            for table, name, tensor in held:
                table[name] = tensor


def _fake(tensor: Tensor, device: str) -> Tensor:
    # With the strides, which decide whether a view is possible.
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def on_either_device(run: Callable[[str, AbstractContextManager[Any]], Result]) -> Result:
    """``run("cpu", watch)``; if that fails after a tensor that stayed on the meta device met others, with ``"meta"``.

    Tensors that are neither parameters nor buffers are where the model was built, and nobody can find them all.

    Args:
        run: holds ``watch`` open while code of the model runs, and no longer: what makes graphs asks tensors a dozen
            times as much as the model does.

    Raises:
        Exception: of the last run.
    """
    meetings = _Meetings()
    try:
        return run("cpu", meetings)
    except Exception:
        # torch has no class of error for tensors of two devices, and model code may raise another.
        if not meetings.seen:
            raise
    return run("meta", nullcontext())


class _Meetings(TorchFunctionMode):
    """Sees whether an operation takes a tensor on the meta device together with one that is elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not (self.seen or func in FACTS):
            tensors = operands(args, kwargs)
            if len(tensors) > 1:
                with DisableTorchFunction():
                    devices = {tensor.device.type for tensor in tensors}
                self.seen = len(devices) > 1 and "meta" in devices
        return func(*args, **(kwargs or {}))
