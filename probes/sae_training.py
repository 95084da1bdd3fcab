"""A sparse autoencoder of a model's states, trained with SAELens, and how good it is.

    x = h - b_dec,   f = TopK_k( relu(x W_enc + b_enc) ),   h^ = f W_dec + b_dec,   rows of W_dec of unit length

    sae = train_sae(states, features=512, k=16, steps=1000, seed=0)     # states [n, width]
    quality(sae, others)                                                # of states it was not trained on
    sae.save_model("folder")                                            # sae_lens.SAE.load_from_disk reads it again

The loss is the squared error; features that have not fired for a tenth of the training are made to describe what the
others leave over (Gao et al. 2024, arXiv 2406.04093, appendix A.2, as SAELens has it).

Traps:

- *The first position* of a text has, in most language models, a state many times as long as all others. It would be
  all that the autoencoder learns to describe, and its explained variance would be superb: leave it out.
- *Explained variance on what it was trained on* flatters an autoencoder of few states: measure it on others.

sae-lens takes seconds to import, so it is imported when an autoencoder is trained or read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.errors import BadInput

if TYPE_CHECKING:
    import torch

__all__ = ["Quality", "Sae", "load_sae", "quality", "train_sae"]

Sae = Any
"""A `sae_lens.SAE`: `encode`, `decode`, `W_dec` [features, width], `cfg`."""


def train_sae(
    states: torch.Tensor,
    *,
    features: int,
    k: int,
    steps: int,
    seed: int,
    batch: int = 256,
    learning_rate: float = 2e-3,
    site: str = "",
    tick: Callable[[int, int], None] | None = None,
) -> Sae:
    """Train a top-k autoencoder on states and return SAELens' inference form of it, a `TopKSAE`.

    Args:
        states: [n, width], float32; drawn at random, reshuffled when they are exhausted.
        features: width of the dictionary.
        k: features that describe a state.
        steps: of Adam, at `learning_rate` that falls to zero over the last fifth.
        seed: of the start and of the order; the caller's random state stays as it is.
        site: the states' hook name, kept in the autoencoder's metadata.
        tick: told steps done, and all.

    Raises:
        ValueError: no states, or k above the number of features.
    """
    import torch
    from sae_lens import SAETrainer, TopKSAE, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata

    if states.ndim != 2 or not len(states) or not 1 <= k <= features:
        raise ValueError(f"states [n, width] and 1 <= k <= features needed, got {tuple(states.shape)}, {k}, {features}")
    width, device = states.shape[1], str(states.device)
    generator = torch.Generator().manual_seed(seed)
    forked = [states.device] if states.device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), torch.enable_grad():
        torch.manual_seed(seed)
        training = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=width,
                d_sae=features,
                k=k,
                device=device,
                normalize_activations="expected_average_only_in",
                metadata=SAEMetadata(hook_name=site),
            )
        )
        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=steps * batch,
                train_batch_size_samples=batch,
                lr=learning_rate,
                lr_end=0.0,
                lr_decay_steps=steps // 5,
                device=device,
                dead_feature_window=max(1, steps // 10),
            ),
            training,
            _batches(states, batch, generator),
        )
        # `fit` does the same with bars of its own.
        scale = width**0.5 / float(states.norm(dim=1).mean())
        trainer.activation_scaler.scaling_factor = scale
        training.b_dec.data = states.mean(dim=0) * scale
        for step in range(1, steps + 1):
            trainer.step(next(trainer.data_provider))
            trainer.n_training_steps = step
            if tick is not None:
                tick(step, steps)
        training.fold_activation_norm_scaling_factor(scale)
        trainer.set_final_sae_metadata()
        weights = copy.deepcopy(training.state_dict())
        training.process_state_dict_for_saving_inference(weights)
        sae = TopKSAE.from_dict(training.cfg.get_inference_sae_cfg_dict())
        sae.load_state_dict(weights)
    return sae.eval().requires_grad_(False)


def _batches(states: torch.Tensor, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches in random order without end; the last of a round is filled up from the next."""
    import torch

    left = torch.empty(0, dtype=torch.long)
    while True:
        while len(left) < batch:
            left = torch.cat([left, torch.randperm(len(states), generator=generator)])
        yield states[left[:batch]]
        left = left[batch:]


def load_sae(folder: Path, width: int, device: str = "cpu") -> Sae:
    """An autoencoder that SAELens has saved.

    Raises:
        BadInput: none can be read there, or it is one of states of another width.
    """
    from sae_lens import SAE

    try:
        sae = SAE.load_from_disk(folder, device=device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadInput(f"{folder}: no autoencoder that SAELens reads ({str(error).splitlines()[0]})") from None
    if sae.cfg.d_in != width:
        raise BadInput(f"{folder}: an autoencoder of states of width {sae.cfg.d_in}, the model's have {width}")
    return sae.eval().requires_grad_(False)


@dataclass(frozen=True)
class Quality:
    """How an autoencoder describes states.

    Attributes:
        explained: share of the states' variance that is described.
        active: mean number of features that describe a state (L0).
        dead: share of the features that describe none of them.
    """

    explained: float
    active: float
    dead: float


def quality(sae: Sae, states: torch.Tensor) -> Quality:
    """Of states [n, width], n at least 2."""
    codes = sae.encode(states)
    error = (states - sae.decode(codes)).square().sum()
    spread = (states - states.mean(dim=0)).square().sum()
    fired = codes > 0
    return Quality(
        float(1 - error / spread), float(fired.sum(dim=1).float().mean()), float((~fired.any(dim=0)).float().mean())
    )
