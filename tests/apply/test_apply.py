"""Applying plans to files: the same values as applying them to the model in memory, everything else as it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normconvert.apply import blocks as apply_blocks
from normconvert.apply import writer as apply_write
from normconvert.errors import InputError
from normconvert.files.safetensors_file import read_header
from normconvert.plan.conversion_plan import Plan
from normconvert.plan.edits import apply_edits
from normconvert.sources import Source, open_source
from tests.support.applied_plans import apply_plan
from tests.support.perturb import perturb
from tests.support.tiny_checkpoints import contents, gpt2, save, save_vit, vit

BLOCK_0, BLOCK_1 = "transformer.h.0", "transformer.h.1"
EDITS: dict[str, list[dict[str, Any]]] = {
    "transformer.wpe.weight": [{"op": "center", "axis": 1}],  # rows, by blocks of rows
    f"{BLOCK_0}.attn.c_proj.weight": [{"op": "center", "axis": 0}],  # columns, by blocks of columns
    f"{BLOCK_0}.mlp.c_proj.weight": [{"op": "scale", "axis": 1, "by": f"{BLOCK_1}.ln_1.weight", "offset": 1.0},
                                     {"op": "center", "axis": -1}],  # one after the other
    f"{BLOCK_0}.mlp.c_proj.bias": [{"op": "center", "axis": 0}],  # no dimension is free
    f"{BLOCK_1}.attn.c_proj.weight": [{"op": "center", "axis": 1, "outer": 3}],  # a factor of a dimension
    f"{BLOCK_1}.attn.c_attn.weight": [{"op": "scale", "axis": 0, "by": f"{BLOCK_1}.ln_1.weight"},
                                      {"op": "center", "axis": 1}],  # both dimensions are needed whole
    f"{BLOCK_1}.attn.c_attn.bias": [{"op": "add_product", "weight": f"{BLOCK_1}.attn.c_attn.weight",
                                     "by": f"{BLOCK_1}.ln_1.bias", "axis": 0}],  # reads the source, not the edited
    f"{BLOCK_1}.mlp.c_proj.weight": [{"op": "center", "axis": 0}],  # two passes over the rows
    f"{BLOCK_0}.mlp.c_fc.weight": [{"op": "center", "axis": 0},
                                   {"op": "scale", "axis": 1, "by": f"{BLOCK_0}.mlp.c_fc.bias"}],
    f"{BLOCK_1}.ln_1.weight": [{"op": "fill", "value": 1.0}],
}  # fmt: skip
PLAN = Plan("rmsnorm", tensors=EDITS)
UNTIE = Plan(
    "rmsnorm",
    tensors={
        "transformer.wte.weight": [{"op": "center", "axis": 1}],
        "lm_head.weight": [{"op": "copy", "from": "transformer.wte.weight"}],
    },
    config={"tie_word_embeddings": False},
)


def expected(state: dict[str, Tensor], plan: Plan, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The plan applied in memory, tensor by tensor, in float64."""
    result = {}
    for name, value in state.items():
        edited = apply_edits(value, plan.tensors.get(name, []), lambda n: state[n].double())
        result[name] = edited.to(dtype or value.dtype) if value.is_floating_point() else value
    return result


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    assert [n for n in wanted if found[n].dtype != wanted[n].dtype or not torch.equal(found[n], wanted[n])] == []


def loaded(folder: Path, **options: Any) -> dict[str, Tensor]:
    return open_source(str(folder)).load(**options).state_dict()


