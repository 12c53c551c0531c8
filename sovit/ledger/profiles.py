"""Read the rows that `sovit profile` wrote: one flat JSON object a (shape, device, dtype, batch, threads).

schema profile_id status (ok | out_of_memory), the shape, num_classes num_params forward_flops head_flops
device device_name dtype threads clock batch_size versions commit commit_dirty date num_repeats
forward_seconds, forward_seconds_low, _high    one forward pass of a batch: median and quartiles of the repeats
train_step_seconds, _low, _high                forward, backward and AdamW of a batch
forward_samples, train_step_samples            the repeats themselves
forward_bytes, train_bytes                     peak memory of both, weights included
images_per_second forward_flops_per_second train_flops_per_second
"""

from __future__ import annotations

import json
from pathlib import Path

from sovit import UserError
from sovit.spec.shape import Shape

NEEDED = ("profile_id", "status", "batch_size", *Shape.__dataclass_fields__)


def read_profiles(path: Path | str) -> list[dict]:
    """The rows of a profile ledger. Raises UserError for a file that is missing, empty or none."""
    try:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except FileNotFoundError:
        raise UserError(f"no profiles at {path}; make them with sovit profile --out {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the profiles {path}: {error}; remove the bad line") from None
    for i, row in enumerate(rows, 1):
        missing = [name for name in NEEDED if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(f"{path}:{i} lacks {missing[0]}; give a file that sovit profile wrote")
    if not rows:
        raise UserError(f"{path} is empty; fill it with sovit profile --out {path}")
    return rows
