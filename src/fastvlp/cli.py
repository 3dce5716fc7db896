"""The command line, and the only place that reads it.

A command is a function of the library: its signature gives the options, its docstring their help. `COMMANDS` says which
function, and how its result is printed. A module that imports torch is imported only when its command is used.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from inspect import Parameter, Signature, getdoc, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import tyro
from rich.console import Console
from tyro.conf import arg

from fastvlp.errors import UserError
from fastvlp.extensions import import_file

if TYPE_CHECKING:
    from fastvlp.batch import Dropped
    from fastvlp.comparison.results import Comparison
    from fastvlp.convert.checkpoints import Converted
    from fastvlp.data.sources.importing import Imported
    from fastvlp.data.sources.inspection import Inspection
    from fastvlp.data.world.corpus import WrittenCorpus
    from fastvlp.eval.evaluation import Evaluation
    from fastvlp.exporters.export import Exported
    from fastvlp.model.model import VLModel
    from fastvlp.search.bulk import Counts
    from fastvlp.search.engines.interface import Hit
    from fastvlp.search.indexing import Built
    from fastvlp.tasks.task_scores import TaskScores
    from fastvlp.training.state import TrainConfig

# A parsed command, ready to run.
Run = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Command:
    """summary: a line for the list of commands. function: `module:function` of the library. show: prints its result.
    parse: reads the words instead of `function`'s signature, where what follows depends on the first word. options: names of
    the options that are not in the signature."""

    summary: str
    function: str = ""
    show: Callable[[Any], None] = lambda result: None
    parse: Callable[[Sequence[str]], Run] | None = None
    options: Callable[[], Collection[str]] = tuple

    def load(self) -> Callable[..., Any]:
        module, _, function = self.function.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded

    def option_names(self) -> Collection[str]:
        parameters = signature(self.load()).parameters if self.function else {}
        # The fields of a dataclass are options beside the other parameters.
        groups = [fields(p.default) for p in parameters.values() if is_dataclass(p.default)]
        return [*parameters, *(field.name for group in groups for field in group), *self.options()]


# ---- commands that are not yet functions of keywords: `show` runs them ----


def show_task_scores(result: TaskScores | None) -> None:
    from fastvlp.tasks.task_scores import format_scores

    if result is not None:
        print(format_scores(result.scores))
        print(f"results: {result.path}")


def show_evaluation(result: Evaluation) -> None:
    from fastvlp.eval.evaluation import score_table

    Console().print(score_table(result.scores))
    for name, values in {"counts": result.counts, "seconds": result.seconds}.items():
        if values:
            print(f"{name}: " + ", ".join(f"{key} {value:,}" for key, value in values.items()))
    print(f"results: {result.path}")


def show_comparison(comparison: Comparison) -> None:
    from fastvlp.comparison.progress import print_tables

    print_tables(comparison, Console())
    if comparison.folder is not None:
        print(comparison.folder / "report.html")


def show_converted(done: Converted) -> None:
    untrained = f"; untrained: {', '.join(part.rstrip('.') for part in done.untrained)}" if done.untrained else ""
    print(f"{done.folder}: {done.parameters / 1e6:.1f} M parameters{untrained}")


def show_towers(model: VLModel) -> None:
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


# ---- printing of results ----


def show_exported(exported: Exported) -> None:
    card = exported.card
    print(f"{exported.folder}: {card['name']} can {', '.join(card['can'])}; {', '.join(exported.files)}")


def show_counts(counts: Counts | None) -> None:
    # Under `torchrun` the main rank alone has them.
    if counts is not None:
        print(f"{counts.folder}: {counts.images:,} images, {counts.texts:,} texts")
        show_dropped(counts.dropped, f"by name in {counts.folder / 'dropped.jsonl'}")


def show_built(built: Built) -> None:
    print(f"{built.uri}: {built.images:,} images")
    show_dropped(built.dropped)


def show_hits(hits: Sequence[Hit]) -> None:
    from fastvlp.search.indexing import hits_table

    Console().print(hits_table(hits))


def show_dropped(dropped: Sequence[Dropped], where: str = "") -> None:
    if dropped:
        print(f"dropped {len(dropped)}{f', {where}' if where else ''}:")
        for record in dropped[:10]:
            print(f"  {record.key}: {record.reason}")
        if len(dropped) > 10:
            print(f"  and {len(dropped) - 10} more")


def show_corpus(corpus: WrittenCorpus) -> None:
    print(f"{corpus.out}: " + ", ".join(f"{name} {count}" for name, count in corpus.counts.items()))


def show_imported(imported: Imported) -> None:
    print(f"{imported.out}: " + ", ".join(f"{split} {count}" for split, count in sorted(imported.written.items())))
    if imported.dropped:
        print(f"dropped {len(imported.dropped)}, by name in {imported.out / 'dropped.jsonl'}:")
        for reason, count in imported.reasons.most_common():
            print(f"  {count} {reason}")


def show_inspection(inspection: Inspection) -> None:
    from fastvlp.data.sources.inspection import as_tables

    Console().print(as_tables(inspection.splits))
    if inspection.sheet:
        print(f"contact sheet: {inspection.sheet}")


# ---- commands whose options depend on their first word ----


def parse_pretrain(argv: Sequence[str]) -> Run:
    """`argv`: RECIPE and overrides of its fields. The recipe comes first, because it says which fields there are."""
    from fastvlp.model.named_sizes import named_sizes
    from fastvlp.recipes import names, recipe
    from fastvlp.training import loop
    from fastvlp.training.state import TrainConfig

    if not argv or argv[0].startswith("-"):
        print(f"usage: vlp pretrain RECIPE [options]\n\nRECIPE is your own file, or one of {', '.join(names())}.")
        print("`vlp pretrain RECIPE --help` lists the recipe's fields, each of which is an option.")
        raise SystemExit(0 if argv else 2)

    # Not a class statement: its annotations would be strings, and tyro looks their names up in this module.
    again = Annotated[bool, arg(help="Continue from the last checkpoint.")]
    Overrides = make_dataclass("Overrides", [("run", Annotated[TrainConfig, arg(name="")]), ("resume", again, False)])

    run, args = with_size(recipe(argv[0]), argv[1:])
    # As in `vlp finetune --from`; the field cannot be called that.
    args = ["--init" + word[6:] if word.partition("=")[0] == "--from" else word for word in args]
    parsed = tyro.cli(
        Overrides,
        default=Overrides(run),
        args=args,
        prog=f"vlp pretrain {argv[0]}",
        description=f"{getdoc(TrainConfig)}\n\n`--model SIZE` replaces the model's size: {', '.join(named_sizes())}.",
        config=(tyro.conf.AvoidSubcommands,),
    )
    return functools.partial(loop.train, one_length(parsed.run, args), parsed.resume, verbose=True)


def with_size(run: TrainConfig, argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """The run with a model of the size that `--model SIZE` names, and the other words (`--model.image.patch 6` is one)."""
    from fastvlp.model.named_sizes import named_size

    args = list(argv)
    for i, word in enumerate(args):
        option, equals, name = word.partition("=")
        if option == "--model":
            end = i + 1 if equals else i + 2
            size = name if equals else "".join(args[i + 1 : end])
            return replace(run, model=named_size(size, like=run.model)), args[:i] + args[end:]
    return run, args


def run_fields() -> list[str]:
    from fastvlp.training.state import TrainConfig

    return [field.name for field in fields(TrainConfig)]


def one_length(run: TrainConfig, argv: Sequence[str]) -> TrainConfig:
    """A length given alone is the run's: `--steps` without `--budget-s` ends the recipe's budget, and the reverse."""
    given = {option.partition("=")[0].replace("_", "-") for option in argv} & {"--steps", "--budget-s"}
    if given == {"--steps"} and run.steps is not None:
        return replace(run, budget_s=None)
    if given == {"--budget-s"} and run.budget_s is not None:
        return replace(run, steps=None)
    return run


def parse_finetune(argv: Sequence[str]) -> Run:
    """`argv`: TASK and options. The task comes first, because it has options of its own."""
    from fastvlp.tasks.finetune import finetune
    from fastvlp.tasks.interface import task_named, tasks

    if not argv or argv[0].startswith("-"):
        print("usage: vlp finetune TASK --from RUN --data FOLDER [options]\n")
        print("\n".join(f"  {task.name:20}{task.summary()}" for task in tasks()))
        print("\n`vlp finetune TASK --help` lists the options, with those of the task.")
        raise SystemExit(0 if argv else 2)

    def bind(*, task: Any, **options: Any) -> Run:
        return functools.partial(finetune, task, **options)

    return parse_with_groups(f"finetune {argv[0]}", finetune, argv[1:], bind, {"task": task_named(argv[0])})


def task_options() -> list[str]:
    from fastvlp.tasks.interface import tasks

    return [field.name for task in tasks() for group in (task, task.scoring) for field in fields(group)]


def scoring_groups() -> dict[str, type]:
    """Dataclasses with the options of the evaluation of the tasks that have some, by the name of the first such task."""
    from fastvlp.tasks.interface import tasks

    groups: dict[str, type] = {}
    for task in tasks():
        if task.scoring not in groups.values() and fields(task.scoring):
            groups[task.name] = task.scoring
    return groups


def parse_evaluate_task(argv: Sequence[str]) -> Run:
    """`argv`: RUN and options, among them those of all tasks: which one it is, the run's folder says later."""
    from fastvlp.tasks.task_evaluation import evaluate_task

    groups = scoring_groups()

    def bind(run: str, /, **options: Any) -> Run:
        chosen = [options.pop(name) for name in groups]
        values = {field.name: (getattr(one, field.name), field.default) for one in chosen for field in fields(one)}
        given = {name: value for name, (value, default) in values.items() if value != default}
        return functools.partial(evaluate_task, run, **options, **given)

    return parse_with_groups("evaluate task", evaluate_task, argv, bind, groups)


