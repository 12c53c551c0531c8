"""The model around encoder, projector and language model: what it sees, how it answers, how answers are scored."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sovit import UserError
from sovit.encoder.model import build
from sovit.encoder.open import timm_encoder
from sovit.spec.shape import Shape

pytest.importorskip("transformers")

from sovit.vlm.evaluate import asked, cluster_interval, unparsed, validate  # noqa: E402
from sovit.vlm.language_model import open_language_model  # noqa: E402
from sovit.vlm.model import ModelOptions, VisionLanguageModel  # noqa: E402
from sovit.vlm.packing import NO_LABEL  # noqa: E402
from sovit.vlm.questions.questions import Question, open_questions  # noqa: E402

SHAPE = Shape(16, 2, 32, head_dim=8, patch_size=4, image_size=16, pool="none")
FAMILIES = ("most", "count", "more")


def model_of(encoder="trained", **more) -> VisionLanguageModel:
    torch.manual_seed(0)
    tower = 3 if encoder == "blind" else timm_encoder("tower", build(SHAPE, 16, seed=1))
    return VisionLanguageModel(tower, open_language_model("random:2x32"), ModelOptions(template="plain", **more)).eval()


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def questions():
    return open_questions("stream", "cpu", 16, 0, FAMILIES)


PROMPTS = ["How many cells are red?", "Why?", "Which colour is the most frequent?"]


def test_placeholders_are_filled_in_order_and_nothing_else_is(model):
    images = torch.rand(2, 3, 16, 16)
    token = model.language_model.image_token_id
    ids = torch.tensor([[5, *[token] * 16, 6], [7, 8, *[token] * 16]])
    x = model.embed(ids, images)
    seen = model.image_tokens(images)
    assert torch.equal(x[0, 1:17], seen[0]) and torch.equal(x[1, 2:], seen[1])
    words = model.lm.get_input_embeddings()
    assert torch.equal(x[0, [0, 17]], words(torch.tensor([5, 6]))) and torch.equal(
        x[1, :2], words(torch.tensor([7, 8]))
    )


@pytest.mark.parametrize("layer, norm", [(-1, True), (-1, False), (0, False)])
def test_the_layer_and_the_norm_are_those_asked_for(layer, norm):
    model = model_of(layer=layer, norm=norm)
    images = torch.rand(2, 3, 16, 16)
    encoder = model.encoder
    x = encoder.preprocess(images)
    with torch.no_grad():
        net = encoder.module
        t = net.patch_embed(x) + net.pos_embed
        for block in net.blocks[: layer % 2 + 1]:
            t = block(t)
        expected = model.projector(net.norm(t) if norm else t)
        torch.testing.assert_close(model.image_tokens(images), expected, rtol=1e-5, atol=1e-6)


def test_the_text_only_baseline_sees_no_image_and_the_other_does():
    images = torch.rand(3, 3, 16, 16)
    for encoder in ("trained", "blind"):
        model = model_of(encoder)
        own, other = (model.score(i, PROMPTS, [["a", "b"]] * 3) for i in (images, images.flip(0)))
        assert all(map(torch.equal, own, other)) == (encoder == "blind")


def test_cached_generation_equals_reading_everything_again_and_each_prompt_alone(model):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    said = model.generate(images, PROMPTS, 12)
    assert said == model.generate(images, PROMPTS, 12, use_cache=False)
    assert said == [model.generate(images[i : i + 1], PROMPTS[i : i + 1], 12)[0] for i in range(3)]
    without = model.generate(None, PROMPTS, 12)
    assert without == model.generate(None, PROMPTS, 12, use_cache=False)


def test_generation_ends_at_the_end_token(model):
    """A head that likes one letter twice and then the end token."""
    model = model_of()
    head, calls = model.lm.lm_head, []
    letter, end = model.encode("q")[0], model.language_model.eos_token_id

    def planted(x):
        calls.append(x.shape)
        logits = head.weight.new_zeros(*x.shape[:2], len(head.weight))
        logits[..., letter if len(calls) < 3 else end] = 1.0
        return logits

    model.lm.lm_head.forward = planted
    assert model.generate(None, ["Say it."], 50) == ["qq"]
    assert len(calls) == 3  # and no further


def test_scores_are_the_log_probabilities_of_the_whole_text(model):
    """Against transformers' own forward over prompt and answer, token by token, one candidate at a time."""
    images = torch.rand(2, 3, 16, 16)
    candidates = [["yes", "no", "perhaps so"], ["7"]]
    with torch.no_grad():
        for i, found in enumerate(model.score(images, PROMPTS[:2], candidates)):
            for answer, total in zip(candidates[i], found, strict=True):
                document = model.document([(PROMPTS[i], answer)])
                question, told = document.exchanges[0]
                ids = torch.tensor([document.prefix + question + told])
                logits = model.lm(inputs_embeds=model.embed(ids, images[i : i + 1])).logits[0].log_softmax(-1)
                start = ids.shape[1] - len(told)
                expected = sum(logits[start - 1 + t, word] for t, word in enumerate(told))
                torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
                assert told[-1] == model.language_model.eos_token_id


