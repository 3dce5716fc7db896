"""A run to a folder that stands alone: what it takes to embed, search and answer, and a model card filled from the run.

Left out is what training alone needs: optimiser, momentum copies, an objective's own parameters. Two heads stay, the one
that matches an image and a text, and the one that answers questions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastvlp.config import flatten
from fastvlp.errors import UserError
from fastvlp.files import whole_folder, write_whole
from fastvlp.model.saved_run import SavedRun, read_json, read_saved_run
from fastvlp.model.saving import Saved, Which, load_model, save_model
from fastvlp.objectives.saved_objectives import head_names
from fastvlp.provenance import data_name
from fastvlp.search.embedder import usable_abilities


def export(run: str | Path, out: str | Path, /, *, weights: Which = "best", license: str = "") -> dict[str, Any]:
    """Make of a run a folder that stands alone: config, weights, tokenizer, and a model card filled from the run.

    Args:
        run: Folder of the run.
        out: Folder to write.
        weights: Those of the lowest validation loss, or the last ones.
        license: Of the weights, for the card; a placeholder stands where none is given.

    Raises:
        UserError: The run can do nothing by itself, or something is in the way.
    """
    run, out = Path(run), Path(out)
    with whole_folder(out) as part:
        saved = load_model(run, weights)
        if not usable_abilities(saved):
            raise UserError(
                f"{run}: nothing to serve: it has no joint space (model.embed), and neither layers that read a text beside "
                f"the image nor a head that uses them; export a run of clip, siglip, moco, flm, ar, prefixlm, itm or a task"
            )
        config = read_saved_run(run)
        card = facts(saved, run, config) | {"license": license or None}
        save_model(part, saved.model, saved.tokenizer, saved.info, objectives=heads(saved))
        write_whole(part / "config.json", json.dumps(reading(config), indent=2, ensure_ascii=False).encode())
        write_whole(part / "card.json", json.dumps(card, indent=2, ensure_ascii=False).encode())
        # An absolute path tells of the machine.
        place = out.name if out.is_absolute() else out.as_posix()
        write_whole(part / "README.md", readme(card, place).encode())
    return card


def heads(saved: Saved) -> dict[str, Any]:
    """Parameters of objectives that serving reads."""
    kept = head_names(saved)
    return {key: value for key, value in saved.objectives.items() if key.partition(".")[0] in kept}


def reading(config: SavedRun) -> dict[str, Any]:
    """The part of a run's config that says how images and texts are read; where its data lay is nobody's business."""
    data = config.data
    return {
        "name": config.name,
        "precision": config.precision,
        "data": {
            "fit": data.fit,
            "max_length": data.max_length,
            "captions": data.captions,
            "answers": list(data.answers),
        },
    }


def facts(saved: Saved, run: Path, config: SavedRun) -> dict[str, Any]:
    """What is known of a run: for the card, and for whoever serves it."""
    info, model, log = saved.info, saved.model.config, _log(run / "log.jsonl", saved.info.get("step"))
    tower = "reads text beside the image" if model.fusion else "two towers"
    data, about = config.data, read_json(run / "about.json")
    return {
        "name": info.get("name") or run.name,
        "can": sorted(usable_abilities(saved)),
        "model": {
            "kind": f"{tower}, joint space of {model.embed.width}" if model.fusion and model.embed else tower,
            "parameters": sum(parameter.numel() for parameter in saved.model.parameters()),
            "image": model.image.size,
            "patch": model.image.size // model.image.grid,
            "width": model.embed.width if model.embed else None,
            "vocabulary": model.text.vocab,
        },
        "objectives": {name: told.get("type", "") for name, told in info.get("objectives", {}).items()},
        "data": {split: data_name(folder) for split, folder in data.folders.items()},
        "captions": data.captions if "captions" in data.stated else None,
        "batch_size": data.batch_size,
        "training": {
            "weights": saved.weights.name,
            "step": info.get("step"),
            "steps": log.get("step"),
            "seconds": info.get("elapsed_s"),
            "pairs": info.get("pairs"),
            **{key: about[key] for key in ("device", "threads", "fastvlp", "commit", "torch", "date") if key in about},
        },
        "validation": log.get("validation", {}),
        "scores": scores(run),
    }


def scores(run: Path) -> dict[str, dict[str, float]]:
    """The latest of each evaluation of the run, by task and data."""
    found: dict[str, dict[str, float]] = {}
    for path in sorted((run / "evaluations").glob("*.json")):
        told = read_json(path)
        last = told.get("results", [{}])[-1].get("scores", {})
        name = f"{told.get('task', path.stem)}, {data_name(told.get('data', ''))}"
        found[name] = _numbers(next(iter(last.values())) if len(last) == 1 else last)
    for split, told in read_json(run / "results.json").items():
        found[f"{split} split"] = _numbers(told)
    return found


def readme(card: Mapping[str, Any], place: str) -> str:
    """The card to read, with the front matter of a model hub. `place`: of the export, as its Python names it."""
    model, training = card["model"], card["training"]
    objectives = ", ".join(f"{name} ({kind})" for name, kind in card["objectives"].items())
    rows = {
        "Can": ", ".join(card["can"]),
        "Model": f"{model['kind']}; {model['parameters'] / 1e6:.1f} M parameters; images of {model['image']} px in patches "
        f"of {model['patch']}; {model['vocabulary']} tokens",
        "Objectives": objectives,
        "Data": ", ".join(f"{split}: {place}" for split, place in card["data"].items()),
        "Captions": card["captions"],
        "Batch": card["batch_size"],
        "Training": _training(training),
        "Device": training.get("device"),
        "Made with": ", ".join(f"{k} {training[k]}" for k in ("fastvlp", "commit", "torch") if training.get(k)),
        "Date": training.get("date"),
    }
    validation = {"validation": card["validation"]} if card["validation"] else {}
    tables = [_table(title, values) for title, values in (card["scores"] | validation).items() if values]
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    return (
        f"---\nlibrary_name: fastvlp\nlicense: {card['license'] or 'other'}\ntags: [image-text, fastvlp]\n---\n\n"
        f"# {card['name']}\n\n| | |\n|---|---|\n{facts}\n\n"
        f"## Scores\n\n{chr(10).join(tables) or 'None yet: `vlp evaluate` scores a run, and the next export tells.'}\n\n"
        f"## Use\n\n```python\n{_use(place, card['can'])}```\n\n"
        f"## Licence\n\n{card['license'] or 'Not chosen yet: say here under which licence the weights may be used.'}\n"
    )


def _use(place: str, can: list[str]) -> str:
    start = f"from fastvlp import Embedder\n\nembedder = Embedder.load({json.dumps(place, ensure_ascii=False)})\n"
    lines = {
        "embed": 'pictures = embedder.images([open("cat.jpg", "rb").read()])  # unit vectors\n'
        'scores = pictures @ embedder.texts(["a cat on a sofa"]).T\n',
        "caption": 'embedder.caption([open("cat.jpg", "rb").read()])\n',
        "answer": 'embedder.answer([open("cat.jpg", "rb").read()], ["what is on the sofa?"])\n',
        "match": 'embedder.match([open("cat.jpg", "rb").read()], ["a cat on a sofa"])\n',
    }
    return start + "".join(lines[ability] for ability in lines if ability in can)


def _training(told: Mapping[str, Any]) -> str:
    parts = {
        "step {} of {}": (told.get("step"), told.get("steps")),
        "{:,} pairs": (told.get("pairs"),),
        "{:.0f} s": (told.get("seconds"),),
        "{}": (told.get("weights"),),
    }
    return "; ".join(text.format(*values) for text, values in parts.items() if None not in values)


def _table(title: str, values: Mapping[str, float]) -> str:
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in values.items())
    return f"### {title}\n\n| | |\n|---|---|\n{rows}\n"


def _numbers(told: Any) -> dict[str, float]:
    return {
        name: value
        for name, value in flatten(told).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _log(path: Path, step: int | None) -> dict[str, Any]:
    """The last step, and the losses of the validation at `step`."""
    found: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            told = json.loads(line)
            found["step"] = told["step"]
        except (ValueError, KeyError, TypeError):
            continue  # a line cut by a kill
        if told.get("kind") == "validation" and told["step"] == step:
            found["validation"] = {k: v for k, v in told.items() if k.startswith("loss") and v is not None}
    return found
