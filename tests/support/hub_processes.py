"""The processes of test_hub.py: one pushes everything, on purpose or in vain, and another one loads it.

    python hub_processes.py pushes|loads FOLDER URL

prints what there is to know about it as JSON, on the last line.
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from hub_server import TOKEN, control
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModel, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ByT5Tokenizer,
    PreTrainedModel,
)

import hf_rps
from hf_rps.integrations.model_card import write_model_card

IDS = torch.arange(18).view(2, 9) * 5 % 97
OWN = "---\nlicense: mit # mine\n---\n\n# My model\n\nWritten by hand.\n"


# ---- in the process that pushes


def tiny(auto_class=AutoModelForSequenceClassification) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    return auto_class.from_config(config).eval()


def remote(name: str, revision: str = "main") -> list[str]:
    return HfApi().list_repo_files(f"user/{name}", revision=revision)


def readme(name: str, revision: str = "main") -> str:
    return Path(HfApi().hf_hub_download(f"user/{name}", "README.md", revision=revision)).read_text()


def failed(*args, **kwargs) -> dict:
    """What a push says that must fail, and the line to retry it."""
    try:
        hf_rps.push_to_hub(*args, **kwargs)
    except Exception as error:
        text = str(error)
        return {"type": type(error).__name__, "text": text, "retry": text.partition("To try again: ")[2],
                "chained": error.__cause__ is not None}  # fmt: skip
    return {"type": None, "text": "", "retry": "", "chained": False}


def uploads(url: str) -> int:
    return sum(method == "PUT" for method, _, _ in control(url))


def bad_input(folder: Path, model: PreTrainedModel) -> dict:
    push = {"model": model, "repo_id": "user/name"}
    (folder / "empty").mkdir()
    model.save_pretrained(folder / "torn")
    (folder / "torn" / "model.safetensors").unlink()
    (folder / "full").mkdir()
    (folder / "full" / "diary.txt").write_text("private")
    cases = {
        "repo_id": push | {"repo_id": "a/b/c"},
        "repo_id type": push | {"repo_id": Path("a/b")},
        "model type": push | {"model": torch.nn.Linear(2, 2)},
        "no folder": push | {"model": folder / "nowhere"},
        "no config": push | {"model": folder / "empty"},
        "no weights": push | {"model": folder / "torn"},
        "folder of others": push | {"folder": folder / "full"},
        "two folders": push | {"model": folder / "torn", "folder": folder / "new"},
        "processing_class": push | {"processing_class": "bert"},
        "card": push | {"card": {"a": 1}},
        "revision": push | {"revision": ""},
        "pull request": push | {"revision": "v2", "create_pr": True},
    }
    return {case: failed(**arguments) for case, arguments in cases.items()}


def pushes(folder: Path, url: str) -> dict:
    """Everything that is pushed, on purpose or in vain. Returns what there is to know about it."""
    time.sleep = lambda seconds: None  # the client waits between its attempts
    out, tokenizer = {}, ByT5Tokenizer(extra_ids=0)
    model = hf_rps.get_rps_model(tiny(), hf_rps.RPSConfig(ratio=0.1, seed=3))
    out["bad"] = bad_input(folder, model)
    out["requests for bad input"] = control(url)

    for name, lfs in (("regular", False), ("large", True)):
        control(url, lfs=lfs)
        model.save_pretrained(folder / name)
        write_model_card(folder / name, model_name=name, metrics={"accuracy": 0.9}, dataset="digits")
        commit = hf_rps.push_to_hub(folder / name, f"user/{name}", processing_class=tokenizer)
        out[name] = {"url": commit.commit_url, "uploads": uploads(url), "files": remote(name)}

    hf_rps.push_to_hub(model, "secret", private=True, revision="v2", commit_message="Two", processing_class=tokenizer)
    out["secret"] = {"main": remote("secret"), "v2": remote("secret", "v2"), "readme": readme("secret", "v2")}
    commit = hf_rps.push_to_hub(model, "user/asked", create_pr=True, folder=folder / "asked")
    out["asked"] = {"pr": commit.pr_revision, "main": remote("asked"), "proposed": remote("asked", "refs/pr/1")}

    # an upload that breaks off after the first of several files
    expected = {"as made": model(IDS).logits}
    for parameter in model.parameters():
        parameter.add_(0.01)  # none of the weights was uploaded before
    expected["changed"] = model(IDS).logits
    model.save_pretrained(folder / "shards", max_shard_size="12KB")
    control(url, fail={"pattern": "^PUT /lfs", "times": 1000, "skip": 1})
    out["upload"] = failed(folder / "shards", "user/shards", private=True) | {"remote": remote("shards")}
    control(url, fail={"pattern": "", "times": 0})
    between = len(control(url))
    exec(out["upload"]["retry"], {"hf_rps": hf_rps})
    sent = [path for method, path, _ in control(url)[between:] if method == "PUT"]
    shards = len(list((folder / "shards").glob("*.safetensors")))
    out["upload"] |= {"sent again": len(sent), "shards": shards}
    model.save_pretrained(folder / "whole")
    hf_rps.push_to_hub(folder / "whole", "user/whole")
    hf_rps.push_to_hub(folder / "shards", "user/whole")
    out["whole"] = remote("whole")

    # a connection that drops when all is uploaded, in the middle of the commit
    control(url, fail={"pattern": "/commit/", "times": 1})
    told = failed(model, "user/dropped", processing_class=tokenizer, token=TOKEN)
    kept = told["text"].partition("complete model is in ")[2].partition(". To try again")[0]
    loaded = AutoModelForSequenceClassification.from_pretrained(kept)
    out["commit"] = told | {"kept": kept, "remote": remote("dropped")}
    out["commit"]["loads"] = torch.equal(loaded(IDS).logits, expected["changed"])
    before = uploads(url)
    exec(told["retry"], {"hf_rps": hf_rps, "token": TOKEN})
    out["commit"]["sent again"] = uploads(url) - before

    # cards that somebody wrote
    model.save_pretrained(folder / "own")
    (folder / "own" / "README.md").write_text(OWN)
    hf_rps.push_to_hub(folder / "own", "user/own")
    out["own"] = readme("own")
    HfApi().create_repo("user/there")
    HfApi().upload_file(path_or_fileobj=OWN.encode(), path_in_repo="README.md", repo_id="user/there")
    hf_rps.push_to_hub(model, "user/there")
    out["there"] = readme("there")
    hf_rps.push_to_hub(model, "user/given", card=ModelCard(OWN))
    out["given"] = readme("given")

    model.push_to_hub("user/plain")  # transformers' own
    out["plain"] = readme("plain")
    hf_rps.push_to_hub(tiny(), "user/dense")
    out["dense"] = readme("dense")

    tiny(AutoModel).save_pretrained(folder / "base")
    config = hf_rps.RPSConfig(ratio=0.01, mode="delta", init_weights=False)
    adapter = get_peft_model(AutoModel.from_pretrained(folder / "base"), config).eval()
    hf_rps.push_to_hub(adapter, "user/adapter")
    out["adapter"] = {"files": remote("adapter"), "readme": readme("adapter")}
    torch.save(expected | {"adapter": adapter(IDS).last_hidden_state}, folder / "expected.pt")
    return out


# ---- in the process that loads


def loads(folder: Path, url: str) -> dict:
    """Loads what was pushed, without a token unless it is given. Returns what is as it was."""
    expected, out = torch.load(folder / "expected.pt"), {}
    classifier = AutoModelForSequenceClassification.from_pretrained
    for name, key, arguments in (
        ("regular", "as made", {}),
        ("large", "as made", {}),
        ("secret", "as made", {"revision": "v2", "token": TOKEN}),
        ("asked", "as made", {"revision": "refs/pr/1"}),
        ("shards", "changed", {"token": TOKEN}),
        ("whole", "changed", {}),
        ("dropped", "changed", {}),
    ):
        out[name] = torch.equal(classifier(f"user/{name}", **arguments)(IDS).logits, expected[key])
    adapter = AutoPeftModel.from_pretrained("user/adapter").eval()
    out["adapter"] = torch.equal(adapter(IDS).last_hidden_state, expected["adapter"])
    for name, arguments in (("regular", {}), ("secret", {"revision": "v2", "token": TOKEN})):
        tokenizer = AutoTokenizer.from_pretrained(f"user/{name}", **arguments)
        out[f"tokenizer of {name}"] = tokenizer("ab").input_ids == [100, 101, 1]
    try:
        classifier("user/secret", revision="v2")
    except OSError as error:
        out["secret without a token"] = str(error)
    card = ModelCard.load("user/regular")
    result = card.data.eval_results[0]
    out["card"] = {"text": card.text, "tags": card.data.tags, "name": card.data.model_name}
    out["result"] = [result.task_type, result.dataset_name, result.metric_type, result.metric_value]
    return out


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    part = {"pushes": pushes, "loads": loads}[sys.argv[1]]
    with torch.no_grad():
        print(json.dumps(part(Path(sys.argv[2]), sys.argv[3])))
