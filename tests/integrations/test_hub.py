"""push_to_hub through the real client, against a Hub in memory: whole or not at all, and readable by a new process.

The client reads its settings when it is imported, and starting a process takes long. So one process pushes everything
(hub_processes.pushes), a second one loads it (loads), and the tests below look at what the two report.
"""

import json
import subprocess
import sys
from pathlib import Path

import hub_processes
import pytest
from hub_processes import OWN, tiny
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard

import hf_rps


def run(part: str, folder: Path, server: HubServer, token: str | None) -> dict:
    command = [sys.executable, hub_processes.__file__, part, str(folder), server.url]
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
