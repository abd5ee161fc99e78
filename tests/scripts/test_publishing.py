"""finetune.py --push_to_hub against a Hub in memory: what is pushed is the run, and a failed push loses nothing."""

import json
import os
import subprocess
import sys

import pytest
import torch
from finetune_runs import DIGITS, ENVIRONMENT, flags, results
from forks import Forks
from hub_server import Failure, HubServer
from huggingface_hub import ModelCard
from paths import SCRIPTS
from safetensors.torch import load_file

RUN = DIGITS | {
    "max_train_steps": 20, "ratio": 0.2, "save_logits": 20, "eval_steps": 10, "push_to_hub": True,
    "hub_model_id": "user/digits", "hub_private_repo": True,
}  # fmt: skip
LOAD = """
import sys, torch, hf_rps
from finetuning.data.sources import load_digits
from huggingface_hub import hf_hub_download
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("user/digits")
images = AutoImageProcessor.from_pretrained("user/digits")(load_digits()["test"]["image"][:20], return_tensors="pt")
with torch.no_grad():
    torch.save(model(**images).logits, sys.argv[1])
print(hf_hub_download("user/digits", "README.md"))
print(hf_hub_download("user/digits", "learning_curve.png"))
"""


@pytest.fixture(scope="module")
def hub():
    return HubServer()


def environment(hub, folder):
    online = {k: v for k, v in ENVIRONMENT.items() if k != "HF_HUB_OFFLINE"}
    return hub.environment(folder / "cache") | online


@pytest.fixture
def readers(hub, tmp_path):
    """Processes forked from one that was started with the settings of the Hub, which are read on import."""
    server = Forks(
        environment(hub, tmp_path), ["hf_rps", "finetuning.data.sources", "transformers.models.auto.modeling_auto"]
    )
    yield server
    server.close()


def test_a_run_is_published_and_read_by_name(hub, readers, tmp_path):
    hub.failures.append(Failure("/commit/", 1000))
    command = [sys.executable, str(SCRIPTS / "finetune.py"), *flags(RUN | {"output_dir": "out"})]
    settings = environment(hub, tmp_path)
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=settings)
    assert failed.returncode == 1
    assert "To try again: hf_rps.push_to_hub(" in failed.stderr
    assert len(results(tmp_path / "out")["metrics"]) == 2  # nothing of the run is lost
    repo = hub.repos["user/digits"]
    assert repo.private
    assert not any("config.json" in files for files in repo.commits.values())

    hub.failures.clear()
    retry = failed.stderr.partition("To try again: ")[2].splitlines()[0]
    again = readers.run_code(f"import hf_rps\n{retry}", [], tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    loaded = readers.run_code(LOAD, [tmp_path / "logits.pt"], tmp_path)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    logits = load_file(tmp_path / "out" / "logits.safetensors")["logits"]
    assert (torch.load(tmp_path / "logits.pt") - logits).abs().max() < 1e-5

    readme, curve = loaded.stdout.split()[-2:]
    assert os.path.getsize(curve) > 5000
    card, run_results = ModelCard.load(readme), results(tmp_path / "out")
    assert card.text.lstrip().startswith("**Import `hf_rps` before you load this model**")
    assert 'from_pretrained("user/digits")' in card.text
    assert "![learning curve](learning_curve.png)" in card.text
    assert run_results["command"] in card.text
    found = {entry.metric_name: entry.metric_value for entry in card.data.eval_results}
    assert found == {f"test_{name}": value for name, value in run_results["metrics"]["test"].items()}
    assert card.data.base_model is None  # it was trained from scratch
    assert json.dumps(str(tmp_path)) not in card.text
