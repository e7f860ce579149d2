"""A plan as the one upload of its launch: numbers of each row, as `RowInputs` names them."""

from collections.abc import Sequence

import numpy as np

from jaxengine.compiling import Bucket
from jaxengine.launch import NUM_ROW_FIELDS, RowInputs, Variant
from jaxengine.step_plan import Row, StepPlan


def padding(bucket: Bucket, variant: Variant, nobody: int) -> np.ndarray:
    """Rows of a slot that nobody has, which read nothing."""
    packed = np.zeros((bucket.num_packed, variant.num_fields), np.int32)
    fields, new_tokens, _ = variant.split(packed)
    fields[:, RowInputs._fields.index("slots")] = nobody
    new_tokens[:] = -1
    return packed


def pack(plan: StepPlan, bucket: Bucket, variant: Variant, nobody: int) -> np.ndarray:
    """All rows of a plan; in a step that decodes each token stands alone, the last of each row
    first."""
    packed = padding(bucket, variant, nobody)
    fields, new_tokens, ids = variant.split(packed)
    rows: Sequence[Row] = plan.rows
    if bucket.num_steps and plan.num_tokens > len(rows):
        rows, before = _spread(rows)
        fields[len(rows) :][: len(before)] = list(map(_fields, before))
    fields[: len(rows)] = list(map(_fields, rows))
    if plan.pauses:
        for index, row in enumerate(rows):
            if row.new_tokens:
                new_tokens[index, -len(row.new_tokens) :] = row.new_tokens
    if variant.wanted is not None:
        for index, row in enumerate(rows):
            asked = row.request.logprobs.ids if row.request.logprobs else ()
            ids[index, : len(asked)] = asked
    return packed


def _fields(row: Row) -> Sequence[int]:
    """All but the request and the tokens that it brings along."""
    return row[1 : NUM_ROW_FIELDS + 1]  # type: ignore[return-value]


def _spread(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The last token of each row, and the tokens before them. What belongs to a row as a whole goes
    with its first token, where a page may begin, or with its last, behind which it draws."""
    last, before = [], []
    for row in rows:
        if row.query_len == 1:
            last.append(row)
            continue
        end = row.start + row.query_len - 1
        last.append(row._replace(start=end, query_len=1, new_page=0))
        first = row._replace(query_len=1, num_draws=0, new_tokens=())
        before.append(first)
        before += [first._replace(start=at, new_page=0) for at in range(row.start + 1, end)]
    return last, before