def parse_import(argv: Sequence[str]) -> Run:
    """`argv`: PATH and options, among them those of the path's format."""
    from fastvlp.data import sources
    from fastvlp.data.sources.importing import import_data

    types = sources.option_types(*sources.formats().values())
    path, format = path_and_format(argv, {**get_type_hints(import_data), **types})
    groups: dict[str, type] = {}
    if path is None:
        print(f"PATH has one of these formats:\n{as_flags(sources.formats_help(), types)}\n")
    else:
        try:
            groups["own"] = sources.find_format(Path(path), format)
        except UserError:
            # The options of all formats are read, and the import then says what is wrong with the path.
            groups["own"] = make_dataclass("OfAllFormats", [(name, kind | None, None) for name, kind in types.items()])
        else:
            given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
            sources.check_options(groups["own"], given & {*types})

    def bind(*args: Any, own: Any = None, **options: Any) -> Run:
        options |= {field.name: getattr(own, field.name) for field in fields(own)}
        return functools.partial(import_data, *args, **options)

    return parse_with_groups("data import", import_data, argv, bind, groups)


def path_and_format(argv: Sequence[str], types: Mapping[str, Any]) -> tuple[str | None, str]:
    """PATH and the value of `--format` among the words of an import; `types` are those of the options."""
    switches = {f"--{no}{name.replace('_', '-')}" for name, kind in types.items() if kind is bool for no in ("", "no-")}
    path, format, words = None, "auto", iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if not word.startswith("-"):
            path = path or word
        elif option.replace("_", "-") not in {*switches, "-h", "--help"}:
            value = value if equals else next(words, "")
            format = value if option == "--format" else format
    return path, format


