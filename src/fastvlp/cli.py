"""The command line, and the only place that reads it. Each command is a frozen dataclass and a function of it.

Modules that import torch are imported inside the functions, so that help and a misspelt option answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass, replace
from difflib import get_close_matches
from inspect import getdoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import tyro
from rich.console import Console
from tyro.conf import Positional, arg, subcommand

from fastvlp.compare_options import Compare
from fastvlp.data.options import Data, DataCommand, DataDemo, DataImport, DataInspect
from fastvlp.errors import UserError, install
from fastvlp.eval.options import Probe, Retrieval, ZeroShot
from fastvlp.model.options import Convert, Towers
from fastvlp.serve.options import Embed, Export, IndexBuild, IndexCommand, Indexing, IndexSearch, Serve
from fastvlp.tasks.options import Evaluate, Finetune

if TYPE_CHECKING:
    from fastvlp.batch import Dropped
    from fastvlp.train.state import TrainConfig


def data_demo(command: DataDemo) -> None:
    from fastvlp.data.streams import bar
    from fastvlp.data.world import WorldConfig, write_world

    config = WorldConfig(seed=command.seed, size=command.size, captions=command.captions)
    with bar() as progress:
        tasks = {}

        def step(split: str, done: int, count: int) -> None:
            if split not in tasks:
                tasks[split] = progress.add_task(split, total=count)
            progress.update(tasks[split], completed=done)

        counts = write_world(
            command.out,
            config,
            train=command.train,
            val=command.val,
            test=command.test,
            pairs=command.pairs,
            singles=command.singles,
            progress=step,
        )
    print(f"{command.out}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


def data_import(command: DataImport) -> None:
    from fastvlp.data import sources
    from fastvlp.data.importing import ImportConfig, import_data

    source = sources.Source(
        path=command.source,
        format=sources.guess(command.source) if command.format == "auto" else command.format,
        image_column=command.image_column,
        caption_column=command.caption_column,
        images=command.images,
        features=command.features,
    )
    config = ImportConfig(
        split=command.split,
        val=command.val,
        test=command.test,
        max_side=command.max_side,
        per_shard=command.per_shard,
    )
    done = import_data(source, command.out, config, show=True)
    print(f"{command.out}: " + ", ".join(f"{split} {count}" for split, count in sorted(done.written.items())))
    if done.dropped:
        print(f"dropped {len(done.dropped)}, by name in {command.out / 'dropped.jsonl'}:")
        for reason, count in done.reasons.most_common():
            print(f"  {count} {reason}")


def data_inspect(command: DataInspect) -> None:
    from fastvlp.data.inspect import inspect, rendered
    from fastvlp.data.tokenize import Tokenizer

    tokenizer = Tokenizer.load(command.tokenizer) if command.tokenizer else None
    sheet = command.sheet or command.folder / "contact-sheet.png"
    reports = inspect(command.folder, tokenizer=tokenizer, sheet=sheet, show=True)
    Console().print(rendered(reports))
    if sheet.exists():
        print(f"contact sheet: {sheet}")


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain a model by a recipe. `vlp pretrain RECIPE --help` lists the recipe's fields, each of which can be set;
    `--from RUN` starts with the weights of another run."""

    recipe: Positional[str]
    """Name of a recipe that comes with fastvlp, or the path of your own file."""
    resume: bool = False
    """Continue from the last checkpoint."""


def pretrain(argv: Sequence[str]) -> None:
    """`argv`: RECIPE and overrides of its fields. The recipe comes first, because it says which fields there are."""
    from fastvlp.recipes import recipe
    from fastvlp.train.run import train
    from fastvlp.train.state import TrainConfig

    # Not a class statement: its annotations would be strings, and tyro looks their names up in this module.
    again = Annotated[bool, arg(help="Continue from the last checkpoint.")]
    Overrides = make_dataclass("Overrides", [("run", Annotated[TrainConfig, arg(name="")]), ("resume", again, False)])

    # As in `vlp finetune --from`; the field cannot be called that.
    args = ["--init" + told[6:] if told.partition("=")[0] == "--from" else told for told in argv[1:]]
    said = tyro.cli(
        Overrides,
        default=Overrides(recipe(argv[0])),
        args=args,
        prog=f"vlp pretrain {argv[0]}",
        description=getdoc(TrainConfig),
        config=(tyro.conf.AvoidSubcommands,),
    )
    train(one_length(said.run, args), said.resume, verbose=True)


