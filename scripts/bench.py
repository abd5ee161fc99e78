#!/usr/bin/env python
"""Time and memory of compressed models beside the dense model, on the same work, as ratios from one run.

    python scripts/bench.py                      # everything, some ten minutes on two cores
    python scripts/bench.py --only step --ratios 0.1

Every subject (dense; ours at each ratio; the index-gather form, which is how a weight is usually shared) lives in a
process of its own, so that memory and the allocator's state are its own, and the parent lets them work in turn. A time
ratio is the median over rounds of (subject / dense) in the same round; memory is the peak of resident memory over what
the process held before it built the model.

Work:
    stack    12 blocks of the linear layers of BERT-base (hidden size 768): forward, and forward + backward, by tokens
    step     a whole training step (forward, backward, clip, AdamW) of a GPT-2-small-shaped Llama
    decode   one token with a KV cache, the same Llama
    load     from_pretrained of the same Llama, without memory mapping
    adapter  a whole training step of the same Llama: all of it (dense), LoRA of rank 8 and RPS in mode "delta" on all
             linear layers
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

WORKS = ("stack", "step", "decode", "load", "adapter")


@dataclass(frozen=True)
class Subject:
    """One form of the model and its ratio: "dense", "views" (ours), "gather" (an index and a sign a weight).

    Adapters: "delta" (ours) and "lora", whose ratio is its rank.
    """

    form: str
    ratio: float = 1.0

    @property
    def name(self) -> str:
        return self.form if self.form == "dense" else f"{self.form} {self.ratio:g}"

    def config(self):
        from hf_rps import RPSConfig

        return RPSConfig(ratio=self.ratio, sign="row" if self.form == "views" else "element", grad_scaling="norm")

    def apply(self, model):
        """The model in this form."""
        from peft import LoraConfig, get_peft_model

        from hf_rps import RPSConfig, get_rps_model

        if self.form == "lora":
            return get_peft_model(model, LoraConfig(r=int(self.ratio), target_modules="all-linear"))
        if self.form == "delta":
            return get_peft_model(model, RPSConfig(ratio=self.ratio, mode="delta", grad_scaling="norm"))
        return model if self.form == "dense" else get_rps_model(model, self.config())


# ---- the worker: one subject, one work, in a process of its own


def resident() -> int:
    """Resident memory of this process, bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """High-water mark of resident memory since the last reset, bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Give freed memory back to the system and start the high-water mark anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def linear_stack():
    """The linear layers of 12 BERT-base blocks, with as little else as keeps the numbers finite."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, hidden=768):
            super().__init__()
            self.query, self.key, self.value, self.output = (nn.Linear(hidden, hidden) for _ in range(4))
            self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

        def forward(self, x):
            x = x + self.output(self.query(x) + self.key(x) + self.value(x))
            return x + self.down(torch.relu(self.up(x)))

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*(Block() for _ in range(12)))

        def forward(self, x):
            return self.blocks(x)

    return Stack()


def llama_config():
    """GPT-2-small's depth and width as a Llama; 97M parameters with a small vocabulary."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=8192,
        max_position_embeddings=1024,
    )  # fmt: skip


def prepare(work: str, subject: Subject, tokens: list[int], fused: bool = False):
    """Build the subject and return {case: function to time}."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = subject.apply(linear_stack() if work == "stack" else AutoModelForCausalLM.from_config(llama_config()))
    cases = {}
    if work == "stack":
        for count in tokens:
            x = torch.randn(count, 768)

            def forward(x=x):
                with torch.no_grad():
                    model(x)

            def both(x=x):
                model(x).sum().backward()
                model.zero_grad()

            cases[f"forward, {count} tokens"] = forward
            cases[f"forward + backward, {count} tokens"] = both
    elif work == "decode":
        from transformers import DynamicCache

        model.eval()
        with torch.no_grad():
            cache = model(torch.zeros(1, 64, dtype=torch.long), past_key_values=DynamicCache()).past_key_values

        def decode():
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
            cache.crop(-1)

        cases["decode one token after 64"] = decode
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=fused or None)
        for count in (16, 512):
            ids = torch.randint(0, 8192, (1, count))

            def step(ids=ids):
                model(input_ids=ids, labels=ids).loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()

            kind = "fine-tuning step" if work == "adapter" else f"{'fused ' if fused else ''}AdamW step"
            cases[f"{kind}, {count} tokens"] = step
    return cases


