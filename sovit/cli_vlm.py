"""`sovit vlm ...`: the vision-language side of the command line. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sovit import UserError
from sovit.ledger import OUTPUTS


def add_commands(commands: Any) -> None:
    """Add `vlm` and its subcommands to the parser's own."""
    vlm = commands.add_parser("vlm", help="vision-language models: what systems are made of, train, ask")
    actions = vlm.add_subparsers(title="commands", metavar="")
    vlm.set_defaults(run=lambda options: vlm.print_help() or 2)
    _add_show(actions)
    _add_questions(actions)
    _add_train(actions)
    _add_ask(actions)


# released systems ------------------------------------------------------------------------------------------------------


def _add_show(actions: Any) -> None:
    command = actions.add_parser("show", help="what released systems are made of and weigh, from their configs alone")
    command.add_argument(
        "system", nargs="?", metavar="SYSTEM", help="one in full, such as llava-1.5-7b (default: a table of all)"
    )
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_show)


def _show(options: Any) -> None:
    from sovit.vlm import show

    found: Any = show.describe(options.system) if options.system else show.compare()
    text: Any = show.describe_text if options.system else show.compare_text
    print(json.dumps(found, indent=2) if options.json else text(found))


# questions -------------------------------------------------------------------------------------------------------------


def _add_questions(actions: Any) -> None:
    command = actions.add_parser(
        "questions", help="questions about images of a data set, with answers, and what is had of them without looking"
    )
    command.add_argument("source", metavar="DATA:PRESET", help="stream:cpu, icons:mosaic ...")
    command.add_argument("--count", type=int, default=6, metavar="N", help="images (default 6)")
    command.add_argument("--image-size", type=int, metavar="R", help="pixels a side (default: the preset's own)")
    command.add_argument("--val", action="store_true", help="of validation images")
    command.add_argument("--out", type=Path, metavar="PNG", help="a sheet of the images with their questions")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_questions)


def _questions(options: Any) -> None:
    from sovit.data import PRESETS
    from sovit.vlm.questions import blind_accuracy, open_questions

    data, _, preset = options.source.partition(":")
    preset = preset or next(iter(PRESETS.get(data, ())), "")
    image_size = PRESETS.get(data, {}).get(preset, (64, ""))[0] if options.image_size is None else options.image_size
    questions = open_questions(data, preset, image_size, data_seed=0)
    split = "val" if options.val else "train"
    asked = questions.ask(split, 0, options.count)
    blind = {name: {"kind": questions.kinds[name], **b._asdict()} for name, b in blind_accuracy(questions).items()}
    if options.out:
        from sovit.plot import contact_sheet

        images = questions.images(split, 0, options.count).clamp(0, 1).permute(0, 2, 3, 1).numpy()  # [B, H, W, 3]
        captions = ["\n".join(f"{q.question} {q.answer}" for q in image) for image in asked]
        title = f"{data}:{preset}, {image_size} px, {split}"
        contact_sheet(images, captions, options.out, title=title, columns=3, lines=32)
    if options.json:
        rows = [[{"family": q.family, "question": q.question, "answer": q.answer} for q in image] for image in asked]
        found = {"data": data, "preset": preset, "image_size": image_size, "split": split}
        print(json.dumps(found | {"images": rows, "blind": blind}, indent=2))
        return
    for number, image in enumerate(asked):
        print(f"image {number}")
        for q in image:
            print(f"  {q.question} {q.answer}")
    print("\nhad without looking, from the text alone (constant: of the best single answer)")
    print(f"{'family':14} {'kind':10} {'accuracy':>8} {'of words':>8} {'constant':>8} {'nats':>7} {'questions':>9}")
    for name, b in blind.items():
        scores = f"{b['accuracy']:8.3f} {b['word_accuracy']:8.3f} {b['constant']:8.3f} {b['nats']:7.3f}"
        print(f"{name:14} {b['kind']:10} {scores} {b['num_val']:9,}")
    if options.out:
        print(options.out)


# a model of one's own ------------------------------------------------------------------------------------------------


