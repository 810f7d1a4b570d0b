"""Linear maps with a part of a stored tensor's rows each: queries, keys and values of `nn.MultiheadAttention`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import normconvert
from normconvert.apply.blocks import edit_whole
from normconvert.options import Options
from normconvert.plan.edits import apply_edits
from tests.support.basis import check_basis
from tests.support.equivalence import Outcome
from tests.support.perturb import perturb

D = 16
X = torch.linspace(-1, 1, 2 * 7 * 5, dtype=torch.float64).sin().reshape(2, 7, 5)


class Pool(nn.Module):
    """Queries that are learnt attend to tokens behind a norm."""

    def __init__(self, bias: bool = True, apart: bool = False) -> None:
        super().__init__()
        self.apart = apart
        self.write, self.first, self.inner = nn.Linear(5, D), nn.LayerNorm(D), nn.Linear(D, D)
        self.last, self.queries = nn.LayerNorm(D), nn.Parameter(torch.empty(3, D))
        self.attend = nn.MultiheadAttention(D, 4, batch_first=True, bias=bias)
        self.end, self.head = nn.LayerNorm(D), nn.Linear(D, 3)

    def asked(self, x: Tensor) -> Tensor:
        return self.queries.expand(x.shape[0], 3, D)

    def tokens(self, x: Tensor) -> Tensor:
        x = self.write(x)
        last: Tensor = self.last(x + self.inner(self.first(x)))
        return last

    def forward(self, x: Tensor) -> Tensor:
        keys, queries = self.tokens(x), self.asked(x)
        # The same tensor for keys and values is cut in two parts, others in three.
        values = keys.clone() if self.apart else keys
        pooled = self.queries.square() + self.attend(queries, keys, values, need_weights=False)[0]
        found: Tensor = self.head(self.end(pooled))
        return found


class Itself(Pool):
    """Some of the tokens behind a norm attend to all of them."""

    def asked(self, x: Tensor) -> Tensor:
        return self.tokens(x)[:, :3]


class Crossed(Pool):
    """The rows of the values are read once more, by what reads something else."""

    def forward(self, x: Tensor) -> Tensor:
        packed = self.attend.in_proj_weight
        return super().forward(x) + (self.asked(x) @ packed[2 * D + 3 :].T).sum(-1, keepdim=True)


class Asked(Pool):
    """A norm of learnt queries writes into one stream, and the attention reads it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.asking = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.asking(self.queries).expand(x.shape[0], 3, D), self.tokens(x)
        found: Tensor = self.head(self.end(queries + self.attend(queries, keys, keys, need_weights=False)[0]))
        return found


class Decoder(nn.Module):
    """The encoder-decoder of torch: the attention of the decoder reads two norms."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"d_model": D, "nhead": 4, "dim_feedforward": 24, "batch_first": True, "norm_first": True}
        layers = nn.TransformerEncoderLayer(**sizes), nn.TransformerDecoderLayer(**sizes)  # type: ignore[arg-type]
        self.write, self.head = nn.Linear(5, D), nn.Linear(D, 3)
        self.encoder = nn.TransformerEncoder(layers[0], 1, norm=nn.LayerNorm(D), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(layers[1], 1, norm=nn.LayerNorm(D))

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(x)
        found: Tensor = self.head(self.decoder(x[:, :3], self.encoder(x)))
        return found


def outcome_of(kind: type[nn.Module], method: str, **changes: object) -> Outcome:
    found = check_basis(lambda: kind(**changes), [{"x": X}, {"x": X.flip(1)}], method, Options())
    assert found.plan is not None
    assert not found.problems
    return found


def kept(found: Outcome) -> dict[str, str]:
    assert found.plan is not None
    return {verdict.path: verdict.reason for verdict in found.plan.kept}


@pytest.mark.parametrize("method", ["fold", "rotate"])
@pytest.mark.parametrize(
    ("kind", "changes"), [(Pool, {}), (Pool, {"bias": False}), (Pool, {"apart": True}), (Decoder, {})]
)
def test_the_rows_that_read_the_norm_take_its_weight(
    method: str, kind: type[nn.Module], changes: dict[str, bool]
) -> None:
    found = outcome_of(kind, method, **changes)
    assert found.plan is not None
    assert set(kept(found)) <= {"end"}  # squares are written into its stream
    packed = [name for name in found.plan.tensors if name.endswith("in_proj_weight")]
    assert any("part" in row for name in packed for row in found.plan.tensors[name])


class Behind(nn.Module):
    """Norms behind the branches of torch's encoder: queries, keys and values read the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, 4, 24, batch_first=True)
        self.write, self.head = nn.Linear(5, D), nn.Linear(D, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(self.write(x)))
        return found


