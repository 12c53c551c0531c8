"""Packed rows: everything placed once, and no document sees another."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sovit import UserError
from sovit.vlm.packing import NO_LABEL, Document, bins, pack, visible

transformers = pytest.importorskip("transformers")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(50, 120))
def test_each_is_placed_once_within_the_capacity(lengths, capacity):
    rows = bins(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    # best fit decreasing leaves at most one row half empty
    assert sum(sum(lengths[i] for i in row) <= capacity / 2 for row in rows) <= 1


def documents(seed: int, num: int) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)

    def words(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    return [Document(words(1, 9), [(words(1, 6), words(1, 4)) for _ in range(1 + i % 3)]) for i in range(num)]


@pytest.fixture(scope="module")
def language_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def alone(language_model, document: Document) -> list[torch.Tensor]:
    """Losses of each answer's tokens, of prefix and exchange as one plain text without mask or positions of ours."""
    losses = []
    for question, answer in document.exchanges:
        ids = torch.tensor([document.prefix + question + answer])
        logits = language_model(ids).logits[0, -len(answer) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    return losses


@pytest.mark.parametrize("max_length", [30, 61, 200])
def test_packed_equals_unpacked(language_model, max_length):
    found = documents(0, 11)
    packed = pack(found, max_length, pad_id=0)
    with torch.no_grad():
        logits = language_model(packed.ids, attention_mask=visible(packed), position_ids=packed.positions).logits
        expected = [loss for document in found for loss in alone(language_model, document)]
    told = packed.labels != NO_LABEL
    losses = F.cross_entropy(logits[told], packed.labels[told], reduction="none")
    for number, loss in enumerate(expected):
        torch.testing.assert_close(losses[packed.source[told] == number], loss, rtol=1e-4, atol=1e-5)
    assert (packed.source[told] >= 0).all() and (packed.source[~told] == -1).all()


def test_naive_packing_is_not_equal(language_model):
    """What the mask is for: the same rows under a plain causal mask give other losses."""
    found = documents(0, 6)
    packed = pack(found, 200, pad_id=0)
    with torch.no_grad():
        naive = language_model(packed.ids).logits
        masked = language_model(packed.ids, attention_mask=visible(packed), position_ids=packed.positions).logits
    told = packed.labels != NO_LABEL
    assert (naive[told] - masked[told]).abs().max() > 0.1


def test_a_row_may_be_split_off_from_a_batch(language_model):
    packed = pack(documents(1, 9), 40, pad_id=0)
    assert len(packed.ids) > 2
    part = type(packed)(*(t[1:2] for t in packed))
    with torch.no_grad():
        whole = language_model(packed.ids, attention_mask=visible(packed), position_ids=packed.positions).logits[1:2]
        alone = language_model(part.ids, attention_mask=visible(part), position_ids=part.positions).logits
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)


def test_images_are_numbered_in_the_order_of_their_places():
    packed = pack(documents(2, 7), 64, pad_id=0)
    for row in range(len(packed.ids)):
        firsts = [int((packed.document[row] == place).nonzero()[0]) for place in range((packed.image[row] >= 0).sum())]
        assert firsts == sorted(firsts)
    assert sorted(packed.image[packed.image >= 0].tolist()) == list(range(7))


def test_a_document_longer_than_a_row_is_refused_with_the_remedy():
    with pytest.raises(UserError, match="takes 12 tokens.*max_length=11.*raise it"):
        pack([Document([1] * 4, [([2] * 5, [3] * 3)])], 11, pad_id=0)
