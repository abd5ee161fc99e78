"""What a run of scripts/finetune.py has left behind, and whether it is that of a run that was never stopped."""

import torch
from finetune_runs import history, results
from safetensors.torch import load_file


def same_run(one, other):
    """Equal to the last bit: weights, metrics and history, but for how long things took."""
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert results(one)["metrics"] == results(other)["metrics"]
    for split in ("train", "validation"):
        for row, expected in zip(history(other, split), history(one, split), strict=True):
            timing = dict.fromkeys(row.keys() & {"samples_per_second", "tokens_per_second"})
            assert row | timing == expected | timing


def check_checkpoints(folder):
    """Everything that is named a checkpoint can be read to the end."""
    found = [path for path in folder.glob("checkpoint-*") if path.suffix not in (".tmp", ".old")]
    for path in found:
        assert len(load_file(path / "model.safetensors")) > 10
        for name in ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"):
            torch.load(path / name, weights_only=False)
        assert (path / "run.json").read_text().endswith("}\n")
    return found


def newest(folder):
    """The step of the newest whole checkpoint, 0 if there is none."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def alive(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"