def test_documents_stay_apart_however_attention_is_computed():
    """transformers' eager attention adds what mask it is given, which for True and False hides nothing."""
    model = model_of()
    images, answers = torch.rand(3, 3, 16, 16), [["yes", "no"]] * 3
    expected = model.score(images, PROMPTS, answers)
    model.lm.set_attn_implementation("eager")
    for one, other in zip(model.score(images, PROMPTS, answers), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    model.lm.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="flex_attention.*sdpa"):
        model.score(images, PROMPTS, answers)


def test_an_answer_is_wrong_exactly_where_greedy_generation_says_something_else(questions):
    """The error is told without generating; here it is held against generating, by a head that says yes or no, then ends."""
    model = model_of(seed=3)
    head, end = model.lm.lm_head, model.language_model.eos_token_id
    words = [model.document([("", word)]).exchanges[0][1][0] for word in ("yes", "no")]
    place = iter(range(100))

    def planted(x):  # of `asked` [L, D]: the word and the end by turns; of `generate` [B, 1, D]: one call a token
        logits = F.linear(x, head.weight)
        only = torch.full_like(logits, -1e9)
        first = logits[..., words].flatten(0, -2)[
            :: 1 if x.ndim == 3 else 2
        ]  # what is compared is where a word is said
        only[..., words] = logits[..., words] - first.median(0).values  # so that both are
        ends = torch.full_like(logits, -1e9)
        ends[..., end] = 0.0
        if x.ndim == 3:
            return ends if next(place) else only
        return torch.where(torch.arange(len(x))[:, None] % 2 == 1, ends, only)

    model.lm.lm_head.forward = planted
    images, sample = questions.images("val", 0, 8), questions.ask("val", 0, 8)
    flat = [(i, q) for i, asked in enumerate(sample) for q in asked]
    said = model.generate(images[[i for i, _ in flat]], [q.question for _, q in flat], 3)
    assert set(said) == {"yes", "no"}
    answers = iter("yes" if k % 2 else "no" for k in range(len(flat)))

    class Planted:
        families = FAMILIES
        images = staticmethod(questions.images)

        def ask(self, split, start, count):
            return [[q._replace(answer=next(answers)) for q in asked] for asked in sample]

    found = asked(model, Planted(), 8, 2048)["wrong"].astype(bool)
    expected = [text != ("yes" if k % 2 else "no") for k, text in enumerate(said)]
    assert found.tolist() == expected and 0 < sum(expected) < len(expected)


def test_losses_are_cross_entropies_of_the_answers(model, questions):
    found = asked(model, questions, 3, 2048)
    images, sample = questions.images("val", 0, 3), questions.ask("val", 0, 3)
    k = 0
    for i, one in enumerate(sample):
        for q in one:
            (score,) = model.score(images[i : i + 1], [q.question], [[q.answer]])
            assert -score.item() == pytest.approx(found["loss"][k], rel=1e-4)
            assert found["tokens"][k] == len(model.encode(" " + q.answer)) + 1
            k += 1
    assert k == len(found["loss"])


