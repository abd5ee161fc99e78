"""The benchmark of scripts/bench.py: its command line, its rows and what is made of them."""

import json

import pytest

from benchmark import cli as bench
from benchmark import costs, report
from benchmark.runner import WORKS
from benchmark.runner import subjects as subjects_of
from benchmark.subjects import Subject
from benchmark.works import Case


def timed_row(form="views", ratio=0.1, time_ratio=0.5, **changes):
    """A finished row as `measure` gives it."""
    row = {
        "work": "stack", "model": "bert", "form": form, "ratio": ratio, "case": "forward, 8 tokens",
        "direction": "forward", "tokens": 8, "batch": 1, "pixels": None, "n": 1000, "m": 100, "time_ratio": time_ratio,
        "time_ratio_low": time_ratio - 0.1, "time_ratio_high": time_ratio + 0.1, "milliseconds": 4.0,
        "dense_milliseconds": 8.0, "memory_ratio": 0.25, "peak_mib": 100, "dense_peak_mib": 400, "threads": 2,
        "device": "a CPU", "dtype": "float32", "part": 1.0, "torch": "2.13", "command": "python scripts/bench.py",
    }  # fmt: skip
    return row | changes


def test_command_line(tmp_path, capsys):
    """Rows are appended as they come, printed as progress, and reported; the command has no path of the machine."""
    file = tmp_path / "rows.jsonl"
    arguments = ["--only", "prefill", "--models", "tiny", "--ratios", "0.1", "--rounds", "2", "--seconds", "0.001",
                 "--threads", "1", "--prompt", "8", "--output", str(file)]  # fmt: skip
    bench.main(arguments)
    bench.main(arguments)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["command"].endswith("--prompt 8 --output PATH") for row in rows)
    output, errors = capsys.readouterr()
    assert "prefill tiny, prefill, 8 tokens, views 0.1: time" in errors
    assert f"{rows[-1]['time_ratio']:.2f} (" in output
    bench.main(["--report", str(file), "--plots", str(tmp_path)])
    assert f"{rows[-1]['time_ratio']:.2f} (" in capsys.readouterr().out


def test_rows_of_another_kind_are_refused(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"work": "decode", "subject": "dense"}\n')
    with pytest.raises(SystemExit):
        bench.main(["--report", str(tmp_path / "rows.jsonl")])
    assert "is not a row of this benchmark" in capsys.readouterr().err


def test_the_command_is_told_without_paths():
    told = bench.command_line(["--fakeroast", ".", "--ratios", "0.1", "--output=/home/me/rows.jsonl"])
    assert told == "python scripts/bench.py --fakeroast PATH --ratios 0.1 --output=PATH"
    assert bench.command_line([]) == "python scripts/bench.py"


def test_every_default_fits_its_work():
    for name, work in WORKS.items():
        assert set(work.default_models) <= set(work.models)
        assert subjects_of(name, None, [0.1], [])


def test_slow_forms_come_at_one_ratio_unless_asked_for():
    views, folded, gather = ((Subject(form, 0.1), Subject(form, 0.01)) for form in ("views", "folded", "gather"))
    assert subjects_of("stack", None, [0.1, 0.01], ["fakeroast"], [4]) == (
        views[0], folded[0], gather[0], Subject("cat", 0.1), Subject("fakeroast", 0.1), views[1], folded[1],
        Subject("codebook", 4),
    )  # fmt: skip
    assert subjects_of("load", ["gather", "cat"], [0.1, 0.01], ["fakeroast"], [4]) == gather


def test_codebooks_come_with_every_number_of_bits_and_no_ratio():
    assert subjects_of("decode", ["codebook"], [0.1, 0.01], [], [4, 3]) == (
        Subject("codebook", 4), Subject("codebook", 3),
    )  # fmt: skip
    assert Subject("codebook", 4).name == "codebook 4 bits"
    assert not subjects_of("decode", None, [], [], [4])


def test_cases_say_what_they_are():
    assert str(Case("decode", 1, 8)) == "decode, 1 token, batch 8"
    assert str(Case("forward", batch=8, pixels=64)) == "forward, batch 8, 64 x 64 pixels"


