"""Where a conversion is made: beside the output while its files are read, put in place as a whole at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from normconvert.files.user_paths import user_path
from normconvert.options import OF_TENSORS, Conversion
from normconvert.tracing.garbage import collecting

if TYPE_CHECKING:
    from normconvert.apply.shard_stream import Stream
    from normconvert.apply.source_reader import SourceReader
    from normconvert.files.tensor_info import TensorInfo
    from normconvert.result import Report
    from normconvert.sources import Source
    from normconvert.sources.opening import Found


@dataclass
class Workplace:
    """Where a conversion is made until it is complete: a staged folder, or what stands beside ``out`` for a stream.

    Attributes:
        reader: reads the source's files in the background, from :attr:`found` on.
        stream: shards come one by one; None: the source is here as a whole.
        found: to be called when the source's tensors are known; None: nothing is to be read yet.
        staging: the staged folder, once the source is known.
    """

    reader: SourceReader
    stream: Stream | None
    found: Found | None = None
    staging: list[Path] = field(default_factory=list)

    @contextmanager
    def folder(self, source: Source, report: Report) -> Iterator[Path]:
        """The folder to write to."""
        if self.stream is None:
            yield self.staging[0]
        else:
            with self.stream.output(source, {**report.options, "plan": report.plan.to_json()}) as folder:
                yield folder

    def can_verify(self, request: Conversion) -> bool:
        """Whether the result is to be verified, and the source is still there for it."""
        return request.verify and (self.stream is None or self.stream.verifiable)


@contextmanager
def workplace(request: Conversion) -> Iterator[Workplace]:
    """What must be there while a conversion runs, and is put in place or cleared away at its end."""
    # Late, as they import torch: a wrong name is told at once.
    from normconvert.apply.output_folder import staged_output
    from normconvert.apply.shard_stream import streamed
    from normconvert.apply.source_reader import SourceReader

    out = user_path(request.out)
    with ExitStack() as staged, ExitStack() as stack:
        # Two stacks: what reads and copies must have ended before the output moves into place.
        stream = None
        if request.stream:
            target = None if request.dry_run else out
            stream = stack.enter_context(streamed(target, request.overwrite, request.verify, request.stage))
        # The reader works while this thread imports, builds and traces.
        place = Workplace(stack.enter_context(SourceReader()), stream)

        def found(tensors: Iterable[TensorInfo], folder: Path | None, _: Sequence[str]) -> None:
            tensors = list(tensors)
            beside = folder or next((tensor.file for tensor in tensors), None)
            place.staging.append(staged.enter_context(staged_output(out, beside, request.overwrite)))
            place.reader.begin(tensors, folder, place.staging[0] if _copied_early(request) else None)

        if not (request.dry_run or request.stream):
            place.found = found
        # A stream may take hours, in which garbage adds up; all else takes seconds.
        stack.enter_context(collecting(request.stream))
        yield place


def _copied_early(request: Conversion) -> bool:
    """Whether files of the output will have the tensors of the source's at their places.

    Then copying them while the model is traced pays, even if most of it is edited: overwriting what is in the system's
    cache takes a fraction of what writing does, which needs memory and a place first.
    """
    alike = request.method == "rmsnorm" or request.method in OF_TENSORS
    return alike and (request.dtype, request.max_shard_size) == ("auto", None)
