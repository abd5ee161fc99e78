"""The configs of scripts/configs/accelerate: accelerate's own loader and launcher take them and mean what they say."""

import json
import os
import subprocess
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from paths import SCRIPTS

FOLDER = SCRIPTS / "configs" / "accelerate"
FILES = {
    "cpu": ("NO", 1, "no"),
    "one_gpu": ("NO", 1, "bf16"),
    "ddp": ("MULTI_GPU", 8, "bf16"),
    "multi_node": ("MULTI_GPU", 16, "bf16"),
    "fsdp2": ("FSDP", 8, "bf16"),
    "deepspeed_zero1": ("DEEPSPEED", 8, "bf16"),
    "deepspeed_zero2": ("DEEPSPEED", 8, "bf16"),
    "deepspeed_zero3": ("DEEPSPEED", 8, "bf16"),
}


def path(name):
    return str(FOLDER / f"{name}.yaml")


def launch_arguments(name, *options):
    arguments = launch_command_parser().parse_args(["--config_file", path(name), *options, "script.py"])
    return _validate_launch_command(arguments)[0]


def environment(name, *options):
    """What ``accelerate launch`` would start the script with."""
    arguments = launch_arguments(name, *options)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        return prepare_deepspeed_cmd_env(arguments)[1]
    if arguments.multi_gpu or arguments.use_fsdp:
        return prepare_multi_gpu_env(arguments)
    return prepare_simple_launcher_cmd_env(arguments)[1]


def test_every_file_is_tested_and_says_when_to_take_it():
    assert {file.stem for file in FOLDER.iterdir()} == set(FILES)
    assert all(file.read_text().startswith("# ") for file in FOLDER.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_load_and_launch(name):
    kind, processes, precision = FILES[name]
    config = load_config_from_file(path(name))
    assert (config.distributed_type.value, config.num_processes, config.mixed_precision) == (kind, processes, precision)
    found = environment(name)
    assert found["ACCELERATE_MIXED_PRECISION"] == precision
    assert found.get("ACCELERATE_USE_FSDP") == ("true" if kind == "FSDP" else None)
    assert found.get("ACCELERATE_USE_DEEPSPEED") == ("true" if kind == "DEEPSPEED" else None)
    assert launch_arguments(name, "--num_processes", "2").num_processes == 2


def test_multi_node():
    arguments = launch_arguments("multi_node", "--machine_rank", "1")
    prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.node_rank, arguments.nproc_per_node) == ("2", 1, "8")
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "192.0.2.1:29500")


def test_fsdp2(monkeypatch):
    monkeypatch.setattr(os, "environ", environment("fsdp2"))
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed(monkeypatch, stage):
    monkeypatch.setattr(os, "environ", environment(f"deepspeed_zero{stage}"))
    plugin = DeepSpeedPlugin()
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"  # as many as the Accelerator was told


def test_the_cpu_config_starts_a_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json\nfrom accelerate import Accelerator\na = Accelerator()\n"
        "print(json.dumps([a.device.type, a.num_processes, a.mixed_precision]))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path("cpu"), str(script)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert json.loads(output.splitlines()[-1]) == ["cpu", 1, "no"]