def test_the_shuffled_control_asks_about_the_next_image(model, questions):
    shuffled = asked(model, questions, 4, 2048, shift=1)
    images = questions.images("val", 0, 4)

    class Rolled:
        families = FAMILIES
        ask = staticmethod(questions.ask)

        def images(self, split, start, count):
            return images.roll(-1, 0)[start : start + count]

    np.testing.assert_allclose(shuffled["loss"], asked(model, Rolled(), 4, 2048)["loss"], rtol=1e-5)
    assert not np.allclose(shuffled["loss"], asked(model, questions, 4, 2048)["loss"])


def test_metrics_are_means_over_questions_and_the_interval_holds_them(model, questions):
    metrics = validate(model, questions, 4, 2048)
    found = asked(model, questions, 4, 2048)
    assert metrics["val_error"] == found["wrong"].mean() and metrics["num_questions"] == len(found["wrong"])
    assert metrics["val_loss"] == pytest.approx(found["loss"].sum() / found["tokens"].sum())
    of_most = found["family"] == FAMILIES.index("most")
    assert metrics["val_loss/most"] == pytest.approx(found["loss"][of_most].sum() / found["tokens"][of_most].sum())
    assert metrics["val_error_low"] <= metrics["val_error"] <= metrics["val_error_high"]


def test_unparsed_answers_are_those_outside_of_the_closed_set(model, monkeypatch):
    class Fixed:
        families = ("one",)

        def images(self, split, start, count):
            return torch.zeros(count, 3, 16, 16)

        def ask(self, split, start, count):
            return [[Question("one", "What?", "x", ("x", "said") if i % 4 else ("x", "y"))] for i in range(count)]

    monkeypatch.setattr(model, "generate", lambda images, prompts, longest: ["said"] * len(prompts))
    assert unparsed(model, Fixed(), 8) == 0.25


def test_the_interval_is_of_clusters():
    """Ten images whose questions all agree know ten things, not a thousand."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(10), 100)
    values = np.repeat(rng.integers(0, 2, 10), 100).astype(float)
    low, high = cluster_interval(values, clusters)
    exact = 1.645 * np.sqrt(values.mean() * (1 - values.mean()) / 10)
    assert (high - low) / 2 == pytest.approx(exact, rel=0.25)


def test_every_labelled_token_gets_its_logits(model):
    """Only they go through the vocabulary; in the order of the labels."""
    documents = [model.document([(p, "yes"), (p, "no")]) for p in PROMPTS]
    images = torch.rand(3, 3, 16, 16)
    batch = model.batch(documents, images, 2048)
    with torch.no_grad():
        logits = model(batch)
        total, count = F.cross_entropy(logits, batch.labels[batch.labels != NO_LABEL], reduction="sum"), len(logits)
        scores = torch.cat(model.score(images, PROMPTS, [["yes", "no"]] * 3))
    assert total.item() == pytest.approx(-scores.sum().item(), rel=1e-4)
    assert count == 2 * sum(len(model.encode(" " + a)) + 1 for a in ("yes", "no")) * 3 // 2


# bad input -------------------------------------------------------------------------------------------------------------


def test_bad_input_is_said_in_one_line(model):
    image = torch.rand(1, 3, 16, 16)
    with pytest.raises(UserError, match="no candidate answers"):
        model.score(image, ["a"], [[]])
    with pytest.raises(UserError, match=r"do not fit into the 2048.*shorten"):
        model.generate(image, ["a" * 3000], 4)
    with pytest.raises(UserError, match="max_length"):
        model.score(image, ["a" * 3000], [["b"]])
    for projector in ("mlp2x_gelu?factor", "mlp2x_gelu?factor=two", "nothing", "pixel_shuffle_linear?factor=3"):
        with pytest.raises(UserError):
            model_of(projector=projector)


def test_text_that_spells_the_image_token_is_refused():
    model = model_of()
    word = model.language_model.tokenizer.decode([model.language_model.image_token_id])
    if model.language_model.tokenizer.encode(word, add_special_tokens=False) != [model.language_model.image_token_id]:
        pytest.skip("this tokenizer cannot be made to spell it")
    with pytest.raises(UserError, match="stands for image tokens"):
        model.encode(f"a {word} b")
