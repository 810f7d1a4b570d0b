"""Virtual tokens: prompts enter where embeddings do, prefixes are keys and values.

A prompt p takes the place of rows of the embedding's result. Where the converted model has those rows centred (in the
table, or behind it), a prompt goes past that, so it becomes P p; a stream whose mean may change takes P p wherever it
may join. Where the table is in another basis or times a number, so is the prompt. Keys and values are behind the linear
maps that make them, which compute what they did before, unless values are rotated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from normconvert.adapters.adapter_files import PREFIX_TUNING, Adapter
from normconvert.adapters.dependence import edits_of
from normconvert.errors import InputError
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import apply_edits
from normconvert.verification.algebra import named_tensors

_BASIS = frozenset({"center", "compress", "rotate"})


def convert_prompt(adapter: Adapter, plan: Plan, truth: nn.Module) -> Adapter:
    """The prompt or prefix of the converted model, in float64.

    Args:
        adapter: of the original, with a prompt.
        plan: of the conversion.
        truth: the original in float64.

    Raises:
        InputError: the model takes no embeddings, or the conversion does to its table what no prompt can follow.
    """
    assert adapter.prompt is not None
    prompt = adapter.prompt.double()
    if adapter.kind == PREFIX_TUNING:
        return replace(adapter, prompt=prompt)
    path, table = embedding_of(truth)
    width = table.weight.shape[1]
    if prompt.shape[1] != width:
        raise InputError(
            f"the prompt has {prompt.shape[1]} channels and {path} {width}: is the adapter one of another model?"
        )
    rows = [*edits_of(plan, f"{path}.weight"), *(m for m in plan.modules if m["path"] == path and "side" in m)]
    for row in rows:
        fits = row["op"] == "times" or (row["op"] in _BASIS and int(row["axis"]) % 2 == 1)
        if not fits or row.get("side", "output") != "output":
            raise InputError(
                f"the conversion does {row['op']} to {path}, which a prompt cannot follow: train one for the result"
            )
        prompt = apply_edits(prompt, [{**row, "axis": 1}], named_tensors(truth).__getitem__)
    config = {**adapter.config, "token_dim": prompt.shape[1]} if rows else adapter.config
    return replace(adapter, prompt=prompt, config=config)


def embedding_of(model: nn.Module) -> tuple[str, nn.Embedding]:
    """Path and module of the table whose rows prompts stand beside.

    Raises:
        InputError: the model names none.
    """
    getter: Any = getattr(model, "get_input_embeddings", None)
    try:
        table = getter() if getter is not None else None
    except NotImplementedError:
        table = None
    path = next((name for name, module in model.named_modules() if module is table), None)
    if path is None or not isinstance(table, nn.Embedding):
        raise InputError(f"{type(model).__name__} has no table of input embeddings: prompts cannot be put before it")
    return path, table


class Prompted(nn.Module):
    """A model with virtual tokens before its text, called with ``input_ids`` as the model is.

    Args:
        model: the model.
        adapter: with a prompt or a prefix.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Any:
        """The model's output for the prompt and the text."""
        assert self.adapter.prompt is not None
        batch = input_ids.shape[0]
        table = embedding_of(self.model)[1]
        prompt = self.adapter.prompt.to(input_ids.device, table.weight.dtype)
        mask = attention_mask if attention_mask is not None else torch.ones_like(input_ids)
        mask = torch.cat([mask.new_ones(batch, prompt.shape[0]), mask], 1)
        for name in ("labels", "position_ids", "token_type_ids"):  # of the text alone
            others.pop(name, None)
        if self.adapter.kind == PREFIX_TUNING:
            others |= {"past_key_values": self._cache(prompt, batch), "input_ids": input_ids}
        else:
            embedded = table(input_ids)
            others["inputs_embeds"] = torch.cat([prompt.expand(batch, -1, -1), embedded], 1)
        return self.model(attention_mask=mask, **others)

    def _cache(self, prefix: Tensor, batch: int) -> Any:
        """The prefix as keys and values of each layer, (batch, heads, tokens, width), as PEFT lays it out."""
        from transformers import DynamicCache

        config = self.adapter.config
        heads, layers = int(config["num_attention_heads"]), int(config["num_layers"])
        values = prefix.view(prefix.shape[0], layers * 2, heads, -1).permute(1, 2, 0, 3)
        cache = DynamicCache()
        for layer in range(layers):
            key, value = (values[2 * layer + i].expand(batch, -1, -1, -1) for i in (0, 1))
            cache.update(key, value, layer)
        return cache
