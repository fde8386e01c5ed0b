"""How long the records are that were packed into rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qlora_dist.data.rows import Rows


def token_lengths(folder: Path) -> dict[str, Any]:
    """Returns the number of records of packed rows, quantiles of their tokens, and a histogram.

    A record is as long as its segments together; the histogram's `edges` are powers of √2, one more than its `counts`.
    """
    segments = Rows.open(folder).segments
    length_N = np.bincount(segments["record"], weights=segments["length"]).astype(np.int64)
    length_N = length_N[length_N > 0]
    if not len(length_N):
        return {"records": 0}
    first, last = int(2 * np.log2(length_N.min())), int(2 * np.log2(length_N.max())) + 1
    edges = [2 ** (half / 2) for half in range(first, last + 1)]
    edges[-1] = max(edges[-1], float(length_N.max()))
    quantiles = {"median": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        "records": len(length_N),
        "least": int(length_N.min()),
        **{name: int(np.quantile(length_N, share, method="higher")) for name, share in quantiles.items()},
        "most": int(length_N.max()),
        "histogram": {"edges": [round(e, 2) for e in edges], "counts": np.histogram(length_N, edges)[0].tolist()},
    }
