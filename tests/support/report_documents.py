"""Documents of every command as the report reads them, and the same with every text in them trying to be markup."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from normconvert.plan.conversion_plan import Plan, Verdict
from normconvert.report.document import check_document, error_document, fidelity_document, report_document
from normconvert.result import Report
from normconvert.verification.fidelity import Fidelity
from normconvert.verification.folder_comparison import Finding
from normconvert.verification.record_check import CheckReport

EVIL = """</script><script>alert(1)</script>"><img src=x onerror=alert(2)>{{ 7 * 7 }}{% raw %}`&lt;'\u2028"""
PLAN = Plan(
    "rmsnorm",
    modules=[{"op": "center", "path": "embed", "side": "output", "key": "", "axis": -1}],
    verdicts=[
        *(Verdict(f"h.{i}.ln", "LayerNorm", True, "it reads a mean-free stream.", "converted") for i in range(12)),
        Verdict("h.0.mid", "LayerNorm", False, "`h.0.q` reads it.", "linear"),
        Verdict("last", "LayerNorm", True, "it reads a mean-free stream.", "converted"),
    ],
)
SPREAD = {"median": 1.25, "low": 1.2, "high": 1.3}
BENCH: dict[str, Any] = {
    "command": "bench", "source": "demo:gpt2", "converted": "out", "library": "transformers", "architecture": "GPT2",
    "method": "rmsnorm", "norms": {"converted": 9, "total": 9}, "device": "cpu", "dtype": "float32",
    "machine": {"processor": "a processor", "threads": 1, "torch": "2.15"}, "parameter_bytes": {"original": 1000},
    "rows": [
        {
            "mode": "eager", "kind": "forward", "batch": batch, "length": 32, "rounds": 5, "calls": 1, "share": None,
            "milliseconds": {"original": SPREAD, "converted": SPREAD, "bound": SPREAD},
            "speedup": {"converted": SPREAD, "bound": SPREAD}, "peak_bytes": {"original": None}, "failures": {},
        }
        for batch in (1, 8)
    ],
}  # fmt: skip
WORTH: dict[str, Any] = {
    "examples": 3, "agreement": 0.9027, "kl": 0.37, "accuracy": 0.9055, "perplexity": None, "features": {},
}  # fmt: skip
DONE = {
    "status": "converted", "message": "", "norms": [9, 9], "seconds": 7.2,
    "figures": {"algebra": 5.8e-16, "rounding": 0.982, "top1": 1.0},
}  # fmt: skip
JOB = {"name": "gpt2", "variant": "rmsnorm", "recipe": "recipes/demo.yaml:6:5", "action": "convert", "result": DONE}
LOST: dict[str, Any] = {"status": "failed", "message": "has no LayerNorm", "norms": None, "seconds": 1.0, "figures": {}}
BATCH: dict[str, Any] = {
    "command": "run", "dry_run": False, "exit_status": 3, "seconds": 8.0,
    "counts": {"converted": 1, "skipped": 0, "failed": 1, "interrupted": 0},
    "jobs": [JOB, {**JOB, "name": "llama", "result": LOST}],
}  # fmt: skip


def hostile() -> dict[str, dict[str, Any]]:
    """A document of every command, with every text in it trying to be markup."""
    row = {"probe": EVIL, "output": EVIL, "algebra": 1.0, "original_error": 1.0, "converted_error": 1.0}
    fidelity = Fidelity(1.0, 3.0, 0.5, 0.1, worst_module=EVIL, passed=False, reasons=[EVIL, f"`{EVIL}`"], probes=[row])
    verdicts = [Verdict(f"{EVIL}.{i}.{EVIL}", EVIL, i % 2 == 0, f"`{EVIL}` {EVIL}", EVIL) for i in range(4)]
    plan = replace(PLAN, verdicts=verdicts, modules=[{**PLAN.modules[0], "path": EVIL, "side": EVIL}], notes=[EVIL])
    report = Report(EVIL, "timm", EVIL, "rmsnorm", EVIL, plan, fidelity, EVIL, "x", seconds={EVIL: 1.0}, notes=(EVIL,))
    layer = {"name": EVIL, "algebra": 1e-16, "original": 1e-7, "converted": 1e-7}
    norm = {"path": EVIL, "converted": True, "before": 0.1, "after": 1e-8, "rms_before": 1.0, "rms_after": 1.0}
    found = {
        "probe": EVIL, "dtype": EVIL, "layers": [layer, layer], "norms": [norm, norm], "architecture": EVIL,
        "perplexity": {"original": 9.0, "converted": 9.0, "tokens": 9}, "library": EVIL,
        "parameters": {"original": 1, "converted": 1}, "bytes": {"original": 1, "converted": 1},
    }  # fmt: skip
    convert = {**report_document("rmsnorm", report), "measures": found, "command_line": EVIL}
    error = RuntimeError(EVIL)
    vars(error)["report"] = report
    checked = CheckReport(EVIL, EVIL, (Finding("weights", EVIL, EVIL, EVIL),), (EVIL,), 1, 1, {EVIL: 1.0})
    texts = {"prompt": EVIL, "original": EVIL, "converted": EVIL, "tokens": 3, "same": False}
    return {
        "convert": convert,
        "verify": {**fidelity_document(EVIL, EVIL, fidelity), "measures": found, "plan": plan.to_json()},
        "check": check_document(checked),
        "error": {**error_document(EVIL, 1, error), "command_line": EVIL},
        "export": {
            "command": "export",
            "source": EVIL,
            "file": EVIL,
            "dynamic": {EVIL: [EVIL]},
            "outputs": [EVIL],
            "error": 1e-7,
            "against": None,
            "bytes_written": 3,
            "notes": [EVIL],
        },
        "bench": {**BENCH, **dict.fromkeys(("source", "converted", "architecture", "library", "device"), EVIL)},
        "demo": {"command": "demo", "reports": [convert, convert], "text": texts, "digits": None},
        "swap": {
            "command": "swap", "source": EVIL, "out": EVIL, "architecture": EVIL, "library": EVIL, "method": EVIL,
            "tails": [{"data": EVIL, "unit": EVIL, "losses": 2, "original": {"50 %": 1.0, "max": 2.0},
                       "swapped": {"50 %": 1.25, "max": None}, "ratio": {"max": None}}],
            "eval_data": EVIL, "settings": {"data": EVIL}, "norms": {"swapped": [EVIL], "left": []}, "steps": 2,
            "figures": dict.fromkeys(("original", EVIL), WORTH), "fused": fidelity_document(EVIL, EVIL, fidelity),
            "trace": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}], "seconds": {EVIL: 1.0}, "notes": [EVIL],
            "plan": plan.to_json(),
        },
        "run": {**BATCH, "jobs": [{**job, "name": EVIL, "variant": EVIL, "recipe": EVIL} for job in BATCH["jobs"]]},
    }  # fmt: skip
