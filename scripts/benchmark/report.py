"""Rows of the benchmark: kept in JSON lines, read back, and reported as Markdown tables and PNG plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmark.subjects import Subject

# what a table shows: its title, the key of a subject's ratio, and the key, unit and digits of the dense model's value
_TABLES = (
    ("time / dense (quartiles)", "time_ratio", "dense_milliseconds", "ms", 1),
    ("FLOP / dense", "flops_ratio", "dense_gflop", "GFLOP", 1),
    ("memory / dense", "memory_ratio", "dense_peak_mib", "MiB", 0),
    ("parameters / dense", "parameters_ratio", "dense_parameters_mib", "MiB", 1),
    ("file / dense", "file_ratio", "dense_file_mib", "MiB", 1),
    ("bytes reduced / dense", "reduced_ratio", "dense_reduced_mib", "MiB", 1),
)
_ACCOUNT = ("state", "saved", "predicted", "measured", "transients")  # columns of the work "memory", MiB
_MACHINE = ("device", "dtype", "threads", "torch")
_KEY = ("work", "model", "form", "ratio", "part", *_MACHINE)


def append(row: dict, path: Path) -> None:
    """Add a line to a file of rows."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(paths: Sequence[Path]) -> list[dict]:
    """The rows of files, in order; a line that is cut short, by an interruption, is left out.

    Raises:
        ValueError: A line is not a row of this benchmark.
    """
    rows = []
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not isinstance(row, dict) or any(key not in row for key in _KEY):
                raise ValueError(f"{path} holds a line that is not a row of this benchmark: {line[:80]}")
            rows.append(row)
    return rows


def latest(rows: Sequence[dict]) -> list[dict]:
    """One row per measurement, the last. An error before the first case goes once its subject has been measured."""
    kept: dict[tuple, dict] = {}
    for row in rows:
        subject = tuple(row.get(key) for key in _KEY)
        if "error" not in row:
            kept.pop((*subject, None), None)
        kept[(*subject, row.get("case"))] = row
    return list(kept.values())


def subject_name(row: dict) -> str:
    return Subject(row["form"], row["ratio"]).name


def progress(row: dict) -> str:
    """One line on a finished row."""
    ratios = [f"{key.removesuffix('_ratio')} {row[key]:.2f}" for _, key, *_ in _TABLES if row.get(key) is not None]
    result = row.get("error") or (", ".join(ratios) if ratios else "done")
    return f"{row['work']} {row['model']}, {row.get('case', 'start')}, {subject_name(row)}: {result}"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


def _model(row: dict) -> str:
    return row["model"] + (f" (part {row['part']:g})" if row["part"] != 1 else "")


def _ratio(row: dict, key: str) -> str:
    if row.get(key) is None:
        return ""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return f"{row[key]:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def _grid(rows: Sequence[dict], title: str, key: str, dense: str, unit: str, digits: int) -> str:
    """A row per model and case, a column per subject, with the ratio ``key``; last the dense model's own value."""
    rows = [row for row in rows if key in row and row["form"] != "dense"]
    columns = list(dict.fromkeys(subject_name(row) for row in rows))
    lines: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        lines.setdefault((_model(row), row["case"]), {})[subject_name(row)] = row
    body = [
        [f"{model}: {case}", *(_ratio(cells.get(column, {}), key) for column in columns),
         f"{next(iter(cells.values()))[dense]:.{digits}f}"]
        for (model, case), cells in lines.items()
    ]  # fmt: skip
    return _markdown([title, *columns, f"dense, {unit}"], body)


def _account(rows: Sequence[dict]) -> str:
    """The memory of a training step against the formula, a row per model and subject."""
    body = [
        [f"{_model(row)}, {row['tokens']} tokens: {subject_name(row)}", f"{row['targets_ratio']:.3f}",
         _ratio(row, "memory_ratio"), *(f"{row[f'{key}_mib']:.0f}" for key in _ACCOUNT)]
        for row in rows
    ]  # fmt: skip
    return _markdown(
        ["memory of a step", "targets / dense", "measured / dense", *(f"{k}, MiB" for k in _ACCOUNT)], body
    )