def worker(work: str, subject: Subject, arguments: argparse.Namespace) -> None:
    """Serve requests {"case": ..., "runs": k} from standard input: seconds a run, and the peak of memory."""
    import torch
    import transformers

    import hf_rps  # noqa: F401

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    torch.ones(64, 64) @ torch.ones(64, 64)
    before = resident()
    cases = prepare(work, subject, arguments.tokens, arguments.fused)
    print(json.dumps({"cases": list(cases)}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        case = cases[request["case"]]
        if request["warm"]:
            case()
            reset_peak()
            case()
        start = time.perf_counter()
        for _ in range(request["runs"]):
            case()
        seconds = (time.perf_counter() - start) / request["runs"]
        print(json.dumps({"seconds": seconds, "peak": peak_resident() - before}), flush=True)


def load_worker(folder: str, threads: int) -> None:
    """Time one from_pretrained and report the peak of memory it took."""
    import torch
    import transformers

    import hf_rps  # noqa: F401

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM  # resolves the lazy import  # noqa: B018
    from transformers.models.llama import modeling_llama  # noqa: F401

    reset_peak()
    before = resident()
    start = time.perf_counter()
    transformers.AutoModelForCausalLM.from_pretrained(folder, disable_mmap=True)
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_resident() - before}), flush=True)


# ---- the parent


