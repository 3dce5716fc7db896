"""The command line. Only this module, `cli_help`, `cli_options` and `cli_results` deal with it.

A command is a function of the library. Its signature gives the options, and its docstring their help. `COMMANDS` names the
function of each command, and the function that prints its result. A module that imports torch is imported only when its command
is used.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

from fastvlp.cli_help import asks_for_help_alone, stand_in_for_torch
from fastvlp.cli_options import (
    Run,
    as_flags,
    contrast_options,
    format_options,
    parse_contrast,
    parse_evaluate_task,
    parse_finetune,
    parse_function,
    parse_import,
    parse_pretrain,
    run_fields,
    task_options,
    tune_options,
)
from fastvlp.cli_results import (
    show_built,
    show_comparison,
    show_converted,
    show_corpus,
    show_counts,
    show_evaluation,
    show_exported,
    show_hits,
    show_imported,
    show_inspection,
    show_speeds,
    show_task_scores,
    show_tuned,
    show_verified,
)
from fastvlp.errors import UserError, remedy
from fastvlp.extensions import import_file


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of `vlp`.

    Attributes:
        summary: a line for the list of commands.
        function: `module:function` of the library.
        show: prints the result of the function. It returns the exit code if that is not 0.
        parse: parses the command's words, for commands whose options depend on their first word. By default the options come
            from the function's signature.
        options: names of the options that are not in the signature.
    """

    summary: str
    function: str = ""
    show: Callable[[Any], int | None] = lambda result: None
    parse: Callable[[Sequence[str]], Run] | None = None
    options: Callable[[], Collection[str]] = tuple

    def load(self) -> Callable[..., Any]:
        module, _, function = self.function.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded

    def option_names(self) -> Collection[str]:
        parameters = signature(self.load()).parameters if self.function else {}
        # The fields of a dataclass are options, like the other parameters.
        groups = [fields(p.default) for p in parameters.values() if is_dataclass(p.default)]
        return [*parameters, *(field.name for group in groups for field in group), *self.options()]


def command(summary: str, function: str, show: Callable[[Any], int | None]) -> Command:
    return Command(summary=summary, function=f"fastvlp.{function}", show=show)


COMMANDS: Mapping[str, Command] = {
    "data demo": command("Write the embedded corpus of rendered scenes.", "data.world.corpus:write_world", show_corpus),
    "data import": Command(
        summary="Import your image-text pairs into shards.",
        function="fastvlp.data.sources.importing:import_data",
        parse=parse_import,
        options=format_options,
        show=show_imported,
    ),
    "data inspect": command(
        "Count and check the records of shards; draw some.", "data.sources.inspection:inspect_data", show_inspection
    ),
    "pretrain": Command(summary="Pretrain a model with a recipe.", parse=parse_pretrain, options=run_fields),
    "finetune": Command(
        summary="Fine-tune a pretrained run on a task.",
        function="fastvlp.tasks.finetune:finetune",
        parse=parse_finetune,
        options=tune_options,
        show=show_task_scores,
    ),
    "finetune contrast": Command(
        summary="Fine-tune a model such as CLIP on your pairs.",
        function="fastvlp.tasks.contrast:finetune_contrast",
        parse=parse_contrast,
        options=contrast_options,
        show=show_tuned,
    ),
    "evaluate task": Command(
        summary="Score a fine-tuned run on its task.",
        function="fastvlp.tasks.task_evaluation:evaluate_task",
        parse=parse_evaluate_task,
        options=task_options,
        show=show_task_scores,
    ),
    "evaluate retrieval": command(
        "Retrieve images by captions, and captions by images.",
        "eval.embedding_retrieval:evaluate_retrieval",
        show_evaluation,
    ),
    "evaluate zeroshot": command(
        "Classify images by the names of classes.", "eval.zeroshot:evaluate_zeroshot", show_evaluation
    ),
    "evaluate probe": command(
        "Fit a logistic regression to frozen features.", "eval.probe:evaluate_probe", show_evaluation
    ),
    "evaluate sugarcrepe": command(
        "Distinguish captions from hard negatives.", "eval.sugarcrepe:evaluate_sugarcrepe", show_evaluation
    ),
    "evaluate winoground": command(
        "Match two pictures with two captions.", "eval.winoground:evaluate_winoground", show_evaluation
    ),
    "evaluate vsr": command("Decide whether a spatial relation holds.", "eval.vsr:evaluate_vsr", show_evaluation),
    "evaluate mteb": command("Score an export with mteb.", "eval.mteb_scores:evaluate_mteb", show_evaluation),
    "compare": command(
        "Train recipes for the same time and compare them.", "comparison.compare:compare", show_comparison
    ),
    "bench": command("Measure how fast recipes train here.", "speed.measure:measure_speed", show_speeds),
    "records verify": command("Measure a speed record again.", "comparison.speed_records:verify_record", show_verified),
    "convert": command("Convert a public model.", "convert.checkpoints:convert", show_converted),
    "export": command("Export a run, also to other libraries.", "exporters.export:export", show_exported),
    "embed": command("Compute vectors of images and captions.", "search.bulk:embed_shards", show_counts),
    "index build": command("Add images to a search index.", "search.indexing:build_index", show_built),
    "index search": command("Search an index for images.", "search.indexing:search_index", show_hits),
    "serve": Command(summary="Serve a model and a search page over HTTP.", function="fastvlp.serve.server:serve"),
}


