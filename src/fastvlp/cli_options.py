"""Parses the options of each command.

For most commands, the signature of a function gives all options (`parse_function`). The others have further options that depend
on their first word: a recipe, a task, a format.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, make_dataclass, replace
from inspect import Parameter, Signature, getdoc, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import tyro
from tyro.conf import arg

from fastvlp.errors import UserError

if TYPE_CHECKING:
    from fastvlp.training.train_config import TrainConfig

# A parsed command, ready to run.
Run = Callable[[], Any]


def parse_function(name: str, target: Callable[..., Any], argv: Sequence[str]) -> Run:
    """Returns the function with the options in `argv`, not yet called. The signature gives the options, and the docstring their
    help."""

    @functools.wraps(target, updated=())
    def bind(*args: Any, **options: Any) -> Run:
        return functools.partial(target, *args, **options)

    return call_tyro(name, target, bind, argv, "", tyro.conf.OmitArgPrefixes)


def call_tyro(
    name: str, target: Callable[..., Any], bind: Callable[..., Run], argv: Sequence[str], about: str = "", *config: Any
) -> Run:
    return tyro.cli(
        bind,
        args=argv,
        prog=f"vlp {name}",
        description="\n\n".join(filter(None, [(getdoc(target) or "").partition("\n\nArgs:")[0], about])),
        config=config,
    )


def parse_with_groups(
    name: str,
    target: Callable[..., Any],
    argv: Sequence[str],
    bind: Callable[..., Run],
    groups: Mapping[str, Any],
    about: str = "",
) -> Run:
    """Parses options like `parse_function`, for a function whose further options (`**options`) are the fields of
    dataclasses: `groups`, by the name under which `bind` gets an instance; each is a class, or an instance with the
    defaults. `bind` takes what was parsed, and returns the call to run. `about` follows the function's description in the
    help."""
    defaults = {group: Parameter.empty if isinstance(of, type) else of for group, of in groups.items()}
    own = {group: Annotated[of if isinstance(of, type) else type(of), arg(name="")] for group, of in groups.items()}
    parameters = [p for p in signature(target).parameters.values() if p.kind != p.VAR_KEYWORD and p.name not in groups]
    parameters += [Parameter(group, Parameter.KEYWORD_ONLY, default=default) for group, default in defaults.items()]
    bind.__doc__, bind.__annotations__ = target.__doc__, {**get_type_hints(target, include_extras=True), **own}
    bind.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return call_tyro(name, target, bind, argv, about)


def parse_pretrain(argv: Sequence[str]) -> Run:
    """Parses `vlp pretrain`. `argv`: RECIPE and overrides of its fields. The recipe comes first, because the fields depend on
    it."""
    from fastvlp.model.named_sizes import named_sizes
    from fastvlp.recipes import about_recipe, names, recipe
    from fastvlp.training import loop
    from fastvlp.training.starting_point import starting_from
    from fastvlp.training.train_config import TrainConfig

    if not argv or argv[0].startswith("-"):
        print(f"usage: vlp pretrain RECIPE [options]\n\nRECIPE is your own file, or one of {', '.join(names())}.")
        print("`vlp pretrain RECIPE --help` lists the recipe's fields, each of which is an option.")
        raise SystemExit(0 if argv else 2)

    # Not a class statement: its annotations would be strings, and tyro looks their names up in this module.
    again = Annotated[bool, arg(help="Continue from the last checkpoint.")]
    shown = Annotated[bool, arg(help="Print the whole config first.")]
    change = Annotated[tuple[str, ...], arg(help="Fields in which a resumed run may differ, such as data.batch-size.")]
    own: list[tuple[str, Any, Any] | tuple[str, Any]] = [
        ("run", Annotated[TrainConfig, arg(name="")]),
        ("resume", again, False),
        ("change", change, ()),
        ("show_config", shown, False),
    ]
    Overrides = make_dataclass("Overrides", own)

    run, args = with_size(recipe(argv[0]), argv[1:])
    folder, args = take_option(args, "--from")
    if folder is not None:
        run = starting_from(run, folder)
    run, args = with_encoders(run, args)
    parsed = tyro.cli(
        Overrides,
        default=Overrides(run),
        args=args,
        prog=f"vlp pretrain {argv[0]}",
        description=f"{about_recipe(argv[0])}\n\n`--from FOLDER` starts from a run, an export or a converted model, and takes "
        f"over its encoders. `--model SIZE` replaces the model's size: {', '.join(named_sizes())}.",
        config=(tyro.conf.AvoidSubcommands,),
    )
    run = one_length(parsed.run, args)
    return functools.partial(loop.train, run, resume=parsed.resume, change=parsed.change, verbose=parsed.show_config)


def with_encoders(run: TrainConfig, argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Returns the run with the public encoders that `--image` and `--text` name, and the other arguments, which may change
    settings of these encoders, such as `--model.image.size`. Encoders that a recipe names are read when the run starts."""
    from fastvlp.training.public_start import with_public_encoders

    args, given = list(argv), dict[str, Any]()
    for name in ("image", "image_layers", "text", "text_layers"):
        value, args = take_option(args, f"--{name.replace('_', '-')}")
        if value is not None:
            number = name.endswith("layers") and value.isdecimal()
            given[name] = None if value == "None" else int(value) if number else value
    run = replace(run, **given)
    if not (run.image or run.text) or not given:
        return run, args
    names = {name: getattr(run, name) for name in ("image", "image_layers", "text", "text_layers")}
    return with_public_encoders(run, **names), args


def with_size(run: TrainConfig, argv: Sequence[str]) -> tuple[TrainConfig, list[str]]:
    """Returns the run with a model of the size that `--model SIZE` names, and the other arguments, such as
    `--model.image.patch 6`."""
    from fastvlp.model.named_sizes import named_size

    size, args = take_option(argv, "--model")
    return (run if size is None else replace(run, model=named_size(size, like=run.model))), args


