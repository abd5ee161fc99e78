"""push_to_hub through the real client, against a Hub in memory: whole or not at all, and readable by a new process.

The client reads its settings when it is imported, and starting a process takes long. So one process pushes everything
(:func:`pushes`), a second one loads it (:func:`loads`), and the tests below look at what the two report.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from hub_server import TOKEN, HubServer, control
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


# ---- the tests


def run(part: str, folder: Path, server: HubServer, token: str | None) -> dict:
    command = [sys.executable, __file__, part, str(folder), server.url]
    (folder / f"{part} temporary").mkdir()
    environment = server.environment(folder / f"{part} cache", token)
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TMPDIR": str(folder / f"{part} temporary")}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    server = HubServer()
    yield tmp_path_factory.mktemp("hub"), server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def pushed(places):
    return run("pushes", *places, TOKEN)


@pytest.fixture(scope="module")
def loaded(places, pushed):
    return run("loads", *places, None)


@pytest.mark.parametrize("name", ["regular", "large", "secret", "asked", "shards", "whole", "dropped", "adapter"])
def test_what_was_pushed_computes_the_same_in_a_new_process(loaded, name):
    assert loaded[name]


def test_weights_travel_in_the_commit_or_through_lfs(pushed):
    assert pushed["regular"]["uploads"] == 0
    assert pushed["large"]["uploads"] == 1
    files = {".gitattributes", "README.md", "config.json", "model.safetensors", "tokenizer_config.json"}
    assert files <= set(pushed["regular"]["files"])
    assert set(pushed["regular"]["files"]) == set(pushed["large"]["files"])
    assert "/user/regular/commit/" in pushed["regular"]["url"]


def test_the_tokenizer_comes_along(loaded):
    assert loaded["tokenizer of regular"]
    assert loaded["tokenizer of secret"]


def test_the_card_arrives_whole(loaded):
    lines = loaded["card"]["text"].strip().splitlines()
    assert "Import `hf_rps`" in lines[0]
    snippet = 'model = AutoModelForSequenceClassification.from_pretrained("user/regular")'
    assert lines.index("import hf_rps") < lines.index(snippet) < 10
    assert loaded["card"]["tags"] == ["rps", "hf_rps"]
    assert loaded["card"]["name"] == "regular"
    assert loaded["result"] == ["text-classification", "digits", "accuracy", 0.9]


def test_a_private_branch_is_for_those_with_a_token(pushed, loaded):
    assert pushed["secret"]["main"] == [".gitattributes"]
    assert "model.safetensors" in pushed["secret"]["v2"]
    assert "user/secret" in loaded["secret without a token"]
    assert 'from_pretrained("user/secret")' in pushed["secret"]["readme"]


def test_a_pull_request_leaves_main_alone(places, pushed):
    assert pushed["asked"]["pr"] == "refs/pr/1"
    assert pushed["asked"]["main"] == [".gitattributes"]
    assert "config.json" in pushed["asked"]["proposed"]
    assert (places[0] / "asked" / "config.json").exists()


@pytest.mark.parametrize("when", ["upload", "commit"])
def test_a_push_that_fails_publishes_nothing_and_says_how_to_retry(pushed, when):
    told = pushed[when]
    assert told["type"] == "RuntimeError"
    assert told["chained"]
    assert told["text"].startswith("uploading to user/")
    assert told["retry"].startswith("hf_rps.push_to_hub(")
    assert told["remote"] == [".gitattributes"]
    assert TOKEN not in told["text"]


def test_only_the_folder_of_a_failed_push_is_kept_and_it_loads(places, pushed):
    assert [str(path) for path in (places[0] / "pushes temporary").glob("hf_rps-*")] == [pushed["commit"]["kept"]]
    assert pushed["commit"]["loads"]


def test_a_retry_sends_only_what_had_not_arrived(pushed):
    told = pushed["upload"]
    assert told["shards"] > 2
    assert told["sent again"] == told["shards"] - 1
    assert pushed["commit"]["sent again"] == 0


def test_weights_of_an_earlier_push_do_not_stay(pushed):
    assert "model.safetensors" not in pushed["whole"]
    assert "model.safetensors.index.json" in pushed["whole"]


@pytest.mark.parametrize("where", ["own", "there", "given"])
def test_a_card_written_by_hand_stays_and_gets_the_import(pushed, where):
    head, _, rest = pushed[where].partition("# My model")
    assert head.startswith("---\nlicense: mit")
    assert "import hf_rps" in head
    assert rest == OWN.partition("# My model")[2]


def test_a_push_by_transformers_itself_has_the_tags(pushed):
    assert {"rps", "hf_rps"} <= set(ModelCard(pushed["plain"]).data.tags)


def test_the_card_of_a_dense_model_does_not_speak_of_rps(pushed):
    assert "rps" not in pushed["dense"].partition("## Size")[0]
    assert 'from_pretrained("user/dense")' in pushed["dense"]


def test_an_adapter_is_pushed_with_its_card(pushed):
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(pushed["adapter"]["files"])
    card = ModelCard(pushed["adapter"]["readme"])
    assert "import hf_rps" in "\n".join(card.text.splitlines()[:10])
    assert 'AutoPeftModel.from_pretrained("user/adapter")' in card.text
    assert {"rps", "hf_rps"} <= set(card.data.tags)


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("repo_id", "ValueError", "such as 'user/name'"),
        ("repo_id type", "TypeError", "PosixPath"),
        ("model type", "TypeError", "Linear"),
        ("no folder", "ValueError", "not a folder"),
        ("no config", "ValueError", "has no config.json"),
        ("no weights", "ValueError", "save the model again"),
        ("folder of others", "ValueError", "give a new folder"),
        ("two folders", "ValueError", "model is already a folder"),
        ("processing_class", "TypeError", "save_pretrained"),
        ("card", "TypeError", "ModelCard or a string"),
        ("revision", "ValueError", "revision must be"),
        ("pull request", "ValueError", "leave out revision='v2'"),
    ],
)
def test_bad_input_is_refused(pushed, case, kind, words):
    assert pushed["bad"][case]["type"] == kind
    assert words in pushed["bad"][case]["text"]


def test_bad_input_causes_no_request_and_no_file(places, pushed):
    assert pushed["requests for bad input"] == []
    assert not (places[0] / "new").exists()
    assert [file.name for file in (places[0] / "full").iterdir()] == ["diary.txt"]


def test_an_interrupted_push_tells_the_folder(tmp_path, monkeypatch, caplog):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(HfApi, "create_repo", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hf_rps.push_to_hub(tiny(), "user/name", folder=tmp_path)
    assert f"hf_rps.push_to_hub({str(tmp_path)!r}, 'user/name')" in caplog.text


def test_a_save_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    class Unfit:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OSError, match="disk full"):
        hf_rps.push_to_hub(tiny(), "user/name", processing_class=Unfit())
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    part = {"pushes": pushes, "loads": loads}[sys.argv[1]]
    with torch.no_grad():
        print(json.dumps(part(Path(sys.argv[2]), sys.argv[3])))
