"""How fast and how big an edit of a checkpoint is, beside copies and other ways to do the same.

    python tests/bench/streaming.py --mergekit PYTHON                     # the table
    python tests/bench/streaming.py --sizes 1,2,4,8 --one-shard --plot PICTURE.png
    python tests/bench/streaming.py --reflink FOLDER --gigabytes 0.5 --shards 2

The checkpoint is a synthetic bfloat16 Llama; what is edited is every down-projection, with U (2048,
4). Each row runs in a process of its own (``tests/bench/rows.py`` has them all) and writes into a
folder of its own, which is deleted afterwards. Rows take turns, in another order in each round.

- Time runs from when a process has imported its modules until every file that it wrote has been
  flushed by ``fsync``, by the bench if not by the row itself. Before each row the source is read
  once, so that all of them find it in the page cache (if it fits there).
- Ratios are taken within a round: to ``dd oflag=direct``, which is what the disk can do, and to
  ``cp -r``, which leaves everything to the page cache and is then flushed.
- CPU seconds, user and system, are those of the process without importing; threads of the kernel
  that flush the page cache are in nobody's, so rows that write past the cache look dearer than the
  others, not cheaper.
- Memory is sampled from outside every 2 ms: what no file stands behind (RssAnon and RssShmem) of
  the process and its children, above what the same process had while it waited. Files that are
  mapped do not count, though they have to be in memory while they are used: a favour to safetensors
  and so to all rows but ours, dd and cp.
- mergekit copies the model (a ``passthrough`` of one): it has no such edit, hence is flattered.
- On a file system with reflinks cp clones, and so do we.

Linux only, with GNU dd and cp. On a tmpfs, where /tmp may be one, it measures nothing: use
``--folder``.
"""

import os
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path

import click

from tests.bench.rounds import EDITED_LEAVES, Checkpoint, Results, Row, run, run_rounds, synthetic
from tests.bench.synthetic import shard_limit

OURS, DD, CP = "ours", "dd oflag=direct", "cp -r"

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)

COPIES = [Row(DD, "dd"), Row(CP, "cp")]


def table_rows(checkpoint: Checkpoint, mergekit: str | None) -> list[Row]:
    """All ways to write the checkpoint again."""
    size = {"shard_size": shard_limit(checkpoint.model, checkpoint.shards, by_name=True)}
    found = [
        *COPIES,
        Row(OURS, "ours"),
        Row("ours, nearest rounding", "ours", {"rounding": "nearest"}),
        Row("ours, through the page cache", "ours", {"refused": "direct"}),
        Row("load_file, edit, save_file", "loop"),
        Row("transformers", "transformers", size),
    ]
    if mergekit is not None and _has_mergekit(mergekit):
        return [*found, Row("mergekit, without an edit", "mergekit", size, mergekit)]
    click.echo("There is no row of mergekit: no interpreter that has it was given.\n")
    return found


def _has_mergekit(python: str) -> bool:
    try:
        found = subprocess.run([python, "-c", "import mergekit"], stderr=subprocess.DEVNULL)
    except OSError:
        return False
    return found.returncode == 0


def spread(values: Sequence[float]) -> str:
    """Median, least and greatest."""
    middle, least, greatest = (f"{of(values):.2f}" for of in (statistics.median, min, max))
    return middle if least == greatest else f"{middle} ({least} - {greatest})"


def disk_rate(checkpoint: Checkpoint, results: Results) -> str:
    seconds = statistics.median(taken.wall for taken in results.rounds[DD])
    return f"dd wrote {checkpoint.model.nbytes / 1e9 / seconds:.2f} GB/s"


def print_table(checkpoint: Checkpoint, results: Results) -> None:
    rounds = len(results.rounds[DD])
    click.echo(f"{checkpoint.describe()}; {disk_rate(checkpoint, results)}.")
    click.echo(f"Medians of {rounds} rounds (least - greatest); peak is the greatest.\n")
    click.echo(
        "| | time / dd's | time / cp's | CPU time / dd's time | peak above idle, MB "
        "| with mapped files, MB | written / checkpoint | left along U |"
    )
    click.echo("|---|---|---|---|---|---|---|---|")
    for row, rounds_of in results.rounds.items():
        cells = [spread(results.ratios(row, base)) for base in (DD, CP)]
        cells.append(spread(results.ratios(row, DD, "cpu")))
        cells += [f"{results.peak(row, what):,.0f}" for what in ("peak", "peak_mapped")]
        cells.append(spread([taken.written / checkpoint.nbytes for taken in rounds_of]))
        left = results.left[row]
        cells.append(f"{left:.0e}" if left < EDITED_LEAVES else "all")
        click.echo(f"| {' | '.join([row, *cells])} |")


def print_sizes(measured: list[tuple[Checkpoint, Results]]) -> None:
    rates = ", ".join(f"{disk_rate(*one).split()[2]}" for one in measured)
    click.echo(f"dd wrote {rates} GB/s.\n")
    click.echo(
        "| GB | shards | ours: time / dd's | ours: time / cp's | cp: time / dd's "
        "| ours: peak above idle, MB | cp | dd |"
    )
    click.echo("|---|---|---|---|---|---|---|---|")
    for checkpoint, results in measured:
        pairs = ((OURS, DD), (OURS, CP), (CP, DD))
        cells = [f"{checkpoint.model.nbytes / 1e9:.2f}", str(checkpoint.shards)]
        cells += [spread(results.ratios(row, base)) for row, base in pairs]
        cells += [f"{results.peak(row):,.0f}" for row in (OURS, CP, DD)]
        click.echo(f"| {' | '.join(cells)} |")