def _add_train(actions: Any) -> None:
    command = actions.add_parser(
        "train", help="put a trained encoder before a language model, and train the two together"
    )
    command.add_argument("encoder", metavar="ENCODER", help="RUN_ID, random:RUN_ID, timm:NAME, hf:NAME, or blind:16")
    command.add_argument(
        "--preset", default="projector", help="how: projector (alone), llava15, nanovlm (default projector)"
    )
    command.add_argument("--examples", type=int, default=900, metavar="N", help="images in all (default 900)")
    command.add_argument("--batch-size", type=int, default=2, help="images a step (default 2)")
    command.add_argument("--language-model", default="smollm2", help="smollm2, random:2x64, hf:NAME or hf:FOLDER")
    command.add_argument("--data", default="stream:cpu", metavar="SOURCE:PRESET", help="what is asked about")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="any field of the run, such as stages.0.projector.peak_lr=0.002",
    )
    command.add_argument("--runs", type=Path, default=Path("runs"), help="where trunks are kept (default runs)")
    command.add_argument("--results", type=Path, default=OUTPUTS, help=f"where the ledger is kept (default {OUTPUTS})")
    command.add_argument("--name", default="vlm", help="name of the ledger (default vlm)")
    command.add_argument("--device", default="cpu")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_train)


def _train(options: Any) -> int:
    from sovit.data import PRESETS
    from sovit.ledger import update_ledger
    from sovit.loop import OutOfMemory
    from sovit.run import override
    from sovit.train import train_here
    from sovit.vlm.train import train
    from sovit.vlm_run import preset_run

    data, _, preset = options.data.partition(":")
    known = PRESETS.get(data, {})
    preset = preset or next(iter(known), "")
    place = {"data": data, "preset": preset, "image_size": known.get(preset, (64, ""))[0]}
    seeds = {"init_seed": options.seed, "data_seed": 100 + options.seed}
    more = {"language_model": options.language_model, **place, **seeds}
    run = preset_run(options.preset, options.encoder, options.examples, options.batch_size, **more)
    run = override(run, options.set).replace(study=options.name)
    try:
        (row,) = train_here(run, options.runs, options.device, train)
    except OutOfMemory as error:
        print(f"sovit: {error}", file=sys.stderr)
        return 1
    ledger = options.results / f"{options.name}.jsonl"
    update_ledger(ledger, [row | {"study": options.name}])
    if options.json:
        print(json.dumps(row, indent=2))
    else:
        print(f"{row['run_id']} {row['status']}, in {ledger}")
    if row["status"] != "ok":
        return 1
    if not options.json:
        low, high = row["val_error_low"], row["val_error_high"]
        print(f"loss {row['val_loss']:.3f} nats a token, wrong {row['val_error']:.1%} (90 %: {low:.1%} to {high:.1%})")
        print(f"with another's image {row['shuffled_loss']:.3f}, wrong {row['shuffled_error']:.1%}")
        print(f"next: sovit vlm ask {row['run_id']}")
    return 0


def _add_ask(actions: Any) -> None:
    command = actions.add_parser("ask", help="ask a trained vision-language model about an image")
    command.add_argument("run_id", metavar="RUN_ID")
    command.add_argument(
        "--question",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="one or several (default: its data's own, with the right answers)",
    )
    command.add_argument("--image", type=Path, metavar="FILE", help="an image file")
    command.add_argument("--val", type=int, metavar="N", help="validation image number N of its data (default 0)")
    command.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="at most so many (default 32)")
    command.add_argument("--out", type=Path, metavar="PNG", help="the image with questions and answers")
    command.add_argument("--runs", type=Path, default=Path("runs"), help="where trunks are kept (default runs)")
    command.add_argument("--device", default="cpu")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=_ask)


def _ask(options: Any) -> None:
    from sovit.train import check_device
    from sovit.vlm.ask import answers_text, ask

    check_device(options.device)
    if options.image is not None and options.val is not None:
        raise UserError("--image and --val both name an image; give one")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens} must be at least 1")
    found, image = ask(
        options.run_id,
        options.question,
        options.image,
        options.val or 0,
        options.max_new_tokens,
        options.runs,
        options.device,
    )
    if options.out is not None:
        from sovit.plot import contact_sheet

        lines = "\n".join(answers_text(found).splitlines())
        pixels = image[None].clamp(0, 1).permute(0, 2, 3, 1).numpy()  # [1, H, W, 3]
        contact_sheet(pixels, [lines], options.out, title=found["image"], columns=1, lines=52)
    print(json.dumps(found, indent=2) if options.json else answers_text(found))