def test_a_number_is_taken_back_by_all_parts() -> None:
    found = check_basis(Behind, [{"x": X}], "scale", Options(power="3"))
    assert found.plan is not None
    assert not found.problems
    assert not found.plan.kept
    assert {row["exponent"] for row in found.plan.tensors["encoder.layers.1.self_attn.in_proj_weight"]} == {3}


def test_rmsnorm_folds_into_a_part_as_well() -> None:
    found = check_basis(Pool, [{"x": X}], "rmsnorm", Options(fold=True))
    assert found.plan is not None
    assert any("part" in row for row in found.plan.tensors["attend.in_proj_weight"])
    assert not [problem for problem in found.problems if "edit" not in problem]


@pytest.mark.parametrize("method", ["fold", "rotate"])
def test_parts_that_read_one_norm_each_take_it(method: str) -> None:
    assert set(kept(outcome_of(Itself, method))) <= {"end"}


@pytest.mark.parametrize("method", ["fold", "rotate"])
def test_rows_that_something_else_reads_keep_what_they_are(method: str) -> None:
    assert "reads the weight of `attend` too" in kept(outcome_of(Crossed, method))["last"]


def test_a_norm_of_learnt_queries_that_the_attention_reads_is_not_rotated() -> None:
    reasons = kept(outcome_of(Asked, "rotate"))
    assert "the norm `asking` gives what `attend` reads, too" in reasons["end"]


def test_a_part_is_edited_in_blocks_as_it_is_whole_and_no_other_part() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gain = (torch.randn(shape, generator=generator).double() for shape in ((600, 300), (300,)))
    rotation = {"op": "rotate", "kind": "hadamard", "seed": 1, "constant": True, "axis": 1}
    rows = [{"op": "scale", "by": "g", "axis": 1, "part": [0, 200, 500]}, {**rotation, "part": [0, 200, 500]}]
    made = apply_edits(weight, rows, lambda name: gain)
    plain = apply_edits(
        weight[200:500], [{k: v for k, v in row.items() if k != "part"} for row in rows], lambda _: gain
    )
    assert torch.equal(made[200:500], plain)
    assert torch.equal(torch.cat([made[:200], made[500:]]), torch.cat([weight[:200], weight[500:]]))
    assert torch.equal(edit_whole(weight, rows, lambda name: gain, torch.float64), made)
    with pytest.raises(ValueError, match=r"shape \(600, 300\) has no part 200 to 601 along dimension 0"):
        apply_edits(weight, [{**rows[0], "part": [0, 200, 601]}], lambda name: gain)


@pytest.mark.slow
def test_an_image_tower_with_a_pooling_head_is_rotated_and_loads_in_its_class(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 56}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 16, "projection_size": 48}
    config = hf.SiglipConfig(
        text_config={**text, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    perturb(hf.SiglipModel(config).eval()).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    report = normconvert.convert(
        tmp_path / "model", tmp_path / "out", "rotate", allow_shifted_outputs=True, verify_level="quick"
    )
    assert report.fidelity is not None
    assert report.fidelity.passed
    assert [v.path for v in report.plan.kept] == [
        "vision_model.head.layernorm"
    ]  # its sums are returned, made of length one
    hf.SiglipModel.from_pretrained(tmp_path / "out")
