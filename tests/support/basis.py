"""Is a plan that changes the basis of streams right, of any network that can be built twice?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from normconvert.errors import TraceError
from normconvert.options import Options
from normconvert.rewrites.planning import difference
from normconvert.rewrites.registry import REWRITES
from normconvert.tracing.graph import trace
from normconvert.verification.algebra import algebra_model
from tests.support.equivalence import Inputs, Outcome, differences, on_meta, randomise


def check_basis(
    make: Callable[[], nn.Module], inputs: Sequence[Inputs], method: str, options: Options, *, seed: int = 0
) -> Outcome:
    """Trace, plan, apply to float64 weights and compare, in the class as it is.

    Args:
        make: builds the network, float64 by default dtype, on the default device.
        inputs: what to compare on; the first is also traced.
        method: the conversion.
        options: of the plan.
        seed: of the weights.
    """
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            skeleton = make().eval()
        try:
            graph = trace(skeleton, on_meta(inputs[0]))
        except TraceError as error:
            return Outcome(None, (f"not traced: {error}",))
        plan = REWRITES[method].planner(graph, options)
        truth = make().eval()
        randomise(truth, seed)
        problems = [f"it has the edit {row['op']}" for row in plan.modules if row["op"] not in ("epsilon", "renew")]
        if plan.converted and (why := difference(graph, plan, options)):
            problems.append(why)
        edited = algebra_model(truth, plan)
        for verdict in plan.converted if method != "scale" else ():
            weight = getattr(edited.get_submodule(verdict.path), "weight", None)
            # A norm behind a table has one number there, a power of two.
            behind_a_table = any(row["op"] == "bound" for row in plan.tensors.get(f"{verdict.path}.weight", ()))
            if weight is not None and not bool((weight == (weight[0] if behind_a_table else 1)).all()):
                problems.append(f"{verdict.path} is said to be converted and has a weight")
        return Outcome(plan, (*problems, *differences(truth, edited, inputs)))
    finally:
        torch.set_default_dtype(torch.float32)
