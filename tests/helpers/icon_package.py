"""A small package of hand-written drawings in the shape of @iconify/json."""

import io
import json
import tarfile

CONCEPTS = tuple(f"thing{a}{b}" for a in "abcde" for b in "abcdefgh")  # forty nouns that no table of words knows
FAMILIES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu")


def drawing(concept: int, family: int) -> str:
    """A bar whose height says the concept and whose width says the family, so that a pixel test can tell the class."""
    return f'<path fill="currentColor" d="M0 0h{12 + family}v{4 + concept / 2}H0z"/>'


def icon_set(prefix: str, bodies: dict[str, str], licence="MIT", palette=False, category="UI 24px") -> dict:
    info = {"author": {"name": f"Author of {prefix}"}, "license": {"spdx": licence}, "palette": palette}
    info["category"] = category
    return {
        "prefix": prefix,
        "info": info,
        "icons": {k: {"body": v} for k, v in bodies.items()},
        "height": 24,
        "width": 24,
    }


def write_package(path, sets: list[dict]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for data in sets:
            raw = json.dumps(data).encode()
            member = tarfile.TarInfo(f"package/json/{data['prefix']}.json")
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))


def small_package() -> list[dict]:
    sets = []
    for f, family in enumerate(FAMILIES):
        bodies = {concept: drawing(c, f) for c, concept in enumerate(CONCEPTS)}
        sets.append(icon_set(f"{family}-set", bodies, licence="Apache-2.0" if f % 2 else "MIT"))
    extra = {
        "thingaa-off-outline": drawing(0, 12.5),
        "thingaa-thingab": "<path d='M1 1h9v9'/>",
        "google-thingaa": "<path/>",
    }
    extra["circle"] = '<circle cx="12" cy="12" r="9"/>'
    extra["thingab-24"] = drawing(1, 0)  # byte for byte the drawing of alpha-set:thingab
    extra["thingac-off"] = drawing(3, 0)  # the drawing of alpha-set:thingad under another name: neither can be trusted
    extra["thingae-blank"], extra["thingae-bad"] = "<g></g>", "<path d='M0 0h3'><broken"
    sets.append(icon_set("alpha-more", extra))
    for prefix, change in {
        "beta-gpl": {"licence": "GPL-3.0"},
        "beta-sharealike": {"licence": "CC-BY-SA-4.0"},
        "beta-colour": {"palette": True},
        "beta-brands": {"category": "Logos"},
    }.items():
        sets.append(icon_set(prefix, {"thingaa": f"<path d='M0 0h{len(prefix)}v9z'/>"}, **change))
    return sets