def format_options() -> list[str]:
    from fastvlp.data import sources

    return [*sources.option_types(*sources.formats().values())]


def command(summary: str, function: str, show: Callable[[Any], None]) -> Command:
    return Command(summary=summary, function=f"fastvlp.{function}", show=show)


COMMANDS: Mapping[str, Command] = {
    "data demo": command("Write the embedded corpus of rendered scenes.", "data.world.corpus:write_world", show_corpus),
    "data import": Command(
        summary="Import your pairs into shards.",
        function="fastvlp.data.sources.importing:import_data",
        parse=parse_import,
        options=format_options,
        show=show_imported,
    ),
    "data inspect": command(
        "Count, check and show a folder of shards.", "data.sources.inspection:inspect_data", show_inspection
    ),
    "pretrain": Command(summary="Pretrain a model by a recipe.", parse=parse_pretrain, options=run_fields),
    "finetune": Command(
        summary="Fine-tune a pretrained run on a task.",
        function="fastvlp.tasks.finetune:finetune",
        parse=parse_finetune,
        options=task_options,
        show=show_task_scores,
    ),
    "evaluate task": Command(
        summary="Score a fine-tuned run on its task.",
        function="fastvlp.tasks.task_evaluation:evaluate_task",
        parse=parse_evaluate_task,
        options=task_options,
        show=show_task_scores,
    ),
    "evaluate retrieval": command(
        "Find images by captions and back.", "eval.embedding_retrieval:evaluate_retrieval", show_evaluation
    ),
    "evaluate zeroshot": command(
        "Classify images by the names of classes.", "eval.zeroshot:evaluate_zeroshot", show_evaluation
    ),
    "evaluate probe": command("Logistic regression on frozen features.", "eval.probe:evaluate_probe", show_evaluation),
    "compare": command("Train recipes for the same time, and report.", "comparison.compare:compare", show_comparison),
    "convert": command("Read a released checkpoint.", "convert.checkpoints:convert", show_converted),
    "towers": command("Start from CLIP's and RoBERTa's towers.", "convert.towers:start_from_towers", show_towers),
    "export": command("Write a model that stands alone.", "exporters.export:export", show_exported),
    "embed": command("Turn shards into vectors.", "search.bulk:embed_shards", show_counts),
    "index build": command("Add images to a search index.", "search.indexing:build_index", show_built),
    "index search": command("Find images in an index.", "search.indexing:search_index", show_hits),
    "serve": Command(summary="Serve a model over HTTP.", function="fastvlp.serve.server:serve"),
}


