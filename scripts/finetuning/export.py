"""What a finished run leaves: the model with its card, the logits, results.json, and the push to the Hub."""

from __future__ import annotations

import logging
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from finetuning.evaluation import SHARDED
from finetuning.files import save_folder, write_json
from finetuning.publishing import publish, write_card
from hf_rps import __version__
from studies.methods.magnitude import remove_pruning

if TYPE_CHECKING:
    from finetuning.run import Run

logger = logging.getLogger(__name__)


def export(run: Run, metrics: dict[str, dict[str, float]], logits: Tensor | None) -> dict:
    """Write the model, ``logits`` and results.json, and push the model if asked to; returns the content of the latter.

    Args:
        run: The run, trained.
        metrics: Of each split that was evaluated.
        logits: Of the first samples of the test split, or None.
    """
    arguments, accelerator = run.training.arguments, run.training.accelerator
    output, results = run.training.output, describe(run, metrics)
    _save_model(run, output / "model", results)
    if accelerator.is_main_process:
        if logits is not None:
            save_file({"logits": logits}, output / "logits.safetensors")
        results["bytes_on_disk"] = sum(file.stat().st_size for file in (output / "model").glob("*.safetensors"))
        results["total_seconds"] = time.perf_counter() - run.started
        write_json(output / "results.json", results)
        last = "test" if "test" in metrics else "validation"
        values = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics[last].items())
        logger.info(f"{last}: {values}; {results['bytes_on_disk']:,} bytes; results are in {output}")
        if arguments.hub.push_to_hub:
            publish(output / "model", arguments.hub)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def describe(run: Run, metrics: dict[str, dict[str, float]]) -> dict:
    """What results.json says of a finished run, but for what is known only once its model is written."""
    training, arguments, report = run.training, run.training.arguments, run.report
    state, processes = training.state, training.accelerator.num_processes
    return {
        "task": arguments.train.task,
        "mode": arguments.rps.mode,
        "model": run.name,
        "parameters": {"stored": report.parameters, "dense": report.dense_parameters, "n": report.n, "m": report.m},
        "metrics": metrics,
        "steps": state.step,
        "best_step": state.best[1] if arguments.checkpoint.keep_best and state.best else state.step,
        "epochs": training.epochs,
        "processes": processes,
        "reduced_bytes_per_step": run.reduced if processes > 1 else 0,
        "train_seconds": state.seconds,
        "command": shlex.join(["finetune.py", *run.argv]),
        "arguments": arguments.as_dict(),
        "versions": {"hf_rps": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _save_model(run: Run, path: Path, results: dict) -> None:
    """Save model, tokenizer or image processor, and model card; gathered by all processes, written by one."""
    training, accelerator = run.training, run.training.accelerator
    main_process, trained = accelerator.is_main_process, _as_loaded(run)

    def save(folder: Path) -> None:
        state = None
        if accelerator.distributed_type in SHARDED:
            state = accelerator.get_state_dict(training.model) or {}
            state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
        trained.save_pretrained(folder, is_main_process=main_process, state_dict=state)
        if main_process:
            run.data.processor.save_pretrained(folder)
            write_card(folder, results, training.arguments, training.history.rows())

    save_folder(path, save, main_process, accelerator.wait_for_everyone)


def _as_loaded(run: Run) -> nn.Module:
    """The trained model without what training put on it: wrappers, masks, the cache that was turned off."""
    model = run.training.accelerator.unwrap_model(run.training.model, keep_torch_compile=False)
    if run.use_cache is not None:
        model.config.use_cache = run.use_cache
    return remove_pruning(model)
