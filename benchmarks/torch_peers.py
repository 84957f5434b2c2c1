"""Times linear cross-entropy of two PyTorch packages, cut-cross-entropy and liger-kernel, for `accelerator.py`.

    python benchmarks/torch_peers.py '[[8192, 4096, 131072]]' 100

Arguments: a JSON list of [tokens, features, vocabulary], and a time limit in seconds. The last line printed is JSON.
"""

from __future__ import annotations

import functools
import json
import sys
import time


def torch_peers(seconds: float, shapes: list) -> None:
    """Times cut-cross-entropy and liger-kernel; the last line printed is JSON."""
    import torch  # here, because it and the two packages are optional

    start, rows, missing = time.monotonic(), [], []

    def cut(**options):
        from cut_cross_entropy import linear_cross_entropy

        return lambda e, w, y: linear_cross_entropy(e, w, y, reduction="sum", **options)

    def liger():
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda e, w, y: loss(w, e, y)

    peers = {
        "cut-cross-entropy": cut,
        "cut-cross-entropy, exact": functools.partial(cut, filter_eps=None),
        "liger-kernel": liger,
    }
    for n, d, v in shapes:
        hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
        weight = (torch.randn(v, d, device="cuda", dtype=torch.bfloat16) * d**-0.5).requires_grad_()
        labels = torch.randint(0, v, (n,), device="cuda")
        for name, make in peers.items():
            if time.monotonic() - start > seconds or any(m.startswith(f"peer {name}:") for m in missing):
                continue
            try:
                f = make()

                def forward(f=f, e=hidden, w=weight, y=labels):
                    with torch.no_grad():
                        return f(e, w, y)

                def both(f=f, e=hidden, w=weight, y=labels):
                    e.grad = w.grad = None
                    f(e, w, y).backward()

                for part, call in (("forward", forward), ("forward + backward", both)):
                    call()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    call()
                    grown = torch.cuda.max_memory_allocated() - before
                    times = []
                    for _ in range(5):
                        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                        a.record()
                        call()
                        b.record()
                        torch.cuda.synchronize()
                        times.append(a.elapsed_time(b))
                    ms = sorted(times)[2]
                    case = f"head {n} x {d} x {v}, {part}"
                    rows.append({"case": case, "contestant": name, "ms": ms, "peak_growth": grown})
            except Exception as error:
                missing.append(f"peer {name}: {type(error).__name__}: {str(error).strip()[:160]}")
    print(json.dumps({"rows": rows, "missing": missing}))


if __name__ == "__main__":
    torch_peers(float(sys.argv[2]), json.loads(sys.argv[1]))
