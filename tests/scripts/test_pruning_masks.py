"""Masks: exactly as many as asked for, held in training, and errors that name what was received."""

import pytest
import torch
from pruning_models import Net, batches_of, seeded, tiny_model
from torch import nn

from hf_rps import RPSConfig, get_rps_model
from studies.methods.at_start import prune_at_start
from studies.methods.masks import apply_masks, keep_largest, masks_of, remove_pruning, targeted_weights
from studies.methods.scores import grasp_scores, snip_scores, synflow_scores


def test_kept_is_global_and_ties_go_to_the_first():
    scores = {"a": torch.tensor([[1.0, 2.0], [2.0, 0.0]]), "b": torch.tensor([2.0, 5.0])}
    assert keep_largest(scores, 1)["b"].tolist() == [False, True]
    masks = keep_largest(scores, 3)
    assert masks["a"].tolist() == [[False, True], [True, False]]
    assert masks["b"].tolist() == [False, True]
    within = {"a": torch.tensor([[True, False], [False, True]]), "b": torch.tensor([True, False])}
    masks = keep_largest(scores, 2, within)
    assert masks["a"].tolist() == [[True, False], [False, False]]
    assert masks["b"].tolist() == [True, False]


@pytest.mark.parametrize("kept", [1, 77, 4999, 5000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_count_is_exact_with_many_ties(kept, dtype):
    scores = {"a": torch.randint(0, 9, (40, 50)).to(dtype), "b": torch.randint(0, 9, (3, 10, 10, 10)).to(dtype)}
    masks = keep_largest(scores, kept)
    flat, mask = (torch.cat([x.flatten() for x in d.values()]) for d in (scores, masks))
    assert mask.sum() == kept
    assert kept == 5000 or flat[mask].min() >= flat[~mask].max()
    order = flat.argsort(descending=True, stable=True)[:kept]
    assert mask[order].all()


def test_a_second_mask_intersects():
    model, weight = nn.Conv2d(2, 2, 1, bias=False), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(2, 2, 1, 1)
    model = nn.Sequential(model)
    model[0].weight.data = weight.clone()
    for mask in ([True, True, False, True], [False, True, True, True]):
        apply_masks(model, {"0": torch.tensor(mask).view_as(weight)})
    assert masks_of(model)["0"].flatten().tolist() == [False, True, False, True]
    assert remove_pruning(model)[0].weight.flatten().tolist() == [0, 2, 0, 4]
    assert masks_of(model) == {}


def test_masks_hold_in_training():
    model, batches = seeded(Net), batches_of()
    masks = prune_at_start(model, "snip", 8, batches=batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    remove_pruning(model)
    assert all((w != 0).equal(masks[name]) for name, w in targeted_weights(model).items())


# ---- errors


@pytest.mark.parametrize(
    ("method", "kept", "message"),
    [
        ("fisher", 5, "method='fisher' is not known; expected one of random, magnitude, snip, grasp, synflow"),
        ("snip", 5, "method='snip' needs batches, got none"),
        ("grasp", 5, "method='grasp' needs batches"),
        ("synflow", 5, "method='synflow' needs inputs"),
        ("random", 5, "method='random' needs generator"),
        ("magnitude", 0, "kept=0 is not valid; expected a whole number of weights from 1 to 20"),
        ("magnitude", 21, "kept=21 is not valid"),
        ("magnitude", 2.0, r"kept=2\.0 is not valid"),
        ("magnitude", True, "kept=True is not valid"),
    ],
)
def test_arguments_that_are_refused(method, kept, message):
    model = Net()
    with pytest.raises(ValueError, match=message):
        prune_at_start(model, method, kept)
    assert masks_of(model) == {}


def test_batches_and_scores_that_are_refused():
    model = seeded(Net)
    for score in (snip_scores, grasp_scores):
        with pytest.raises(ValueError, match="batches is empty"):
            score(model, [])
        with pytest.raises(ValueError, match=r"Net returns no loss for a batch of \['x'\]; give it labels"):
            score(model, [{"x": torch.ones(1, 3, dtype=torch.float64)}])
    with pytest.raises(ValueError, match="2 of the 3 scores of module 'b' are NaN or infinite"):
        keep_largest({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan, torch.inf])}, 1)
    with pytest.raises(ValueError, match=r"within has masks of \['b'\]; expected those of the scored \['a'\]"):
        keep_largest({"a": torch.ones(2)}, 1, {"b": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="every SynFlow score of this Net is zero"):
        synflow_scores(seeded(Net, lambda h: h * 0), {"x": torch.ones(1, 3)})


def test_masks_that_are_refused():
    model, mask = seeded(Net), torch.ones(4, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="Net has no module 'third' with a weight"):
        apply_masks(model, {"first": mask, "third": mask})
    with pytest.raises(ValueError, match=r"mask of module 'second' has shape \(4, 3\) and its weight \(2, 4\)"):
        apply_masks(model, {"first": mask, "second": mask})
    assert masks_of(model) == {}


def test_models_that_are_refused():
    model, batches, _ = tiny_model("vit")
    prune_at_start(model, "magnitude", 100)
    with pytest.raises(ValueError, match="is pruned already; call remove_pruning"):
        prune_at_start(model, "snip", 100, batches=batches)
    compressed = get_rps_model(tiny_model("vit")[0], RPSConfig(ratio=0.5))
    with pytest.raises(ValueError, match="is compressed by hf_rps"):
        prune_at_start(compressed, "magnitude", 100)