def take_option(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Returns the value of an option, and the other arguments. The value is None if the option is not given, and the last one
    if it is given twice."""
    value, others, words = None, list[str](), iter(argv)
    for word in words:
        option, equals, after = word.partition("=")
        if option == name:
            value = after if equals else next(words, "")
        else:
            others.append(word)
    return value, others


def run_fields() -> list[str]:
    from fastvlp.training.train_config import TrainConfig

    return [*(field.name for field in fields(TrainConfig)), "resume", "change"]


def one_length(run: TrainConfig, argv: Sequence[str]) -> TrainConfig:
    """Returns the run with only one length, if only one was given: `--steps` alone removes the recipe's `budget_s`, and the
    reverse."""
    given = {option.partition("=")[0].replace("_", "-") for option in argv} & {"--steps", "--budget-s"}
    if given == {"--steps"} and run.steps is not None:
        return replace(run, budget_s=None)
    if given == {"--budget-s"} and run.budget_s is not None:
        return replace(run, steps=None)
    return run


def parse_finetune(argv: Sequence[str]) -> Run:
    """Parses `vlp finetune`. `argv`: TASK and options. The task comes first, because it has options of its own."""
    from fastvlp.tasks.finetune import TuneOptions, finetune
    from fastvlp.tasks.interface import task_named, tasks

    if not argv or argv[0].startswith("-"):
        print("usage: vlp finetune TASK --from RUN --data FOLDER [options]\n")
        print("\n".join(f"  {task.name:20}{task.summary()}" for task in tasks()))
        print("  contrast            Fine-tune two encoders, such as CLIP's, on your own pairs.")
        print("\n`vlp finetune TASK --help` lists all options of a task.")
        raise SystemExit(0 if argv else 2)

    def bind(*, task: Any, tuning: Any, **options: Any) -> Run:
        return functools.partial(finetune, task, **options, **vars(tuning))

    task = task_named(argv[0])
    groups = {"task": task, "tuning": TuneOptions(optim=task.optim, decoder=task.decoder)}
    return parse_with_groups(f"finetune {argv[0]}", finetune, argv[1:], bind, groups, getdoc(task) or "")


def tune_options() -> list[str]:
    from fastvlp.tasks.finetune import TuneOptions

    return [*task_options(), *(field.name for field in fields(TuneOptions))]


def parse_contrast(argv: Sequence[str]) -> Run:
    """Parses `vlp finetune contrast`. `argv`: options, among them the length and the learning rate."""
    from fastvlp.tasks.contrast import finetune_contrast
    from fastvlp.tasks.contrast_settings import ContrastSettings

    def bind(*, settings: Any, **options: Any) -> Run:
        chosen = {field.name: getattr(settings, field.name) for field in fields(settings)}
        return functools.partial(finetune_contrast, **options, **chosen)

    return parse_with_groups("finetune contrast", finetune_contrast, argv, bind, {"settings": ContrastSettings})


def contrast_options() -> list[str]:
    from fastvlp.tasks.contrast_settings import setting_names

    return setting_names()


def task_options() -> list[str]:
    from fastvlp.tasks.interface import tasks

    return [field.name for task in tasks() for group in (task, task.scoring) for field in fields(group)]


def scoring_groups() -> dict[str, type]:
    """Returns the dataclasses with the options of the tasks' evaluations, each by the name of the first task that has it."""
    from fastvlp.tasks.interface import tasks

    groups: dict[str, type] = {}
    for task in tasks():
        if task.scoring not in groups.values() and fields(task.scoring):
            groups[task.name] = task.scoring
    return groups


def parse_evaluate_task(argv: Sequence[str]) -> Run:
    """Parses `vlp evaluate task`. `argv`: RUN and options. The options of all tasks are accepted, because the task is read from
    the run's folder later."""
    from fastvlp.tasks.task_evaluation import evaluate_task

    groups = scoring_groups()

    def bind(run: str, /, **options: Any) -> Run:
        chosen = [options.pop(name) for name in groups]
        values = {field.name: (getattr(one, field.name), field.default) for one in chosen for field in fields(one)}
        given = {name: value for name, (value, default) in values.items() if value != default}
        return functools.partial(evaluate_task, run, **options, **given)

    return parse_with_groups("evaluate task", evaluate_task, argv, bind, groups)


def parse_import(argv: Sequence[str]) -> Run:
    """Parses `vlp data import`. `argv`: PATH and options, among them those of the path's format."""
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
            # The options of all formats are accepted, and the import then reports the fault of the path.
            groups["own"] = make_dataclass("OfAllFormats", [(name, kind | None, None) for name, kind in types.items()])
        else:
            given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
            sources.check_options(groups["own"], given & {*types})

    def bind(*args: Any, own: Any = None, **options: Any) -> Run:
        options |= {field.name: getattr(own, field.name) for field in fields(own)}
        return functools.partial(import_data, *args, **options)

    return parse_with_groups("data import", import_data, argv, bind, groups)


def path_and_format(argv: Sequence[str], types: Mapping[str, Any]) -> tuple[str | None, str]:
    """Returns PATH and the value of `--format` among the arguments of an import. `types`: the types of the options."""
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


def as_flags(message: str, options: Collection[str]) -> str:
    """Replaces the names of parameters in a message of the library, such as `` `max_side` ``, by those of options, such as
    --max-side."""

    def flag(found: re.Match[str]) -> str:
        return f"--{found[1].replace('_', '-')}" if found[1].split(".")[0] in options else found[0]

    return re.sub(r"`([a-z][a-z0-9_.]*)`", flag, message)
