"""Several precisions of one model in one folder, as save_pretrained(variant=...) writes them."""

import pytest
import torch
from checkpoints import equal
from transformers import AutoModelForCausalLM

from hf_rps import RPSConfig, get_rps_model


@pytest.mark.parametrize("order", [(None, "fp16"), ("fp16", None)])
def test_each_variant_of_a_folder_loads(tiny, ids, tmp_path, order):
    whole = get_rps_model(tiny(), RPSConfig(ratio=0.1))
    whole.save_pretrained(tmp_path / "whole")
    models = {None: whole, "fp16": AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float16)}
    for variant in order:
        models[variant].save_pretrained(tmp_path, variant=variant)
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant, dtype=dtype)
        equal(loaded(ids).logits, models[variant](ids).logits)


def test_a_variant_that_was_saved_again_makes_the_other_none_the_worse(tiny, ids, tmp_path):
    """The check of the other one's file stays: a file of a third save in its place is refused."""
    model = get_rps_model(tiny(), RPSConfig(ratio=0.1))
    model.save_pretrained(tmp_path)
    kept = (tmp_path / "model.safetensors").read_bytes()
    model.half().save_pretrained(tmp_path, variant="fp16")
    AutoModelForCausalLM.from_pretrained(tmp_path)
    other = get_rps_model(tiny(), RPSConfig(ratio=0.1))
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    other.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(kept)
    with pytest.raises(ValueError, match="two saves are mixed"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