def one_length(run: TrainConfig, argv: Sequence[str]) -> TrainConfig:
    """A length given alone is the run's: `--steps` without `--budget-s` puts an end to the recipe's budget, and the
    reverse."""
    given = {option.partition("=")[0].replace("_", "-") for option in argv} & {"--steps", "--budget-s"}
    if given == {"--steps"} and run.steps is not None:
        return replace(run, budget_s=None)
    if given == {"--budget-s"} and run.budget_s is not None:
        return replace(run, steps=None)
    return run


def finetune(command: Finetune) -> None:
    from fastvlp.tasks.finetune import finetune, told_in_words

    if (done := finetune(command)) is not None:
        print(told_in_words(done[0]))
        print(f"results: {done[1]}")


EvaluateCommand = (
    Annotated[Evaluate, subcommand("task")]
    | Annotated[Retrieval, subcommand("retrieval")]
    | Annotated[ZeroShot, subcommand("zeroshot")]
    | Annotated[Probe, subcommand("probe")]
)


def names(parts: Any) -> tuple[str, ...]:
    """Of a command's parts, as tyro is told them."""
    return tuple(get_args(part)[1].name for part in get_args(parts))


EVALUATIONS = names(EvaluateCommand)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Score a run: the task that it was fine-tuned on, or its embeddings. `vlp evaluate RUN` is `vlp evaluate task RUN`."""

    command: Annotated[EvaluateCommand, arg(name="")]


def evaluate_task(command: Evaluate) -> None:
    from fastvlp.tasks.finetune import evaluate, told_in_words, write_results

    scores = {command.split: evaluate(command)}
    print(told_in_words(scores))
    print(f"results: {write_results(Path(command.run), scores)}")


def evaluate_embeddings(command: Retrieval | ZeroShot | Probe) -> None:
    from fastvlp.about import about
    from fastvlp.config import to_json
    from fastvlp.dist import pick_device
    from fastvlp.eval import probe, retrieval, zeroshot
    from fastvlp.eval.results import keep_result, score_table

    match command:
        case Retrieval():
            found = retrieval.evaluate(command)
        case ZeroShot():
            found = zeroshot.evaluate(command)
        case Probe():
            found = probe.evaluate(command)
    Console().print(score_table(found["scores"]))
    for name in sorted({"counts", "seconds"} & {*found}):
        print(f"{name}: " + ", ".join(f"{key} {value:,}" for key, value in found[name].items()))
    result = {**found, "settings": to_json(command), "about": about(pick_device(command.device))}
    print(f"results: {keep_result(command.run, type(command).__name__.lower(), found['data'], result)}")


def compare(command: Compare) -> None:
    from fastvlp.compare import run_comparison

    run_comparison(command)
    print(command.out / "report.html")


def convert(command: Convert) -> None:
    from fastvlp.train.released import convert

    model, fresh = convert(command)
    untrained = f"; untrained: {', '.join(part.rstrip('.') for part in fresh)}" if fresh else ""
    print(f"{command.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters{untrained}")


def towers(command: Towers) -> None:
    from fastvlp.model import sizes
    from fastvlp.model.public import local_file, start_from_towers

    clip, roberta = (local_file(source, "model.safetensors") for source in (command.clip, command.roberta))
    tokenizer = local_file(command.tokenizer or command.roberta, "tokenizer.json")
    # CLIP ViT-B/32 was trained at 224 px; a run at another size resizes the positions.
    config = sizes.flm_base(size=224)
    model = start_from_towers(replace(config, reconstructor=None), clip, roberta, tokenizer, command.out)
    print(f"{command.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


def export(command: Export) -> None:
    from fastvlp.serve.export import export

    card = export(command)
    print(f"{command.out}: {card['name']} can {', '.join(card['can'])}; its card: {command.out / 'README.md'}")


def embed(command: Embed) -> None:
    from fastvlp.serve.bulk import embed

    if (done := embed(command)) is not None:
        print(f"{command.out}: {done['images']:,} images, {done['texts']:,} texts")
        say_dropped(done["dropped"], f"by name in {command.out / 'dropped.jsonl'}")


def say_dropped(dropped: Sequence[Dropped], where: str) -> None:
    if dropped:
        print(f"dropped {len(dropped)}{f', {where}' if where else ''}:")
        for one in dropped[:10]:
            print(f"  {one.key}: {one.reason}")
        if len(dropped) > 10:
            print(f"  and {len(dropped) - 10} more")


def index(command: IndexBuild | IndexSearch) -> None:
    from fastvlp.serve import indexing

    if isinstance(command, IndexSearch):
        Console().print(indexing.as_table(indexing.search(command)))
        return
    done = indexing.build(command)
    print(f"{command.index}: {done['images']:,} images")
    say_dropped(done["dropped"], "")


def serve(command: Serve) -> None:
    try:
        from fastvlp.serve.run import serve
    except ImportError as error:
        raise UserError(f"no {error.name}: the service needs the extra serve: {install('serve')}") from error

    key = os.environ.get("FASTVLP_API_KEY")
    serve(replace(command, api_key=(*command.api_key, *([key] if key else []))))


def run(
    command: Data | Pretrain | Finetune | Evaluation | Compare | Convert | Towers | Export | Embed | Indexing | Serve,
) -> None:
    match command:
        case Export():
            export(command)
        case Embed():
            embed(command)
        case Indexing(command=part):
            index(part)
        case Serve():
            serve(command)
        case Convert():
            convert(command)
        case Towers():
            towers(command)
        case Compare():
            compare(command)
        case Finetune():
            finetune(command)
        case Evaluation(command=Evaluate() as task):
            evaluate_task(task)
        case Evaluation(command=Retrieval() | ZeroShot() | Probe() as embeddings):
            evaluate_embeddings(embeddings)
        case Pretrain():
            pretrain([command.recipe, *(["--resume"] if command.resume else [])])
        case Data(command=DataDemo() as demo):
            data_demo(demo)
        case Data(command=DataImport() as importing):
            data_import(importing)
        case Data(command=DataInspect() as inspecting):
            data_inspect(inspecting)


COMMANDS: dict[str, Any] = {
    "data": Data,
    "pretrain": Pretrain,
    "finetune": Finetune,
    "evaluate": Evaluation,
    "compare": Compare,
    "convert": Convert,
    "towers": Towers,
    "export": Export,
    "embed": Embed,
    "index": Indexing,
    "serve": Serve,
}
PARTS = {"data": names(DataCommand), "evaluate": EVALUATIONS, "index": names(IndexCommand)}


def check_words(argv: Sequence[str]) -> None:
    """Raises UserError, with the nearest, where the first word is no command or the second no part of it."""
    for at, known in enumerate((tuple(COMMANDS), PARTS.get(argv[0], ()) if argv else ())):
        if len(argv) <= at or not known or argv[at].startswith("-") or argv[at] in known:
            continue
        near = get_close_matches(argv[at], known, n=1)
        # `vlp evaluate RUN`.
        if argv[:at] == ["evaluate"] and (not near or "/" in argv[at] or Path(argv[at]).exists()):
            continue
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"{argv[at]}: no command of `{' '.join(['vlp', *argv[:at]])}`; {hint}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 after saying what is wrong where the user can mend it; tyro exits with 2 too."""
    argv = sys.argv[1:] if argv is None else argv
    # Torch's threads spin while they wait for each other: on cores that others use too, a step then takes 50 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        check_words(argv)
        if argv[:1] == ["pretrain"] and len(argv) > 1 and not argv[1].startswith("-"):
            pretrain(argv[1:])
            return 0
        if argv[:1] == ["evaluate"] and len(argv) > 1 and argv[1] not in EVALUATIONS and not argv[1].startswith("-"):
            argv = ["evaluate", "task", *argv[1:]]
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="vlp",
            description="Pretrain vision-language models on your image-text pairs.",
            args=argv,
            config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes),
        )
        run(command)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # As when piped into `head`: Python would fail once more on flushing stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
