"""Which memory a tensor's values are in, and how often that was written to; told of tensors without values as well."""

from __future__ import annotations

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from normconvert.compat.torch import DisableTorchFunction, version


def writes_to(tensor: Tensor) -> int:
    """How often a tensor's memory was written to; -1 if that is not counted."""
    with DisableTorchFunction():
        # Tensors made in inference mode count nothing, and raise an error when asked.
        return -1 if tensor.is_inference() else version(tensor)


def memory_of(tensor: Tensor) -> int:
    """Which memory a tensor's values are in; 0 if it has none of its own, as one that ``vmap`` maps over."""
    with DisableTorchFunction():
        try:
            # The storage's own address: fake tensors have no data to point to.
            return int(StorageWeakRef(tensor.untyped_storage()).cdata)
        except NotImplementedError:
            return 0
