"""Whatever is changed in a saved checkpoint, it is refused with a clear error, or loads as it was saved.

A field of config.json that dense models take as it is (an activation, an epsilon) does to a compressed model what it
does to a dense one. Outside of the promise are flipped bits in the numbers of a weight, of which only the ends and what
is not finite are noticed. So are, in an adapter's file, which has no metadata of its own, tensors of one shape that
exchange their names (biases, modules_to_save) and float16 that is called bfloat16.
"""

import json
import random
import shutil
import traceback
import zlib
from pathlib import Path

import pytest
import torch
from mutated_checkpoints import CHECKPOINTS, state_of
from mutations import file_mutations, header_mutations, json_mutations
from safetensors import SafetensorError

import hf_rps

CLEAR = (ValueError, RuntimeError, OSError, SafetensorError)
LIBRARY = str(Path(hf_rps.__file__).parent)


class Subject:
    """A checkpoint, saved twice (the second time with other numbers) and dense, and what it is when it is loaded."""

    def __init__(self, name, folder):
        self.case, self.folder, self.name = CHECKPOINTS[name], folder, name
        self.native = self.case.config == "config.json"
        self.saved, self.other, self.dense = folder / "saved", folder / "other", folder / "dense"
        self.case.save(self.saved)
        self.case.save(self.other, seed=1)
        if self.native:
            self.case.save_dense(self.dense)
        model, self.missing = self.case.load_from(self.saved)
        self.outputs, self.state = self.case.outputs(model), state_of(model)
        self.other_state = state_of(self.case.load_from(self.other)[0])

    def mutations(self, count):
        """About ``count`` changes of the compressed files, the same in every run."""
        rng, saved = random.Random(zlib.crc32(self.name.encode())), self.saved
        config = saved / self.case.config
        found = json_mutations(config, rng, count, under=self.case.own)
        if self.native:
            found += json_mutations(config, rng, count // 2, outside=self.case.own)
        for index in saved.glob("*.index.json"):
            found += json_mutations(index, rng, count // 4)
        headers = header_mutations(saved, rng, count)
        found += [mutation for mutation in headers if self.native or "names exchanged" not in mutation.name]
        files = file_mutations(saved, self.other)
        return found + rng.sample(files, min(len(files), max(1, count // 4)))

    def check(self, mutation, **options):
        """Raise an AssertionError unless the mutated checkpoint is refused clearly, or is what it was."""
        spoilt = self._spoilt(self.saved, mutation)
        try:
            model, missing = self.case.load_from(spoilt, **options)
            outputs = self.case.outputs(model)
        except Exception as error:
            self._check_error(error, mutation)
            return "refused"
        if self._is_as_saved(model, missing, outputs):
            return "harmless"
        if not self.native and mutation.name.endswith("another save"):  # whose config is the same
            torch.testing.assert_close(state_of(model), self.other_state, rtol=0, atol=0)
            return "the other save"
        of_the_model = self.native and mutation.field and not mutation.field.startswith("quantization_config")
        assert of_the_model, "it loads, and is something else"
        dense, dense_missing = self.case.load_from(self._spoilt(self.dense, mutation), **options)
        new = missing - self.missing
        assert new == dense_missing - self.missing, "other parameters are new than in a dense model"
        if not new:
            same = outputs.shape == (expected := self.case.outputs(dense)).shape
            assert same, "the outputs have another shape than those of a dense model"
            if not self.missing:
                torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        return "as in a dense model" if not new else "new parameters, as in a dense model"

    def _spoilt(self, source, mutation):
        spoilt = self.folder / "spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(source, spoilt)
        if source == self.dense:
            self._edit_dense(spoilt, mutation)
        else:
            mutation.apply(spoilt)
        return spoilt

    def _edit_dense(self, folder, mutation):
        """The config of the mutated checkpoint, without its record, beside the dense weights."""
        mutation.apply(folder)
        config = json.loads((folder / "config.json").read_text())
        for field in ("quantization_config", "transformers_weights"):
            config.pop(field, None)
        (folder / "config.json").write_text(json.dumps(config))

    def _is_as_saved(self, model, missing, outputs):
        state = state_of(model)
        known = {key for key in self.state if key not in self.missing}
        return (
            missing == self.missing
            and state.keys() == self.state.keys()
            and all(torch.equal(state[key], self.state[key]) for key in known)
            and (bool(self.missing) or torch.equal(outputs, self.outputs))
        )

    def _check_error(self, error, mutation):
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, CLEAR) and len(str(error)) > 15:
            return
        assert not frames[-1].startswith(LIBRARY), f"obscure: {error!r} in {frames[-1]}"
        if mutation.name.startswith("model.safetensors.index.json"):
            return  # transformers reads it, and hf_rps sees the files that it found
        if self.native and mutation.field and not mutation.field.startswith("quantization_config"):
            with pytest.raises(type(error)):  # of transformers, which says the same of a dense model
                self.case.outputs(self.case.load_from(self._spoilt(self.dense, mutation))[0])
            return
        if not self.native and not mutation.field and isinstance(error, KeyError):
            return  # of PEFT, which names the tensor that is missing for modules_to_save
        assert mutation.field in FOREIGN, f"obscure: {error!r} in {frames[-1]}"


# read by PEFT or transformers before hf_rps is asked
FOREIGN = ("quantization_config", "quantization_config.quant_method", "peft_type")


@pytest.fixture(scope="module")
def subject(request, tmp_path_factory):
    return Subject(request.param, tmp_path_factory.mktemp("mutated"))


def check_all(subject, mutations, **options):
    failures = []
    for mutation in mutations:
        try:
            subject.check(mutation, **options)
        except (AssertionError, pytest.fail.Exception) as failure:
            failures.append(f"{mutation.name}: {str(failure).splitlines()[0]}")
    assert not failures, f"{len(failures)} of {len(mutations)}:\n" + "\n".join(failures)


@pytest.mark.parametrize("subject", CHECKPOINTS, indirect=True)
def test_some_mutations(subject):
    mutations = subject.mutations(20)
    check_all(subject, random.Random(0).sample(mutations, 4))


@pytest.mark.slow
@pytest.mark.parametrize("subject", CHECKPOINTS, indirect=True)
def test_many_mutations(subject):
    check_all(subject, subject.mutations(40))


@pytest.mark.parametrize("subject", ["one file"], indirect=True)
def test_mismatched_sizes_are_not_ignored(subject):
    """``ignore_mismatched_sizes=True`` lets a dense model have other sizes; no shared array is drawn anew for it.

    Without the right quant_method hf_rps is not asked, and transformers does what it was told to.
    """
    mutations = [m for m in subject.mutations(20) if not m.field or m.field.startswith("quantization_config.")]
    mutations = [m for m in mutations if m.field != "quantization_config.quant_method"]
    check_all(subject, mutations, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("by", ["delta", "delta, transformers"])
@pytest.mark.parametrize("version", [3, 4])
def test_an_adapter_of_the_other_mode(by, version, tmp_path):
    """What was to be added to the weights is not loaded in their place, though both have the same map."""
    case = CHECKPOINTS[by]
    case.save(tmp_path)
    file = tmp_path / case.config
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mode": "replace", "format_version": version}))
    with pytest.raises((ValueError, RuntimeError)):
        case.load_from(tmp_path)


@pytest.mark.parametrize("by", ["replace", "replace, transformers", "delta", "delta, transformers"])
def test_an_adapter_without_its_format(by, tmp_path):
    """Such a config belongs to files in which the array has another name. PEFT's loader knows both names."""
    case = CHECKPOINTS[by]
    case.save(tmp_path)
    before = case.outputs(case.load_from(tmp_path)[0])
    file = tmp_path / case.config
    config = json.loads(file.read_text())
    del config["format_version"]
    file.write_text(json.dumps(config))
    if by in ("replace", "delta"):
        torch.testing.assert_close(case.outputs(case.load_from(tmp_path)[0]), before)
    else:
        with pytest.raises(ValueError, match="format_version"):
            case.load_from(tmp_path)
