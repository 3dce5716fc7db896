"""Prints the results of the commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from fastvlp.errors import install

if TYPE_CHECKING:
    from fastvlp.batch import Dropped
    from fastvlp.comparison.results import Comparison
    from fastvlp.comparison.speed_records import Verified
    from fastvlp.convert.checkpoints import Converted
    from fastvlp.data.sources.importing import Imported
    from fastvlp.data.sources.inspection import Inspection
    from fastvlp.data.world.corpus import WrittenCorpus
    from fastvlp.eval.evaluation import Evaluation
    from fastvlp.exporters.export import Exported
    from fastvlp.search.bulk import Counts
    from fastvlp.search.indexing import Built, Hits
    from fastvlp.speed.measure import Speeds
    from fastvlp.tasks.contrast import Tuned
    from fastvlp.tasks.task_scores import TaskScores


def show_task_scores(result: TaskScores | None) -> None:
    from fastvlp.tasks.task_scores import format_scores

    if result is not None:
        print(format_scores(result.scores))
        print(f"results: {result.path}")


def show_tuned(tuned: Tuned | None) -> None:
    from fastvlp.tasks.contrast_scores import change_line

    if tuned is None:
        return
    for name, after in tuned.after.items():
        print(change_line(name, tuned.before[name], after))
        if name != "original" and after["recall"] < tuned.before[name]["recall"]:
            print("  no better than before: compare other rates, such as --lr at a third and three times as much")
    if "original" not in tuned.after:
        print("what the model lost elsewhere is measured with --original FOLDER: held-out pairs unlike the new ones")
    print(f"results: {tuned.path}")


def show_evaluation(result: Evaluation) -> None:
    from fastvlp.eval.evaluation import score_table

    Console().print(score_table(result))
    for name, values in {"counts": result.counts, "seconds": result.seconds}.items():
        if values:
            print(f"{name}: " + ", ".join(f"{key} {value:,}" for key, value in values.items()))
    print(f"results: {result.path}")


def show_comparison(comparison: Comparison) -> None:
    from fastvlp.comparison.progress import print_tables

    print_tables(comparison, Console())
    if comparison.folder is not None:
        print(comparison.folder / "report.html")


def show_speeds(speeds: Speeds) -> None:
    from fastvlp.speed.speed_table import speed_table

    Console().print(speed_table(speeds))
    if speeds.memory_limit is not None:
        print(f"largest batch: within {speeds.memory_limit / 1e9:g} GB")


def show_verified(verified: Verified) -> int:
    """Returns 1 where the target is not met."""
    from fastvlp.comparison.record_table import print_record

    print_record(verified, Console())
    return 0 if verified.measured.met else 1


def show_converted(done: Converted) -> None:
    more = {"untrained": [part.rstrip(".") for part in done.untrained], "absent encoder": done.absent}
    notes = "".join(f"; {name}: {', '.join(parts)}" for name, parts in more.items() if parts)
    print(f"{done.folder}: {done.layout}, {done.parameters / 1e6:.1f} M parameters{notes}")


def show_exported(exported: Exported) -> None:
    card = exported.card
    print(f"{exported.folder}: {card['name']} can {', '.join(card['can'])}; {', '.join(exported.files)}")
    if exported.url:
        print(exported.url)


def show_counts(counts: Counts | None) -> None:
    # Under `torchrun` the main rank alone has them.
    if counts is not None:
        print(f"{counts.folder}: {counts.images:,} images, {counts.texts:,} texts")
        show_dropped(counts.dropped, f"by name in {counts.folder / 'dropped.jsonl'}")


def show_built(built: Built) -> None:
    print(f"{built.uri}: {built.images:,} images")
    if built.recall is not None:
        print(f"recall@10 {built.recall:.3f}, of a sample of images and texts beside exact search")
    show_dropped(built.dropped)


def show_hits(hits: Hits) -> None:
    from fastvlp.search.indexing import hits_table

    Console().print(hits_table(hits))
    for note in hits.notes:
        print(f"note: {note}")


def show_dropped(dropped: Sequence[Dropped], where: str = "") -> None:
    if dropped:
        print(f"dropped {len(dropped)}{f', {where}' if where else ''}:")
        for record in dropped[:10]:
            print(f"  {record.key}: {record.reason}")
        if len(dropped) > 10:
            print(f"  and {len(dropped) - 10} more")


def show_corpus(corpus: WrittenCorpus) -> None:
    print(f"{corpus.out}: " + ", ".join(f"{name} {count}" for name, count in corpus.counts.items()))
    if blind := {split: fields["questions"] for split, fields in corpus.blind.items() if "questions" in fields}:
        scores = ", ".join(f"{split} {score:.1%}" for split, score in blind.items())
        print(f"questions answered right from their text alone: {scores}")


def show_imported(imported: Imported) -> None:
    from fastvlp.cli_options import as_flags

    print(f"{imported.out}: " + ", ".join(f"{split} {count}" for split, count in sorted(imported.written.items())))
    if imported.dropped:
        print(f"dropped {len(imported.dropped)}, by name in {imported.out / 'dropped.jsonl'}:")
        for reason, count in imported.reasons.most_common():
            print(f"  {count} {reason}")
    if imported.cut is not None:
        print(str(imported.cut).replace("`", ""))
    for text, count in imported.notes.most_common():
        example = imported.examples[text]
        print(f"note: {as_flags(text, ['images'])} ({count}{f', as {example}' if example else ''})")


def show_inspection(inspection: Inspection) -> None:
    from fastvlp.data.sources.inspection import as_tables

    Console().print(as_tables(inspection.splits, inspection.duplicates))
    if len(inspection.splits) > 1 and not inspection.perceptual:
        print(f"copies at another size or quality were not looked for: {install('duplicates')}")
    if inspection.sheet:
        print(f"contact sheet: {inspection.sheet}")
    if inspection.no_sheet:
        print(f"no contact sheet: {inspection.no_sheet}, with --sheet FILE")