def find_command(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Split `argv` into a command and its words. Raises UserError with the nearest name for a misspelt word."""
    words = dict.fromkeys(name.split()[0] for name in COMMANDS)
    if argv[0] not in words:
        raise UserError(f"{argv[0]}: no command of `vlp`; {_nearest(argv[0], list(words))}")
    if argv[0] in COMMANDS:
        return argv[0], argv[1:]
    parts = [name.split()[1] for name in COMMANDS if name.split()[0] == argv[0]]
    second = argv[1] if len(argv) > 1 else ""
    if second in parts:
        return f"{argv[0]} {second}", argv[2:]
    # `vlp evaluate RUN` is `vlp evaluate task RUN`.
    looks_like_run = "/" in second or Path(second).exists() or not get_close_matches(second, parts, n=1)
    if argv[0] == "evaluate" and second and not second.startswith("-") and looks_like_run:
        return "evaluate task", argv[1:]
    raise UserError(f"{second or 'no word'}: no command of `vlp {argv[0]}`; {_nearest(second, parts)}")


def _nearest(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def help_text(first: str = "") -> str:
    """The list of commands, or of those that begin with one word."""
    listed = {name: command.summary for name, command in COMMANDS.items() if not first or name.split()[0] == first}
    lines = [f"  {name:20}{summary}" for name, summary in listed.items()]
    return "\n".join(
        [
            "usage: vlp [--import FILE.py ...] COMMAND ...",
            "",
            "Pretrain vision-language models on your image-text pairs.",
            "",
            *lines,
            "",
            "`vlp COMMAND --help` lists a command's options. `--import` reads your own file first, with encoders,",
            "objectives, tasks, sources, index engines or export targets of yours.",
        ]
    )


def parse(name: str, argv: Sequence[str]) -> Run:
    """The function of a command with the options in `argv`, not yet called."""
    command = COMMANDS[name]
    if command.parse is not None:
        return command.parse(argv)
    target = command.load()

    @functools.wraps(target, updated=())
    def bind(*args: Any, **options: Any) -> Run:
        return functools.partial(target, *args, **options)

    return tyro.cli(
        bind,
        args=argv,
        prog=f"vlp {name}",
        description=(getdoc(target) or "").partition("\n\nArgs:")[0],
        config=(tyro.conf.OmitArgPrefixes,),
    )


def parse_with_groups(
    name: str,
    target: Callable[..., Any],
    argv: Sequence[str],
    bind: Callable[..., Run],
    groups: Mapping[str, type],
) -> Run:
    """As `parse`, for a function whose further options (`**options`) are the fields of dataclasses: `groups`, by the name
    under which `bind` gets an instance. `bind` takes what was parsed, and returns the call to run."""
    own = {group: Annotated[cls, arg(name="")] for group, cls in groups.items()}
    parameters = [p for p in signature(target).parameters.values() if p.kind != p.VAR_KEYWORD and p.name not in groups]
    parameters += [Parameter(group, Parameter.KEYWORD_ONLY) for group in groups]
    bind.__doc__, bind.__annotations__ = target.__doc__, {**get_type_hints(target, include_extras=True), **own}
    bind.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return tyro.cli(
        bind,
        args=argv,
        prog=f"vlp {name}",
        description=(getdoc(target) or "").partition("\n\nArgs:")[0],
        config=(tyro.conf.OmitArgPrefixes,),
    )


def run(name: str, ready: Run) -> None:
    """Runs a parsed command and prints its result."""
    COMMANDS[name].show(ready())


def as_flags(message: str, options: Collection[str]) -> str:
    """The library names parameters, `` `max_side` `` or `` `data.batch_size` ``; here they are options, --max-side."""

    def flag(found: re.Match[str]) -> str:
        return f"--{found[1].replace('_', '-')}" if found[1].split(".")[0] in options else found[0]

    return re.sub(r"`([a-z][a-z0-9_.]*)`", flag, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, or 2 after saying what is wrong where the user can mend it; tyro exits with 2 too."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Torch's threads spin while they wait for each other: on cores that others use too, a step then takes 50 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    name = ""
    try:
        while argv[:1] == ["--import"] and len(argv) > 1:
            import_file(argv[1])
            argv = argv[2:]
        if argv[:1] == ["--version"]:
            print(f"fastvlp {version('fastvlp')}")
            return 0
        if not argv or argv[0] in ("-h", "--help"):
            print(help_text())
            return 0 if argv else 2
        if argv[0] not in COMMANDS and argv[1:2] in (["-h"], ["--help"]):
            print(help_text(argv[0]))
            return 0
        name, rest = find_command(argv)
        run(name, parse(name, rest))
    except UserError as error:
        options = COMMANDS[name].option_names() if name else ()
        print(f"error: {as_flags(str(error), options)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # As when piped into `head`: Python would fail once more on flushing stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0
