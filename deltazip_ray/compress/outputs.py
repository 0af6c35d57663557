"""The quality record: fine-tune, reconstruction and base compared on held-out tokens."""

import sys
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from deltazip_ray.artifact.manifest import Quality
from deltazip_ray.compress.blocks import States
from deltazip_ray.compress.calibration import Calibration
from deltazip_ray.compress.pairing import Pair
from deltazip_ray.compress.parts import Parts, base_rows, rebuild_rows, rebuild_slice
from deltazip_ray.compress.quality import finite
from deltazip_ray.compress.runner import Runner
from deltazip_ray.compress.skeleton import load_tensor, load_tensors
from deltazip_ray.compress.vocabulary import Divergence, capped, row_pieces

Name = Literal["finetuned", "reconstruction", "base"]


class Outputs:
    """The heads of the three models. For added tokens the base gets the fine-tune's rows."""

    def __init__(self, pair: Pair, runner: Runner, calibration: Calibration, parts: Parts) -> None:
        """``parts`` of the ``outer`` blob."""
        self._pair, self._runner, self._parts = pair, runner, parts
        self._skeleton = pair.skeleton
        self._tokens = calibration.tokens[runner.fitted :].to(runner.mask.device)
        self._mask = runner.mask[runner.fitted :]
        self._finetuned, self._base = (load_tensor(side, pair.skeleton.head) for side in (pair.finetuned, pair.base))

    def record(self, states: States, block_errors: dict[str, float], data: str) -> Quality:
        """The quality record for ``states`` after the last block. Raises CompressionError when they overflow."""
        found = self._final(states)
        device, softcap = self._mask.device, self._skeleton.logits_softcap
        lost, made_up = (Divergence(len(found["finetuned"]), device, softcap) for _ in range(2))
        for finetuned, rebuilt, base in self._pieces():
            lost.add(found["finetuned"], finetuned, found["reconstruction"], rebuilt)
            made_up.add(found["finetuned"], finetuned, found["base"], base)
        totals = dict(zip(found, (*lost.totals, made_up.totals[1]), strict=True))
        perplexities = {name: finite(value, "the head") for name, value in self._perplexities(found, totals)}
        return Quality(
            data=data,
            block_errors=block_errors,
            kl_divergence=finite(lost.mean(), "the head"),
            base_kl_divergence=finite(made_up.mean(), "the base"),
            perplexities=perplexities,
        )

    def _final(self, states: States) -> dict[Name, Tensor]:
        """The states after the final norm, ``[held-out tokens, hidden]``."""
        fitted, place = self._runner.fitted, self._runner.place
        ours, before = (
            self._skeleton.final_norm({name: place(values) for name, values in norms.items()})
            for norms in (load_tensors(side, self._skeleton.norms) for side in (self._pair.finetuned, self._pair.base))
        )
        return {
            "finetuned": ours(place(states.finetuned[fitted:]))[self._mask],
            "reconstruction": ours(place(states.compressed[fitted:]))[self._mask],
            "base": before(place(states.base))[self._mask],
        }

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows of the three heads, piece by piece; added rows are the same for all."""
        place = self._runner.place
        for rows in row_pieces(len(self._base)):
            base = self._base[rows].to(self._mask.device)
            rebuilt = rebuild_slice(self._skeleton.head, base, rows, self._parts)
            yield place(self._finetuned[rows]), place(rebuilt), place(base)
        for rows in row_pieces(len(self._finetuned) - len(self._base)):
            added = place(self._finetuned[len(self._base) :][rows])
            yield added, added, added

    def _perplexities(
        self, states: Mapping[Name, Tensor], totals: Mapping[Name, Tensor]
    ) -> Iterator[tuple[Name, float]]:
        """Perplexity of each model; ``totals`` are the log denominators of its softmaxes at every position."""
        followed = torch.zeros_like(self._mask)
        followed[:, :-1] = self._mask[:, 1:]
        tokens = self._tokens.roll(-1, 1)[followed].cpu()
        at = followed[self._mask]
        rows = {
            "finetuned": self._finetuned[tokens],
            "reconstruction": rebuild_rows(self._skeleton.head, self._base, tokens, self._parts),
            "base": base_rows(self._base, self._finetuned, tokens),
        }
        for name, total in totals.items():
            logits = (states[name][at].float() * rows[name].to(total.device).float()).sum(1)
            loss = total[at] - capped(logits, self._skeleton.logits_softcap)
            # Finite in any case: JSON has no infinity.
            yield name, min(float(loss.mean().exp()), sys.float_info.max)