def plot_sizes(measured: list[tuple[Checkpoint, Results]], path: Path) -> None:
    """Two panels over the size: memory, and time over that of dd."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, time) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    styles = {OURS: ("#0072b2", "o"), CP: ("#d55e00", "s"), DD: ("#555555", "^")}
    several = [one for one in measured if one[0].shards > 1]
    single = [one for one in measured if one[0].shards == 1]
    for row, (color, marker) in styles.items():
        for chosen, line, fill in ((several, "-", color), (single, "none", "white")):
            x = [checkpoint.model.nbytes / 1e9 for checkpoint, _ in chosen]
            look = {"color": color, "marker": marker, "markerfacecolor": fill, "linestyle": line}
            y = [results.peak(row) for _, results in chosen]
            memory.plot(x, y, **look, label=row if chosen is several else None, clip_on=False)
            if row == DD:
                continue
            ratios = [results.ratios(row, DD) for _, results in chosen]
            y = [statistics.median(values) for values in ratios]
            below = [m - min(values) for m, values in zip(y, ratios, strict=True)]
            above = [max(values) - m for m, values in zip(y, ratios, strict=True)]
            time.errorbar(x, y, [below, above], **look, capsize=4)
    if single:
        memory.plot([], [], "o", color="black", markerfacecolor="white", label="in one shard")
    time.axhline(1, color=styles[DD][0], linestyle="--")
    titles = {memory: "Peak memory above idle, MB", time: "Time over that of dd oflag=direct"}
    for panel, title in titles.items():
        panel.set_title(title, loc="left")
        panel.set_xlabel("checkpoint, GB")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    figure.savefig(path, dpi=150)


def print_reflink(checkpoint: Checkpoint) -> None:
    """What is written where files can share blocks; folders stay until all have been measured.

    Raises:
        click.UsageError: they cannot.
    """
    folder = checkpoint.folder.parent
    config, probe = checkpoint.folder / "config.json", folder / "probe"
    clone = ["cp", "--reflink=always", str(config), str(probe)]
    if subprocess.run(clone, stderr=subprocess.DEVNULL, check=False).returncode:
        raise click.UsageError("--reflink needs a file system with reflinks, such as XFS or btrfs")
    click.echo(f"{checkpoint.describe()}.\n")
    click.echo("| | blocks taken / checkpoint | written by the process / checkpoint |")
    click.echo("|---|---|---|")
    for row in (Row(OURS, "ours"), Row("ours, without clones", "ours", {"refused": "clone"})):
        before = _used(folder)
        taken = run(row, checkpoint, folder / row.name)
        blocks = _used(folder) - before
        shares = [nbytes / checkpoint.nbytes for nbytes in (blocks, taken.written)]
        click.echo(f"| {row.name} | {shares[0]:.3f} | {shares[1]:.3f} |")


def _used(folder: Path) -> int:
    """Bytes in use on a file system, once everything is on disk."""
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@click.command()
@click.option("--gigabytes", default=4.0, show_default=True, help="Of the checkpoint.")
@click.option("--shards", default=7, show_default=True, help="That it comes in.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1))
@click.option("--folder", type=FOLDER, help="Where to write.  [default: a temporary folder]")
@click.option("--mergekit", metavar="PYTHON", help="An interpreter that has mergekit 0.1.")
@click.option("--sizes", metavar="GB,GB,...", default="", help="Ours and copies only, by size.")
@click.option("--one-shard", is_flag=True, help="The same, of one file of --gigabytes.")
@click.option("--reflink", type=FOLDER, help="Count what is written, in a folder with reflinks.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Of the sizes.")
def main(
    gigabytes: float,
    shards: int,
    rounds: int,
    folder: Path | None,
    mergekit: str | None,
    sizes: str,
    one_shard: bool,
    reflink: Path | None,
    plot: Path | None,
) -> None:
    if reflink is not None:
        with synthetic(reflink, gigabytes, shards) as checkpoint:
            print_reflink(checkpoint)
    elif sizes or one_shard:
        wanted = [(float(size), max(1, round(float(size) * shards / gigabytes)))
                  for size in sizes.split(",") if size]  # fmt: skip
        measured = []
        for size, count in wanted + [(gigabytes, 1)] * one_shard:
            with synthetic(folder, size, count) as checkpoint:
                rows = [*COPIES, Row(OURS, "ours")]
                measured.append((checkpoint, run_rounds(checkpoint, rows, rounds)))
        print_sizes(measured)
        if plot is not None:
            plot_sizes(measured, plot)
    else:
        with synthetic(folder, gigabytes, shards) as checkpoint:
            rows = table_rows(checkpoint, mergekit)
            print_table(checkpoint, run_rounds(checkpoint, rows, rounds))


if __name__ == "__main__":
    main()