def test_tables_give_ratios_of_the_latest_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    for row in (
        timed_row(time_ratio=0.9),
        timed_row("gather", error="gather 0.1: killed", case=None),
        timed_row(time_ratio=0.6),
        timed_row("gather", time_ratio=3.0),
        timed_row("cat", error="cat 0.1: killed", case=None),
    ):
        report.append(row, file)
    file.write_text(file.read_text() + '{"work": "cut sho')
    text = report.tables(report.read([file]))
    assert "| time / dense (quartiles) | views 0.1 | gather 0.1 | dense, ms |" in text
    assert "| bert: forward, 8 tokens | 0.60 (0.50 to 0.70) | 3.00 (2.90 to 3.10) | 8.0 |" in text
    assert "| bert: forward, 8 tokens | 0.25 | 0.25 | 400 |" in text
    assert "cat 0.1: killed" in text
    assert "gather 0.1: killed" not in text


def test_plots(tmp_path):
    rows = [timed_row(ratio=ratio, tokens=tokens, case=f"forward, {tokens} tokens", n=n, model=model)
            for ratio in (0.1, 0.01) for tokens in (1, 8) for n, model in ((1000, "bert"), (9000, "gpt2"))]  # fmt: skip
    written = report.plots(rows, tmp_path)
    models = [f"stack-{model}-{axis}.png" for model in ("bert", "gpt2") for axis in ("ratio", "tokens")]
    assert [path.name for path in written] == [*models, "stack-size.png"]
    assert all(path.stat().st_size > 10_000 for path in written)
    assert report.plots(rows[:1], tmp_path) == []
    assert report.plots([timed_row("codebook", bits) for bits in (4, 3)], tmp_path) == [], "bits are no ratio"


def test_cost_model():
    """Of its own laws, and as a table beside measured rows."""
    cpu, gpu = costs.MACHINES
    stack, m = costs.layers("bert", 1.0)
    assert m == sum(layer.rows * layer.cols for layer in stack) == 12 * 12 * 768**2
    small = costs.predict("bert", 0.01, 1, cpu, "forward")
    assert small < costs.predict("bert", 0.1, 1, cpu, "forward") < 1  # bytes decide with one token
    for machine in (cpu, gpu):
        step = costs.predict("bert", 0.1, 512, machine, "training step")
        assert step < costs.predict("bert", 0.1, 512, machine, "forward + backward")
    row = {"work": "stack", "model": "bert", "form": "views", "ratio": 0.1, "part": 1, "tokens": 512,
           "direction": "forward", "case": "forward, 512 tokens", "time_ratio": 1.0, "n": 1 << 26,
           "dtype": "float32", "device": "AMD EPYC"}  # fmt: skip
    lines = costs.table([row, row | {"form": "gather"}]).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| bert: forward, 512 tokens | views | 0.1 | 1.00 | ")


def test_cost_model_of_folded_inputs():
    """An eighth, which divides 768, of the operations at many tokens, of the bytes with one; and folding."""
    machine = costs.Machine("plain", 4, 1e12, 1e13, 1e13, 1e13, 0.0, 0.0, 1e12, 0.0, "cpu")
    stack, m = costs.layers("bert", 0.1, "folded")
    assert m == pytest.approx(sum(layer.rows * layer.cols for layer in stack) / 10, rel=1e-3)
    assert sum(layer.reads_new_input for layer in stack) == 12 * 4  # queries, output, up, down
    many = costs.predict("bert", 0.1, 4096, machine, "forward", "folded")
    assert many == pytest.approx(1 / 8 + 8 * 7 / 12 / 768, abs=0.002)
    slow = costs.Machine("slow", 4, 1e15, 1e10, 1e10, 1e10, 0.0, 0.0, 1e12, 0.0, "cpu")
    assert costs.predict("bert", 0.1, 1, slow, "forward", "folded") == pytest.approx(1 / 8, abs=0.01)
    row = {"work": "stack", "model": "bert", "form": "folded", "ratio": 0.1, "part": 1, "tokens": 512,
           "direction": "forward", "case": "forward, 512 tokens", "time_ratio": 0.3, "n": 1 << 26,
           "dtype": "float32", "device": "Intel(R) Xeon(R) Processor"}  # fmt: skip
    assert "| folded | 0.1 | 0.30 |" in costs.table([row])