def find_command(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Splits `argv` into the name of a command and the other words. Raises UserError, with the nearest name for a misspelt
    word."""
    if (two := " ".join(argv[:2])) in COMMANDS:
        return two, argv[2:]
    words = dict.fromkeys(name.split()[0] for name in COMMANDS)
    if argv[0] not in words:
        raise UserError(f"{argv[0]}: not a command of `vlp`; {_nearest(argv[0], list(words))}")
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
    if not second:
        raise UserError(f"`vlp {argv[0]}` needs a further word: {', '.join(parts)}")
    raise UserError(f"{second}: not a command of `vlp {argv[0]}`; {_nearest(second, parts)}")


def _nearest(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"


def help_text(first: str = "") -> str:
    """Returns the list of commands, or of those that begin with the word `first`."""
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
            "`vlp COMMAND --help` lists the options of a command. `--import FILE.py` first imports your own encoders,",
            "objectives, tasks, data sources, index engines, export targets or metrics from a file.",
        ]
    )


def parse(name: str, argv: Sequence[str]) -> Run:
    """Returns the function of a command with the options in `argv` bound to it. Does not call it."""
    command = COMMANDS[name]
    if command.parse is not None:
        return command.parse(argv)
    return parse_function(name, command.load(), argv)


def run(name: str, ready: Run) -> int | None:
    """Runs a parsed command and prints its result. Returns the exit code if that is not 0."""
    return COMMANDS[name].show(ready())


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory for later allocations. Returns whether this is possible, which needs glibc.

    By default glibc returns freed blocks of 32 MB and more to the system at once, and the system clears them again when the
    next large tensor is made. This takes a third of a step on a CPU, or more (docs/log.md, entry 23).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h, at the highest values that they take.
    return mallopt is not None and all(mallopt(*setting) == 1 for setting in ((-3, 1 << 30), (-1, (1 << 31) - 1)))


@contextmanager
def without_collection() -> Iterator[None]:
    """Context without garbage collection. Importing torch makes many objects and hardly any garbage, and takes a tenth less
    time without it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0; or 1 if a check that the command makes fails; or 2 after an error that the user can fix,
    which is printed. tyro also exits with 2."""
    if argv is None and asks_for_help_alone(sys.argv[1:]):
        # This process only prints help. A program that calls `main` with `argv` goes on afterwards, and may need torch.
        stand_in_for_torch()
    argv = list(sys.argv[1:] if argv is None else argv)
    # Torch's threads spin while they wait for each other. On cores that other programs use, a step then takes 50 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
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
        with without_collection():
            ready = parse(name, rest)
        return run(name, ready) or 0
    except UserError as error:
        options = COMMANDS[name].option_names() if name else ()
        print(f"error: {as_flags(str(error), options)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # As when piped into `head`: Python would fail once more on flushing stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        advice = remedy(error)
        if advice is None:
            raise
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}; {as_flags(advice, ['data'])}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
