"""The conversions that are lossless: read a checkpoint, write another one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from normconvert.cli.app import CONVERSIONS, register
from normconvert.cli.commands import Ask, command
from normconvert.cli.view import MEASURES, View, patient_threads
from normconvert.files.user_paths import user_path
from normconvert.options import Conversion

if TYPE_CHECKING:
    from normconvert.report.screen import Done, Screen


@register(short_help="Turn LayerNorm into RMSNorm.", rich_help_panel=CONVERSIONS)
@command(Conversion, View, said=MEASURES, method="rmsnorm")
def rmsnorm(ask: Ask[Conversion], view: View) -> int:
    """Turn every LayerNorm for which it is provably exact into RMSNorm, and write the checkpoint to OUT."""
    return _convert(ask, view)


@register(short_help="Turn LayerNorm into RMSNorm on a stream of one channel less.", rich_help_panel=CONVERSIONS)
@command(Conversion, View, said=MEASURES, method="crmsnorm")
def crmsnorm(ask: Ask[Conversion], view: View) -> int:
    """Store every stream that provably allows it in one channel less, its LayerNorms as CRMSNorm, and write it to OUT.

    The result loads by normconvert.load or trust_remote_code only: tensors have other shapes.
    """
    return _convert(ask, view)


@register(short_help="Move the norms' weights into what reads them.", rich_help_panel=CONVERSIONS)
@command(Conversion, View, said=MEASURES, method="fold")
def fold(ask: Ask[Conversion], view: View) -> int:
    """Move the weight and bias of every LayerNorm and RMSNorm into the linear maps that read it; weights of ones stay.

    Names, shapes and the class of the model stay, and what it computes.
    """
    return _convert(ask, view)


@register(short_help="Rotate the residual streams.", rich_help_panel=CONVERSIONS)
@command(Conversion, View, said=MEASURES, method="rotate")
def rotate(ask: Ask[Conversion], view: View) -> int:
    """Store every residual stream that provably allows it in another orthogonal basis, its norms' weights folded.

    Names, shapes and the class of the model stay, and what it computes; large single channels are spread over all.
    """
    return _convert(ask, view)


@register(short_help="Scale the residual streams into float16's range.", rich_help_panel=CONVERSIONS)
@command(Conversion, View, said=MEASURES, method="scale")
def scale(ask: Ask[Conversion], view: View) -> int:
    """Store every residual stream that provably allows it times a power of two, so that its values fit into float16.

    The power is measured on a few inputs, or given. Names, shapes and what the model computes stay.
    """
    return _convert(ask, view)


BESIDE = "The folder to make; for a weight file, NAME-fused beside it if left out."


@register("fuse-bn", short_help="Fuse BatchNorm into the layers beside it.", rich_help_panel=CONVERSIONS)
@command(Conversion, View, said=MEASURES, optional={"out": BESIDE}, method="fuse-bn")
def fuse_bn(ask: Ask[Conversion], view: View) -> int:
    """Move every BatchNorm (and frozen or similar norm) into the convolutions and linears beside it, exactly."""
    return _convert(ask, view)


def _convert(ask: Ask[Conversion], view: View) -> int:
    """Run a conversion, and show what came of it."""

    def action(screen: Screen) -> Done:
        asked = ask()
        src, out = str(asked.src), asked.out or beside(str(asked.src))
        stage = screen.stages(src, str(out))
        stage("open")  # before anything heavy is imported
        patient_threads()
        from normconvert.api import convert
        from normconvert.report.console import show_summary
        from normconvert.report.document import report_document
        from normconvert.report.screen import Done
        from normconvert.tracing.garbage import collecting

        report = convert(**vars(ask(out=out, progress=screen.progress, stage=stage)))
        if report.out is not None:
            screen.written.append(report.out)
        with collecting(view.report_file is not None):  # it runs models
            found = view.measured(
                screen, src, report.out, revision=asked.revision, arch=asked.arch, device=asked.device,
                trust_remote_code=asked.trust_remote_code,
            )  # fmt: skip
        return Done(
            {**found, **report_document(asked.method, report)},
            lambda console: show_summary(console, report, verbose=view.verbose > 0, measures=found.get("measures")),
        )

    return view.run(action)


def beside(src: str) -> Path:
    """``ckpt-fused`` beside ``ckpt.safetensors``.

    Raises:
        InputError: SRC is not a weight file.
    """
    from normconvert.errors import InputError

    path = user_path(src)
    if not path.is_file():
        raise InputError(f"OUT is missing: only for a weight file is it made up; try `normconvert fuse-bn {src} OUT`")
    return path.with_name(f"{path.stem}-fused")
