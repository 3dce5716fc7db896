"""The model card of an export: facts of the run as JSON, and as a text to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastvlp.config import flatten
from fastvlp.model.saved_run import SavedRun, read_json
from fastvlp.model.saving import Saved
from fastvlp.plain_json import parse_json
from fastvlp.provenance import data_name
from fastvlp.search.embedder import usable_abilities

# Of what the run wrote about the machine and the versions (about.json).
ABOUT = ("device", "threads", "fastvlp", "commit", "torch", "date")


def card_facts(saved: Saved, run: Path, config: SavedRun) -> dict[str, Any]:
    """Returns what is known of a run, for its card and for whoever serves it.

    Args:
        saved: The run's model.
        run: Its folder, with its log and its results.
        config: What its config says of its data.
    """
    info, model, log = saved.info, saved.model.config, _read_log(run / "log.jsonl", saved.info.get("step"))
    kind = "reads text beside the image" if model.fusion else "two towers"
    data, about = config.data, read_json(run / "about.json")
    return {
        "name": info.get("name") or run.name,
        "can": sorted(usable_abilities(saved)),
        "model": {
            "kind": f"{kind}, joint space of {model.embed.width}" if model.fusion and model.embed else kind,
            "parameters": sum(parameter.numel() for parameter in saved.model.parameters()),
            "image": model.image.size,
            "patch": model.image.size // model.image.grid,
            "width": model.embed.width if model.embed else None,
            "vocabulary": model.text.vocab,
        },
        "objectives": {name: entry.get("type", "") for name, entry in info.get("objectives", {}).items()},
        "data": {split: data_name(folder) for split, folder in data.folders.items()},
        "captions": data.captions if "captions" in data.stated else None,
        "batch_size": data.batch_size,
        "training": {
            "weights": saved.weights.name,
            "step": info.get("step"),
            "steps": log.get("step"),
            "seconds": info.get("elapsed_s"),
            "pairs": info.get("pairs"),
            **{name: about[name] for name in ABOUT if name in about},
        },
        "validation": log.get("validation", {}),
        "scores": latest_scores(run),
    }


def latest_scores(run: Path) -> dict[str, dict[str, float]]:
    """Returns the latest scores of each evaluation of a run, by task and data."""
    scores: dict[str, dict[str, float]] = {}
    for path in sorted((run / "evaluations").glob("*.json")):
        results = read_json(path)
        latest = results.get("results", [{}])[-1].get("scores", {})
        name = f"{results.get('task', path.stem)}, {data_name(results.get('data', ''))}"
        scores[name] = _numbers(next(iter(latest.values())) if len(latest) == 1 else latest)
    for split, result in read_json(run / "results.json").items():
        scores[f"{split} split"] = _numbers(result)
    return scores


def card_text(card: Mapping[str, Any], place: str) -> str:
    """Returns the card as Markdown, with the front matter of a model hub.

    Args:
        card: What `card_facts` returned, and the license.
        place: Path of the export in its own example of Python.
    """
    model, training = card["model"], card["training"]
    rows = {
        "Can": ", ".join(card["can"]),
        "Model": f"{model['kind']}; {model['parameters'] / 1e6:.1f} M parameters; images of {model['image']} px in patches "
        f"of {model['patch']}; {model['vocabulary']} tokens",
        "Objectives": ", ".join(f"{name} ({kind})" for name, kind in card["objectives"].items()),
        "Data": ", ".join(f"{split}: {name}" for split, name in card["data"].items()),
        "Captions": card["captions"],
        "Batch": card["batch_size"],
        "Training": _training_text(training),
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
        f"## Scores\n\n{chr(10).join(tables) or 'None yet: `vlp evaluate` scores a run, and the next export lists them.'}\n\n"
        f"## Use\n\n```python\n{_example(place, card['can'])}```\n\n"
        f"## Licence\n\n{card['license'] or 'Not chosen yet: say here under which licence the weights may be used.'}\n"
    )


def _example(place: str, can: Iterable[str]) -> str:
    start = f"from fastvlp import Embedder\n\nembedder = Embedder.load({json.dumps(place, ensure_ascii=False)})\n"
    lines = {
        "embed": 'pictures = embedder.images([open("cat.jpg", "rb").read()])  # unit vectors\n'
        'scores = pictures @ embedder.texts(["a cat on a sofa"]).T\n',
        "caption": 'embedder.caption([open("cat.jpg", "rb").read()])\n',
        "answer": 'embedder.answer([open("cat.jpg", "rb").read()], ["what is on the sofa?"])\n',
        "match": 'embedder.match([open("cat.jpg", "rb").read()], ["a cat on a sofa"])\n',
    }
    return start + "".join(lines[ability] for ability in lines if ability in can)


def _training_text(training: Mapping[str, Any]) -> str:
    parts = {
        "step {} of {}": (training.get("step"), training.get("steps")),
        "{:,} pairs": (training.get("pairs"),),
        "{:.0f} s": (training.get("seconds"),),
        "{}": (training.get("weights"),),
    }
    return "; ".join(text.format(*values) for text, values in parts.items() if None not in values)


def _table(title: str, values: Mapping[str, float]) -> str:
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in values.items())
    return f"### {title}\n\n| | |\n|---|---|\n{rows}\n"


def _numbers(result: Any) -> dict[str, float]:
    return {
        name: value
        for name, value in flatten(result).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _read_log(path: Path, step: int | None) -> dict[str, Any]:
    """Returns the last step as `step`, and the losses of the validation at the given step as `validation`."""
    log: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = parse_json(line)
            log["step"] = entry["step"]
        except (ValueError, KeyError, TypeError):
            continue  # a line that was cut when the run was killed
        if entry.get("kind") == "validation" and entry["step"] == step:
            log["validation"] = {k: v for k, v in entry.items() if k.startswith("loss") and v is not None}
    return log
