"""`sovit vlm ...`: the vision-language side of the command line. Imports nothing heavy until a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add `vlm` and its subcommands to the parser's own."""
    vlm = commands.add_parser("vlm", help="vision-language models: what systems are made of, train, ask, evaluate")
    actions = vlm.add_subparsers(title="commands", metavar="")
    vlm.set_defaults(run=lambda options: vlm.print_help() or 2)
    _add_questions(actions)


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
    image_size = options.image_size or PRESETS.get(data, {}).get(preset, (64, ""))[0]
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
