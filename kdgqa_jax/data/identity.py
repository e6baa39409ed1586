"""What the data of a run were, so that a run resumes on the same and no others.

The record is `data.json` of a run's directory: names of the classes, and of each split the number
of images and a fingerprint of its listing. Of image files that is their names and labels, not their
content, which would have to be read: files that change under their names go unnoticed.
"""

import hashlib
from collections.abc import Collection
from typing import Any

from kdgqa_jax import paths, processes, workdir
from kdgqa_jax.data.dataset import Dataset, Split, listing
from kdgqa_jax.errors import UserError

FILE = "data.json"
Description = dict[str, Any]


def describe(dataset: Dataset) -> Description:
    """What distinguishes a data set from others, as JSON; of a data set as its source gives it."""
    return {
        "class_names": list(dataset.class_names),
        "train": _describe_split(dataset.train),
        "test": _describe_split(dataset.test),
    }


def _describe_split(split: Split) -> Description:
    digest = hashlib.blake2b(digest_size=16)
    for part in listing(split):
        digest.update(part)
    return {"images": len(split), "fingerprint": digest.hexdigest()}


def check(folder: paths.Path, here: dict[str, Description], renew: Collection[str] = ()) -> None:
    """Compare data with the record in a run's directory, or make it where there is none.

    To be called in every process of the run; the first one writes.

    Args:
      folder: of the run.
      here: the descriptions, by what they are called in the sentence.
      renew: those that nothing has used so far, which may have changed.

    Raises UserError: data have changed; it says what and what to do.
    """

    def recorded() -> dict[str, Description]:
        path = folder / FILE
        there = workdir.read_json(path) if path.exists() else {}
        known = {**here, **{name: d for name, d in there.items() if name not in renew}}
        if known != there:
            workdir.write_json(path, known)
        return known

    there = processes.on_first_process(recorded)
    for name, description in here.items():
        changes = _changes(there[name], description)
        if changes:
            raise UserError(
                f"the {name} of the run in {folder} changed after it began: {'; '.join(changes)};"
                " restore them to resume it, or choose another --workdir for a run on what is"
                " there now"
            )


def _changes(there: Description, here: Description) -> list[str]:
    """What differs, in words."""
    before, now = there["class_names"], here["class_names"]
    changes = []
    for what, names in (
        ("added", [n for n in now if n not in set(before)]),
        ("removed", [n for n in before if n not in set(now)]),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            changes.append(f"class {', '.join(map(repr, names[:4]))}{more} {what}")
    if before != now and not changes:
        changes.append("the order of the classes")
    for split in ("train", "test"):
        old, new = there[split], here[split]
        if old["images"] != new["images"]:
            counts = f"{new['images']:,} instead of {old['images']:,}"
            changes.append(f"{counts} images to {split} on")
        elif old["fingerprint"] != new["fingerprint"] and not changes:
            changes.append(f"other images to {split} on, or other labels or names of them")
    return changes
