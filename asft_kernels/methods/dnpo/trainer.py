"""DNPO's alternation: a step of the noise against the model, then a step of the model against the noise.

The noise is a linear layer of the reference's hidden states (V, D): the standard deviation of a Gaussian on each
of the reference's logits, at rejected answers only. It lives here, not in the model: what is saved and evaluated
has none. Hidden states of the reference are needed at every step, so cached log-probabilities do not do.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asft_kernels import fused_linear_logps
from asft_kernels.methods.dnpo.noisy_logps import fused_noisy_linear_logps
from asft_kernels.models import PreferenceModel
from asft_kernels.objectives import DNPO
from asft_kernels.objectives.base import counting, mean_over
from asft_kernels.sequence import Logps

INITIAL_STD = 0.1  # of every logit; at 0 the noise would have no mean gradient to grow by
MAX_GRAD_NORM = 1.0


def noise_head_for(lm_weight: Tensor) -> nn.Linear:
    """An fp32 layer like the output head (V, D) that gives std = INITIAL_STD everywhere."""
    vocab, size = lm_weight.shape
    head = nn.Linear(size, vocab, device=lm_weight.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, INITIAL_STD)
    return head


class DNPOTrainer:
    """Policy, frozen reference (the policy as it came), noise, and an optimiser (AdamW, constant rate) for each side.

    model: a Hugging Face causal LM, on its device. seed: of the noise, a fresh draw for either half of every step.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: DNPO,
        *,
        learning_rate: float = 2e-5,
        noise_learning_rate: float = 1e-4,
        seed: int = 0,
    ):
        self.objective = objective
        self.reference = PreferenceModel(copy.deepcopy(model).eval().requires_grad_(False))
        self.policy = PreferenceModel(model.train())
        self.noise_head = noise_head_for(self.reference.lm_head.weight)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        self.noise_optimizer = torch.optim.AdamW(self.noise_head.parameters(), lr=noise_learning_rate, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """One step of either side on a batch of `PairCollator`, noise first. Means over its pairs that count."""
        labels = batch["labels"]
        with torch.no_grad():
            ref_hidden = self._hidden(self.reference, batch)
            ref = self._sequences(self.reference, ref_hidden, labels)
        policy = self._sequences(self.policy, self._hidden(self.policy, batch), labels)
        counts = counting(policy, paired=True)
        rejected = ref_hidden.chunk(2)[1], labels.chunk(2)[1]

        noisy, power = self._noisy(*rejected, ref.rejected.length)
        noise_loss = mean_over(self.objective.noise_loss(policy, ref.sum, noisy, power), counts)
        self.noise_optimizer.zero_grad()
        noise_loss.backward()
        self.noise_optimizer.step()

        with torch.no_grad():
            noisy, power = self._noisy(*rejected, ref.rejected.length)
        terms = self.objective(policy, torch.cat([ref.chosen.sum, noisy]))
        loss = mean_over(terms.loss, counts)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()

        figures = {
            "loss": loss,
            "noise_loss": noise_loss,
            "noise_power": mean_over(power, counts),
            "reference_shift": mean_over(noisy - ref.rejected.sum, counts),
            **{f"noisy_{name}": mean_over(value, counts) for name, value in terms.metrics.items()},
            **self._clean_figures(policy.detach(), ref, counts),
        }
        return dict(zip(figures, torch.stack([x.detach().double() for x in figures.values()]).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """All that steps change. The reference is not in it: it is the model that the trainer was made of."""
        return {
            **{name: part.state_dict() for name, part in self._parts().items()},
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])

    def _parts(self) -> dict[str, Any]:
        return {
            "policy": self.policy.model,
            "noise_head": self.noise_head,
            "optimizer": self.optimizer,
            "noise_optimizer": self.noise_optimizer,
        }

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
        """Means over the pairs that count, under the reference without noise; dropout is off meanwhile."""
        self.policy.eval()
        sums: dict[str, float] = {}
        pairs = 0.0
        for batch in batches:
            ref, policy = (
                self._sequences(model, self._hidden(model, batch), batch["labels"])
                for model in (self.reference, self.policy)
            )
            counts = counting(policy, paired=True)
            figures = {"pairs": counts.sum().double(), **self._clean_figures(policy, ref, counts)}
            values = dict(zip(figures, torch.stack([*figures.values()]).tolist(), strict=True))
            count = values.pop("pairs")
            pairs += count
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + count * value
        self.policy.train()
        return {"pairs": pairs, **{name: value / max(pairs, 1) for name, value in sums.items()}}

    def _clean_figures(self, policy: Logps, ref: Logps, counts: Tensor) -> dict[str, Tensor]:
        terms = self.objective(policy, ref.sum)
        figures = {
            "clean_loss": terms.loss,
            **terms.metrics,
            "accuracy": (policy.chosen.avg > policy.rejected.avg).double(),
            "chosen_avg_logp": policy.chosen.avg,
            "rejected_avg_logp": policy.rejected.avg,
        }
        return {name: mean_over(values, counts) for name, values in figures.items()}

    def _hidden(self, model: PreferenceModel, batch: Mapping[str, Tensor]) -> Tensor:
        return model.hidden_states(batch["input_ids"], batch["attention_mask"])

    def _sequences(self, model: PreferenceModel, hidden: Tensor, labels: Tensor) -> Logps:
        logps = fused_linear_logps(hidden, model.lm_head, labels, **model.fused_head.keywords)
        return Logps(logps.double().sum(dim=1), (labels[:, 1:] != -100).sum(dim=1))

    def _noisy(self, hidden: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) each: sums under one draw of the noise, and the mean over the row's tokens of its mean square."""
        seed = int(torch.randint(2**62, (), generator=self.generator))
        keywords = self.reference.fused_head.keywords
        options = {name: keywords[name] for name in ("logit_scale", "softcap", "backend")}
        noisy = fused_noisy_linear_logps(hidden, self.reference.lm_head, self.noise_head, labels, seed=seed, **options)
        sums, power = (values.double().sum(dim=1) for values in noisy)
        return sums, power / lengths.clamp(min=1)
