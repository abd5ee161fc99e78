"""Whatever is changed in a saved checkpoint, it is refused with a clear error, or loads as it was saved.

A field of config.json that dense models take as it is (an activation, an epsilon) does to a compressed model what it
does to a dense one. Flipped bits in the numbers of a weight are outside of the promise: only what is finite is checked.
"""

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

    def mutations(self, count):
        """About ``count`` changes of the compressed files, the same in every run."""
        rng, saved = random.Random(zlib.crc32(self.name.encode())), self.saved
        config = saved / self.case.config
        found = json_mutations(config, rng, count, under=self.case.own)
        if self.native:
            found += json_mutations(config, rng, count // 2, outside=self.case.own)
        for index in saved.glob("*.index.json"):
            found += json_mutations(index, rng, count // 4)
        found += header_mutations(saved, rng, count)
        files = file_mutations(saved, self.other)
        return found + rng.sample(files, min(len(files), max(1, count // 4)))

    def check(self, mutation):
        """Raise an AssertionError unless the mutated checkpoint is refused clearly, or is what it was."""
        spoilt = self._spoilt(self.saved, mutation)
        try:
            model, missing = self.case.load_from(spoilt)
            outputs = self.case.outputs(model)
        except Exception as error:
            self._check_error(error, mutation)
            return "refused"
        if self._is_as_saved(model, missing, outputs):
            return "harmless"
        of_the_model = self.native and mutation.field and not mutation.field.startswith("quantization_config")
        assert of_the_model, "it loads, and is something else"
        dense, dense_missing = self.case.load_from(self._spoilt(self.dense, mutation))
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
        import json

        mutation.apply(folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)
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
        assert mutation.field in FOREIGN, f"obscure: {error!r} in {frames[-1]}"


# read by PEFT or transformers before hf_rps is asked
FOREIGN = ("quantization_config", "quantization_config.quant_method", "peft_type")


@pytest.fixture(scope="module")
def subject(request, tmp_path_factory):
    return Subject(request.param, tmp_path_factory.mktemp("mutated"))


def check_all(subject, mutations):
    failures = []
    for mutation in mutations:
        try:
            subject.check(mutation)
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
