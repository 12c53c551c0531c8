"""`sovit vlm ...`: the vision-language side."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from sovit import UserError
from sovit.cli.common import Flat, Help, Json, Pixels, Place, Whole, encoder_name, sheet
from sovit.cli.common import show as show_result
from sovit.files import check_name

vlm = App(name="vlm", help="Vision-language models: what systems are made of, train, ask.")


@vlm.command
def show(system: str = "", /, *, json: Json = False) -> None:
    """Tell what released systems are made of and weigh, from their configs alone.

    Args:
        system: one in full, such as llava-1.5-7b (default: a table of all)
    """
    from sovit.vlm.systems import compare, compare_text, describe, describe_text

    if system:
        show_result(describe(system), describe_text, json)
    else:
        show_result(compare(), compare_text, json)


@vlm.command
def questions(
    source: str,
    /,
    *,
    count: Whole = 6,
    image_size: Pixels | None = None,
    out: Path | None = None,
    json: Json = False,
) -> None:
    """Show questions about training images of a data set, with answers, and the text-only baseline of each family.

    Args:
        source: DATA:PRESET, such as stream:cpu
        count: images
        image_size: pixels a side (default: the preset's own)
        out: PNG, a sheet of the images with their questions
    """
    from sovit.data import named_data
    from sovit.tables import text_table
    from sovit.vlm.questions.questions import open_questions, text_only_accuracy

    data, preset, size = named_data(source)
    size = size if image_size is None else image_size
    opened = open_questions(data, preset, size, data_seed=0)
    asked = opened.ask("train", 0, count)
    alone = text_only_accuracy(opened)
    if out:
        captions = ["\n".join(f"{q.question} {q.answer}" for q in image) for image in asked]
        title = f"{data}:{preset}, {size} px"
        sheet(opened.images("train", 0, count), captions, out, title, columns=3, lines=32)
    rows = [[{"family": q.family, "question": q.question, "answer": q.answer} for q in image] for image in asked]
    found = {"data": data, "preset": preset, "image_size": size, "images": rows, "text_only_accuracy": alone}
    if json:
        return show_result(found, str, True)
    for number, image in enumerate(asked):
        print(f"image {number}", *(f"  {q.question} {q.answer}" for q in image), sep="\n")
    print("\ntext-only baseline: what the question alone tells")
    cells = [[name, opened.kinds[name], f"{accuracy:.3f}"] for name, accuracy in alone.items()]
    print(text_table(["family", "kind", "accuracy"], cells, left=("family", "kind")))
    if out:
        print(out)


@Flat
@dataclass(frozen=True)
class TrainOptions:
    """What to train, on what."""

    preset: Annotated[str, Help("How: projector (alone), llava15 or nanovlm.")] = "projector"
    examples: Annotated[Whole, Help("Images in all.")] = 900
    batch_size: Annotated[Whole, Help("Images a step.")] = 2
    language_model: Annotated[str, Help("smollm2, random:2x64, hf:NAME or hf:FOLDER.")] = "smollm2"
    data: Annotated[str, Help("SOURCE:PRESET to ask about.")] = "stream:cpu"
    seed: Annotated[Whole, Help("Seed of weights; data takes 100 more.")] = 0
    set: Annotated[tuple[str, ...], Help("KEY=VALUE of any field, such as stages.0.projector.peak_lr=0.002.")] = ()


@vlm.command
def train(
    encoder: str,
    /,
    *,
    options: TrainOptions = TrainOptions(),
    place: Place = Place(),
    name: str = "vlm",
    json: Json = False,
) -> int:
    """Connect an encoder to a language model and train the projector, or more, by --preset.

    Args:
        encoder: RUN_ID, random:RUN_ID, timm:NAME, hf:NAME, or blind:16 (the text-only baseline: 16 learned tokens, no image)
        name: name of the ledger
    """
    from sovit.data import assets, named_data
    from sovit.ledger.ledger import update_ledger
    from sovit.spec.config import override
    from sovit.spec.vlm_run import preset_run

    encoder = encoder_name(encoder, place.runs)
    check_name(name)
    more = named_data(options.data)._asdict() | {"init_seed": options.seed, "data_seed": 100 + options.seed}
    more["language_model"] = options.language_model
    run = preset_run(options.preset, encoder, options.examples, options.batch_size, **more)
    run = override(run, options.set).replace(study=name)
    if run.language_model == "smollm2":
        assets.path("smollm2")
    from sovit.train.command import train_here
    from sovit.train.loop import OutOfMemory
    from sovit.vlm.trainer import train as train_vlm

    try:
        (row,) = train_here(run, place.runs, place.device, train_vlm)
    except OutOfMemory as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 1
    ledger = place.results / f"{name}.jsonl"
    update_ledger(ledger, [row | {"study": name}])
    show_result(row, lambda row: _trained_text(row, ledger), json)
    return int(row["status"] != "ok")


def _trained_text(row: dict, ledger: Path) -> str:
    first = f"{row['run_id']} {row['status']}, in {ledger}"
    if row["status"] != "ok":
        return first
    return (
        f"{first}\nloss {row['val_loss']:.3f} nats a token, wrong {row['val_error']:.1%}"
        f" (90 %: {row['val_error_low']:.1%} to {row['val_error_high']:.1%})\n"
        f"with another's image {row['shuffled_loss']:.3f}, wrong {row['shuffled_error']:.1%}\n"
        f"next: sovit vlm ask {row['run_id']}"
    )


@Flat
@dataclass(frozen=True)
class AskOptions:
    """What to ask about which image."""

    questions: Annotated[
        tuple[str, ...],
        Parameter(name="--question", help="One or several (default: its data's own, with the right answers)."),
    ] = ()
    image: Annotated[Path | None, Help("An image file.")] = None
    val: Annotated[Whole | None, Help("Validation image of this number of its data (default 0).")] = None
    max_new_tokens: Annotated[Whole, Help("At most so many.")] = 32


@vlm.command
def ask(
    run_id: str,
    /,
    *,
    options: AskOptions = AskOptions(),
    out: Path | None = None,
    runs: Path = Path("runs"),
    device: str = "cpu",
    json: Json = False,
) -> None:
    """Ask a trained vision-language model about an image.

    Args:
        run_id: a row of a ledger whose trunk is in runs
        out: PNG, the image with questions and answers
        runs: folder of trunks
        device: such as cpu or cuda
    """
    from sovit.ledger.records import find_branch

    if options.image is not None and options.val is not None:
        raise UserError("--image and --val both name an image; give one")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    if options.image is not None and not options.questions:
        raise UserError("an image file has no questions of its own; give one with --question")
    if options.image is not None and not options.image.is_file():
        raise UserError(f"--image {options.image} is no file; name an image file")
    run_id = find_branch(run_id, runs, vlm=True)
    from sovit.train.base import check_device
    from sovit.vlm.ask import Asked, answers_text
    from sovit.vlm.ask import ask as ask_model

    check_device(device)
    asked = Asked(**vars(options) | {"val": options.val or 0})
    found, image = ask_model(run_id, asked, runs, device)
    if out is not None:
        sheet(image[None], [answers_text(found)], out, found["image"], columns=1, lines=52)
    show_result(found, answers_text, json)
