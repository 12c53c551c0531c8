"""Documents of tokens -> packed rows, in which no document sees another: equal to running each of them alone.

A document is an image's prefix and the exchanges about it; an exchange is a question and its answer. Every exchange sees the
prefix and itself. Packed naively (nanoVLM's fault), a document also sees those before it in its row, and its positions
go on from theirs; here a mask and positions that start anew in each document prevent both. Exchanges of one document share
its prefix, so that an image is encoded, and its tokens go through the language model, once for all its questions (as Molmo
packs its annotations, arXiv 2409.17146).

    legend: B rows, T tokens a row, I images a row at most
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sovit import UserError

NO_LABEL = -100  # what cross_entropy passes over


class Document(NamedTuple):
    """prefix: token ids, among them one placeholder for each image token; exchanges: (question ids, answer ids)."""

    prefix: list[int]
    exchanges: list[tuple[list[int], list[int]]]

    @property
    def num_tokens(self) -> int:
        return len(self.prefix) + sum(len(question) + len(answer) for question, answer in self.exchanges)


class Packed(NamedTuple):
    """Rows of documents; every tensor [B, ...], so that a batch can be split by rows.

    ids, positions, labels [B, T] int64: labels[b, t] is the token to be told at t, NO_LABEL where none is. document and
    exchange [B, T]: which of its row a token is of, -1 padding; exchange -1 the prefix. image [B, I]: number of the image
    in the batch that the row's documents begin with, -1 where it has fewer. source [B, T]: number of the exchange in the
    batch, in the order given, at labelled tokens; -1 elsewhere.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    document: Tensor
    exchange: Tensor
    image: Tensor
    source: Tensor


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which go together: the longest first, each into the fullest row that still has room (best fit decreasing)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if fits:
            r = min(fits, key=lambda r: (room[r], r))
            rows[r].append(i)
            room[r] -= lengths[i]
        else:
            rows.append([i])
            room.append(capacity - lengths[i])
    return rows


def check_lengths(lengths: Sequence[int], max_length: int) -> None:
    if max(lengths) > max_length:
        raise UserError(
            f"an image with its questions takes {max(lengths)} tokens, a row has max_length={max_length};"
            " raise it up to what the language model reads, ask fewer questions, or pool the image's tokens"
        )


def pack(documents: Sequence[Document], max_length: int, pad_id: int) -> Packed:
    """Pack documents, of which number d shows image number d. Raises UserError where one is longer than a row."""
    lengths = [document.num_tokens for document in documents]
    check_lengths(lengths, max_length)
    first_source = [0]  # of each document
    for document in documents:
        first_source.append(first_source[-1] + len(document.exchanges))
    rows = bins(lengths, max_length)
    width = max(sum(lengths[d] for d in row) for row in rows)
    columns: dict[str, list[list[int]]] = {name: [] for name in ("ids", "positions", "labels", "document", "exchange")}
    columns["source"] = []
    for row in rows:
        line: dict[str, list[int]] = {name: [] for name in columns}

        def add(line, ids, positions, labels, document, exchange, source) -> None:
            line["ids"] += ids
            line["positions"] += positions
            line["labels"] += labels
            line["document"] += [document] * len(ids)
            line["exchange"] += [exchange] * len(ids)
            line["source"] += [source if label != NO_LABEL else -1 for label in labels]

        for place, d in enumerate(row):
            prefix, exchanges = documents[d]
            add(line, prefix, range(len(prefix)), [NO_LABEL] * len(prefix), place, -1, -1)
            for e, (question, answer) in enumerate(exchanges):
                ids = question + answer
                told = [NO_LABEL] * (len(question) - 1) + answer + [NO_LABEL]
                positions = range(len(prefix), len(prefix) + len(ids))
                add(line, ids, positions, told, place, e, first_source[d] + e)
        padding = width - len(line["ids"])
        fill = {"ids": pad_id, "positions": 0, "labels": NO_LABEL, "document": -1, "exchange": -1, "source": -1}
        for name in columns:
            columns[name].append(line[name] + [fill[name]] * padding)
    most = max(map(len, rows))
    image = torch.tensor([row + [-1] * (most - len(row)) for row in rows])
    return Packed(**{name: torch.tensor(lines) for name, lines in columns.items()}, image=image)


def visible(packed: Packed) -> Tensor:
    """Attention mask [B, 1, T, T], True where a token (row) may look (column): causal, within its document, and of the
    exchanges of that document only its own. Padding looks at itself, since a row of nothing but minus infinity is NaN.
    """
    document, exchange = packed.document, packed.exchange
    same = document[:, :, None] == document[:, None, :]  # [B, T, T]
    own = (exchange[:, None, :] == -1) | (exchange[:, :, None] == exchange[:, None, :])
    causal = torch.ones(same.shape[1:], dtype=torch.bool, device=same.device).tril()
    itself = torch.eye(same.shape[1], dtype=torch.bool, device=same.device)
    real = document[:, :, None] >= 0
    return ((same & own & causal & real) | itself)[:, None]
