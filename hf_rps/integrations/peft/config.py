"""RPSConfig: the settings of RPS as a PEFT config, which is also what :func:`hf_rps.get_rps_model` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from peft import PeftConfig

from hf_rps.config import RPSSettings, check
from hf_rps.integrations.peft.card import write_card
from hf_rps.integrations.peft.peft_type import RPS
from hf_rps.mappings.weight_map import WeightMap

# until 3, without a number, every shared array had the same name; until 4 the sentinel did not tell a delta
ADAPTER_FORMAT = 4
READABLE_FORMATS = (None, 3, 4)


@dataclass
class RPSConfig(RPSSettings, PeftConfig):
    """Configuration of randomized parameter sharing (STABLE-RPS, ICLR 2024).

    All targeted weights, n numbers, are replaced by signed, scaled slices of one shared trainable array of
    m = round(ratio * n) numbers. ``RPSConfig(ratio=0.1)`` is meant to be right for nearly everyone.

    Args:
        ratio: Stored numbers over targeted weights, m / n, in (0, 1]. 0.1 (default) stores a tenth; 1 is the dense
            model itself. With ``mapping="codebook"`` it follows from ``bits``, and is not given.
        mode: "replace" (default): the shared array stands for the targeted weights, which are freed. "delta", with
            PEFT only: it stands for a change of them, W = W0 + RPS(psi), zero at first: an adapter of full rank, for
            ratios like 0.001.
        seed: Seed of the mapping (rotations and signs). It does not drive torch's generator.
        target_modules: Names (suffixes) of the modules to share, a regular expression over full names, or
            "all-linear". Default None: every attention and MLP projection of the base model, that is every linear
            layer and Conv1D but the output head, the classifier and tied weights. In a base model without linear
            layers (ResNet) it is every convolution; elsewhere convolutions are shared where they are named. Adapters
            (PEFT) share linear layers only.
        exclude_modules: Names (suffixes) or a regular expression of modules to leave dense.
        share_embeddings: Share the base model's embeddings, too (words, positions, types; default False). They can
            also be named in ``target_modules``. A head that is tied to one reads the same numbers. A table that has
            max_norm, scale_grad_by_freq or sparse raises. Not for adapters.
        layers_to_transform: Index or indices of the transformer layers to share; default all.
        layers_pattern: Name of the module list that ``layers_to_transform`` counts, if it is not one of the usual.
        modules_to_save: Names (suffixes) of further modules to leave dense and, with PEFT, to train and save.
        bias: With PEFT, which biases to train and save: "none" (default), "all" of the model, or those of the targeted
            modules ("rps_only").
        sharing: "global" shares one array between all targets (the best accuracy at equal m); "block" gives each
            transformer block, "module" each module, a segment of its own.
        mapping: "fold" (RANDOMFOLD, weights are views, dense speed). "roast" (hashed tiles of 64 weights, ICML 2023)
            and "hash" (a hash per weight, HashedNets, ICML 2015) are slow forms, for comparison. "codebook" is for
            pretrained models: every row of a weight has a few numbers of its own, each weight is one of them, and
            which is learned (``calibration`` of :func:`hf_rps.get_rps_model`) and stored in ``bits``. The shared array
            is all the codebooks. With PEFT it is for adapters of a model that is compressed so already: codebooks of
            their own, for all its compressed layers. What is left out then (``bits``, ``group_size``, ``seed``) is the
            model's; anything else raises.
        bits: Of a weight's code, 2, 3, 4 (default) or 8, with ``mapping="codebook"``; a codebook has 2**bits numbers.
        group_size: How many weights of a row share a codebook, with ``mapping="codebook"``. None (default): all.
        tile: How many weights side by side share one code, with ``mapping="codebook"``; default 1. More make a codebook
            one of vectors, which all rows of a matrix read (of ``group_size`` columns), each with a scale of its own,
            for two bits a weight and fewer: bits=8 and tile=4 take 8 / 4 bits a weight and what codebooks and scales
            need, and keep more than bits=2 (docs/pretrained.md).
        sign: "row", one hashed sign per output row, which is free; "element", one per weight, the paper's exact form
            and slow; "none".
        input_fold: How many times a layer's input is folded before the product, which divides the multiplications by
            that number, forward and backward, and so the time of all but small layers. It is the second knob beside the
            ratio: with ratio=0.1 and input_fold=4 there are a quarter of the multiplications, and 0.4 numbers are
            stored for each of their factors. "full": as far as the ratio allows, here 10. A layer takes the largest
            divisor of its input channels up to there (8 for 10 and 768), unless it is below three quarters. 2 to 4 cost
            about nothing, more costs accuracy in narrow layers (docs/comparison.md). Default 1: not folded. See
            :mod:`hf_rps.mappings.input_fold`.
        grad_scaling: What the shared array's gradient is divided by, slot by slot. "projection" (Gamma, the sum of
            squared scales): an SGD step is the projection of the dense one, stable wherever dense training is.
            "norm" (its square root): the size of the gradient stays that of the dense model's, so that Adam's epsilon
            and gradient clipping keep their meaning; for adaptive optimizers. "none" (1): the unstable ROAST.
        init_std: Standard deviation C of the shared array at init. None (default): RMS of the modules' own
            standard deviations times (m / n)**(1/3), with which a dense recipe's learning rate (AdamW) carries over;
            with ``mode="delta"`` ten times sqrt(m / n), so that the rates usual for adapters (AdamW, 1e-3) suit. Not a
            knob to tune; it exists to reproduce the paper's sweep, and configs of saved models record what it was.
        init_weights: Where the shared array starts. True (default): "project" if more than half of the targeted weights
            look trained, "rescale" if they are as an initialiser leaves them. Their numbers decide it, not where they
            came from; it is logged, and size_report says which it was. "project": the least-squares fit,
            sum(scale sign w) / Gamma_j. "rescale": sum(sign w / scale) / sqrt(count_j), which keeps every module's own
            std. Both are exact at ratio 1. False: independent draws from N(0, C**2) of torch's generator. With
            ``mode="delta"`` True is zero and False is draws.
        modules, fingerprint, learned: The map, recorded in the config of a PEFT adapter when it is made and checked
            when it is loaded, and in what :func:`hf_rps.get_rps_config` returns. Leave them out.

    Raises:
        ValueError: A field is out of its range; the message names field, value and what is expected.

    >>> RPSConfig(ratio=2)
    Traceback (most recent call last):
        ...
    ValueError: RPSConfig: ratio=2 is not valid; expected a number in (0, 1], the share of the targeted weights to store
    """

    format_version: int | None = field(default=None, metadata={"help": "Recorded with an adapter; leave out."})

    def __post_init__(self):
        PeftConfig.__post_init__(self)
        self.peft_type = RPS
        super().__post_init__()
        version = self.format_version
        known = version in READABLE_FORMATS if version is None or type(version) is int else False
        check(known, "format_version", version, f"one of {READABLE_FORMATS}; a later version of hf_rps may read it")

    def record(self, weight_map: WeightMap) -> None:
        """Remember the map of the adapter made with this config, to be saved with it.

        The fields stay as they are, so that one config can be used for several models.
        """
        self._recorded = weight_map

    @property
    def recorded(self) -> WeightMap | None:
        """The map of the adapter made with this config last, if any."""
        return getattr(self, "_recorded", None)

    def to_dict(self) -> dict:
        """The fields, and the recorded map among them."""
        if self.recorded is None:
            return super().to_dict()
        modules = [str(target) for target in self.recorded.targets]
        found = self.recorded
        record = {"modules": modules, "fingerprint": found.fingerprint, "init_std": found.init_std}
        if found.learned is not None:  # the base's map, whatever was left out
            record |= {"seed": found.seed, "learned": found.learned} | found.options
        return super().to_dict() | record | {"format_version": ADAPTER_FORMAT}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write adapter_config.json and, for an adapter, the model card's first lines; see PeftConfig."""
        super().save_pretrained(save_directory, **kwargs)
        if self.recorded is not None:
            write_card(Path(save_directory), self)
