"""scripts/finetune.py reads flags and files alike, and refuses what cannot work before any work."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from finetune_runs import flags
from paths import SCRIPTS

pytest.importorskip("datasets")
pytest.importorskip("evaluate")
pytest.importorskip("sklearn")
from finetuning.arguments import cli as _arguments


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("digits", {"config_overrides": "num_chanels=1"}, "config_overrides names ['num_chanels'], which 'vit' does"),
        ("digits", {"config_overrides": "hidden_size=big"}, "expected int, got str (value: 'big')"),
        ("lm", {"config_overrides": "vocab_size=100"}, "'bytes' has 259 tokens, but the model's vocab_size is 100"),
        ("words", {"tokenizer_name": "bytes"}, "token-classification needs a fast tokenizer"),
    ],
)
def test_refuses_configurations(base, finetune, tmp_path, task, change, message):
    assert message in finetune.error(tmp_path, base[task] | change | {"output_dir": "refused"})
    assert not (tmp_path / "refused").exists()


def plugin(**fields):
    return SimpleNamespace(zero_stage=3, zero3_init_flag=True, deepspeed_config={"zero_optimization": {}}, **fields)


@pytest.mark.parametrize(
    ("kind", "mode", "message"),
    [
        ("MEGATRON_LM", "rps", "MEGATRON_LM, which this script can't use: Megatron-LM splits and rebuilds the layers"),
        ("FSDP", "rps", "FSDP1 flattens the parameters of each block, .* set fsdp_version: 2"),
        ("DEEPSPEED", "rps", "split the dense weights before they are compressed; set zero3_init_flag: false"),
        ("DEEPSPEED", "magnitude", "masks are not sharded"),
    ],
)
def test_refuses_what_can_not_work(base, monkeypatch, tmp_path, kind, mode, message):
    from accelerate.utils import DistributedType

    from finetuning import launch as script

    fake = SimpleNamespace(
        distributed_type=DistributedType[kind], is_fsdp2=False, state=SimpleNamespace(deepspeed_plugin=plugin())
    )
    monkeypatch.setattr(script, "Accelerator", lambda **options: fake)
    arguments = _arguments.parse_arguments(flags(GOOD | {"output_dir": str(tmp_path / "new"), "ratio": 0.5}))
    arguments.rps.mode = mode
    with pytest.raises(ValueError, match=message):
        script.make_accelerator(arguments)


@pytest.mark.parametrize("file", sorted((SCRIPTS / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_example_configurations_are_valid(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = _arguments.parse_arguments([str(file), "--output_dir", "new"])
    assert read.train.output_dir == "new"
    assert file.read_text().startswith("# ")


GOOD = {
    "task": "image-classification",
    "dataset_name": "sklearn/digits",
    "model_type": "vit",
    "output_dir": "new",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, "no task was given; give --task"),
        ({"task": "translation"}, r"task='translation' is not valid; expected one of \['text-classification'"),
        ({"output_dir": None}, "no output_dir was given"),
        ({"output_dir": "full"}, "exists and is not empty; continue it with --resume, name another folder, or give"),
        ({"model_type": None}, "got no model; give exactly one of --model_name_or_path"),
        ({"config_name": "x"}, "got config_name and model_type; give exactly one"),
        ({"config_overrides": "hidden_size"}, "'hidden_size' is not key=value"),
        ({"dataset_name": None}, "got no data; give exactly one of --dataset_name, --train_file"),
        ({"dataset_name": None, "train_file": "no.csv"}, "train_file='no.csv' does not exist"),
        ({"dataset_name": None, "train_file": "a.xml"}, "unknown extension; expected one of"),
        ({"dataset_name": None, "data_dir": "no"}, "data_dir='no' does not exist or is not a folder"),
        ({"validation_file": "a.csv"}, "validation_file='a.csv' was given without train_file"),
        ({"task": "causal-lm", "tokenizer_name": "bytes"}, "'sklearn/digits' holds images"),
        ({"learning_rate": -1}, r"learning_rate=-1.0 is not valid; expected a positive number"),
        ({"learning_rate": "fast"}, "learning_rate='fast' is not valid; expected float"),
        ({"num_train_epochs": 1.5}, "num_train_epochs=1.5 is not valid; expected int"),
        ({"validation_fraction": 1}, "validation_fraction=1.0 is not valid; expected a number between 0 and 1"),
        ({"ratio": 2}, r"ratio=2.0 is not valid; expected a number in \(0, 1\]"),
        ({"grad_scaling": "x"}, "grad_scaling='x' is not valid; expected one of"),
        ({"learning_rat": 1}, "learning_rat"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "hub_model_id='a/b/c' can't be a name on the Hub"),
        ({"push_to_hub": True, "hub_model_id": "a/b"}, "push_to_hub needs a token; log in with"),
        ({"streaming": True}, "a stream has no known length; with --streaming give --max_train_steps"),
        ({"streaming": True, "dataloader_num_workers": 2}, "several workers would read the stream in another order"),
        ({"group_by_length": True}, "group_by_length needs texts that are all there"),
        ({"distill_hidden_states": 1}, "distill_hidden_states=1.0 was given without a teacher; give --teacher"),
        ({"distill_alpha": 2}, "distill_alpha=2.0 is not valid; expected a number from 0 to 1"),
        ({"mode": "frozen"}, "mode='frozen' keeps weights that are trained; give --model_name_or_path"),
        ({"mode": "magnitude"}, "pruning by magnitude needs trained weights; give --model_name_or_path"),
        ({"bits": 3}, "bits=3 has no meaning with mapping='fold'; it belongs to mapping='codebook'"),
        ({"tile": 2}, "tile=2 has no meaning with mapping='fold'; it belongs to mapping='codebook'"),
        ({"mapping": "codebook", "ratio": 0.1}, "ratio=0.1 has no meaning with mapping='codebook': what is stored"),
        ({"mapping": "codebook", "bits": 5}, r"bits=5 is not valid; expected one of \[2, 3, 4, 8\]"),
        ({"mapping": "codebook", "mode": "magnitude"}, "mapping='codebook' has no meaning with mode='magnitude'"),
        ({"mapping": "codebook"}, "mapping='codebook' is learned from trained weights; give --model_name_or_path"),
        ({"calibration_samples": 64}, "calibration_samples=64 has no meaning with mapping='fold', which is drawn"),
        ({"calibration_samples": -1}, "calibration_samples=-1 is not valid; expected 0 or more"),
        ({"teacher": "itself"}, "a model that is trained from scratch knows nothing to teach; name a trained"),
        ({"predict_with_generate": True}, "predict_with_generate is for --task seq2seq"),
        ({"resume": True, "overwrite_output_dir": True}, "--resume continues what --overwrite_output_dir deletes"),
        ({"save_total_limit": 0}, "save_total_limit=0 is not valid; expected a positive number"),
    ],
)
def test_refuses_arguments(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_arguments, "get_token", lambda: None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "a.xml").touch()
    arguments = {name: value for name, value in (GOOD | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(arguments))
    with pytest.raises(ValueError, match=message):
        _arguments.parse_arguments(["config.json"])
    assert not (tmp_path / "new").exists()


def test_refuses_a_file_that_holds_no_arguments(tmp_path):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    (tmp_path / "broken.json").write_text("{")
    for name, message in (("none.yaml", "neither a flag nor"), ("list.yaml", "holds list"), ("broken.json", "parsed")):
        with pytest.raises(ValueError, match=message):
            _arguments.parse_arguments([str(tmp_path / name)])


def test_flags_and_file_are_read_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change = {"config_overrides": "image_size=[8, 8],layer_norm_eps=1e-6", "target_modules": ["q_proj", "fc1"]}
    Path("config.yaml").write_text(yaml.safe_dump(GOOD | change))
    argv = [*flags(GOOD), "--config_overrides", change["config_overrides"], "--target_modules", "q_proj", "fc1"]
    assert _arguments.parse_arguments(argv) == _arguments.parse_arguments(["config.yaml"])
    read = _arguments.parse_arguments(["config.yaml", "--seed", "5", "--target_modules", "fc2"])
    assert (read.train.seed, read.rps.target_modules, read.model.model_type) == (5, ["fc2"], "vit")  # flags win
    model, rps = read.model, _arguments.parse_arguments(argv).rps
    assert model.config_overrides == {"image_size": [8, 8], "layer_norm_eps": 1e-6}
    assert rps.config("sgd").grad_scaling == "projection"
    assert rps.config("adamw").grad_scaling == "norm"
    assert rps.config("adamw").target_modules == ["q_proj", "fc1"]
    assert (rps.ratio, rps.bits) == (0.1, None)  # defaults that depend on the mapping
    assert (_arguments.RPSArguments(mapping="codebook").ratio, _arguments.RPSArguments(mapping="codebook").bits) == (
        None,
        4,
    )
    assert _arguments.RPSArguments(target_modules=[r".*\.fc1"]).target_modules == r".*\.fc1"