class Worker:
    """A subject in its process."""

    def __init__(self, work: str, subject: Subject, arguments: argparse.Namespace):
        command = [sys.executable, __file__, "--worker", work, subject.form, str(subject.ratio)]
        command += ["--threads", str(arguments.threads), "--tokens", *map(str, arguments.tokens)]
        command += ["--fused"] if arguments.fused else []
        environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.cases = json.loads(self.process.stdout.readline())["cases"]

    def run(self, case: str, runs: int, warm: bool = False) -> dict:
        self.process.stdin.write(json.dumps({"case": case, "runs": runs, "warm": warm}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def bench(work: str, subjects: list[Subject], arguments: argparse.Namespace) -> list[dict]:
    """Let all subjects do ``work`` in turn; one row a case and subject."""
    workers = {subject: Worker(work, subject, arguments) for subject in subjects}
    rows = []
    for case in workers[subjects[0]].cases:
        print(f"{case} ...", file=sys.stderr, flush=True)
        warm = {subject: process.run(case, 1, warm=True) for subject, process in workers.items()}
        runs = max(1, round(arguments.seconds / warm[subjects[0]]["seconds"]))
        results = {subject: [] for subject in subjects}
        for _ in range(arguments.rounds):
            for subject, process in workers.items():
                results[subject].append(process.run(case, runs))
        dense = results[subjects[0]]
        for subject, series in results.items():
            ratio = statistics.median(r["seconds"] / d["seconds"] for r, d in zip(series, dense, strict=True))
            peak = max(r["peak"] for r in series)
            rows.append({
                "work": case, "subject": subject.name, "time_ratio": ratio,
                "memory_ratio": peak / max(d["peak"] for d in dense), "peak_mib": peak / 2**20,
                "milliseconds": 1e3 * statistics.median(r["seconds"] for r in series),
            })  # fmt: skip
    for process in workers.values():
        process.close()
    return rows


def bench_load(subjects: list[Subject], threads: int, rounds: int) -> list[dict]:
    """from_pretrained, each in a fresh process, in turn."""
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects:
            torch.manual_seed(0)
            model = subject.apply(AutoModelForCausalLM.from_config(llama_config()))
            model.save_pretrained(os.path.join(folder, subject.name))
        series = {subject: [] for subject in subjects}
        for _ in range(rounds):
            for subject in subjects:
                command = [sys.executable, __file__, "--load", os.path.join(folder, subject.name)]
                output = subprocess.run([*command, "--threads", str(threads)], check=True, capture_output=True)
                series[subject].append(json.loads(output.stdout.decode().splitlines()[-1]))
    dense = series[subjects[0]]
    rows = []
    for subject, results in series.items():
        seconds = [r["seconds"] for r in results]
        peak = statistics.median(r["peak"] for r in results)
        rows.append({
            "work": "from_pretrained", "subject": subject.name,
            "time_ratio": statistics.median(s / d["seconds"] for s, d in zip(seconds, dense, strict=True)),
            "memory_ratio": peak / statistics.median(d["peak"] for d in dense), "peak_mib": peak / 2**20,
            "milliseconds": 1e3 * statistics.median(seconds),
        })  # fmt: skip
    return rows


def state_bytes(ratio: float) -> dict:
    """Bytes of weights, gradients and AdamW state of the targeted weights after a step, over the dense model's."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_rps import RPSConfig, get_rps_model
    from hf_rps.convert import find_bank

    model = get_rps_model(AutoModelForCausalLM.from_config(llama_config()), RPSConfig(ratio=ratio))
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    bank = find_bank(model)
    tensors = [bank.psi, bank.psi.grad, *optimizer.state[bank.psi].values()]
    kept = [t for t in bank._divisors.values() if isinstance(t, torch.Tensor)]
    used = sum(t.numel() * t.element_size() for t in tensors + kept)
    ratio_used = used / (4 * 4 * bank.weight_map.n)
    return {"work": "weights + gradients + AdamW state of the targets", "subject": f"views {ratio:g}",
            "time_ratio": None, "memory_ratio": ratio_used, "peak_mib": used / 2**20, "milliseconds": None}  # fmt: skip


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table, ratios first."""
    lines = ["| work | subject | time / dense | memory / dense | ms | peak MiB |", "|---|---|---|---|---|---|"]
    for row in rows:
        time_ratio = "" if row["time_ratio"] is None else f"{row['time_ratio']:.2f}"
        ms = "" if row["milliseconds"] is None else f"{row['milliseconds']:.1f}"
        lines.append(
            f"| {row['work']} | {row['subject']} | {time_ratio} | {row['memory_ratio']:.2f} | {ms} "
            f"| {row['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.01], help="m / n of the compressed subjects")
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="which work to do")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of every subject")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of alternation; the median counts")
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long the dense model works in a round")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 128, 512], help="tokens of the layer stack")
    parser.add_argument("--fused", action="store_true", help="use the fused AdamW in every subject")
    parser.add_argument("--no-gather", action="store_true", help="leave out the index-gather form")
    parser.add_argument("--output", help="append one JSON line a row to this file")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work, form, ratio = arguments.worker
        return worker(work, Subject(form, float(ratio)), arguments)
    if arguments.load:
        return load_worker(arguments.load, arguments.threads)
    subjects = [Subject("dense")]
    for ratio in arguments.ratios:
        subjects.append(Subject("views", ratio))
    if not arguments.no_gather:
        subjects += [Subject("gather", ratio) for ratio in arguments.ratios]
    rows = []
    for work in arguments.only:
        if work == "adapter":
            forms = [("dense", 1.0), ("lora", 8), ("delta", 0.001), ("delta", 0.01)]
            rows += bench(work, [Subject(*form) for form in forms], arguments)
        elif work == "load":
            rows += bench_load([s for s in subjects if s.form != "gather"], arguments.threads, arguments.rounds)
        else:
            rows += bench(work, subjects, arguments)
    if "step" in arguments.only:
        rows += [state_bytes(ratio) for ratio in arguments.ratios]
    print(f"{arguments.threads} threads, {arguments.rounds} rounds\n\n{table(rows)}")
    if arguments.output:
        with open(arguments.output, "a") as file:
            file.writelines(json.dumps(row | {"threads": arguments.threads}) + "\n" for row in rows)
    return None


if __name__ == "__main__":
    main()
