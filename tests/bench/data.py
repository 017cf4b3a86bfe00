"""Records to test with, as plain data."""

HASH = "0123456789abcdef"


def quantiles(p50, spread=0.05, n=7):
    return {"p20": p50 * (1 - spread), "p50": p50, "p80": p50 * (1 + spread), "n": n}


def memory(activation=1 << 20):
    return {
        "parameter_bytes": 4000,
        "activation_peak_bytes": activation,
        "allocator_peak_bytes": activation,
        "method": "resident set",
    }


def side(latency, activation=1 << 20):
    return {
        "latency_ms": quantiles(latency),
        "throughput": 1e3 / latency,
        "flops": 1_000_000,
        "parameters": 1000,
        "attention_parameters": 400,
        "memory": memory(activation),
    }


def cost(speedup=1.0):
    return {
        "candidate": side(10 / speedup),
        "baseline": side(10),
        "ratios": {
            "speedup": quantiles(speedup, 0.02),
            "flops": 1.0,
            "parameters": 1.0,
            "attention_parameters": 1.0,
            "activation_peak": 1.0,
            "allocator_peak": 1.0,
        },
        "uncounted_ops": ["aten.gelu"],
    }


def quality(accuracy=0.95, ratio=1.0):
    return {
        "accuracy": accuracy,
        "low": accuracy - 0.02,
        "high": accuracy + 0.02,
        "images": 100,
        "ratio": ratio,
        "trainings": [
            {
                "seed": 0,
                "correct": int(100 * accuracy),
                "images": 100,
                "final_loss": 0.5,
                "seconds": 3.0,
                "epoch_losses": [2.0, 1.0, 0.5],
            }
        ],
        "note": "a small model on digits",
    }


def record_data(**changes):
    data = {
        "config_hash": HASH,
        "benchmark": "test",
        "command": "python eval/bench.py test.yaml",
        "kind": "cost",
        "label": "dense",
        "attention": None,
        "options": {},
        "is_baseline": True,
        "status": "ok",
        "message": "",
        "utc": "2026-01-02T03:04:05+00:00",
        "seconds": 1.5,
        "environment": {
            "attnzoo": "0.1.0",
            "python": "3.11.0",
            "torch": "2.11",
            "timm": "1.0",
            "system": "Linux x86_64",
            "device": "a CPU",
            "threads": 2,
            "commit": "0" * 40,
            "dirty": False,
        },
        "host": "timm:vit",
        "dtype": "float32",
        "tokens": 16,
        "shapes": {"batch": 1, "tokens": 16, "prefix": 1, "dim": 16, "heads": 2, "depth": 1},
        "gate": {
            "oracle": "softmax",
            "passed": True,
            "max_abs_error": 1e-7,
            "scale": 1.0,
            "tolerance": 1e-4,
            "at": "model output",
        },
        "baseline_gate": None,
        "backends": ["aten.bmm"],
        "cost": cost(),
        "quality": None,
        "quality_note": "none",
    }
    return {**data, **changes}


def cost_in(result):
    """The one cost of a result of one phase."""
    (found,) = result.costs.values()
    return found
