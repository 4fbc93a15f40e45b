"""A result file such as an H100 run writes, with made-up numbers, for tests of what reads it."""

import random

from bench import stats

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & \u2028 |"


def document(rows=24, samples=60, hostile=""):
    """`rows` rows; `hostile` text is put wherever text comes from a file."""
    generator = random.Random(0)
    made = [_row(generator, i, samples, hostile) for i in range(rows)]
    telemetry = [
        [i / 5, 1755 + generator.randint(-20, 20), 300 + 60 * generator.random(), 55, 4 * (i > 90)] for i in range(100)
    ]
    env = {
        "machine": "Made-up GPU 80GB" + hostile,
        "device": "cuda",
        "date": "2026-01-01T00:00:00+00:00",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "commit": "0123456789ab",
        "dirty": False,
        "flags": {"cudnn.benchmark": False},
        "suite": "full" + hostile,
        "telemetry": telemetry,
        "ceilings": {"source": "measured", "fp16": 720.0, "bf16": 720.0, "tf32": 380.0, "fp32": 51.0, "gbps": 2990.0},
    }
    return {"schema": 1, "env": env, "rows": made, "running": None}


def _row(generator, index, samples, hostile):
    length = 256 * 2 ** (index % 6)
    dtype, mode = ("fp16", "bf16", "fp32")[index // 6 % 3], ("infer", "train")[index // 12 % 2]
    name = f"made-up d64 s{length}{hostile}"
    speed = 1.0 if index % 5 == 0 else generator.uniform(0.8, 2.2)
    flops, moved = 4e6 * length**1.4, 2e4 * length
    stock_s = flops / 250e12 + 1e-5
    ours_s = stock_s / speed
    versus = {"ratio": round(speed, 4), "lo": round(speed * 0.985, 4), "hi": round(speed * 1.015, 4), "best": "sdpa"}
    ours = _provider(generator, "ours", ours_s, samples, flops, moved) | {"vs_best": versus, "how": "ours" + hostile}
    verdict = stats.verdict(stats.Ratio(versus["ratio"], versus["lo"], versus["hi"]), 0.01)
    providers = {
        "sdpa": _provider(generator, "stock", stock_s, samples, flops, moved),
        "fastops": ours | {"verdict": verdict},
    }
    providers["flex"] = {"role": "stock", "unavailable": "not here " + hostile}
    row = {
        "case": f"attention/{name}/{dtype}/{mode}",
        "op": "attention",
        "name": name,
        "mode": mode,
        "dtype": dtype,
        "shape": {"heads": 16, "q_len": length, "k_len": length, "dim": 64},
        "gate": "pass",
        "providers": providers,
        "vs_best": {**versus, "arm": "fastops"},
        "verdict": verdict,
        "noise": {"floor": 0.01, "ratio": 1.0, "lo": 0.995, "hi": 1.004},
        "flops": flops,
        "bytes": moved,
        "bound": "compute",
        "clock": "cuda-graph",
        "cache": "cold, inputs rotated",
        "rounds": samples,
    }
    if index % 11 == 7:
        row |= {"vs_best": None, "verdict": stats.ERROR, "error": "OutOfMemoryError: made up" + hostile}
    return row


def _provider(generator, role, seconds, samples, flops, moved):
    return {
        "role": role,
        "median_s": seconds,
        "p20_s": seconds * 0.99,
        "p80_s": seconds * 1.01,
        "samples_s": [float(f"{seconds * generator.lognormvariate(0, 0.01):.6g}") for _ in range(samples)],
        "tflops": flops / seconds / 1e12,
        "gbps": moved / seconds / 1e9,
        "ceiling_pct": 100 * flops / 720e12 / seconds,
        "peak_bytes": 64 * 2**20,
        "launches": 2,
        "cold_s": 1.5,
    }