@pytest.fixture(params=["safetensors", "sharded", "bin", "sharded-bin"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return open_source(str(save(gpt2(), tmp_path / "src", request.param)))


@pytest.mark.parametrize("block", [1 << 17, 97])
def test_edits_in_the_files_equal_edits_in_memory(
    source: Source, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply_blocks, "BLOCK", block)  # small: every tensor is taken in many blocks
    monkeypatch.setattr(apply_write, "PIECE", block)
    result = apply_plan(source, PLAN, tmp_path / "out")
    assert_equal(loaded(tmp_path / "out"), expected(source.load().state_dict(), PLAN))
    assert set(result.edited) == set(EDITS)


def test_untying_writes_the_copy_of_the_original(source: Source, tmp_path: Path) -> None:
    apply_plan(source, UNTIE, tmp_path / "out")
    out = loaded(tmp_path / "out")
    assert_equal(out, expected(source.load().state_dict(), UNTIE))
    assert not torch.equal(out["lm_head.weight"], out["transformer.wte.weight"])


def test_a_tied_tensor_is_found_under_the_name_the_files_hold(tmp_path: Path) -> None:
    """transformers ties both ways: files may hold only the head's name."""
    from safetensors.torch import load_file, save_file

    folder = save(gpt2(), tmp_path / "src")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    names = ["transformer.wte.weight", "lm_head.weight"]
    plan = Plan("x", tensors={names[0]: [{"op": "center", "axis": 1}]}, aliases={names[0]: names})
    apply_plan(open_source(str(folder)), plan, tmp_path / "out")
    before, after = loaded(folder), loaded(tmp_path / "out")
    centred = (before[names[0]].double() - before[names[0]].double().mean(1, keepdim=True)).float()
    assert all(torch.equal(after[name], centred) for name in names)
    apply_plan(open_source(str(folder)), UNTIE, tmp_path / "untied")
    assert_equal(loaded(tmp_path / "untied"), expected(before, UNTIE))


def test_both_names_of_a_tied_tensor_are_edited_when_the_files_hold_both(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(gpt2(), tmp_path / "src")
    state = load_file(folder / "model.safetensors")
    save_file({**state, "lm_head.weight": state["transformer.wte.weight"].clone()}, folder / "model.safetensors")
    names = ["transformer.wte.weight", "lm_head.weight"]
    plan = Plan("x", tensors={names[0]: [{"op": "center", "axis": 1}]}, aliases={names[0]: names})
    apply_plan(open_source(str(folder)), plan, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(out[names[0]], out[names[1]])
    assert float(out[names[0]].mean(1).abs().max()) < 1e-6


def test_an_empty_plan_copies_safetensors_byte_for_byte(tmp_path: Path) -> None:
    for form in ("safetensors", "sharded"):
        folder = save(gpt2(), tmp_path / form, form)
        apply_plan(open_source(str(folder)), Plan("rmsnorm"), tmp_path / f"{form}-out")
        assert contents(tmp_path / f"{form}-out") == contents(folder)


def test_untouched_tensors_headers_shards_and_index_stay_as_they_were(tmp_path: Path) -> None:
    folder = save(gpt2(), tmp_path / "src", "sharded")
    before = contents(folder)
    apply_plan(open_source(str(folder)), PLAN, tmp_path / "out")
    after = contents(tmp_path / "out")
    assert contents(folder) == before
    assert list(after) == list(before)
    for name in (n for n in before if n.endswith(".safetensors")):
        header = read_header(folder / name)
        assert after[name][: len(header.raw)] == header.raw
        for info in header.tensors.values():
            same = after[name][info.start : info.end] == before[name][info.start : info.end]
            assert same == (info.name not in EDITS)


def test_the_same_input_gives_the_same_bytes(source: Source, tmp_path: Path) -> None:
    for out in ("one", "two"):
        apply_plan(source, PLAN, tmp_path / out)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_hashes_are_those_of_the_source_files(source: Source, tmp_path: Path) -> None:
    assert source.folder is not None
    result = apply_plan(source, PLAN, tmp_path / "out")
    names = {f.name for f in source.files} | {"config.json"}
    assert result.hashes == {n: hashlib.sha256((source.folder / n).read_bytes()).hexdigest() for n in names}
    assert apply_plan(source, PLAN, tmp_path / "out2", hash_source=False).hashes == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_option_rounds_once_and_says_so_in_the_config(tmp_path: Path, dtype: torch.dtype) -> None:
    source = open_source(str(save(gpt2(), tmp_path / "src")))
    apply_plan(source, PLAN, tmp_path / "out", dtype=dtype)
    assert_equal(loaded(tmp_path / "out"), expected(source.load().state_dict(), PLAN, dtype))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_sixteen_bit_sources_stay_sixteen_bit(tmp_path: Path) -> None:
    source = open_source(str(save(gpt2().bfloat16(), tmp_path / "src")))
    assert source.dtype == torch.bfloat16
    apply_plan(source, PLAN, tmp_path / "out")
    assert_equal(loaded(tmp_path / "out"), expected(source.load().state_dict(), PLAN))


def test_a_value_that_overflows_the_dtype_is_refused(tmp_path: Path) -> None:
    model = gpt2()
    model.get_parameter("transformer.wpe.weight").data[3, 3] = 1e6
    source = open_source(str(save(model, tmp_path / "src")))
    with pytest.raises(InputError, match=r"transformer\.wpe\.weight .*overflows"):
        apply_plan(source, Plan("x"), tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_max_shard_size_shards_again(source: Source, tmp_path: Path) -> None:
    apply_plan(source, PLAN, tmp_path / "out", max_shard_size=60_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert max(sum(i.end - i.start for i in read_header(s).tensors.values()) for s in shards) <= 60_000
    assert_equal(loaded(tmp_path / "out"), expected(source.load().state_dict(), PLAN))


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=101, hidden_size=48, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=3,
        intermediate_size=40, num_local_experts=2,
    )  # fmt: skip
    model: nn.Module = MixtralForCausalLM(config).eval()
    return model


def test_merged_tensors_go_through_the_loaded_model_and_others_stream(tmp_path: Path) -> None:
    source = open_source(str(save(perturb(mixtral()), tmp_path / "src")))
    state = source.load().state_dict()
    merged = next(n for n in sorted(source.merged) if n.endswith("down_proj"))
    for name, streams in ((merged, False), ("model.embed_tokens.weight", True)):
        plan = Plan("x", tensors={name: [{"op": "center", "axis": 1}]})
        result = apply_plan(source, plan, tmp_path / f"out{streams}")
        assert bool(result.notes) != streams
        assert_equal(loaded(tmp_path / f"out{streams}"), expected(state, plan))
        names = set(open_source(str(tmp_path / f"out{streams}")).tensors)
        assert names == set(source.tensors)


def test_a_loaded_model_is_rounded_once_and_may_not_overflow(tmp_path: Path) -> None:
    model = perturb(mixtral()).bfloat16()
    source = open_source(str(save(model, tmp_path / "src")))
    state = source.load().state_dict()
    merged = next(n for n in sorted(source.merged) if n.endswith("down_proj"))
    edits: list[dict[str, Any]] = [{"op": "center", "axis": 1}]
    apply_plan(source, Plan("x", tensors={merged: edits}), tmp_path / "out", dtype=torch.float32)
    found = open_source(str(tmp_path / "out")).load().state_dict()
    assert torch.equal(found[merged], apply_edits(state[merged], edits, state.__getitem__).float())
    plan = Plan("x", tensors={merged: [{"op": "scale", "axis": 1, "by": 1e6}]})
    with pytest.raises(InputError, match=rf"{merged} \(up to .*\) overflows torch.float16: choose another --dtype"):
        apply_plan(source, plan, tmp_path / "large", dtype=torch.float16)


def test_timm_folder_and_bare_weights_come_out_as_timm_folders(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    plan = Plan("x", tensors={"blocks.0.mlp.fc2.weight": [{"op": "center", "axis": 0}]})
    folder = save_vit(vit(), tmp_path / "src")
    apply_plan(open_source(str(folder)), plan, tmp_path / "out")
    native = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert_equal(dict(native.state_dict()), expected(loaded(folder), plan))
    bare = perturb(timm.create_model("vit_tiny_patch16_224", num_classes=3).eval())
    save_file(bare.state_dict(), tmp_path / "mine.safetensors")
    apply_plan(
        open_source(str(tmp_path / "mine.safetensors"), arch="timm:vit_tiny_patch16_224"), plan, tmp_path / "out2"
    )
    native = timm.create_model(f"local-dir:{tmp_path / 'out2'}", pretrained=True)
    assert_equal(dict(native.state_dict()), expected(dict(bare.state_dict()), plan))


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    source = open_source(str(save(gpt2(), tmp_path / "src")))
    seen: list[tuple[str, int, int]] = []
    result = apply_plan(source, PLAN, tmp_path / "out", progress=lambda *row: seen.append(row))
    assert seen[-1][1] == seen[-1][2] == result.bytes_written
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_plan_for_a_tensor_that_is_nowhere_is_refused(source: Source, tmp_path: Path) -> None:
    for plan in (
        Plan("x", tensors={"transformer.nowhere": [{"op": "center", "axis": 0}]}),
        Plan("x", tensors={"transformer.wpe.weight": [{"op": "scale", "axis": 1, "by": "transformer.nowhere"}]}),
    ):
        with pytest.raises(InputError, match="nowhere"):
            apply_plan(source, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
