"""The adapter to lmms-eval, on requests as it makes them; with its own base class where it is installed."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from sovit import UserError
from sovit.encoder.open import Preprocess


@pytest.fixture
def adapter(monkeypatch):
    """The module under test; a bare base class stands in where lmms-eval is not installed."""
    try:
        import lmms_eval.api.model  # noqa: F401
    except ImportError:
        names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance", "lmms_eval.api.model")
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[names[-1]].lmms = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})
        sys.modules[names[-2]].GenerationResult = lambda text: SimpleNamespace(text=text)
        monkeypatch.delitem(sys.modules, "sovit.vlm.lmms_eval", raising=False)
    import sovit.vlm.lmms_eval as module

    yield module
    sys.modules.pop("sovit.vlm.lmms_eval", None)


class Sees:
    """Says whether an image is red; "blind" without one."""

    encoder = SimpleNamespace(preprocess=Preprocess(8, (0.5,) * 3, (0.5,) * 3))

    def encode(self, text):
        return list(text)

    def generate(self, images, prompts, max_new_tokens):
        self.size = len(prompts)
        if images is None:
            return ["blind"] * len(prompts)
        assert images.shape[1:] == (3, 8, 8) and images.min() >= 0 and images.max() <= 1
        return ["yes\nQuestion" if image[0].mean() > 0.5 else "no" for image in images]

    def score(self, images, prompts, answers):
        said = self.generate(images, prompts, 3)
        return [torch.tensor([-0.5 if a == s.split()[0] else -3.0 for a in given]) for s, given in zip(said, answers)]


@pytest.fixture
def model(adapter, monkeypatch):
    monkeypatch.setattr(adapter, "open_vlm", lambda *given: Sees())
    model = adapter.SovitModel("0123456789-640", batch_size="2")
    colours = ["red", "blue", None, "red", "blue"]
    documents = [{"image": c and Image.new("RGB", (16, 12), c), "answer": "no"} for c in colours]
    model.task_dict = {"task": {"test": documents}}
    return model


def requests(*second, of=range(5)):
    def visual(document):
        return [document["image"]] if document["image"] else []

    return [SimpleNamespace(args=("Red?", s, visual, i, "task", "test")) for i in of for s in second]


def test_answers_keep_the_order_of_their_requests(model):
    options = {"max_new_tokens": 4, "until": ["\n"]}
    assert model.generate_until(requests(options)) == ["yes", "no", "blind", "yes", "no"]
    assert model.model.size <= 2


def test_the_likelier_answer_has_the_smaller_loss(model):
    found = model.loglikelihood(requests(" yes", " no", of=[1]))
    assert [r.text for r in found] == [(3.0, False), (0.5, True)]
    (found,) = model.loglikelihood(requests(lambda document: document["answer"], of=[1]))
    assert found.text == (0.5, True)


def test_several_images_are_refused(model):
    (request,) = requests({}, of=[0])
    request.args = (*request.args[:2], lambda document: [1, 2], *request.args[3:])
    with pytest.raises(UserError, match="question 0 of task has 2 images; one is read"):
        model.generate_until([request])
