"""Write the index of transformers' model types that `normconvert identify` searches, for the installed transformers.

For every model type and every class that a task lists for it: the names of its checkpoint's tensors with `#` for the
numbers of layers, and what each dimension is in the configuration's words, as `tools/census/zoo/probing.py` finds out.
Each type has a process of its own, so that none can take the others' memory or time; what is done stays in ``build/``.

    nice python tools/indexes/build_transformers_index.py            # about fifteen minutes; goes on where it stopped
    python tools/indexes/build_transformers_index.py --minutes 5     # as many types as that is enough for
    python tools/indexes/build_transformers_index.py --only llama    # print one type, write nothing
    nice python tools/indexes/build_transformers_index.py --check       # is every type found, with its values?
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GIGABYTES = 8
SECONDS = 120
"""Of processor time for one type."""
FIRST = ("MASKED_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_CLASSIFICATION", "CTC",
         "AUDIO_CLASSIFICATION")  # fmt: skip
"""Tasks whose types come first, should the time not be enough for all."""

Row = dict[str, Any]

if TYPE_CHECKING:
    from tools.census.zoo.shrink import Level


def main(argv: list[str] | None = None) -> int:
    """Probe what the work file lacks, then write the index."""
    from importlib.metadata import version

    from normconvert.identification.model_types import INDEX, TypeIndex, save_types

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="TYPE")
    parser.add_argument("--out", type=Path, default=INDEX)
    installed = version("transformers")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / f"transformers-types-{installed}.jsonl")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop probing after so many")
    parser.add_argument("--check", action="store_true", help="identify models of other sizes than those probed")
    arguments = parser.parse_args(argv)
    _quiet()
    if arguments.check:
        return check(arguments.only)
    if arguments.only:
        for name in arguments.only:
            print(json.dumps(_probe_type(name, *_common()), indent=1))
        return 0
    arguments.work.parent.mkdir(parents=True, exist_ok=True)
    names = _names()
    _probe_all([n for n in names if n not in _read(arguments.work)], arguments.work, 60 * arguments.minutes)
    known = _read(arguments.work)
    rows = [known[name] for name in sorted(names) if name in known]
    left_out = {row["type"]: row["skipped"] for row in rows if "skipped" in row}
    left_out |= {name: "not probed yet" for name in names if name not in known}
    types = [{k: v for k, v in row.items() if k != "failed"} for row in rows if "skipped" not in row]
    save_types(TypeIndex(installed, types, left_out), arguments.out)
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")
    print(f"{len(types)} of {len(names)} types; {arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")
    return 0


def _names() -> list[str]:
    """Every model type, those of the first tasks first."""
    import importlib

    from tools.census.zoo.transformers_zoo import transformers_types

    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    first = {kind for task in FIRST for kind in getattr(auto, f"MODEL_FOR_{task}_MAPPING_NAMES")}
    return sorted(transformers_types(), key=lambda kind: kind not in first)


def _probe_all(names: list[str], work: Path, seconds: float) -> None:
    import transformers.modeling_layers  # what all models import, once for all processes

    assert transformers
    started = time.monotonic()
    common = _common() if names else None
    for i, name in enumerate(names):
        if common is None or time.monotonic() - started > seconds:
            return
        child = os.fork()
        if not child:  # with what is imported already
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            try:
                row = _probe_type(name, *common)
            except Exception as error:
                row = {"type": name, "skipped": f"{type(error).__name__}: {str(error)[:160]}"}
            _write(work, row)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended:
            _write(work, {"type": name, "skipped": f"more than {SECONDS} s or {GIGABYTES} GB (status {ended})"})
        if i % 20 == 0:
            print(f"{i}/{len(names)}  {time.monotonic() - started:.0f} s", flush=True)


def _read(work: Path) -> dict[str, Row]:
    rows = (json.loads(line) for line in work.read_text().splitlines()) if work.exists() else ()
    return {row["type"]: row for row in rows}


def _write(work: Path, row: Row) -> None:
    with work.open("a") as handle:
        handle.write(json.dumps(row) + "\n")


def _quiet() -> None:
    """Few threads, limited memory, and nothing of what configurations say of values that are no real ones."""
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES * 2**30, GIGABYTES * 2**30))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def _common() -> tuple[frozenset[str], dict[str, list[Any]]]:
    """Keys that every configuration has, and last part of a key -> what default configurations have there."""
    import transformers

    from tools.census.zoo.snapshots import flat_values

    generic = frozenset(vars(transformers.PretrainedConfig()))
    words: dict[str, dict[Any, None]] = defaultdict(dict)
    for model_type in transformers.CONFIG_MAPPING:
        try:
            config = transformers.CONFIG_MAPPING[model_type]()
        except Exception:  # a configuration that demands arguments
            continue
        for path, value in flat_values(config, generic).items():
            if value is not None:
                words[path.rpartition(".")[2]][value] = None
    return generic, {key: sorted(values, key=str) for key, values in words.items()}


def _probe_type(model_type: str, generic: frozenset[str], words: dict[str, list[Any]]) -> Row:
    import transformers

    from tools.census.zoo.probing import of_class, probe
    from tools.census.zoo.shrink import LEVELS
    from tools.census.zoo.transformers_zoo import CLASSES, REQUIRED, model_classes

    listed = [name for name in model_classes().get(model_type, ()) if getattr(transformers, name, None) is not None]
    if not listed:
        return {"type": model_type, "skipped": "no model class of its own"}
    own = transformers.CONFIG_MAPPING[model_type].model_type
    if own != model_type:  # the same classes: nothing computes differently
        return {"type": model_type, "skipped": f"another name of {own}"}
    main = CLASSES.get(model_type, listed[0])
    required = REQUIRED.get(model_type, {})
    config = transformers.CONFIG_MAPPING[model_type](**required)
    cls = getattr(transformers, main)
    small = next((c for level in LEVELS if (c := _built(cls, config, level, required)) is not None), None)
    if small is None:
        return {"type": model_type, "skipped": f"{main} cannot be built from a configuration of default values"}
    # The default configuration, and one of its widths with few layers: what does not hold there is dropped.
    others = [c for level in (LEVELS[-1], LEVELS[8]) if (c := _built(cls, config, level, required)) is not None]
    found = probe(cls, small, generic, words, others)
    classes = {main: found.entry()}
    for name in dict.fromkeys(listed):
        if name != main and (entry := of_class(getattr(transformers, name), small, found)):
            classes[name] = entry
    for name, entry in classes.items():
        entry["ignored"] = sorted(map(str, getattr(transformers, name)._keys_to_ignore_on_load_unexpected or ()))
    return {"type": model_type, "unfixed": found.unfixed, "failed": found.failed, "classes": classes}


def check(only: list[str]) -> int:
    """Identify every type at a size that was neither probed nor checked; returns 1 if one is not found as it is."""
    import transformers

    from normconvert.identification.model_types import candidates, load_types, search_types
    from tools.census.zoo.shrink import Level
    from tools.census.zoo.snapshots import flat_values, snapshot
    from tools.census.zoo.transformers_zoo import REQUIRED

    generic = frozenset(vars(transformers.PretrainedConfig()))
    rows = load_types().rows
    wrong, found, unbuilt, sizes = 0, 0, 0, []
    for row in rows:
        if only and row["type"] not in only:
            continue
        name = next(iter(row["classes"]))
        required = REQUIRED.get(row["type"], {})
        cls, config = getattr(transformers, name), transformers.CONFIG_MAPPING[row["type"]](**required)
        levels = (Level(2, True, False, True), Level(2, True, True, False))
        built = (_built(cls, config, level, required) for level in levels)
        other = next((c for c in built if c is not None), None)
        if other is None:
            unbuilt += 1
            continue
        fits = search_types(snapshot(cls, other).shapes, frozenset(), rows)
        known = {c.name: c for c in candidates(fits)}
        sizes.append(len(known))
        if row["type"] not in known:
            near = next((fit for fit in fits if fit.model_type == row["type"]), None)
            what = near and (near.missing[:3], near.extra[:3], near.clash)
            print(f"NOT FOUND {row['type']}: {what}")
            wrong += 1
            continue
        values = flat_values(other, generic)
        said = known[row["type"]].config
        off = {k: (v, values[k]) for k, v in said.items() if k in values and values[k] is not None and values[k] != v}
        if off:
            print(f"OTHER VALUES {row['type']}: (said, is) {off}")
        wrong += bool(off)
        found += not off
    alone = sum(size == 1 for size in sizes)
    print(f"{found} of {found + wrong} as they are ({alone} alone); {unbuilt} cannot be built at that size")
    return int(bool(wrong))


def _built(cls: Any, config: Any, level: Level, required: Row) -> Any:
    """The configuration at one level of shrinking, if the class can be built with it."""
    from tools.census.zoo.shrink import shrink
    from tools.census.zoo.snapshots import snapshot

    try:
        small = shrink(config, level, required)
        snapshot(cls, small)
    except Exception:
        return None
    return small


if __name__ == "__main__":
    sys.exit(main())