def tables(rows: Sequence[dict]) -> str:
    """All tables, Markdown: grouped by machine, then by work."""
    rows, parts = latest(rows), []
    for machine in dict.fromkeys(tuple(row[key] for key in _MACHINE) for row in rows):
        device, dtype, threads, torch = machine
        parts.append(f"{device}, {threads} thread{'s' if threads > 1 else ''}, {dtype}, torch {torch}")
        here = [row for row in rows if tuple(row[key] for key in _MACHINE) == machine]
        good, errors = [row for row in here if "error" not in row], [row for row in here if "error" in row]
        for work in dict.fromkeys(row["work"] for row in good):
            chosen = [row for row in good if row["work"] == work]
            parts.append(f"**{work}**")
            if work == "memory":
                parts.append(_account(chosen))
                continue
            shown = [spec for spec in _TABLES if any(row.get(spec[1]) is not None for row in chosen)]
            parts += [_grid(chosen, *spec) for spec in shown]
        if errors:
            parts.append("**not measured**")
            parts.append("\n".join(f"- {progress(row)}" for row in errors))
    return "\n\n".join(parts) + "\n"


# ---- plots: what is on the x axis, and how it is read from a row
_AXES: dict[str, tuple[str, Callable[[dict], float | None]]] = {
    "ratio": ("stored numbers / weights", lambda row: None if row["form"] == "codebook" else row["ratio"]),
    "tokens": ("tokens", lambda row: row.get("tokens")),
    "size": ("weights of the targeted layers", lambda row: row.get("n")),
}


def plots(rows: Sequence[dict], folder: Path) -> list[Path]:
    """Plots of every timed work whose rows differ in the quantity on the x axis; the paths.

    WORK-MODEL-ratio.png and WORK-MODEL-tokens.png of each model, WORK-size.png of all of them.
    """
    rows = [row for row in latest(rows) if row.get("time_ratio") is not None]
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for work in dict.fromkeys(row["work"] for row in rows):
        ours = [row for row in rows if row["work"] == work]
        groups = [(f"{work}-{model}", axis, [row for row in ours if row["model"] == model])
                  for model in dict.fromkeys(row["model"] for row in ours) for axis in ("ratio", "tokens")]  # fmt: skip
        for name, axis, chosen in [*groups, (work, "size", ours)]:
            curves = _curves(chosen, axis)
            if curves:
                written.append(folder / f"{name}-{axis}.png")
                _plot(curves, f"{name.replace('-', ', ', 1)}, beside the dense model", _AXES[axis][0], written[-1])
    return written


def _curves(rows: Sequence[dict], axis: str) -> dict[str, list[tuple[float, dict]]]:
    """Points (x, row) of rows that differ in nothing but ``axis``, two or more, under a label."""
    curves: dict[str, list[tuple[float, dict]]] = {}
    machines = {tuple(row[key] for key in _MACHINE) for row in rows}
    for row in rows:
        x = _AXES[axis][1](row)
        if x is None:
            continue
        machine = f"{row['device']} ({row['threads']} threads, {row['dtype']})" if len(machines) > 1 else None
        fixed = [
            row["form"] if axis == "ratio" else subject_name(row), row["direction"],
            f"{row['tokens']} tokens" if row["tokens"] and axis != "tokens" else None,
            f"batch {row['batch']}" if row["batch"] > 1 else None, f"{row['pixels']} pixels" if row["pixels"] else None,
            machine,
        ]  # fmt: skip
        curves.setdefault(", ".join(part for part in fixed if part), []).append((x, row))
    ordered = {label: sorted(points, key=lambda point: point[0]) for label, points in curves.items()}
    return {label: points for label, points in ordered.items() if len({x for x, _ in points}) > 1}


def _plot(curves: dict[str, list[tuple[float, dict]]], title: str, label: str, path: Path) -> None:
    """Time ratio (quartiles as bars) and memory ratio, one line per curve, over a logarithmic axis."""
    from matplotlib.figure import Figure  # here, because every worker imports what bench.py imports

    figure = Figure(figsize=(14, 5), layout="constrained")
    axes = figure.subplots(1, 2)
    for i, (name, points) in enumerate(curves.items()):
        x, rows = zip(*points, strict=True)
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "marker": "o", "markersize": 4}
        middle = [row["time_ratio"] for row in rows]
        bars = [[row["time_ratio"] - row["time_ratio_low"] for row in rows],
                [row["time_ratio_high"] - row["time_ratio"] for row in rows]]  # fmt: skip
        axes[0].errorbar(x, middle, bars, capsize=2, label=name, **style)
        axes[1].plot(x, [row["memory_ratio"] for row in rows], **style)
    for axis, what in zip(axes, ("time / dense", "memory / dense"), strict=True):
        axis.axhline(1, color="black", linestyle="--", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel=what)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
