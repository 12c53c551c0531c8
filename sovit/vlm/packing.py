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
from itertools import accumulate
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
    batch, in the order given, at labelled tokens; -1 elsewhere. images [B, I, 3, S, S]: in [0, 1], empty without any.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    document: Tensor
    exchange: Tensor
    image: Tensor
    source: Tensor
    images: Tensor = torch.empty(0)


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
    first = [0, *accumulate(len(document.exchanges) for document in documents)]  # number of a document's first exchange
    rows = bins(lengths, max_length)
    lines = []  # of (id, position, label, document, exchange, source), one a token
    for row in rows:
        line: list[tuple[int, ...]] = []
        for place, d in enumerate(row):
            prefix, exchanges = documents[d]
            line += [(token, position, NO_LABEL, place, -1, -1) for position, token in enumerate(prefix)]
            for e, (question, answer) in enumerate(exchanges):
                labels = [NO_LABEL] * (len(question) - 1) + answer + [NO_LABEL]
                for position, (token, label) in enumerate(zip(question + answer, labels, strict=True), len(prefix)):
                    line.append((token, position, label, place, e, -1 if label == NO_LABEL else first[d] + e))
        lines.append(line)
    width, most = max(map(len, lines)), max(map(len, rows))
    padding = (pad_id, 0, NO_LABEL, -1, -1, -1)
    table = torch.tensor([line + [padding] * (width - len(line)) for line in lines])  # [B, T, 6]
    ids, positions, labels, document, exchange, source = table.permute(2, 0, 1).contiguous()
    image = torch.tensor([row + [-1] * (most - len(row)) for row in rows])
    return Packed(ids, positions, labels, document, exchange, image, source)


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
