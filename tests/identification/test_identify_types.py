"""transformers' weights without a config.json: the model type, and the configuration that shapes fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model

import normconvert
from normconvert.errors import InputError
from normconvert.sources import open_source
from tests.support.bare_weights import write
from tests.support.tiny_checkpoints import gpt2


def test_weights_of_transformers_say_what_shapes_fix_and_what_not(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_model(gpt2(n_inner=80), str(path))
    found = normconvert.identify(path)
    known = {c.name: c for c in found.exact}
    assert found.arch is None
    config = known["gpt2"].config
    sizes = {"vocab_size": 101, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_inner": 80}
    assert {key: config[key] for key in sizes} == sizes
    assert "n_head" in known["gpt2"].unfixed
    assert "GPT2LMHeadModel" in known["gpt2"].classes
    with pytest.raises(InputError, match=r"without a config.json.*n_layer=2.*put its config.json beside it"):
        open_source(str(path))


@pytest.mark.parametrize("kept", ["transformer.wte.weight", "lm_head.weight"])
def test_a_tied_tensor_of_transformers_is_known_by_either_name(kept: str, tmp_path: Path) -> None:
    state = {n: t.contiguous() for n, t in gpt2().state_dict().items()}
    other = ({"transformer.wte.weight", "lm_head.weight"} - {kept}).pop()
    for absent in ([], [other]):
        path = write({n: t.clone() for n, t in state.items() if n not in absent}, tmp_path / "w.safetensors")
        known = {c.name: c for c in normconvert.identify(path).exact}
        assert known["gpt2"].config["vocab_size"] == 101
        assert "GPT2LMHeadModel" in known["gpt2"].classes
    path = write({n: t for n, t in state.items() if n not in (kept, other)}, tmp_path / "w.safetensors")
    near = normconvert.identify(path).nearest[0]
    assert (near.names, near.missing, near.classes) == (("gpt2",), ("transformer.wte.weight",), ("GPT2LMHeadModel",))


def test_a_size_that_a_configuration_leaves_out_is_probed_as_a_number() -> None:
    """GPT-2's n_inner is None by default, which means four times n_embd."""
    import transformers

    from tools.census.zoo.probing import filled, probe
    from tools.census.zoo.snapshots import snapshot

    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=48, vocab_size=80)
    cls, generic = transformers.GPT2LMHeadModel, frozenset(vars(transformers.PretrainedConfig()))
    assert filled(cls, config, generic, {}).n_inner == 128
    found = probe(cls, config, generic, {}, [])
    assert found.dims["transformer.h.#.mlp.c_fc.weight"] == ["n_embd", "n_inner"]
    assert found.dims["transformer.h.#.attn.c_attn.weight"] == ["n_embd", "3*n_embd"]
    assert found.tied == {("transformer.wte.weight", "lm_head.weight")}
    assert snapshot(cls, config).shapes["transformer.h.1.mlp.c_fc.bias"] == (128,)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5", "vit", "whisper"])
def test_the_index_is_of_transformers_as_it_is_installed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """At sizes that were not probed, with the values that shapes fix."""
    from tools.indexes.build_transformers_index import check

    assert check([kind]) == 0, capsys.readouterr().out
    assert "1 of 1 as they are" in capsys.readouterr().out


def test_a_product_is_said_where_shapes_fix_no_more(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, attention_bias=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    found = normconvert.identify(tmp_path)
    known = {c.name: c for c in found.exact}
    said = known["llama"].config
    assert (said["num_attention_heads*head_dim"], said["num_key_value_heads*head_dim"]) == (48, 24)
    assert (said["hidden_size"], said["num_hidden_layers"], said["intermediate_size"]) == (32, 3, 48)
    assert said["attention_bias"] is True
    assert {"num_attention_heads", "head_dim", "rms_norm_eps"} <= set(known["llama"].unfixed)


def test_tensors_of_another_kind_are_no_transformers_model(tmp_path: Path) -> None:
    model = gpt2()
    state = {n: t.contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    state["transformer.adapter.weight"] = torch.zeros(2)
    found = normconvert.identify(write(state, tmp_path / "w.safetensors"))
    assert found.exact == ()
    assert any("gpt2" in near.names and near.extra == ("transformer.adapter.weight",) for near in found.nearest)
