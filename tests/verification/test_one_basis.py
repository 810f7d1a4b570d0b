"""Which probes a model in another basis is held against: those that give it nothing in the old one."""

from __future__ import annotations

import torch

from normconvert.plan.conversion_plan import Plan
from normconvert.tracing.probes import Probe
from normconvert.verification.probe_runs import in_one_basis

IDS = torch.arange(3)[None]


def test_a_flag_that_is_no_proved_door_leaves_its_probes() -> None:
    """Models that stop without a cache of their own class are given the flag that asks for none."""
    probes = [
        Probe("ids", {"input_ids": IDS, "use_cache": False}),
        Probe("embeddings", {"inputs_embeds": torch.zeros(1, 3, 4), "use_cache": False}),
        Probe("states", {"encoder_outputs": (torch.zeros(1, 3, 4),), "decoder_input_ids": IDS}),
    ]
    plan = Plan("rotate", untraced_doors=["inputs_embeds", "use_cache", "encoder_outputs"])
    assert [probe.name for probe in in_one_basis(probes, plan)] == ["ids"]
    assert in_one_basis(probes, Plan("fold", untraced_doors=["inputs_embeds"])) == probes
