"""The stages of the study over one output folder; each run is done once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_rps import size_report
from hf_rps.names import is_psi_key
from studies.language_model import tuning
from studies.language_model.arguments import FINETUNED, Arguments
from studies.language_model.data import Texts, batches, load, read, write
from studies.language_model.rows import CODEBOOK, Row, codebook_bits
from studies.language_model.runs import EMBEDDINGS, Run, Runs
from studies.language_model.scores import accuracy, perplexity, samples
from studies.language_model.training import divergence, frozen_head, learn, next_token, teacher_states, train


class Study:
    """Runs, models and texts of one output folder."""

    def __init__(self, arguments: Arguments):
        self.arguments, self.output = arguments, Path(arguments.output_dir)
        (self.output / "students").mkdir(parents=True, exist_ok=True)
        self.runs = Runs(self.output / "runs.jsonl")
        self._before: dict[str, float] = {}

    @cached_property
    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.arguments.model, gguf_file=self.arguments.gguf_file)

    @cached_property
    def texts(self) -> Texts:
        """Those of the folder, which another machine may have made: its Python is another, and its sayings are."""
        file = self.output / "texts.pt"
        if not file.exists():
            write(file, load(self.tokenizer, Path(self.arguments.fortunes_dir)))
        return read(file)

    def dense(self) -> nn.Module:
        return self._load(self.arguments.model, gguf_file=self.arguments.gguf_file)

    def _load(self, source, **options) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="eager", **options
        )
        return model.to(self.arguments.device).eval()

    def compressed(self, row: Row) -> tuple[nn.Module, float]:
        """The untrained model of a row and its bits per targeted weight. Learned maps are kept: they take minutes."""
        if row.method != CODEBOOK:
            model = self.dense()
            return model, row.apply(model, self.texts)
        folder = self.output / "students" / row.folder
        if not (folder / "config.json").exists():
            model = self.dense()
            row.apply(model, self.texts)
            model.save_pretrained(folder)
        model = self._load(folder)
        return model, codebook_bits(model)

    def folder(self, run: Run) -> Path:
        """Where the distilled model of a run is."""
        return self.output / "distilled" / f"{Row(run.row).folder}-{run.steps}{run.variant and '-embedding'}"

    @property
    def variant(self) -> str:
        """Of runs that distil."""
        rate = self.arguments.embedding_rate
        return "" if rate is None else f"{EMBEDDINGS} at {rate:g}"

    # ---- judging

    def scores(self, model: nn.Module) -> dict:
        """With codebooks in bfloat16, as they are stored."""
        round_codebooks(model)
        return {
            "perplexity": perplexity(model, self.texts.held_out),
            "other_perplexity": perplexity(model, self.texts.other),
            "choices": accuracy(model, self.tokenizer, self.texts.choices),
            "samples": samples(model, self.tokenizer),
        }

    # ---- stages

    def untrained(self, row: Row) -> dict:
        def execute() -> dict:
            model, bits = self.compressed(row)
            return {"bits": bits, "other": self.texts.other_name} | self.scores(model)

        return self.runs(Run("untrained", row.name), execute)

    def distil(self, run: Run) -> tuple[nn.Module, dict]:
        """Train the model of a row to predict what the dense one does."""
        autocast, table_rate = run.variant != "float32", self.arguments.embedding_rate
        ids = batches(self.texts.train, run.batch_size, run.steps).to(self.arguments.device)
        teacher = self._teacher(ids)
        model, bits = self.compressed(Row(run.row))
        learn(model, embeddings=table_rate is not None)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        head, table = model.get_output_embeddings().weight, frozen_head(model, autocast)
        head = head if head.requires_grad else table

        def loss(hidden: Tensor, step: int) -> Tensor:
            return divergence(hidden, teacher[step], head, table)

        losses, seconds = train(model, ids, loss, run.rate, autocast, table_rate)
        return model, {"bits": bits, "trained": trained, "losses": losses, "seconds": seconds}

    def _teacher(self, ids: Tensor) -> Tensor:
        return teacher_states(self.dense(), ids, self.output / f"teacher-{ids.shape[1]}.pt")

    def rate(self, row: Row, rate: float) -> dict:
        size = self.arguments.batch_size
        run = Run("rates", row.name, self.arguments.grid_steps, rate, variant=self.variant, batch_size=size)

        def execute() -> dict:
            model, result = self.distil(run)
            return result | {"validation": perplexity(model, self.texts.validation)}

        return self.runs(run, execute)

    def best_rate(self, row: Row) -> float:
        """That of the row's own short runs or, where it has none, of another row of its method."""
        tried = self.runs.of("rates", row.name)
        if not tried:
            others = {run.row for run in self.runs.of("rates") if Row(run.row).method == row.method}
            others = others or {run.row for run in self.runs.of("rates") if _is_peer(run.row) and _is_peer(row.name)}
            if not others:
                raise ValueError(f"no rate is known for {row.name}; run --stages rates --rows {row.name}")
            tried = self.runs.of("rates", min(others))
        tried = {run: x["validation"] for run, x in tried.items() if not run.variant.startswith(EMBEDDINGS)}
        return min(tried, key=tried.get).rate

    def distilled(self, row: Row) -> dict:
        size = self.arguments.batch_size
        rate = self.best_rate(row)
        run = Run("distilled", row.name, self.arguments.steps, rate, variant=self.variant, batch_size=size)

        def execute() -> dict:
            model, result = self.distil(run)
            result |= self.scores(model)
            if row.method == CODEBOOK:
                model.to(torch.bfloat16).save_pretrained(self.folder(run))
                self.tokenizer.save_pretrained(self.folder(run))
            return result

        return self.runs(run, execute)

    def arithmetic(self, row: Row, steps: int = 10) -> None:
        """A few steps with products in bfloat16 and the same in float32."""
        for variant in ("bfloat16", "float32"):
            size = self.arguments.batch_size
            run = Run("arithmetic", row.name, steps, self.best_rate(row), variant=variant, batch_size=size)
            self.runs(run, lambda run=run: self.distil(run)[1])

    def finetuned(self, method: str) -> list[dict]:
        """Short runs at every rate with the first seed, and the other seeds at the best."""
        seeds, steps = self.arguments.seeds, self.arguments.finetune_steps

        def run(rate: float, seed: int) -> dict:
            size = self.arguments.batch_size
            settings = Run("finetuned", method, steps, rate, seed, self._base(method), batch_size=size)
            return self.runs(settings, lambda: self._finetune(settings))

        tried = {rate: run(rate, seeds[0])["validation"] for rate in tuning.TUNED[method]}
        return [run(min(tried, key=tried.get), seed) for seed in seeds]

    def _base(self, method: str) -> str:
        """What the table says of the row that is fine-tuned, where it is not the default one."""
        row = self.arguments.finetune_row
        return Row(row).title if row != FINETUNED and method.startswith("codebooks") else ""

    def _finetune(self, run: Run) -> dict:
        torch.manual_seed(run.seed)
        row, texts = Row(self.arguments.finetune_row), self.texts
        compressed, _ = self.compressed(row)
        learn(compressed)
        memory = codebook_memory(compressed)
        model = compressed
        if run.row != "codebooks":
            base = compressed if run.row == "codebooks+lora" else self.dense()
            model, memory = tuning.prepare(run.row, base, memory)
        if run.row not in self._before:  # before training all runs of a method are the same
            self._before[run.row] = perplexity(model, texts.code_held_out)
        ids = batches(texts.code, run.batch_size, run.steps, run.seed).to(self.arguments.device)
        head = frozen_head(model)

        def loss(hidden: Tensor, step: int) -> Tensor:
            return next_token(hidden, ids[step], head)

        losses, seconds = train(model, ids, loss, run.rate)
        round_codebooks(model)
        found = {name: perplexity(model, getattr(texts, of)) for name, of in JUDGED.items()}
        sizes = {"memory": memory.bytes, "frozen_bytes": memory.frozen, "trained": memory.trained}
        return {"before": self._before[run.row], "losses": losses, "seconds": seconds} | found | sizes


JUDGED = {"validation": "code_validation", "perplexity": "code_held_out", "documentation": "validation"}


def _is_peer(name: str) -> bool:
    return Row(name).method not in ("dense", CODEBOOK)


def codebooks(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if is_psi_key(name)]


@torch.no_grad()
def round_codebooks(model: nn.Module) -> None:
    """To bfloat16, in which they are stored and counted."""
    for psi in codebooks(model):
        psi.copy_(psi.bfloat16())


def codebook_memory(model: nn.Module) -> tuning.Memory:
    """Of training the codebooks and norms of a compressed model: codes, and a bfloat16 embedding, are frozen."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = sum(p.numel() for p in model.parameters() if p.is_floating_point() and not p.requires_grad)
    return tuning.Memory(size_report(model).code_bytes + 2 * others, trained)
